"""What a report shows of runs, read from their directories: metrics, accuracy, drift.

Everything is numbers as the files hold them (thinned, never averaged); what is not there is absent
or null. The page's scripts draw this and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.files import Path
from dcod_jax.train.metrics import read_metrics
from dcod_jax.train.profiling import GOODPUT

POSITION = "weights/position_"  # prefix of the metrics by position bucket; the rest is its start
DRIFT = ("student_alive", "teacher_alive", "reach", "accumulated", "reference", "excess")
DRIFT += ("log_ratio",)  # what a drift.json has of each student
GOODPUT_PARTS = ("productive", "startup", "eval", "save", "lost", "wall")  # of goodput.json
CURVES = ("student_kl", "teacher_kl", "accumulated", "reference", "excess", "difference")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run's directory."""

    name: str
    path: Path
    config: Any  # resolved, as the run stored it

    @property
    def root(self) -> Path:
        """Where its evaluation and drift are: its own directory, or that of `compare` above."""
        homes = (self.path, self.path.parent)
        having = (
            home
            for home in homes
            for name in ("evaluation", "drift.json")
            if (home / name).exists()
        )
        return next(having, self.path)


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these directories: each is a run itself, or holds those of `compare`.

    Raises DcodError for a directory without any.
    """
    runs: list[Run] = []
    for directory in directories:
        homes = [directory] if _is_run(directory) else []
        homes = homes or sorted(p for p in directory.glob("*") if _is_run(p))
        if not homes:
            raise DcodError(
                f"{directory}: no run; expected config.json and metrics.jsonl in it or in the "
                "directories of its variants"
            )
        runs += [Run(home.name, home, _stored_config(home)) for home in homes]
    for name in (lambda run: f"{run.path.parent.name}/{run.path.name}", lambda run: str(run.path)):
        names = [run.name for run in runs]
        runs = [
            run if names.count(run.name) == 1 else dataclasses.replace(run, name=name(run))
            for run in runs
        ]
    return runs


def _is_run(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "metrics.jsonl"))


def _stored_config(directory: Path) -> Any:
    return configs.to_config(_read_json(directory / "config.json"))


# ---------------------------------------------------------------- metrics


def run_record(run: Run, *, points: int) -> dict[str, Any]:
    """{"name", "directory", "config", "series", "positions"} of a run.

    series is {metric: {"steps": [...], "values": [...]}} of every metric but the position buckets,
    at most about `points` entries each; positions the buckets' weights at the first, a middle and
    the last logged step that has them.
    """
    lines = read_metrics(run.path / "metrics.jsonl")
    names = dict.fromkeys(key for line in lines for key in line if key != "step")
    series = {}
    for name in names:
        if not name.startswith(POSITION):
            found = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = zip(*thin(found, points), strict=True)
            series[name] = {"steps": list(steps), "values": list(values)}
    return {
        "name": run.name,
        "directory": str(run.path),
        "config": {key: _plain(value) for key, value in configs.keys(run.config).items()},
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
    found = _read_json(path)
    try:
        total = found["total"]
        seconds = {part: total[f"{part}_seconds"] for part in GOODPUT_PARTS}
        return {
            "starts": len(found["attempts"]),
            "goodput": total["goodput"],
            "seconds": seconds,
        }
    except (KeyError, TypeError) as error:
        notes.append(f"{path} is not shown: it has no {error}; it is not a run's goodput.json")
        return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _positions(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    having = [line for line in lines if any(key.startswith(POSITION) for key in line)]
    if not having:
        return []
    chosen = sorted({0, len(having) // 2, len(having) - 1})
    return [
        {
            "step": having[i]["step"],
            "first": [int(key.removeprefix(POSITION)) for key in _buckets(having[i])],
            "values": [having[i][key] for key in _buckets(having[i])],
        }
        for i in chosen
    ]


def _buckets(line: dict[str, Any]) -> list[str]:
    return sorted(key for key in line if key.startswith(POSITION))


def thin(found: Sequence[tuple[int, float]], points: int) -> list[tuple[int, float]]:
    """At most about `points` of the (step, value) pairs, with every extreme among them.

    The steps are cut into stretches of which the lowest and the highest value stay, and the first
    and the last pair; values are never averaged, so a spike stays a spike.
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
    """Every results.json that belongs to the runs: {"source", "set", "runs", and what it holds}.

    set is the name of the folder of a problem set, "" for the evaluation's own; runs says which of
    them a model is. A file of another form is left out with a note.
    """
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        folder = root / "evaluation"
        for path in (folder / "results.json", *sorted(folder.glob("*/results.json"))):
            if path.is_file():
                name = "" if path.parent == folder else path.parent.name
                result = _result(path, ("accuracy",), notes)
                place = {"source": str(path), "set": name, "runs": _places(runs, root)}
                found += [{**place, **result}] if result else []
    return found


def drifts(runs: Sequence[Run], notes: list[str], *, points: int) -> list[dict[str, Any]]:
    """Every drift.json that belongs to the runs, its curves at about `points` lengths.

    A file of another form is left out with a note.
    """
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        path = root / "drift.json"
        if path.is_file() and (result := _result(path, DRIFT, notes)):
            models = {name: _thin_drift(row, points) for name, row in result["models"].items()}
            place = {"source": str(path), "runs": _places(runs, root)}
            found.append({**place, **result, "models": models})
    return found


def _places(runs: Sequence[Run], root: Path) -> dict[str, int]:
    """{model: place of its run} of the models that results in `root` tell of."""
    return {
        "student" if run.path == root else run.path.name: place
        for place, run in enumerate(runs)
        if run.root == root
    }


def _thin_drift(row: dict[str, Any], points: int) -> dict[str, Any]:
    """The row with "lengths" and every curve at these lengths only."""
    length = len(row["student_alive"])
    step = max(math.ceil(length / points), 1)
    # The longest length that is reported stays, whatever the step.
    lengths = sorted({*range(1, length + 1, step), max(row["reach"], 1), length})

    def take(values: list[Any]) -> list[Any]:
        return [values[n - 1] for n in lengths]

    def curve(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: take(part) for name, part in values.items()}

    thinned = {"lengths": lengths, "reach": row["reach"]}
    thinned |= {key: take(row[key]) for key in ("student_alive", "teacher_alive")}
    thinned |= {key: curve(row[key]) for key in CURVES if key in row}
    thinned["log_ratio"] = {side: curve(part) for side, part in row["log_ratio"].items()}
    return thinned


def _result(path: Path, needed: Sequence[str], notes: list[str]) -> dict[str, Any] | None:
    """A file of {"models": {name: row}}, or None and a note of what the page could not show."""
    result = _read_json(path)
    models = result.get("models")
    if not isinstance(models, dict):
        notes.append(f"{path} is not shown: it has no models; make it again")
        return None
    for name, row in models.items():
        lacking = [key for key in needed if key not in row]
        if lacking:
            notes.append(f"{path} is not shown: {name} has no {', '.join(lacking)}; make it again")
            return None
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DcodError(f"{path}: not JSON ({error}); make it again") from None
    if not isinstance(found, dict):
        raise DcodError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
