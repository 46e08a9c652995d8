"""The runs of the study, their order, and the file of their results.

results.jsonl holds three kinds of lines, each appended whole:

    {"kind": "settings", "condition", "arm", "settings": {key: value unlike the default}}
    {"kind": "reference", "condition", accuracy of the teacher, counts of the traces}
    {"kind": "tune" | "test", "condition", "arm", "seed", "rate", ...what was measured}

A line that a kill cut off is dropped, and its run is done again. Other settings than those written
for a condition and arm are refused, because the file would hold two studies.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dcod_jax import config as configs
from dcod_jax.bounds import check, mapping, number, optional, text, whole
from dcod_jax.configs.study import study_keys
from dcod_jax.errors import DcodError
from dcod_jax.files import naming
from dcod_jax.train.metrics import json_lines

MAIN = "main"  # the condition whose learning rates the others take over, where it has the arm
# Keys that say where things are or what else is run, not what a run is.
_ELSEWHERE = (
    "run_dir study.arms study.conditions study.only study.seeds study.tuning_seeds "
    "study.learning_rates study.own_rates teacher.name data.prefetch"
).split()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one arm under one condition."""

    kind: str  # "tune": on the validation problems; "test"
    condition: str
    arm: str
    seed: int
    rate: float  # 0 in the schedule of a test, whose grid finds it

    @property
    def key(self) -> tuple[str, str, str, int, float]:
        """What a line of results.jsonl is found by."""
        return (self.kind, self.condition, self.arm, self.seed, self.rate)


def _named(entries: Any, key: str) -> dict[str, list[str]]:
    """("sft a=1 b=2", ...) -> {"sft": ["a=1", "b=2"]}."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, *changes = entry.split()
        if name in found:
            raise DcodError(f"study.{key}: {name!r} comes twice; names must differ")
        found[name] = changes
    if not found:
        raise DcodError(f'study.{key} is empty; expected entries such as "name key=value"')
    return found


def conditions(config: Any) -> dict[str, Any]:
    """{name: the config of the condition}, in order."""
    entries = _named(config.study.conditions, "conditions")
    return {name: configs.with_changes(config, changes) for name, changes in entries.items()}


def arms(condition: Any) -> dict[str, Any]:
    """{name: the config of the arm under this condition}; study.only leaves some out."""
    entries = _named(condition.study.arms, "arms")
    unknown = [name for name in condition.study.only if name not in entries]
    if unknown:
        raise DcodError(
            f"study.only names {', '.join(unknown)}, which study.arms has not; "
            f"it has {', '.join(entries)}"
        )
    return {
        name: configs.with_changes(condition, changes)
        for name, changes in entries.items()
        if name in condition.study.only or not condition.study.only
    }


def settings_of(config: Any) -> dict[str, Any]:
    """What differs from the defaults and says what a run is."""
    defaults = configs.keys(configs.load_recipe(configs.BASE))
    defaults |= configs.keys(study_keys(), "study.")
    flat = configs.keys(config)
    changed = {k: v for k, v in flat.items() if k not in _ELSEWHERE and v != defaults.get(k)}
    for key in ("teacher.path", "student.path"):  # where the checkout lies is no setting
        if key in changed:
            changed[key] = Path(changed[key]).name
    return json.loads(json.dumps(changed, sort_keys=True))


# ---------------------------------------------------------------- the results file


class Results:
    """The lines of a results file, and the only writer of it."""

    def __init__(self, path: Path):
        self.path = path
        self.settings: dict[tuple[str, str], dict[str, Any]] = {}  # of (condition, arm)
        self.references: dict[str, dict[str, Any]] = {}  # condition -> line
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {}  # Run.key -> line
        for line in read_results(path) if path.exists() else []:
            self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        if line["kind"] == "settings":
            self.settings[line["condition"], line["arm"]] = line["settings"]
        elif line["kind"] == "reference":
            self.references[line["condition"]] = line
        else:
            key = ("kind", "condition", "arm", "seed", "rate")
            self.done[tuple(line[name] for name in key)] = line

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, forced to the disk; a torn line before it is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, sort_keys=True, allow_nan=False) + "\n"
        with naming(self.path), open(self.path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._add(line)

    def check_start(self, run: Run, start: dict[str, str]) -> None:
        """Refuse a test run from another start than the seed's other runs of the condition.

        start is Lab.start_correct's. A start trained again by another version of the program, or
        on another machine, can differ by more than the arms do.
        """
        own = ("test", run.condition, run.seed)
        for line in self.done.values():
            same = (line["kind"], line["condition"], line["seed"]) == own
            if same and line.get("start") != start:
                raise DcodError(
                    f"{self.path}: arm {line['arm']!r} of condition {run.condition!r}, seed "
                    f"{run.seed}, began from a start that solves other problems than the one that "
                    f"is there now. Put the earlier one back ({self.path.parent}/starts), or take "
                    "the condition's lines of that seed out of the file so that all its runs are "
                    "done from this one"
                )

    def check_settings(self, condition: str, arm: str, settings: dict[str, Any]) -> None:
        """Write the settings of this condition and arm, or refuse others than those written."""
        before = self.settings.get((condition, arm))
        if before is None:
            own = {"kind": "settings", "condition": condition, "arm": arm, "settings": settings}
            self.append(own)
        elif before != settings:
            changed = [
                f"{key}: {before.get(key, 'default')!r} then, {settings.get(key, 'default')!r} now"
                for key in sorted(before.keys() | settings.keys())
                if before.get(key) != settings.get(key)
            ]
            raise DcodError(
                f"{self.path} holds runs of condition {condition!r}, arm {arm!r} with other "
                "settings:\n  " + "\n  ".join(changed) + "\nset them back, or choose another "
                "run_dir or another name"
            )


def read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; raises DcodError with the line that is none of its."""
    if not path.is_file():
        raise DcodError(f"{path}: no such file; python -m dcod_jax.study writes it")
    lines = []
    for place, line in json_lines(path):
        source = f"{path}:{place} (take the line out, and its run is done again)"
        check({"line": line}, {"line": mapping({"kind": text()})}, source=source)
        if line["kind"] not in _LINES:
            raise DcodError(f"{source}: kind={line['kind']!r:.80} is none of {', '.join(_LINES)}")
        check(line, _LINES[line["kind"]], source=source)
        lines.append(line)
    return lines


_NUMBER, _SHARE = number(-1e308, 1e308), number(0, 1)
_RUN = {"condition": text(), "arm": text(), "seed": whole(-(1 << 63), 1 << 63), "rate": _NUMBER}
_HEX = optional(mapping(items=text()))
_MEASURED = {"curves": optional(mapping(items=_NUMBER))}
_MEASURED |= {"drift": optional(mapping(items=optional(_NUMBER)))}
_LINES = {
    "settings": {"condition": text(), "arm": text(), "settings": mapping()},
    "reference": {"condition": text(), "teacher": mapping(items=_SHARE)},
    "tune": _RUN | _MEASURED | {"accuracy": mapping({"validation": _SHARE})},
    "test": _RUN | _MEASURED | {"accuracy": mapping(items=_SHARE), "correct": _HEX, "start": _HEX},
}


def to_hex(correct: np.ndarray) -> str:
    """[n] bool as hexadecimal digits, the first one in the highest bit."""
    return np.packbits(correct).tobytes().hex()


def from_hex(text: str, count: int) -> np.ndarray:
    """[count] bool of what to_hex wrote."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


# ---------------------------------------------------------------- learning rates and order


def tuning_seeds(config: Any) -> list[int]:
    """Seeds of the tuning runs; no test run has them, whatever study.seeds grows to."""
    return [config.seed + 1000 * number for number in range(config.study.tuning_seeds)]


def best_rate(results: Results, condition: str, arm: str, own: Any) -> float | None:
    """The rate of the highest mean accuracy over the tuning seeds; None where runs are missing."""
    sums: dict[float, float] = {}
    for rate in sorted(own.study.learning_rates):
        keys = [("tune", condition, arm, seed, rate) for seed in tuning_seeds(own)]
        if not all(key in results.done for key in keys):
            return None
        sums[rate] = round(sum(results.done[key]["accuracy"]["validation"] for key in keys), 9)
    return max(sums, key=lambda rate: sums[rate])


def schedule(config: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, str], list[Run]]]:
    """(condition, {arm: its config}, {arm: condition whose grid finds its rate}, runs), in order.

    First the learning-rate grids, then all arms seed by seed, so that an interrupted condition has
    the same seeds in every arm. Conditions without study.own_rates take the rates of the condition
    "main" for its arms.
    """
    main_arms: set[str] = set()
    for name, condition in conditions(config).items():
        entries = arms(condition)
        if name == MAIN:
            main_arms = set(entries)
        given = set() if condition.study.own_rates else main_arms
        source = {arm: MAIN if arm in given else name for arm in entries}
        runs = [
            Run("tune", name, arm, seed, rate)
            for arm, own in entries.items()
            for seed, rate in itertools.product(tuning_seeds(own), own.study.learning_rates)
            if source[arm] == name
        ]
        first = condition.seed + 1
        seeds = range(first, first + condition.study.seeds)
        runs += [Run("test", name, arm, seed, 0.0) for seed in seeds for arm in entries]
        yield name, entries, source, runs


def pending(config: Any, results: Results) -> Iterator[tuple[Run, Any]]:
    """(run, its config) of the runs left, in order; reads the results again after each."""
    for name, entries, source, runs in schedule(config):
        for arm, own in entries.items():
            results.check_settings(name, arm, settings_of(own))
        for run in runs:
            arm, own = run.arm, entries[run.arm]
            if run.kind == "test":
                rate = best_rate(results, source[arm], arm, own)
                if rate is None:
                    raise DcodError(
                        f"no learning rate for arm {arm!r} of condition {name!r}: "
                        f"{source[arm]!r} has to be run first; put it first in study.conditions"
                    )
                run = dataclasses.replace(run, rate=rate)
            if run.key not in results.done:
                yield run, own
