"""Thousands of steps with held-out loss, saves and ten kills: nothing grows, no step gets slower.

    python -m pytest -m long -s tests/faults/test_soak_long.py

Ten starts are killed at even distances in the first half of the run, the last start does the other
half. Of resident memory, open files, threads and the time of a step it prints the slope over the
steps with its 95 % interval, and the level: a regression on medians of 50 steps, one save apart,
with one level for each start. Once of all starts behind their first 100 steps, and once of what is
behind 1,000 steps of a start: until then the allocator and the pools of threads of 20 saves fill.
The C library's allocator has one arena here: it has up to eight for each core otherwise, which fill
with free blocks for some 7,500 steps.
"""

import json
import os

import numpy as np
import pytest
import scipy.stats
from cases import case_of, write_place
from forked import run, warm

STEPS, KILLS, EVERY = 5000, 10, 50
ENDS = [*(STEPS * n // (2 * KILLS) for n in range(1, KILLS + 1)), STEPS]  # of the starts
# What 1,000 steps may add at most: bytes, files, threads, seconds a step.
MOST = {"memory": 2e6, "files": 0.5, "threads": 0.5, "seconds": 1e-3}


@pytest.mark.long
def test_nothing_grows_over_thousands_of_steps(tmp_path, monkeypatch):
    place = write_place(tmp_path)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with warm():
        case = case_of(place, "score")
        case.begin()
        starts = [one_start(case, end) for end in ENDS]
    lines = map(json.loads, (case.home / "run" / "metrics.jsonl").read_text().splitlines())
    seconds = {line["step"]: line["time/step_seconds"] for line in lines if "loss" in line}
    assert sorted(seconds) == list(range(1, STEPS + 1))
    for start, began, end in zip(starts, [0, *ENDS], ENDS, strict=False):
        start["seconds"] = [(step, seconds[step]) for step in range(began + 1, end + 1)]
    for behind in (100, 1000):
        found = {name: fitted([start[name] for start in starts], behind) for name in MOST}
        print(f"behind {behind} steps of a start, in 1,000 steps:")
        for name, (slope, half, level, points) in found.items():
            print(f"  {name}: {slope:+.3g} ± {half:.2g}, level {level:.4g}, {points} medians")
    too_much = {name: found[name] for name, most in MOST.items() if found[name][0] > most}
    assert not {name for name, (slope, half, *_) in too_much.items() if slope > half}


def fitted(starts, behind):
    """(slope in 1,000 steps, half its 95 % interval, mean, points) of [(step, value)] by start."""
    rows = []
    for number, (values, began) in enumerate(zip(starts, [0, *ENDS], strict=False)):
        steps, found = np.transpose(values)
        blocks = (steps - began - 1) // EVERY
        for block in range(behind // EVERY, int(blocks.max()) + 1):
            if (inside := blocks == block).any():
                rows.append((number, steps[inside].mean(), np.median(found[inside])))
    of, steps, values = np.transpose(rows)
    levels = of[:, None] == np.unique(of)
    design = np.column_stack([steps / 1000, levels])
    found = np.linalg.lstsq(design, values, rcond=None)[0]
    free = len(rows) - design.shape[1]
    spread = np.sqrt(np.sum((values - design @ found) ** 2) / free)
    error = spread * np.sqrt(np.linalg.inv(design.T @ design)[0, 0])
    return found[0], scipy.stats.t.ppf(0.975, free) * error, values.mean(), len(rows)


def one_start(case, end):
    """{"memory", "files", "threads": [(step, value)]} of a start, killed at the step `end`."""
    found = {"memory": [], "files": [], "threads": []}
    metrics = case.home / "run" / "metrics.jsonl"
    seen = 0

    def sample(process):
        nonlocal seen
        step = newest(metrics)
        if end < STEPS and step >= end:
            process.kill()
        elif step > seen:
            seen, home = step, f"/proc/{process.pid}"
            with open(f"{home}/statm") as file:
                pages = int(file.read().split()[1])
            found["memory"].append((step, pages * os.sysconf("SC_PAGESIZE")))
            for name, folder in (("files", "fd"), ("threads", "task")):
                found[name].append((step, len(os.listdir(f"{home}/{folder}"))))

    changes = [f"steps={STEPS}", f"eval_every={EVERY}", f"save_every={EVERY}"]
    words = [f"--config={case.place / 'recipe.py'}", "--config.evaluate.problems="]
    words += [f"--config.train.{change}" for change in changes]
    ended = run("train", words, home=case.home, meanwhile=sample, timeout=800)
    assert (ended.code != 0) == (end < STEPS), ended.text
    return found


def newest(metrics):
    """The step of the last whole line."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 20_000, 0))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0
