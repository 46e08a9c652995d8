"""The lines of a study's results by what they are of, and means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dcod_jax.configs.study import study_keys
from dcod_jax.evaluate.statistics import equal, unanimous
from dcod_jax.study.conditions import MAIN, from_hex

Line = dict[str, Any]
Pick = Callable[[Line], float | None]
Arm = tuple[str, str]  # (condition, arm)


class Estimate(NamedTuple):
    """A mean with its 95 % interval; without an interval (one seed) low and high are NaN."""

    mean: float
    low: float
    high: float


def crossed_mean(values: np.ndarray, least: float = 0.0) -> Estimate:
    """Mean of [seeds, problems], in [least, 1], and its 95 % interval for new seeds and problems.

    Two-way crossed random effects without replication: with MS_s, MS_p, MS_e the mean squares of
    seeds, problems and the rest, Var(mean) = (MS_s + MS_p - MS_e) / (S P), in which neither of the
    first two counts for less than MS_e; Student's t with Satterthwaite's degrees of freedom
    (Satterthwaite 1946). A single seed or problem gives no interval. Where every value is the same
    the interval is that of as many equal values as there are seeds, or problems where they are
    fewer (dcod_jax.evaluate.statistics.unanimous).
    """
    seeds, problems = values.shape
    mean = float(values.mean())
    if seeds < 2 or problems < 2:
        return Estimate(mean, math.nan, math.nan)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    rest = values - rows[:, None] - columns[None, :] + mean
    free = (seeds - 1, problems - 1, (seeds - 1) * (problems - 1))
    error = float(np.square(rest).sum()) / free[2]
    squares = (
        max(problems * float(rows.var(ddof=1)), error),
        max(seeds * float(columns.var(ddof=1)), error),
        error,
    )
    total = squares[0] + squares[1] - squares[2]
    if total <= 0:  # every value is the same
        return Estimate(mean, *unanimous(mean, min(seeds, problems), (least, 1.0)))
    freedom = total**2 / sum(s**2 / f for s, f in zip(squares, free, strict=True))
    spread = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total / (seeds * problems))
    return Estimate(mean, mean - spread, mean + spread)


def seed_mean(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's 95 % interval; equal values, or a single one, have none."""
    mean = float(np.mean(values))
    if equal(np.asarray(values)):
        return Estimate(mean, math.nan, math.nan)
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * float(stats.sem(values))
    return Estimate(mean, mean - spread, mean + spread)


class Study:
    """The lines of a results file by what they are of, and questions to them."""

    def __init__(self, lines: Sequence[Line]):
        self.settings: dict[Arm, dict[str, Any]] = {}  # beside the defaults, in the recipe's order
        self.references: list[Line] = []
        self.tunes: list[Line] = []
        runs: dict[Arm, dict[int, Line]] = {}
        for line in lines:
            if line["kind"] == "reference":
                self.references.append(line)
            elif line["kind"] == "tune":
                self.tunes.append(line)
            elif line["kind"] == "test":
                runs.setdefault(arm_of(line), {})[line["seed"]] = line
            else:
                self.settings[arm_of(line)] = line["settings"]
        self.conditions = list(dict.fromkeys(condition for condition, _ in runs))  # tested ones
        self.runs = {arm: dict(sorted(own.items())) for arm, own in runs.items()}

    def arms(self, condition: str) -> list[Arm]:
        """Arms that were run, in the order of the recipe."""
        return [arm for arm in self.settings if arm[0] == condition and arm in self.runs]

    def base(self, arm: Arm) -> Arm | None:
        """What an arm is compared with, or None.

        It is the unweighted form of a weighted method, and SFT for a plain one: in the same
        condition, or in "main" where both conditions have the same settings and starts.
        """
        condition, method = arm
        name = method.partition("+")[0] if "+" in method else "sft"
        if name == method:
            return None
        if (condition, name) in self.arms(condition):
            return condition, name
        main = (MAIN, name)
        if main not in self.arms(MAIN) or self._world(arm) != self._world(main):
            return None
        alike = [one["start"] == other["start"] for one, other in self.pairs(arm, main)]
        return main if alike and all(alike) else None

    def _world(self, arm: Arm) -> dict[str, Any]:
        own = self.settings[arm].items()
        return {k: v for k, v in own if not k.startswith(("loss.", "study.select"))}

    def pairs(self, one: Arm, base: Arm) -> list[tuple[Line, Line]]:
        """The test runs of two arms, on the seeds that both have."""
        first, second = self.runs[one], self.runs[base]
        return [(first[seed], second[seed]) for seed in first if seed in second]

    def correct(
        self, arm: Arm, name: str, lines: Iterable[Line], *, of: str = "correct"
    ) -> np.ndarray:
        """[runs, problems] of 0 and 1; of="start": those of each run's start."""
        count = int(self.settings[arm].get("study.problems", study_keys().problems))
        return np.array([from_hex(line[of][name], count) for line in lines], np.float64)

    def accuracy(self, arm: Arm, name: str) -> Estimate:
        return crossed_mean(self.correct(arm, name, self.runs[arm].values()))

    def difference(self, one: Arm, base: Arm, name: str) -> Estimate:
        """Accuracy of one arm minus that of another."""
        first, second = zip(*self.pairs(one, base), strict=True)
        return crossed_mean(self.correct(one, name, first) - self.correct(base, name, second), -1.0)

    def gain(self, arm: Arm, name: str) -> Estimate:
        """Accuracy minus that of the start that each run began from."""
        lines = self.runs[arm].values()
        starts = self.correct(arm, name, lines, of="start")
        return crossed_mean(self.correct(arm, name, lines) - starts, -1.0)

    def starts(self, condition: str, name: str) -> np.ndarray:
        """Accuracy of the condition's starts, one for each seed."""
        found: dict[int, float] = {}
        for arm in self.arms(condition):
            means = self.correct(arm, name, self.runs[arm].values(), of="start").mean(axis=1)
            found |= dict(zip(self.runs[arm], means.tolist(), strict=True))
        return np.array(list(found.values()))

    def of(self, arm: Arm, pick: Pick) -> list[float]:
        """The picked number of each test run that has it."""
        values = [pick(line) for line in self.runs[arm].values()]
        return [float(value) for value in values if value is not None]

    def paired(self, one: Arm, base: Arm, pick: Pick) -> Estimate | None:
        """The picked number of one arm minus another's, over seeds; None: no pair."""
        pairs = [(pick(first), pick(second)) for first, second in self.pairs(one, base)]
        changes = [a - b for a, b in pairs if a is not None and b is not None]
        return seed_mean(changes) if changes else None


def arm_of(line: Line) -> Arm:
    return line["condition"], line["arm"]


def drift(key: str) -> Pick:
    return lambda line: (line.get("drift") or {}).get(key)
