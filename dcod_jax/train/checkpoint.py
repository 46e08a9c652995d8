"""Checkpoints of a run, and where a run's parameters come from.

Restore precedence (decided in train.py, first that applies):
  1. the run's own directory: params, optimizer, step and data position (resume), or newer ones on
     the processes' own disks (local_checkpoints.py);
  2. train.init_from: the parameters of another run's checkpoint, step 0;
  3. student.path: HF or GGUF weights;
  4. student.config: random initial weights.
A missing or mismatched piece is an error, never a warning.

Layout: run_dir/checkpoints/<step>/{params,opt_state,run}, the loss's state with the optimizer's;
a step directory gets its name only when all of it is on disk, so a half-written one is never read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, RemotePath, as_path
from dcod_jax.parallel.mesh import put
from dcod_jax.types import Params, TrainState

ITEMS = ("params", "opt_state", "run")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds besides the state."""

    step: int
    progress: dict[str, Any]  # data position and counters, exactly as they were saved
    config: dict[str, Any]  # resolved config of the run that wrote it
    metrics: dict[str, float]  # held-out metrics at this step, where there were any


class Checkpointer:
    """Asynchronous checkpoints of one run: the newest `keep` of them, and the best."""

    def __init__(
        self,
        run_dir: Location,
        *,
        keep: int = 2,
        best_metric: str = "",
        alone: bool = False,
        beside_local: bool = False,
    ):
        """alone: run_dir is this process's own, for the shards it holds; it waits for no other.

        beside_local: such ones are written in the same run.
        """
        self.alone = alone
        self.directory = as_path(run_dir).resolve() / "checkpoints"
        if isinstance(self.directory, RemotePath) and self.directory.protocol != "gs":
            raise DcodError(
                f"run_dir={run_dir}: checkpoints need a local directory or gs://bucket/name"
            )
        self.best_metric = best_metric
        newest: Any = policies.LatestN(keep)
        policy = newest
        if best_metric:
            best = policies.BestN(
                get_metric_fn=lambda metrics: -metrics[best_metric],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policy = policies.AnyPreservationPolicy([newest, best])
        # Of those that are alone, local_checkpoints.py removes what is half-written.
        options: dict[str, Any] = {
            "preservation_policy": policy,
            "cleanup_tmp_directories": not alone,
        }
        if alone or beside_local:
            # Directories made in the background are waited for under a number that counts all
            # saves of a process. One that gave up its local ones has another number than process
            # 0: it would write before the directory is made, and lose its part when that is made.
            options["async_options"] = ocp.options.AsyncOptions(
                create_directories_asynchronously=False
            )
        with self._explained("open"):
            self.directory.mkdir(parents=True, exist_ok=True)
            place = epath.Path(str(self.directory))  # Orbax's own way to gs://
            if alone:
                self.manager = _lonely_manager(place, options)
            else:
                self.manager = ocp.CheckpointManager(
                    place,
                    item_names=ITEMS,
                    options=ocp.CheckpointManagerOptions(**options),
                )

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self.manager.all_steps())

    def best(self) -> int | None:
        """Step with the lowest best_metric; None when no checkpoint has it."""
        scored = []
        for step in self.steps():
            metrics = read_run(self.directory.parent, step).metrics
            if self.best_metric in metrics:
                scored.append((metrics[self.best_metric], step))
        return min(scored)[1] if scored else None

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        progress: dict[str, Any],
        config: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start writing a checkpoint; returns as soon as the state may be donated.

        metrics without best_metric do not take part in the choice of the best. An error of this or
        the save before it, such as a full disk, is raised as DcodError here or in wait().
        """
        metrics = metrics or {}
        run = {"step": step, "progress": progress, "config": config, "metrics": metrics}
        items = ocp.args.Composite(
            params=self._saving(state.params),
            opt_state=self._saving(_moments(state)),
            run=ocp.args.JsonSave(run),
        )
        ranked = metrics if self.best_metric in metrics else None
        with self._explained("save"):
            self.manager.save(step, args=items, metrics=ranked, force=True)

    def wait(self) -> None:
        """Until everything started is on disk; raises DcodError when it could not be written."""
        with self._explained("save"):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self.manager.close()

    def restore(self, like: TrainState, *, step: int | None = None) -> tuple[TrainState, Restored]:
        """State at a step (default: the newest) with the shapes, dtypes and shardings of `like`.

        like may hold arrays or jax.ShapeDtypeStruct with shardings. Raises DcodError when there is
        no checkpoint, when it is damaged, or when a shape differs from the model's.
        """
        step = self._existing(step)
        items = ocp.args.Composite(
            params=self._restoring(like.params),
            opt_state=self._restoring(_moments(like)),
            run=ocp.args.JsonRestore(),
        )
        with self._explained("restore", step):
            self._check_shapes(step, like.params)
            found = self.manager.restore(step, args=items)
        state = TrainState(
            step=put(jnp.int32(step), getattr(like.step, "sharding", None)),
            params=found["params"],
            opt_state=found["opt_state"]["optimizer"],
            loss_state=found["opt_state"]["loss"],
        )
        return state, _restored(found["run"])

    def restore_params(self, like: Params, *, step: int | None = None) -> tuple[Params, Restored]:
        """Parameters alone, with the shapes, dtypes and shardings of `like`."""
        step = self._existing(step)
        items = ocp.args.Composite(params=self._restoring(like), run=ocp.args.JsonRestore())
        with self._explained("restore", step):
            self._check_shapes(step, like)
            found = self.manager.restore(step, args=items)
        return found["params"], _restored(found["run"])

    def _saving(self, tree: Any) -> Any:
        return ocp.args.PyTreeSave(tree) if self.alone else ocp.args.StandardSave(tree)

    def _restoring(self, like: Any) -> Any:
        like = _abstract(like)
        if not self.alone:
            return ocp.args.StandardRestore(like)
        how = ocp.checkpoint_utils.construct_restore_args(like)
        return ocp.args.PyTreeRestore(like, restore_args=how)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step is None or step not in steps:
            asked = "a checkpoint" if step is None else f"step {step}"
            raise DcodError(f"{self.directory}: {asked} was expected, but it holds steps {steps}")
        return step

    def _check_shapes(self, step: int, like: Params) -> None:
        """Name the first parameter that differs, before any array is read."""
        reader = ocp.PyTreeCheckpointHandler()
        stored: Any = reader.metadata(epath.Path(str(self.directory)) / str(step) / "params")
        reader.close()
        there = _shapes(stored.tree)
        for path, shape in _shapes(like).items():
            if there.get(path) != shape:
                raise ValueError(f"{path} has shape {there.get(path)}, the model needs {shape}")

    @contextmanager
    def _explained(self, what: str, step: int | None = None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            where = self.directory / (str(step) if step is not None else "")
            text = " ".join(str(error).split())[:400] or type(error).__name__
            if self.alone:  # the caller knows what follows from it
                text = "no space left on the disk" if "space left" in str(error) else text
                raise DcodError(f"{where}: cannot {what} a local checkpoint: {text}") from error
            if "space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
                hint = "free disk space and run the same command again"
            elif what == "restore":
                others = [s for s in finished(self.directory) if s != step]
                hint = (
                    "the directory is damaged or of another model; move it away to go on from "
                    + (f"step {others[-1]}" if others else "the beginning")
                )
            else:
                hint = "see that the directory can be written, and run the same command again"
            there = finished(self.directory)
            kept = f"; finished checkpoints {there} are untouched" if what == "save" else ""
            raise DcodError(f"{where}: cannot {what} a checkpoint: {text}{kept}; {hint}") from error


def finished(directory: Path) -> list[int]:
    """Steps whose directories have their final names, oldest first."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


class _Lonely(ocp.CheckpointManager):
    """Saves of one process among several, at other moments than the others' perhaps."""

    def reached_preemption(self, step: int) -> bool:
        # The service would take this step, which a save that ends late asks with, for the one the
        # loop is at, and all could agree on a step that is past already.
        return False


def _needed(record: logging.LogRecord) -> bool:
    """Orbax warns at each such save that it does not add up the sizes of all processes' parts."""
    return "primary_host=None" not in record.getMessage()


def _lonely_manager(place: epath.Path, options: dict[str, Any]) -> ocp.CheckpointManager:
    """Every process is its own primary host and writes each shard it holds, whichever replica."""
    logging.getLogger("absl").addFilter(_needed)
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
    return _Lonely(
        place,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            **options, create=False, multiprocessing_options=processes
        ),
    )


def read_run(run_dir: Location, step: int) -> Restored:
    """The small part of a checkpoint (step, data position, config, metrics), without its arrays."""
    path = as_path(run_dir) / "checkpoints" / str(step) / "run" / "metadata"
    try:
        return _restored(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DcodError(f"{path}: expected a finished checkpoint's record: {error}") from error


def _restored(run: dict[str, Any]) -> Restored:
    return Restored(run["step"], run["progress"], run["config"], run["metrics"])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def _moments(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.opt_state, "loss": state.loss_state}


def _abstract(tree: Any) -> Any:
    """What to restore; on this host's first device where no layout is given.

    Orbax would take the layout of the run that saved, whose devices may be another host's.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
        ),
        tree,
    )
