"""What stands before and after training: missing inputs, then export, evaluation and the table."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import jax

from dcod_jax import config as configs
from dcod_jax.data.dataset import MANIFEST, read_manifest
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.command import compare
from dcod_jax.export.command import export
from dcod_jax.files import Path, as_path
from dcod_jax.generate_traces.command import generate_traces, traces_path
from dcod_jax.parallel import hosts
from dcod_jax.prepare.command import is_prepared, prepare
from dcod_jax.report.command import report
from dcod_jax.score.command import score
from dcod_jax.train.start import expected_teacher

# ---------------------------------------------------------------- before


def ensure_inputs(config: Any) -> None:
    """Sample, prepare and score what the recipe names and is not there yet.

    On several hosts nothing is made: DcodError with the commands to run first.
    """
    if jax.process_count() > 1:
        _refuse_unfinished(config)
        return
    verbs = {"generate_traces": generate_traces, "prepare": prepare, "score": score}
    for name in _missing(config):
        verbs[name](config)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give what earlier steps freed back to the system, where the C library can (glibc).

    Freed arrays otherwise stay with the process: a second training run would need its own state
    on top of the room that the first one left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _refuse_unfinished(config: Any) -> None:
    """Process 0 looks for all: hashing the raw traces takes a while."""
    told = json.dumps(_unfinished(config)) if hosts.first() else ""
    unfinished = json.loads(hosts.exchange("look for unfinished steps", told)[0])
    if unfinished:
        commands = "\n".join(f"  python -m dcod_jax.{verb} --config ..." for verb in unfinished)
        raise DcodError(
            f"{configs.dataset_dir(config)} is not ready for training on {jax.process_count()} "
            f"hosts; run these first with the same --config and flags, one after the other (like "
            f"this command on every host; prepare works on process 0 alone):\n{commands}"
        )


def _unfinished(config: Any) -> list[str]:
    """The verbs of _missing whose result is not there yet."""
    verbs = _missing(config)
    if is_prepared(config):
        teachers = [expected_teacher(variant) for _, variant in configs.variants(config)]
        teacher = next(filter(None, teachers), None)
        return ["score"] if teacher and not _scored(config, teacher) else []
    return [v for v in verbs if v != "generate_traces" or not traces_path(config).exists()]


def _missing(config: Any) -> list[str]:
    """Verbs to run before training, in order; each leaves finished work as it is."""
    verbs = []
    if config.generate.prompts and not config.data.traces:
        verbs.append("generate_traces")
    if config.data.traces or verbs:
        verbs.append("prepare")
    elif not _splits(config):
        raise DcodError(
            f"no trace dataset in {configs.dataset_dir(config)}: set data.dataset to one, or "
            "data.traces (raw traces), or generate.prompts with teacher.path"
        )
    teachers = [expected_teacher(variant) for _, variant in configs.variants(config)]
    teacher = next(filter(None, teachers), None)
    if teacher and ("generate_traces" in verbs or not _scored(config, teacher)):
        verbs.append("score")
    return verbs


def _scored(config: Any, fingerprint: str) -> bool:
    """Whether this teacher's log-probs are there, told without loading the teacher."""
    manifests = [read_manifest(path) for path in _splits(config)]
    return bool(manifests) and all(
        manifest["scored"]
        and manifest.get("teacher", {}).get("weights") == fingerprint
        and manifest["top_k"] == config.score.top_k
        for manifest in manifests
    )


def _splits(config: Any) -> list[Path]:
    root = as_path(configs.dataset_dir(config))
    found = [path for path in (root / "train", root / "eval") if (path / MANIFEST).is_file()]
    return found or ([root] if (root / MANIFEST).is_file() else [])


# ---------------------------------------------------------------- after


def finish(config: Any, runs: Sequence[tuple[str, Any]]) -> None:
    """Export every run, grade teacher, start and students on the same problems, print the table."""
    exported = {name: export(variant) for name, variant in runs}
    if config.evaluate.problems or config.evaluate.sets:
        models = {"teacher": config.teacher.path, "start": config.student.path}
        models |= {name or "student": str(path) for name, path in exported.items()}
        compare(config, {name: path for name, path in models.items() if path})
    for name, variant in runs:
        if change := held_out_change(as_path(variant.run_dir)):
            print(f"held-out nll{f' {name}' if name else ''}: {change}")
    for name, path in exported.items():
        print(f"exported{f' {name}' if name else ''}: {path}")
    if config.report.at_end and jax.process_count() == 1:
        report(config)
    elif config.report.at_end:
        print("the report is made on one host alone: python -m dcod_jax.report --config ...")


def held_out_change(run_dir: Path) -> str:
    """First and last held-out nll of a run, "4.2000 -> 3.9000 (steps 0 to 24)"; "" without any."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if "eval/nll" in line]
    if not found:
        return ""
    values = " -> ".join(f"{line['eval/nll']:.4f}" for line in (found[0], found[-1]))
    return f"{values} (steps {found[0]['step']} to {found[-1]['step']})"
