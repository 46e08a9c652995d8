"""Results of the study as numbers with intervals and as Markdown tables.

The problems of a set are the same for every run and the seeds the same for every arm, so two arms
are compared in pairs: a difference D[seed, problem] in {-1, 0, 1}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from dcod_jax.study.domain import SETS
from dcod_jax.types import DcodError

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; without an interval (one seed) low and high are NaN."""

    mean: float
    low: float
    high: float


def crossed_mean(values: Float[np.ndarray, "S P"]) -> Estimate:
    """Mean over seeds and problems, and its 95 % interval for new seeds and new problems.

    Two-way crossed random effects without replication: with MS_s, MS_p, MS_e the mean squares of
    seeds, problems and the rest, Var(mean) = (MS_s + MS_p - MS_e) / (S P), in which neither of the
    first two counts for less than MS_e; Student's t with Satterthwaite's degrees of freedom
    (Satterthwaite 1946). A single seed or problem gives no interval.
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
        return Estimate(mean, mean, mean)
    freedom = total**2 / sum(s**2 / f for s, f in zip(squares, free, strict=True))
    spread = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total / (seeds * problems))
    return Estimate(mean, mean - spread, mean + spread)


def seed_mean(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * float(stats.sem(values))
    return Estimate(mean, mean - spread, mean + spread)


# ---------------------------------------------------------------- looking things up


@dataclasses.dataclass(frozen=True)
class Study:
    """The lines of a results file, and questions to them."""

    lines: tuple[Line, ...]

    def conditions(self) -> list[str]:
        return list(dict.fromkeys(line["condition"] for line in self.tests()))

    def tests(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "test"]

    def arms(self, condition: str) -> list[str]:
        """In the order of the recipe, as far as they were run."""
        ran = {line["arm"] for line in self.tests() if line["condition"] == condition}
        order = [
            line["arm"]
            for line in self.lines
            if line["kind"] == "settings" and line["condition"] == condition
        ]
        return [arm for arm in order if arm in ran]

    def runs(self, condition: str, arm: str) -> dict[int, Line]:
        """{seed: line} of the test runs."""
        own = [x for x in self.tests() if (x["condition"], x["arm"]) == (condition, arm)]
        return {line["seed"]: line for line in sorted(own, key=lambda x: x["seed"])}

    def settings(self, condition: str, arm: str) -> dict[str, Any]:
        for line in self.lines:
            same = (line["condition"], line["arm"]) == (condition, arm)
            if line["kind"] == "settings" and same:
                return line["settings"]
        raise DcodError(f"the results hold no settings of {condition!r} {arm!r}")

    def problems(self, condition: str, arm: str) -> int:
        from dcod_jax import config as configs

        default = configs.keys(configs.load_recipe(configs.BASE))["study.problems"]
        return int(self.settings(condition, arm).get("study.problems", default))

    def correct(self, condition: str, arm: str, name: str, seeds: Iterable[int]) -> np.ndarray:
        """[seeds, problems] of 0 and 1."""
        count, runs = self.problems(condition, arm), self.runs(condition, arm)
        return np.array([unpack_bits(runs[s]["correct"][name], count) for s in seeds], np.float64)

    def accuracy(self, condition: str, arm: str, name: str) -> Estimate:
        return crossed_mean(self.correct(condition, arm, name, self.runs(condition, arm)))

    def difference(self, condition: str, arm: str, base: str, name: str) -> Estimate:
        """Accuracy of `arm` minus that of `base` on the seeds that both have."""
        first, second = self.runs(condition, arm), self.runs(condition, base)
        seeds = [seed for seed in first if seed in second]
        pair = [self.correct(condition, each, name, seeds) for each in (arm, base)]
        return crossed_mean(pair[0] - pair[1])

    def of(self, condition: str, arm: str, pick: Callable[[Line], float]) -> list[float]:
        return [pick(line) for line in self.runs(condition, arm).values()]

    def paired(
        self, condition: str, arm: str, base: str, pick: Callable[[Line], float]
    ) -> Estimate:
        first, second = self.runs(condition, arm), self.runs(condition, base)
        return seed_mean([pick(first[s]) - pick(second[s]) for s in first if s in second])


def base_of(arm: str) -> str:
    """What an arm is compared with: "fkl+sigmoid" with "fkl", a plain method with "sft"."""
    return arm.partition("+")[0] if "+" in arm else "sft"


# ---------------------------------------------------------------- Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(value: Estimate) -> str:
    """0.865 with its interval -> "86.5 (84.0 to 89.0)"; bounds are cut to 0 and 100."""
    low, high = max(value.low, 0.0), min(value.high, 1.0)
    interval = "" if math.isnan(value.low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * value.mean:.1f}{interval}"


def points(value: Estimate) -> str:
    """Percentage points with sign; bold where the interval leaves out 0."""
    text = f"{100 * value.mean:+.1f}"
    if math.isnan(value.low):
        return _minus(text)
    text += f" ({100 * value.low:+.1f} to {100 * value.high:+.1f})"
    return _minus(f"**{text}**" if value.low > 0 or value.high < 0 else text)


def number(value: Estimate, digits: int = 1, *, sign: bool = False) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    text = format(value.mean, form)
    if math.isnan(value.low):
        return _minus(text)
    text += f" ({format(value.low, form)} to {format(value.high, form)})"
    apart = sign and (value.low > 0 or value.high < 0)
    return _minus(f"**{text}**" if apart else text)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def accuracy_table(study: Study, names: Sequence[str]) -> str:
    """Accuracy on the three sets and its paired difference, for every arm of these conditions."""
    head = ["condition", "arm", "seeds", *SETS, "minus", *(f"Δ {name}" for name in SETS)]
    rows = []
    for condition in names:
        for arm in study.arms(condition):
            base = base_of(arm)
            compare = arm != base and base in study.arms(condition)
            rows.append(
                [
                    condition,
                    arm,
                    f"{len(study.runs(condition, arm))}",
                    *(percent(study.accuracy(condition, arm, name)) for name in SETS),
                    base if compare else "",
                    *(
                        points(study.difference(condition, arm, base, name)) if compare else ""
                        for name in SETS
                    ),
                ]
            )
    return table(head, rows) if rows else "No run of these conditions was done."


def unpack_bits(text: str, count: int) -> np.ndarray:
    """[count] bool of what lab.pack_bits wrote."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)
