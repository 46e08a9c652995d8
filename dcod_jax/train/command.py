"""Distil a student: one command from raw traces, or from prompts and a teacher, to an HF model.

Missing inputs are made first (generate_traces, prepare, score). Then every variant of `compare` is
trained from the same start; the same command resumes after an interruption. At the end
the students are exported, and graded where `evaluate` names problems.

Writes run_dir/{config.json,metrics.jsonl,tensorboard,checkpoints,export}; with `compare` one such
directory for each variant. Exit codes: 0 done, 1 error, 75 interrupted after saving.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dcod_jax import config as configs
from dcod_jax.data.dataset import read_manifest
from dcod_jax.data.teachers import teacher_entries, teacher_paths
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.command import compare
from dcod_jax.evaluate.prompts import check_sets
from dcod_jax.export.command import export, rehearse
from dcod_jax.files import as_path
from dcod_jax.generate_traces.command import generate_traces, traces_path
from dcod_jax.locks import locked
from dcod_jax.parallel import hosts
from dcod_jax.prepare.command import is_prepared, prepare
from dcod_jax.report.command import report
from dcod_jax.score.command import score
from dcod_jax.train.loop import fit
from dcod_jax.train.metrics import read_metrics
from dcod_jax.train.settings import loss_config
from dcod_jax.train.setup import (
    dataset_splits,
    expected_start,
    expected_teacher,
    load_student,
    preflight,
)

log = logging.getLogger(__name__)


def train(config: Any) -> None:
    """The verb: missing inputs, every variant, then evaluation and export."""
    student = load_student(next(configs.variants(config))[1])
    check_sets(config, student.tokenizer, student.config)  # what the end asks is read first
    with runs_ready(config) as runs:
        for name, variant in runs:
            fit(variant, name=name)
            hosts.release_memory()
            hosts.stop_if_noticed()
        finish(config, runs)


@contextlib.contextmanager
def runs_ready(config: Any) -> Iterator[list[tuple[str, Any]]]:
    """The variants of `compare`: checked, each run_dir locked, and their inputs made."""
    runs = list(configs.variants(config))
    for _, variant in runs:
        preflight(variant)
        if hosts.first():
            rehearse(variant)
    with contextlib.ExitStack() as locks:
        for _, variant in runs:
            path = as_path(variant.run_dir) / ".train.lock"
            locks.enter_context(locked(path, what=f"run_dir={variant.run_dir}"))
        hosts.barrier("the lock of run_dir")
        make_inputs(config)
        yield runs


# ---------------------------------------------------------------- inputs


def make_inputs(config: Any) -> None:
    """Sample, prepare and score what is not there yet; several hosts are told the commands."""
    if jax.process_count() > 1:
        # Only process 0 looks, because hashing the raw traces takes a while.
        def look() -> list[str]:
            with hosts.alone():
                return _unfinished(config)

        if unfinished := hosts.from_first("look for unfinished steps", look):
            commands = "\n".join(f"  python -m dcod_jax.{verb} --config ..." for verb in unfinished)
            raise DcodError(
                f"{configs.dataset_dir(config)} is not ready for training on "
                f"{jax.process_count()} hosts; run these first with the same --config and flags, "
                "one after the other (like this command on every host; prepare works on process 0 "
                f"alone):\n{commands}"
            )
        return
    verbs = {"generate_traces": generate_traces, "prepare": prepare, "score": score}
    for name in missing_verbs(config):
        verbs[name](config)
        hosts.release_memory()


def _unfinished(config: Any) -> list[str]:
    """The verbs of missing_verbs whose result is not there yet."""
    verbs = missing_verbs(config)
    if is_prepared(config):
        return ["score"] if _lacks_scores(config) else []
    return [v for v in verbs if v != "generate_traces" or not traces_path(config).exists()]


def missing_verbs(config: Any) -> list[str]:
    """Verbs to run before training, in order; each leaves finished work as it is."""
    verbs = []
    if config.generate.prompts and not config.data.traces:
        verbs.append("generate_traces")
    if config.data.traces or verbs:
        verbs.append("prepare")
    elif not dataset_splits(config):
        raise DcodError(
            f"no trace dataset in {configs.dataset_dir(config)}: set data.dataset to one, or "
            "data.traces (raw traces), or generate.prompts with teacher.path"
        )
    if _lacks_scores(config, new_traces="generate_traces" in verbs):
        verbs.append("score")
    return verbs


def _check_teacher_named(runs: list[Any], *, scored: bool) -> None:
    """Raise DcodError where a loss needs log-probs that no trace and no named teacher gives."""
    for run in runs:
        loss = loss_config(run)
        told = scored or run.prepare.logprobs == "require" or teacher_entries(run)
        if loss.needs_cache and not told:
            raise DcodError(
                f"loss.divergence={loss.divergence} with loss.weights.name={run.loss.weights.name} "
                "needs a teacher's log-probs of the traces, and no teacher is named: set "
                "teacher.path, score.server or score.teachers; prepare.logprobs=require where the "
                "traces have them; or loss.weights.name=uniform or dft with loss.divergence=nll"
            )


def _lacks_scores(config: Any, *, new_traces: bool = False) -> bool:
    """Whether log-probs of a teacher or the start are needed and not there; loads no model."""
    runs = [variant for _, variant in configs.variants(config)]
    places = [] if new_traces else dataset_splits(config).values()
    manifests = [read_manifest(path) for path in places]
    told = manifests[0].get("teacher") if manifests else None
    teacher = next(filter(None, (expected_teacher(run, told) for run in runs)), None)
    start = next(filter(None, map(expected_start, runs)), None)
    _check_teacher_named(runs, scored=bool(manifests) and all(one["scored"] for one in manifests))
    if (teacher is None and start is None) or not manifests:
        return teacher is not None or start is not None
    return not all(
        manifest["scored"]
        and teacher in (None, manifest.get("teacher", {}).get("weights"))
        and start in (None, manifest.get("start", {}).get("weights"))
        and manifest["top_k"] == config.score.top_k
        for manifest in manifests
    )


# ---------------------------------------------------------------- the end


def finish(config: Any, runs: Sequence[tuple[str, Any]]) -> None:
    """Export every run, grade teacher, start and students on the same problems, print the table."""
    exported = {name: export(variant) for name, variant in runs}
    if config.evaluate.problems or config.evaluate.sets:
        models = teacher_paths(config) | {"start": config.student.path}
        models |= {name or "student": str(path) for name, path in exported.items()}
        compare(config, {name: path for name, path in models.items() if path})
    for name, variant in runs:
        ends: dict[str, list[tuple[float, int]]] = {}  # by metric the first and the last
        for line in read_metrics(as_path(variant.run_dir) / "metrics.jsonl"):
            for metric in {"eval/nll", "eval/accuracy"} & line.keys():
                ends[metric] = [*ends.get(metric, [])[:1], (line[metric], line["step"])]
        for metric, form in (("nll", ".4f"), ("accuracy", ".1%")):
            if found := ends.get(f"eval/{metric}"):
                (before, first), (after, last) = found[0], found[-1]
                change = f"{before:{form}} -> {after:{form}} (steps {first} to {last})"
                print(f"held-out {metric}{f' {name}' if name else ''}: {change}")
    for name, path in exported.items():
        print(f"exported{f' {name}' if name else ''}: {path}")
    if config.report.at_end and jax.process_count() == 1:
        report(config)
    elif config.report.at_end:
        log.info("the report is made on one host alone: python -m dcod_jax.report --config ...")
