"""Checkpoints read by others than the run that writes them; nothing is created or removed.

Orbax's manager, which the run itself uses, lists the directory once and fails where a checkpoint
that it listed is removed meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from dcod_jax.errors import DcodError, nearest
from dcod_jax.files import Location, Path, as_path, from_json, read_whole
from dcod_jax.models import hf, lora
from dcod_jax.models.config import ModelConfig
from dcod_jax.train import checksums
from dcod_jax.train.checkpointer import (
    Record,
    check_shapes,
    explain,
    finished,
    rank,
    record_of,
    restoring,
    sharded_shapes,
    step_of,
)
from dcod_jax.types import Params

Found = TypeVar("Found")
ADAPTER_BASE = "base of the adapters"  # among what a run learned from (learned_from.py)


def find_run(place: Location, *, key: str) -> tuple[Path, int | None]:
    """(run directory, step) of a run directory or of one of its checkpoints; None: not named.

    runs/x -> (runs/x, None); runs/x/checkpoints/8 -> (runs/x, 8). Raises DcodError, which begins
    with `key`, where no finished checkpoint is.
    """
    path = as_path(place)
    named = step_of(path.name) if path.parent.name == "checkpoints" else None
    run_dir = path if named is None else path.parent.parent
    steps = finished(run_dir / "checkpoints")
    if steps if named is None else named in steps:
        return run_dir, named
    there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = f"finished checkpoints: {steps or 'none'}"
    if not run_dir.exists():
        found = f"no such directory{nearest(path.name, there)}"
    raise DcodError(
        f"{key}={place}: expected a run directory with a finished checkpoint, or one checkpoint "
        f"such as {run_dir / 'checkpoints' / '8'}; {found}"
    )


def read_record(place: Location, *, step: int | None = None, key: str = "run_dir") -> Record:
    """The record of a run's newest checkpoint, or of the one that is named; no arrays are read."""
    return _read(place, key, step, lambda path: _checked_record(path, "run"))


def read_params(
    place: Location,
    like: Params,
    *,
    step: int | None = None,
    best_metric: str = "",
    key: str = "run_dir",
) -> tuple[Params, Record]:
    """(parameters laid out as `like`, record) of the step, else the best, else the newest."""

    def read(path: Path) -> tuple[Params, Record]:
        record = _checked_record(path, "run", "params")
        place = epath.Path(str(path.resolve())) / "params"
        with explain(path.parent, int(path.name)):
            check_shapes(place, like)
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                return reader.restore(place, args=ocp.args.StandardRestore(restoring(like))), record

    return _read(place, key, step, read, best_metric=best_metric)


def read_student(
    place: Location,
    source: Location,
    *,
    mesh: Mesh | None,
    step: int | None = None,
    best_metric: str = "",
    key: str = "run_dir",
    merged: bool = True,
) -> tuple[ModelConfig, Params, Record]:
    """(architecture, float32 parameters, record) of a run's student, adapters merged or alone.

    source: student.path or student.config of the run; the base of adapters is read from it. Raises
    DcodError as `read_params` does, and where the base is not the one that the run had.
    """
    model = hf.read_config(source)
    run = read_record(place, key=key)
    whole = lora.with_adapter(model, (run.config.get("student") or {}).get("lora"))
    which: dict[str, Any] = {"step": step, "best_metric": best_metric, "key": key}
    params, record = read_params(place, sharded_shapes(whole, mesh), **which)
    if whole.lora is None:
        return model, params, record
    check_base(run, source, hf.weights_fingerprint(source))
    dtype = run.config["student"]["compute_dtype"]
    if not merged:
        return whole, params, record
    base = hf.load_model(source, dtype=dtype, mesh=mesh)[1]
    return model, lora.merge(whole, params, base), record


def check_base(run: Record, source: Location, found: str) -> None:
    """Raise DcodError where the base at `source` is not the one that a run's adapters belong to."""
    expected = run.data["parts"].get(ADAPTER_BASE)
    if found != expected:
        raise DcodError(
            f"student.path={source}: its weights have the hash {found}, but the adapters were "
            f"trained beside {expected}; set student.path to that base"
        )


def _read(
    place: Location,
    key: str,
    step: int | None,
    read: Callable[[Path], Found],
    *,
    best_metric: str = "",
) -> Found:
    """read(directory of the checkpoint); its successor's where the run removes it meanwhile."""
    run_dir, named = find_run(place, key=key)
    asked, chosen = (named if step is None else step), None
    home = run_dir / "checkpoints"
    while True:
        steps = finished(home)
        if asked is not None and asked not in steps:
            raise DcodError(f"{home}: step {asked} was expected, but it holds steps {steps}")
        before, chosen = chosen, _best(home, steps, best_metric) if asked is None else asked
        try:
            return read(home / str(chosen))
        except DcodError:
            if chosen == before or asked is not None:
                raise


def _best(home: Path, steps: list[int], metric: str) -> int:
    """The step whose held-out metric is best, the later one of two; without any the newest."""
    found = {}
    for step in steps if metric else []:
        try:
            found[step] = rank(_record(home / str(step)).metrics, metric)
        except DcodError:  # it was removed meanwhile
            continue
    found = {step: value for step, value in found.items() if value < math.inf}
    return min(found, key=lambda step: (found[step], -step), default=steps[-1])


def _checked_record(checkpoint: Path, *items: str) -> Record:
    """The record, when all files of these items are as they were saved."""
    home = checkpoint.parent
    checksums.verify(home, int(checkpoint.name), items, steps=finished(home))
    return _record(checkpoint)


def _record(checkpoint: Path) -> Record:
    path = checkpoint / "run" / "metadata"
    try:
        return Record(**record_of(from_json(read_whole(path)), source=path))
    except (OSError, ValueError) as error:
        raise DcodError(f"{path}: expected a finished checkpoint's record: {error}") from error
