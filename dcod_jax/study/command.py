"""Compare methods and weights on embedded arithmetic over seeds and conditions.

    dcod study --config study

Runs every arm (a loss) of every condition (where traces, start or student differ) over seeds, from
one warm start and on the same batches, each at the learning rate that its own grid found on
validation problems. Grades it on three sets of problems, and measures drift and costs. Each run
is a line of run_dir/results.jsonl; the same command goes on after an interruption.
tools/make_study_page.py writes the tables of docs/study.md from that file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.logs import track
from dcod_jax.study.conditions import (
    MAIN,
    Results,
    arms,
    conditions,
    pending,
    test_seeds,
    tuning_seeds,
)
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
    directory = Path(config.run_dir)
    results = Results(directory / "results.jsonl")
    lab = Lab(config, directory, wanted_starts(config))
    total = count_runs(config)
    wanted = {
        (kind, name, seed)
        for name, condition in conditions(config).items()
        for kind, seeds in (("tune", tuning_seeds(condition)), ("test", test_seeds(condition)))
        for seed in seeds
    }
    done = sum((x["kind"], x["condition"], x["seed"]) in wanted for x in results.done.values())
    with track("study", total, unit="runs", done=done, enabled=config.train.progress) as advance:
        for run, own in pending(config, results):
            if run.condition not in results.references:
                line = {"kind": "reference", "condition": run.condition}
                results.append(line | lab.reference(own))
            if run.kind == "test":
                results.check_start(run, lab.start_correct(own, run.seed))
            measured = lab.run(own, kind=run.kind, rate=run.rate, seed=run.seed)
            results.record(run, measured)
            note = f"{run.kind} {run.condition} {run.arm} seed {run.seed} {measured['accuracy']}"
            advance(1, note)


def count_runs(config: Any) -> int:
    """Lines that a finished study has, settings left out."""
    total, main_arms = 0, set()
    for name, condition in conditions(config).items():
        entries = arms(condition)
        main_arms = set(entries) if name == MAIN else main_arms
        own = condition.study.own_rates or name == MAIN
        tuned = [arm for arm in entries if own or arm not in main_arms]
        total += len(tuned) * len(condition.study.learning_rates) * condition.study.tuning_seeds
        total += len(entries) * condition.study.seeds
    return total


def wanted_starts(config: Any) -> dict[tuple[int, int], set[int]]:
    """{(width, layers): warm-start steps} over the conditions."""
    wanted: dict[tuple[int, int], set[int]] = {}
    for condition in conditions(config).values():
        study = condition.study
        if study.start_steps:
            wanted.setdefault((study.width, study.layers), set()).add(study.start_steps)
    return wanted
