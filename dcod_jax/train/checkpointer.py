"""One directory of checkpoints, written asynchronously by Orbax, and the record that they hold.

Layout: <run>/checkpoints/<step>/{params,opt_state,run,metrics,checksums.json}; opt_state includes
the loss's state, and metrics is there where best_metric was measured. A step directory gets its
name when all of it is on disk, so a half-written one is never read. A missing or damaged piece is
an error (checksums.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from dcod_jax.bounds import array, check, flag, mapping, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.files import REFUSED, Location, Path, as_path, remove_tree
from dcod_jax.models import lora, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import put
from dcod_jax.stores import RemotePath
from dcod_jax.train import checksums
from dcod_jax.types import Params, TrainState

ITEMS = ("params", "opt_state", "run")
_PROGRESS = {"iterator": mapping(), "tokens_seen": whole(0, 1 << 62)}
_DATA = mapping({"parts": mapping(), "changes": array(mapping())})
_PROGRESS |= {"on_policy": mapping(items=number(0, 1e300)), "data": _DATA}
_LORA = {"rank": whole(0, 1 << 20), "alpha": number(0, 1e9), "rslora": flag()}
_STUDENT = dict.fromkeys(("path", "config", "tokenizer", "compute_dtype"), text())
_STUDENT |= {"lora": optional(mapping(_LORA | {"targets": array(text())}))}
_RUN = {"step": whole(0, 1 << 53), "metrics": mapping()}
_RUN |= {"config": mapping({"student": optional(mapping(_STUDENT))})}
_RUN |= {"progress": mapping(_PROGRESS)}
REMOVED = ".removed"  # beside the steps: those that are no longer kept, until they are gone
# What Orbax warns of at each save of a local checkpoint, and at each without held-out metrics.
# And what it logs, with a traceback, of an error that the next save or wait raises.
EXPECTED_WARNINGS = ("primary_host=None", "did not provide metrics")
EXPECTED_WARNINGS += ("_SignalingThread.run() raised an exception",)
# Orbax asks for them at each save, for a log line; tensorstore 0.1 frees none, 50 KB a save.
tensorstore.experimental_collect_matching_metrics = lambda *_: []


@dataclasses.dataclass(kw_only=True)
class Record:
    """What a checkpoint holds beside the arrays."""

    step: int
    iterator: dict[str, Any] = dataclasses.field(default_factory=dict)  # position in the data
    tokens_seen: int = 0
    on_policy: dict[str, Any] = dataclasses.field(default_factory=dict)  # what sampling has cost
    # What the run learned from (learned_from.py).
    data: dict[str, Any] = dataclasses.field(default_factory=lambda: {"parts": {}, "changes": []})
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the run that wrote it
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # held-out, at this step


@dataclasses.dataclass(kw_only=True)
class Snapshot(Record):
    """A run at one step: what the loop advances, a checkpoint saves and a restart restores."""

    state: TrainState


def rank(metrics: dict[str, float], name: str) -> float:
    """The held-out metric such that lower is better; +inf where it was not measured, or is NaN."""
    value = metrics.get(name)
    if value is None or math.isnan(value):
        return math.inf
    return -value if name == "eval/accuracy" and value < math.inf else value


class Checkpointer:
    """The checkpoints of one directory: the newest `keep`, and the best by best_metric."""

    def __init__(
        self,
        run_dir: Location,
        *,
        keep: int = 2,
        best_metric: str = "",
        local: bool = False,
        beside_local: bool = False,
    ):
        """local: run_dir is of this process alone, which saves its shards and waits for no other;
        beside_local: such checkpoints are written in the same run."""
        self.local, self.best_metric = local, best_metric
        self.directory = as_path(run_dir).resolve() / "checkpoints"
        if isinstance(self.directory, RemotePath) and self.directory.protocol != "gs":
            raise DcodError(
                f"run_dir={run_dir}: checkpoints need a local directory or gs://bucket/name"
            )
        self._explained = functools.partial(explain, self.directory, local=local)
        self.place = epath.Path(str(self.directory))  # Orbax's own way to gs://
        kept: list[Any] = [policies.LatestN(keep)]
        # local_checkpoints.py removes half-written local ones.
        options: dict[str, Any] = {"cleanup_tmp_directories": not local}
        if best_metric:
            options |= {"best_fn": lambda metrics: rank(metrics, best_metric), "best_mode": "min"}
            kept.append(
                policies.BestN(
                    get_metric_fn=options["best_fn"],
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options["todelete_subdir"] = REMOVED  # on a disk; in a store Orbax removes the objects
        self._retention = policies.AnyPreservationPolicy(kept)
        options["preservation_policy"] = self._retention
        self._saving, asynchronous = 0, ocp.options.AsyncOptions()
        # Called on the first process when all is written and nothing has its name.
        asynchronous.post_finalization_callback = lambda: checksums.write(
            self._unnamed(), self._saving
        )
        if jax.process_count() > 1 and not local:
            self._all_written = ocp.multihost.get_barrier_sync_fn()
            asynchronous.barrier_sync_fn = self._barrier
        # Orbax waits for directories made in the background under a number that counts the saves
        # of a process. A process that gave up its local checkpoints has another number than
        # process 0: it would write before the directory is made, and lose its part.
        asynchronous.create_directories_asynchronously = not (local or beside_local)
        options["async_options"] = asynchronous
        logging.getLogger("absl").addFilter(_unexpected)
        with self._explained(what="open"):
            self.directory.mkdir(parents=True, exist_ok=True)
            if local:
                self.manager = _local_manager(self.place, options)
            else:
                self.manager = ocp.CheckpointManager(
                    self.place, item_names=ITEMS, options=ocp.CheckpointManagerOptions(**options)
                )

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a checkpoint; returns as soon as the state may be donated.

        A snapshot without best_metric takes no part in the choice of the best. An error of this or
        the save before it, such as a full disk, is raised as DcodError here or in wait().
        """
        names = ("iterator", "tokens_seen", "on_policy", "data")
        progress = {key: getattr(snapshot, key) for key in names}
        run = {key: getattr(snapshot, key) for key in ("step", "config", "metrics")}
        tree: Any = ocp.args.PyTreeSave if self.local else ocp.args.StandardSave
        items = ocp.args.Composite(
            params=tree(snapshot.state.params),
            opt_state=tree(_moments(snapshot.state)),
            run=ocp.args.JsonSave(run | {"progress": progress}),
        )
        ranked = snapshot.metrics if self.best_metric in snapshot.metrics else None
        with self._explained(what="save"):
            self.manager.wait_until_finished()  # its checksums are those of the step before
            self._remove_old()
            self._saving = snapshot.step
            self.manager.save(snapshot.step, args=items, metrics=ranked, force=True)

    def _remove_old(self) -> None:
        """Remove the checkpoints that retention renamed: none is half-removed under its name."""
        if not isinstance(self.directory, RemotePath) and (self.local or jax.process_index() == 0):
            remove_tree(self.directory / REMOVED)

    def _unnamed(self) -> Path:
        """The directory that is being written; in a store it has its name from the beginning."""
        unnamed = list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        return unnamed[0] if unnamed else self.directory / str(self._saving)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Called by Orbax on each process; before the barrier behind its arrays it hashes them."""
        if "async_write_complete" in key and not isinstance(self.directory, RemotePath):
            checksums.write_part(self._unnamed(), jax.process_index())
        self._all_written(key=key, timeout_ms=timeout_ms)

    def wait(self) -> None:
        """Until everything started is on disk; raises DcodError when it could not be written."""
        with self._explained(what="save"):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            self._remove_old()

    def close(self) -> None:
        """wait, then remove what is not kept, and free what Orbax holds.

        Orbax removes at a save only: of a run that was killed between its last checkpoint and the
        removal of an older one, the next start has nothing to save.
        """
        self.wait()
        with self._explained(what="remove"):
            steps, context = self.steps(), policies.PreservationContext()
            metrics = self.manager.metrics
            found: list[Any] = [types.SimpleNamespace(step=s, metrics=metrics(s)) for s in steps]
            kept = self._retention.should_preserve(found, context=context)
            for step in (step for step, stays in zip(steps, kept, strict=True) if not stays):
                self.manager.delete(step)
            self._remove_old()
        self.manager.close()

    def restore(self, like: TrainState, *, step: int | None = None) -> Snapshot:
        """The run at a step (default: the newest), laid out as the arrays or shapes of `like`."""
        steps = self.steps()
        if step is None and steps:
            step = steps[-1]
        elif step is None or step not in steps:
            asked = "a checkpoint" if step is None else f"step {step}"
            raise DcodError(f"{self.directory}: {asked} was expected, but it holds steps {steps}")
        items: dict[str, Any] = {}
        for name, tree in (("params", like.params), ("opt_state", _moments(like))):
            items[name] = ocp.args.StandardRestore(tree := restoring(tree))
            if self.local:
                how = ocp.checkpoint_utils.construct_restore_args(tree)
                items[name] = ocp.args.PyTreeRestore(tree, restore_args=how)
        checksums.verify(self.directory, step, ITEMS, steps=steps, alone=self.local)
        with self._explained(step):
            check_shapes(self.place / str(step) / "params", like.params)
            args = ocp.args.Composite(**items, run=ocp.args.JsonRestore())
            found: Any = self.manager.restore(step, args=args)
        state = TrainState(
            step=put(jnp.int32(step), getattr(like.step, "sharding", None)),
            params=found["params"],
            opt_state=found["opt_state"]["optimizer"],
            loss_state=found["opt_state"]["loss"],
        )
        return Snapshot(state=state, **record_of(found["run"], source=self.directory / str(step)))


@contextlib.contextmanager
def explain(
    directory: Path, step: int | None = None, *, what: str = "restore", local: bool = False
) -> Iterator[None]:
    """Errors of Orbax and of the disk become DcodErrors that name what is left and what to do."""
    try:
        yield
    except Exception as error:
        known = (OSError, ValueError, KeyError, TypeError, RuntimeError)
        # Orbax wraps what tensorstore finds while it reads an array in a bare Exception.
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        if what == "restore" and isinstance(error, OSError) and error.errno in REFUSED:
            raise
        where = directory / str(step) if step is not None else directory
        text = " ".join(str(error).split())[:400] or type(error).__name__
        full = "space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        if local:  # the caller says what follows from it
            text = "no space left on the disk" if "space left" in str(error) else text
            raise DcodError(f"{where}: cannot {what} a local checkpoint: {text}") from error
        there = finished(directory)
        others = [other for other in there if other != step]
        if full:
            hint = "free disk space and run the same command again"
        elif what == "restore":
            hint = "the directory is damaged or of another model; move it away to go on from " + (
                f"step {others[-1]}" if others else "the beginning"
            )
        else:
            hint = "see that the directory can be written, and run the same command again"
        kept = f"; finished checkpoints {there} are untouched" if what == "save" else ""
        raise DcodError(f"{where}: cannot {what} a checkpoint: {text}{kept}; {hint}") from error


def restoring(like: PyTree) -> PyTree:
    """The shapes of `like` with a layout for each."""
    # Without a layout Orbax would take that of the run that saved: another host's devices.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
        ),
        like,
    )


def check_shapes(place: epath.Path, like: Params) -> None:
    """Name the first parameter that differs; the error that Orbax raises does not."""
    reader = ocp.PyTreeCheckpointHandler()
    stored: Any = reader.metadata(place)
    reader.close()
    there = _shapes(stored.tree)
    for path, shape in _shapes(like).items():
        if there.get(path) != shape:
            raise ValueError(f"{path} has shape {there.get(path)}, the model needs {shape}")


def sharded_shapes(model_config: ModelConfig, mesh: Mesh | None) -> Params:
    """A model's trained parameters as shapes with shardings (if a mesh is given)."""
    shapes = lora.trained(model_config, transformer.param_shapes(model_config))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda shape, layout: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout),
        shapes,
        lora.trained_shardings(model_config, mesh),
    )


def finished(directory: Path) -> list[int]:
    """Steps whose checkpoints are whole, oldest first; none where there is no directory."""
    try:
        found = [path for path in directory.iterdir() if step_of(path.name) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    stored = isinstance(directory, RemotePath)  # which has no rename: a marker comes last
    return sorted(
        int(path.name)
        for path in found
        if ((path / "commit_success.txt").is_file() if stored else path.is_dir())
    )


def step_of(name: str) -> int | None:
    """The step of a checkpoint's directory; None for a name that no run gives: 08, or ²."""
    known = name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
    return int(name) if known else None


def record_of(run: Any, *, source: object) -> dict[str, Any]:
    """The fields of Record from a checkpoint's item `run`; DcodError for one of another type."""
    check({"run": run}, {"run": mapping(_RUN)}, source=source)
    for name, value in run["metrics"].items():
        if type(value) is not float and whole(-(1 << 53), 1 << 53).fault(value):  # it may be NaN
            raise DcodError(f"{source}: run.metrics[{name!r}]={value!r:.80} must be a number")
    found = {key: run[key] for key in ("step", "config", "metrics")}
    return found | mapping(_PROGRESS).kept(run["progress"])


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def _moments(state: TrainState) -> dict[str, PyTree]:
    return {"optimizer": state.opt_state, "loss": state.loss_state}


def _unexpected(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in EXPECTED_WARNINGS)


class _LocalManager(ocp.CheckpointManager):
    """Saves of one process among several, perhaps at other moments than the others'."""

    def reached_preemption(self, step: int) -> bool:
        # The service would take the step of a late save for the step that the loop is at, and all
        # processes could agree on a step that is past already.
        return False


def _local_manager(place: epath.Path, options: dict[str, Any]) -> ocp.CheckpointManager:
    """Every process is its own primary host and writes each shard it holds, whichever replica."""
    processes = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"local-{jax.process_index()}",
    )
    arrays = ocp.type_handlers.ArrayHandler(
        primary_host=None, replica_id=None, use_replica_parallel=False
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers: dict[str, Any] = {
        item: ocp.PyTreeCheckpointHandler(
            multiprocessing_options=processes, type_handler_registry=registry
        )
        for item in ("params", "opt_state")
    }
    handlers["run"] = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
    return _LocalManager(
        place,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            **options, create=False, multiprocessing_options=processes
        ),
    )
