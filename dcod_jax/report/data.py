"""Reads what a report shows of runs from their directories: metrics, accuracy, drift.

Numbers are those of the files, thinned and never averaged; what is missing is absent or null.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from dcod_jax import config as configs
from dcod_jax.bounds import Bound, array, check, either, mapping, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, read_whole
from dcod_jax.train.metrics import TRACES, whole_lines
from dcod_jax.train.profiling import GOODPUT

POSITION = re.compile(r"weights/position_(\d{1,9})")  # metric of the bucket that starts there
GOODPUT_PARTS = ("productive", "startup", "eval", "save", "lost", "wall")  # of goodput.json
ALIVE = ("student_alive", "teacher_alive")
CURVES = ("accumulated", "reference", "excess", "difference")
Pair: TypeAlias = tuple[int, float]  # step, value
_NAMES = 1000  # about the most series of a run

# What is shown of the files; the page's scripts rely on it.
_NUMBER = optional(number(-1e308, 1e308))
_SCALAR = optional(either(text(), number(-1e308, 1e308)))
_TABLE = optional(array(mapping(items=_SCALAR), most=10_000))
_AT_K = optional(mapping(items=array(_NUMBER, fewest=3, most=3)))
_SCORES = (
    "problems correct low high no_answer truncated tokens seconds samples difference "
    "difference_low difference_high"
).split()
_RESULTS = {
    "baseline": optional(text()),
    "models": mapping(
        items=mapping(
            {
                "accuracy": number(0, 1),
                **dict.fromkeys(_SCORES, _NUMBER),
                "details": optional(
                    mapping(
                        {
                            "pass_at_k": _AT_K,
                            "maj_at_k": _AT_K,
                            "by_length": _TABLE,
                            "by_difficulty": _TABLE,
                            "degenerate": optional(mapping(items=_NUMBER)),
                        }
                    )
                ),
            }
        )
    ),
}
_LIST = array(_NUMBER, fewest=1)
_CURVE = mapping(items=_LIST)
_DRIFT = {
    **dict.fromkeys("teacher baseline prompts samples least".split(), _SCALAR),
    "models": mapping(
        items=mapping(
            {
                "reach": whole(0, 1 << 24),
                **dict.fromkeys(ALIVE, _LIST),
                **dict.fromkeys(CURVES[:-1], _CURVE),
                "difference": optional(_CURVE),
                "log_ratio": mapping({"student": _CURVE, "teacher": _CURVE}),
            }
        )
    ),
}
_NAMED = optional(array(array(either(text(), _NUMBER), fewest=2, most=2), most=100))
_WEIGHED = {"step": whole(0, 1 << 53), "most": _NAMED, "least": _NAMED}
_GOODPUT = {
    "attempts": array(),
    "total": mapping(
        {
            "goodput": number(-1e308, 1e308),
            **{f"{part}_seconds": number(-1e308, 1e308) for part in GOODPUT_PARTS},
        }
    ),
}


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
    """The runs in these directories: each is a run itself, or holds those of `compare`."""
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
            runs.append(Run(home.name, home, _config(home / "config.json")))
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


def run_record(run: Run, notes: list[str], *, points: int) -> dict[str, Any]:
    """{"name", "directory", "config", "series", "positions"} of a run.

    series is {metric: {"steps": [...], "values": [...]}} without the position buckets: at most
    `points` entries and the ends, of a long file at least half of that. positions are the buckets
    at the first, a middle and the last step with them. Lines and values that are no numbers of a
    step are left out with a note.
    """
    found: dict[str, _Curve] = {}
    having: list[dict[str, Any]] = []  # of the lines with position buckets each `every`-th
    last, count, every = None, 0, 1
    for line in _metrics(run.path / "metrics.jsonl", notes):
        for name, value in line.items():
            if name != "step" and not POSITION.fullmatch(name):
                found.setdefault(name, _Curve(points // 2)).add((line["step"], value))
        if any(map(POSITION.fullmatch, line)):
            having += [] if count % every else [line]
            last, count = line, count + 1
            if len(having) > points:
                having, every = having[::2], 2 * every
    having += [] if last is None or having[-1] is last else [last]
    series = {}
    for name, curve in found.items():
        steps, values = zip(*curve.pairs(), strict=True)
        series[name] = {"steps": steps, "values": values}
    return {
        "name": run.name,
        "directory": str(run.path),
        "config": configs.keys(run.config),
        "series": series,
        "positions": _positions(having),
    }


class _Curve:
    """A series as it is read: of each of at most `most` stretches the lowest and the highest."""

    def __init__(self, most: int):
        self.most, self.span, self.count = most, 1, 0  # span: pairs of a stretch
        self.stretches: list[list[Pair]] = []
        self.ends: list[Pair] = []

    def add(self, pair: Pair) -> None:
        if self.count % self.span == 0 and len(self.stretches) >= self.most:
            halves = itertools.zip_longest(self.stretches[::2], self.stretches[1::2], fillvalue=[])
            self.stretches = [_extremes(one + other) for one, other in halves]
            self.span *= 2
        if self.count % self.span == 0:
            self.stretches.append([pair])
        else:
            self.stretches[-1] = _extremes([*self.stretches[-1], pair])
        self.ends = [*self.ends[:1], pair]
        self.count += 1

    def pairs(self) -> list[Pair]:
        inside = itertools.chain.from_iterable(self.stretches)
        return list(dict.fromkeys([self.ends[0], *inside, self.ends[-1]]))


def _extremes(pairs: list[Pair]) -> list[Pair]:
    """The lowest and the highest, in their order."""
    ends = (min(pairs, key=lambda pair: pair[1]), max(pairs, key=lambda pair: pair[1]))
    return [pair for pair in pairs if pair in ends]


_STEP = {"step": whole(0, 1 << 53)}


def _metrics(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines with their finite numbers; one that a killed process wrote in part is left out."""
    odd, first, names = 0, 0, {"step"}
    for place, line in whole_lines(path):
        try:
            found = _parse(line, path)
            check(found, _STEP, source=path)
        except DcodError:
            found, kept = {"": None}, {}
        else:
            names |= {*list(found)[:_NAMES]} if len(names) < _NAMES else set()
            kept = {
                key: value
                for key, value in found.items()
                if value is not None and key in names and _NUMBER.fault(value) is None
            }
            yield kept
        if len(kept) < len(found):
            odd, first = odd + 1, first or place
    if odd:
        notes.append(
            f"{path}: {odd} lines, the first one line {first}, hold what is no finite number "
            "of a step; that is left out"
        )


def goodput(run: Run, notes: list[str]) -> dict[str, Any] | None:
    """{"starts", "goodput", "seconds": {part: seconds}} of goodput.json, if it can be read."""
    path = run.path / GOODPUT
    if not path.is_file():
        return None
    found = _checked(path, _GOODPUT, notes)
    if found is None:
        return None
    total = found["total"]
    seconds = {part: total[f"{part}_seconds"] for part in GOODPUT_PARTS}
    return {"starts": len(found["attempts"]), "goodput": total["goodput"], "seconds": seconds}


def weighed(run: Run, notes: list[str]) -> dict[str, Any] | None:
    """{"step", "most", "least"} of the last line of trace_weights.jsonl, if it can be read."""
    path = run.path / TRACES
    last = collections.deque(whole_lines(path) if path.is_file() else (), maxlen=1)
    return _checked(path, _WEIGHED, notes, content=last[0][1]) if last else None


def skipped(run: dict[str, Any]) -> list[str]:
    """A note where steps of the run were skipped (optim.on_nonfinite, optim.spike_factor)."""
    counts = run["series"].get("skipped_total", {"values": (0,)})["values"]
    if not counts[-1]:
        return []
    return [
        f"{run['name']}: {counts[-1]:g} steps were skipped, as loss or gradient was not finite or "
        "the gradient far larger than before; they changed nothing, and the log names their traces"
    ]


def _positions(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"step", "first", "values"}: mean weight in the bucket that begins with token `first`."""
    found = []
    for i in sorted({0, len(lines) // 2, len(lines) - 1} if lines else ()):
        matches = sorted(filter(None, map(POSITION.fullmatch, lines[i])), key=lambda m: m[0])
        first = [int(match[1]) for match in matches]
        values = [lines[i][match[0]] for match in matches]
        found.append({"step": lines[i]["step"], "first": first, "values": values})
    return found


# ---------------------------------------------------------------- evaluation and drift


def evaluations(runs: Sequence[Run], notes: list[str]) -> list[dict[str, Any]]:
    """Every readable results.json with "source", "set" (its folder) and "runs", {model: place}."""
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        folder = root / "evaluation"
        for path in (folder / "results.json", *sorted(folder.glob("*/results.json"))):
            if result := _result(path, _RESULTS, root, runs, notes):
                found.append(result | {"set": "" if path.parent == folder else path.parent.name})
    return found


def drifts(runs: Sequence[Run], notes: list[str], *, points: int) -> list[dict[str, Any]]:
    """Every readable drift.json of the runs, its curves at about `points` lengths."""
    found = []
    for root in dict.fromkeys(run.root for run in runs):
        path = root / "drift.json"
        if result := _result(path, _DRIFT, root, runs, notes):
            if uneven := [name for name, row in result["models"].items() if _uneven(row)]:
                notes.append(f"{path} is not shown: the curves of {uneven[0]} differ in length")
                continue
            models = {name: _thin_drift(row, points) for name, row in result["models"].items()}
            found.append(result | {"models": models})
    return found


def _uneven(row: dict[str, Any]) -> bool:
    """Whether the lists of a row are not all of one length, or reach is beyond it."""

    def lengths(values: Any) -> set[int]:
        if isinstance(values, dict):
            return set().union(*map(lengths, values.values()))
        return {len(values)} if isinstance(values, list) else set()

    return len(lengths(row)) != 1 or row["reach"] > len(row["student_alive"])


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
    path: Path, bounds: dict[str, Bound], root: Path, runs: Sequence[Run], notes: list[str]
) -> dict[str, Any] | None:
    """A file of {"models": {name: row}} with "source" and "runs", {model: place of its run}."""
    if not path.is_file() or (result := _checked(path, bounds, notes)) is None:
        return None
    names = ["student" if run.path == root else run.path.name for run in runs]
    places = {name: i for i, name in enumerate(names) if runs[i].root == root}
    return {"source": str(path), "runs": places} | result


# ---------------------------------------------------------------- files


def _checked(
    path: Path, bounds: dict[str, Bound], notes: list[str], *, content: bytes | None = None
) -> dict[str, Any] | None:
    """What the bounds name of a JSON file, or of `content`; None and a note if it is wrong."""
    try:
        found = _parse(read_whole(path) if content is None else content, path)
        check(found, bounds, source=path)
    except DcodError as error:
        notes.append(f"{error}; it is not shown: make it again")
        return None
    return mapping(bounds).kept(found)


def _config(path: Path) -> Any:
    """The resolved config of a run."""
    try:
        return configs.to_config(_parse(read_whole(path), path))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DcodError(f"{path}: not a run's config ({error})") from error


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object, with null for NaN and the infinities; DcodError for anything else."""

    def finite(digits: str) -> float | None:
        return value if math.isfinite(value := float(digits)) else None

    try:
        found = json.loads(content, parse_constant=lambda name: None, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DcodError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DcodError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
