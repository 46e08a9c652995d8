"""Compare methods and weights on embedded arithmetic over seeds and conditions.

    dcod study --config study

Runs every arm (a loss) of every condition (where traces, start or student differ) over seeds, from
one warm start and on the same batches, each at the learning rate that its own grid found on
validation problems. Grades it on three sets of problems, and measures drift and costs. Each run
is a line of run_dir/results.jsonl; the same command goes on after an interruption.
tools/make_study_page.py writes the tables of docs/study.md from that file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.study import domain
from dcod_jax.study.conditions import Results, arms, conditions, pending, schedule
from dcod_jax.study.lab import Lab


def study(config: Any) -> None:
    """Every run that results.jsonl lacks, in the order of the recipe."""
    if "://" in config.run_dir:
        raise DcodError(f"run_dir={config.run_dir}: a study appends to its results on a local disk")
    if "study" not in config:
        raise DcodError(
            "the recipe has no section study; begin from --config study, or set "
            "c.study = study_keys() of dcod_jax.configs.study"
        )
    for condition in conditions(config).values():
        domain.style_shares(condition)
        for own in arms(condition).values():
            if own.study.select:
                domain.selection(own)
    directory = Path(config.run_dir)
    with locked(directory / ".study.lock", what=f"run_dir={directory}"):
        results = Results(directory / "results.jsonl")
        lab = Lab(config, directory, wanted_starts(config))
        runs = [run.key[:4] for *_, own in schedule(config) for run in own]  # without the rate
        done = sum(key[:4] in runs for key in results.done)
        shown = config.train.progress
        with track("study", len(runs), unit="runs", done=done, enabled=shown) as advance:
            for run, own in pending(config, results):
                if run.condition not in results.references:
                    line = {"kind": "reference", "condition": run.condition}
                    results.append(line | lab.reference(own))
                if run.kind == "test":
                    results.check_start(run, lab.start_correct(own, run.seed))
                measured = lab.run(own, kind=run.kind, rate=run.rate, seed=run.seed)
                results.append(dataclasses.asdict(run) | measured)
                note = (
                    f"{run.kind} {run.condition} {run.arm} seed {run.seed} {measured['accuracy']}"
                )
                advance(1, note)


def wanted_starts(config: Any) -> dict[tuple[int, int], set[int]]:
    """{(width, layers): warm-start steps} over the conditions."""
    wanted: dict[tuple[int, int], set[int]] = {}
    for condition in conditions(config).values():
        study = condition.study
        if study.start_steps:
            wanted.setdefault((study.width, study.layers), set()).add(study.start_steps)
    return wanted
