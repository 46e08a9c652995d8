"""Thousands of steps with held-out loss, saves and ten kills: nothing grows, no step gets slower.

    python -m pytest -m long -s tests/faults/test_soak_long.py

Prints of memory, open files, threads and seconds a step the mean slope over the starts of the run
with its 95 % interval, and the level.
"""

import json
import os

import numpy as np
import pytest
import scipy.stats
from cases import case_of, write_place
from forked import run, warm

STEPS, KILLS = 5000, 10
WARM_UP = 100  # steps of a start that are not measured: it compiles, and caches fill
# What 1,000 steps may add at most: bytes, files, threads, seconds a step.
MOST = {"memory": 2e6, "files": 0.5, "threads": 0.5, "seconds": 1e-3}


@pytest.mark.long
def test_nothing_grows_over_thousands_of_steps(tmp_path):
    place = write_place(tmp_path)
    ends = [STEPS * n // (KILLS + 1) for n in range(1, KILLS + 2)]
    with warm():
        case = case_of(place, "score")
        case.begin()
        starts = [one_start(case, until=end, killed=end < STEPS) for end in ends]
    lines = map(json.loads, (case.home / "run" / "metrics.jsonl").read_text().splitlines())
    seconds = {line["step"]: line["time/step_seconds"] for line in lines if "loss" in line}
    assert sorted(seconds) == list(range(1, STEPS + 1))
    for start, end in zip(starts, ends, strict=True):
        steps = range(end - STEPS // (KILLS + 1) + WARM_UP, end)
        start["seconds"] = [(step, seconds[step]) for step in steps]
    for name, most in MOST.items():
        slopes = [1000 * np.polyfit(*np.transpose(start[name]), 1)[0] for start in starts]
        level = np.mean([value for start in starts for _, value in start[name]])
        half = scipy.stats.t.ppf(0.975, KILLS) * scipy.stats.sem(slopes)
        mean = np.mean(slopes)
        print(f"{name}: {mean:+.3g} ± {half:.2g} in 1,000 steps, level {level:.4g}")
        assert mean - half < most, name


def one_start(case, *, until, killed):
    """{"memory", "files", "threads": [(step, value)]} of one start of the run."""
    found = {"memory": [], "files": [], "threads": []}
    first = until - STEPS // (KILLS + 1) + WARM_UP
    metrics = case.home / "run" / "metrics.jsonl"

    def sample(process):
        step = newest(metrics)
        if killed and step >= until:
            process.kill()
        if first <= step < until and (not found["memory"] or found["memory"][-1][0] < step):
            home = f"/proc/{process.pid}"
            with open(f"{home}/statm") as file:
                pages = int(file.read().split()[1])
            found["memory"].append((step, pages * os.sysconf("SC_PAGESIZE")))
            for name, folder in (("files", "fd"), ("threads", "task")):
                found[name].append((step, len(os.listdir(f"{home}/{folder}"))))

    changes = [f"steps={STEPS}", "eval_every=50", "save_every=50"]
    words = [f"--config={case.place / 'recipe.py'}", "--config.evaluate.problems="]
    words += [f"--config.train.{change}" for change in changes]
    ended = run("train", words, home=case.home, meanwhile=sample, timeout=600)
    assert (ended.code != 0) == killed, ended.text
    return found


def newest(metrics):
    """The step of the last whole line."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 20_000, 0))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0
