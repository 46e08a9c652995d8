"""Reads what a report shows of runs from their directories: metrics, accuracy, drift.

Numbers are those of the files, thinned and never averaged; what is missing is absent or null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, read_json
from dcod_jax.train.metrics import read_metrics
from dcod_jax.train.profiling import GOODPUT

POSITION = "weights/position_"  # prefix of the metrics by position bucket; the rest is its start
GOODPUT_PARTS = ("productive", "startup", "eval", "save", "lost", "wall")  # of goodput.json
ALIVE = ("student_alive", "teacher_alive")
DRIFT = (*ALIVE, "reach", "accumulated", "reference", "excess", "log_ratio")  # of each student
CURVES = ("accumulated", "reference", "excess", "difference")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run's directory."""

    name: str
    path: Path
    config: Any  # resolved, as the run stored it

    @property
    def root(self) -> Path:
        """The directory of its evaluation and drift: its own, or that of `compare` above."""
        for home in (self.path, self.path.parent):
            if (home / "evaluation").exists() or (home / "drift.json").exists():
                return home
        return self.path


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these directories: each is a run itself, or holds those of `compare`.

    Raises DcodError for a directory without any.
    """
    runs: list[Run] = []
    for directory in directories:
        candidates = [directory] if _is_run(directory) else sorted(directory.glob("*"))
        homes = [home for home in candidates if _is_run(home)]
        if not homes:
            raise DcodError(
                f"{directory}: no run; expected config.json and metrics.jsonl in it or in the "
                "directories of its variants"
            )
        for home in homes:
            runs.append(Run(home.name, home, configs.to_config(read_json(home / "config.json"))))
    for name in (lambda run: f"{run.path.parent.name}/{run.path.name}", lambda run: str(run.path)):
        names = [run.name for run in runs]
        runs = [
            run if names.count(run.name) == 1 else dataclasses.replace(run, name=name(run))
            for run in runs
        ]
    return runs


def _is_run(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "metrics.jsonl"))


# ---------------------------------------------------------------- metrics


def run_record(run: Run, *, points: int) -> dict[str, Any]:
    """{"name", "directory", "config", "series", "positions"} of a run.

    series is {metric: {"steps": [...], "values": [...]}} of about `points` entries, without the
    position buckets; positions are the buckets at the first, a middle and the last step with them.
    """
    lines = read_metrics(run.path / "metrics.jsonl")
    series = {}
    for name in dict.fromkeys(key for line in lines for key in line if key != "step"):
        if not name.startswith(POSITION):
            found = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = zip(*thin(found, points), strict=True)
            series[name] = {"steps": steps, "values": values}
    return {
        "name": run.name,
        "directory": str(run.path),
        "config": configs.keys(run.config),
        "series": series,
        "positions": _positions(lines),
    }


def goodput(run: Run, notes: list[str]) -> dict[str, Any] | None:
    """{"starts", "goodput", "seconds": {part: seconds}} of goodput.json, or None without one.

    A file of another form is left out with a note.
    """
    path = run.path / GOODPUT
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        total = found["total"]
        seconds = {part: total[f"{part}_seconds"] for part in GOODPUT_PARTS}
        starts, share = len(found["attempts"]), total["goodput"]
        return {"starts": starts, "goodput": share, "seconds": seconds}
    except (KeyError, TypeError) as error:
        notes.append(f"{path} is not shown: it has no {error}; it is not a run's goodput.json")
        return None


def _positions(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"step", "first", "values"}: mean weight in the bucket that begins with token `first`."""
    having = [line for line in lines if any(key.startswith(POSITION) for key in line)]
    found = []
    for i in sorted({0, len(having) // 2, len(having) - 1} if having else ()):
        buckets = sorted(key for key in having[i] if key.startswith(POSITION))
        first = [int(key.removeprefix(POSITION)) for key in buckets]
        values = [having[i][key] for key in buckets]
        found.append({"step": having[i]["step"], "first": first, "values": values})
    return found


def thin(found: Sequence[tuple[int, float]], points: int) -> list[tuple[int, float]]:
    """About `points` of the (step, value) pairs: the first, the last, and the extremes between.

    Of each stretch of steps the lowest and the highest value stay, so a spike stays a spike.
    """
    if len(found) <= points:
        return list(found)
    stretches = max((points - 2) // 2, 1)
    kept = {0, len(found) - 1}
    for i in range(stretches):
        inside = range(i * len(found) // stretches, (i + 1) * len(found) // stretches)
        if inside:
            kept |= {min(inside, key=lambda j: found[j][1]), max(inside, key=lambda j: found[j][1])}
    return [found[i] for i in sorted(kept)]


# ---------------------------------------------------------------- evaluation and drift


def evaluations(runs: Sequence[Run], notes: list[str]) -> list[dict[str, Any]]:
    """Every results.json of the runs: its content with {"source", "set", "runs"}.

    set names the folder of a problem set, "" for the evaluation's own; runs maps models to runs.
    A file of another form is left out with a note.
    """
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        folder = root / "evaluation"
        for path in (folder / "results.json", *sorted(folder.glob("*/results.json"))):
            if result := _result(path, ("accuracy",), root, runs, notes):
                found.append(result | {"set": "" if path.parent == folder else path.parent.name})
    return found


def drifts(runs: Sequence[Run], notes: list[str], *, points: int) -> list[dict[str, Any]]:
    """Every drift.json of the runs, its curves at about `points` lengths.

    A file of another form is left out with a note.
    """
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        if result := _result(root / "drift.json", DRIFT, root, runs, notes):
            models = {name: _thin_drift(row, points) for name, row in result["models"].items()}
            found.append(result | {"models": models})
    return found


def _thin_drift(row: dict[str, Any], points: int) -> dict[str, Any]:
    """The row with its curves at some lengths only, which "lengths" lists."""
    length = len(row["student_alive"])
    step = max(math.ceil(length / points), 1)
    # The longest length that is reported stays, whatever the step.
    lengths = sorted({*range(1, length + 1, step), max(row["reach"], 1), length})

    def take(values: Any) -> Any:
        """Lists inside dictionaries, each at these lengths."""
        if isinstance(values, dict):
            return {name: take(part) for name, part in values.items()}
        return [values[n - 1] for n in lengths]

    kept = (*ALIVE, *(key for key in CURVES if key in row), "log_ratio")
    return {"lengths": lengths, "reach": row["reach"]} | {key: take(row[key]) for key in kept}


def _result(
    path: Path, needed: Sequence[str], root: Path, runs: Sequence[Run], notes: list[str]
) -> dict[str, Any] | None:
    """A file of {"models": {name: row}} with {"source", "runs": {model: place of its run}}.

    None without a file, and with a note of what a row lacks.
    """
    if not path.is_file():
        return None
    result = read_json(path)
    models = result.get("models")
    if not isinstance(models, dict):
        notes.append(f"{path} is not shown: it has no models; make it again")
        return None
    for name, row in models.items():
        lacking = [key for key in needed if key not in row]
        if lacking:
            notes.append(f"{path} is not shown: {name} has no {', '.join(lacking)}; make it again")
            return None
    names = ["student" if run.path == root else run.path.name for run in runs]
    places = {name: i for i, name in enumerate(names) if runs[i].root == root}
    return {"source": str(path), "runs": places} | result
