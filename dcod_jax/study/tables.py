"""Results of the study as numbers with intervals and as Markdown tables.

All runs have the same problems and all arms the same seeds, so two arms are compared in pairs: a
difference D[seed, problem] in {-1, 0, 1}.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from dcod_jax.configs.study import study_keys
from dcod_jax.errors import DcodError
from dcod_jax.study.conditions import MAIN, from_hex
from dcod_jax.study.domain import SETS

Line = dict[str, Any]
Pick = Callable[[Line], float | None]


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
        """Names of the arms that were run, in the order of the recipe."""
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
        """What the runs of an arm had set, beside the defaults."""
        for line in self.lines:
            if line["kind"] == "settings" and (line["condition"], line["arm"]) == (condition, arm):
                return line["settings"]
        raise DcodError(f"the results hold no settings of {condition!r} {arm!r}")

    def problems(self, condition: str, arm: str) -> int:
        settings = self.settings(condition, arm)
        return int(settings.get("study.problems", study_keys().problems))

    def base(self, condition: str, arm: str) -> tuple[str, str] | None:
        """(condition, arm) that an arm is compared with, or None.

        It is the unweighted form of a weighted method, and SFT for a plain one: in the same
        condition, or in "main" where both conditions have the same settings and starts.
        """
        name = arm.partition("+")[0] if "+" in arm else "sft"
        if name == arm:
            return None
        if name in self.arms(condition):
            return condition, name
        if name not in self.arms(MAIN) or self._world(condition, arm) != self._world(MAIN, name):
            return None
        own, main = self.runs(condition, arm), self.runs(MAIN, name)
        alike = [own[seed]["start"] == main[seed]["start"] for seed in own if seed in main]
        return (MAIN, name) if alike and all(alike) else None

    def _world(self, condition: str, arm: str) -> dict[str, Any]:
        settings = self.settings(condition, arm)
        return {key: value for key, value in settings.items() if not key.startswith("loss.")}

    def correct(
        self, condition: str, arm: str, name: str, seeds: Iterable[int], *, of: str = "correct"
    ) -> np.ndarray:
        """[seeds, problems] of 0 and 1; of="start": those of each run's start."""
        count, runs = self.problems(condition, arm), self.runs(condition, arm)
        return np.array([from_hex(runs[s][of][name], count) for s in seeds], np.float64)

    def accuracy(self, condition: str, arm: str, name: str) -> Estimate:
        return crossed_mean(self.correct(condition, arm, name, self.runs(condition, arm)))

    def difference(self, one: tuple[str, str], base: tuple[str, str], name: str) -> Estimate:
        """Accuracy of one (condition, arm) minus that of another, on the seeds that both have."""
        first, second = self.runs(*one), self.runs(*base)
        seeds = [seed for seed in first if seed in second]
        pair = [self.correct(*each, name, seeds) for each in (one, base)]
        return crossed_mean(pair[0] - pair[1])

    def gain(self, condition: str, arm: str, name: str) -> Estimate:
        """Accuracy minus that of the start that each run began from."""
        seeds = list(self.runs(condition, arm))
        pair = [self.correct(condition, arm, name, seeds, of=of) for of in ("correct", "start")]
        return crossed_mean(pair[0] - pair[1])

    def starts(self, condition: str, name: str) -> np.ndarray:
        """Accuracy of the condition's starts, one for each seed."""
        found: dict[int, float] = {}
        for arm in self.arms(condition):
            seeds = list(self.runs(condition, arm))
            means = self.correct(condition, arm, name, seeds, of="start").mean(axis=1)
            found |= dict(zip(seeds, means.tolist(), strict=True))
        return np.array(list(found.values()))

    def of(self, condition: str, arm: str, pick: Pick) -> list[float]:
        """The picked number of each test run that has it."""
        values = [pick(line) for line in self.runs(condition, arm).values()]
        return [float(value) for value in values if value is not None]

    def paired(self, one: tuple[str, str], base: tuple[str, str], pick: Pick) -> Estimate | None:
        """The picked number of one (condition, arm) minus another's, over seeds; None: no pair."""
        first, second = self.runs(*one), self.runs(*base)
        pairs = [(pick(first[s]), pick(second[s])) for s in first if s in second]
        changes = [a - b for a, b in pairs if a is not None and b is not None]
        return seed_mean(changes) if changes else None


# ---------------------------------------------------------------- Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: Estimate, *, scale: float = 1.0, sign: bool = False) -> str:
    """Mean and interval; with sign in bold where the interval excludes 0."""
    texts = [format(scale * x, "+.1f" if sign else ".1f") for x in dataclasses.astuple(value)]
    text = texts[0].replace("-", "−")
    if math.isnan(value.low):
        return text
    text = "{} ({} to {})".format(*texts).replace("-", "−")
    return f"**{text}**" if sign and (value.low > 0 or value.high < 0) else text


def percent(value: Estimate) -> str:
    """0.865 with its interval -> "86.5 (84.0 to 89.0)"; bounds are cut to 0 and 100."""
    return number(Estimate(value.mean, max(value.low, 0.0), min(value.high, 1.0)), scale=100.0)


def points(value: Estimate) -> str:
    """Percentage points with sign."""
    return number(value, scale=100.0, sign=True)


def _arm_table(
    study: Study,
    names: Sequence[str],
    head: Sequence[str],
    cells: Callable[[str, str], Sequence[str] | None],
) -> str:
    """A table of a row for each arm of these conditions; cells(condition, arm) None: no row."""
    rows = []
    for condition in names:
        for arm in study.arms(condition):
            found = cells(condition, arm)
            rows += [] if found is None else [[condition, f"`{arm}`", *found]]
    return table(["condition", "arm", *head], rows)


def accuracy_table(study: Study, names: Sequence[str]) -> str:
    """Accuracy on the three sets, percent."""

    def cells(condition: str, arm: str) -> list[str]:
        accuracies = (percent(study.accuracy(condition, arm, name)) for name in SETS)
        return [f"{len(study.runs(condition, arm))}", *accuracies]

    return _arm_table(study, names, ["seeds", *SETS], cells)


def difference_table(study: Study, names: Sequence[str]) -> str:
    """Paired differences of accuracy, percentage points, and of the two drift numbers."""

    def cells(condition: str, arm: str) -> list[str] | None:
        one, base = (condition, arm), study.base(condition, arm)
        if base is None:
            return None
        drift = [study.paired(one, base, _drift(key)) for key in ("excess", "accumulated")]
        return [
            f"`{base[1]}`",
            *(points(study.difference(one, base, name)) for name in SETS),
            *("n/a" if value is None else number(value, sign=True) for value in drift),
        ]

    head = ["minus", *SETS, "ExAccErr, points", "error on own prefixes, nats"]
    return _arm_table(study, names, head, cells)


def gain_table(study: Study, names: Sequence[str]) -> str:
    """Paired differences to the start, percentage points."""

    def cells(condition: str, arm: str) -> list[str]:
        return [points(study.gain(condition, arm, name)) for name in SETS]

    return _arm_table(study, names, [f"{name}, minus start" for name in SETS], cells)


def drift_table(study: Study, names: Sequence[str]) -> str:
    """ExAccErr and its parts."""

    def cells(condition: str, arm: str) -> list[str]:
        keys = ("excess", "accumulated", "reference")
        values = [study.of(condition, arm, _drift(key)) for key in keys]
        return [f"{len(values[0])}", *(number(seed_mean(v)) if v else "n/a" for v in values)]

    return _arm_table(study, names, ["seeds", "ExAccErr, %", "R, nats", "E, nats"], cells)


# Column of the cost table -> (number of a run, its format).
COSTS: dict[str, tuple[Pick, str]] = {
    "train CPU-s": (lambda line: line["train_cpu"], ".1f"),
    "tokens trained on": (lambda line: line["tokens"], ",.0f"),
    "tokens generated": (lambda line: line["generated"], ",.0f"),
    "effective sample size": (lambda line: line["curves"].get("ess"), ".2f"),
    "weight of tokens of q ≤ 0.9": (lambda line: line["curves"].get("unknown_weight"), ".2f"),
    "nll at the end": (lambda line: line["curves"]["nll"], ".2f"),
}


def cost_table(study: Study, names: Sequence[str]) -> str:
    """Costs and weights of a run, means over the seeds."""

    def cells(condition: str, arm: str) -> list[str]:
        found = [f"{next(iter(study.runs(condition, arm).values()))['rate']:g}"]
        for pick, form in COSTS.values():
            values = study.of(condition, arm, pick)
            found.append(format(float(np.mean(values)), form) if values else "n/a")
        return found

    return _arm_table(study, names, ["rate", *COSTS], cells)


def rates_table(study: Study) -> str:
    """The learning-rate grids: mean validation accuracy of the tuning runs, percent."""
    tunes = [line for line in study.lines if line["kind"] == "tune"]
    rates = sorted({line["rate"] for line in tunes})
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for x in tunes:
        own = found.setdefault((x["condition"], x["arm"]), {})
        own.setdefault(x["rate"], []).append(x["accuracy"]["validation"])
    rows = []
    for (condition, arm), own in found.items():
        means = [round(float(np.mean(own[rate])), 9) if rate in own else None for rate in rates]
        place = means.index(max(value for value in means if value is not None))
        cells = ["" if value is None else f"{100 * value:.1f}" for value in means]
        cells[place] = f"**{cells[place]}**"
        rows.append([condition, f"`{arm}`", *cells])
    return table(["condition", "arm", *(f"{rate:g}" for rate in rates)], rows)


def references_table(study: Study) -> str:
    """Accuracy of starts (mean, lowest to highest) and teacher, percent, and the traces."""
    head = ["condition", *(f"start, {x}" for x in SETS), *(f"teacher, {x}" for x in SETS)]
    rows = []
    for line in study.lines:
        if line["kind"] != "reference" or line["condition"] not in study.conditions():
            continue
        starts = [100 * study.starts(line["condition"], name) for name in SETS]
        cells = [f"{x.mean():.1f} ({x.min():.1f} to {x.max():.1f})" for x in starts]
        cells += [f"{100 * line['teacher'][name]:.1f}" for name in SETS]
        dropped = ", ".join(f"{count:,} {name}" for name, count in line["counts"].items() if count)
        styles = ", ".join(f"{count:,} {name}" for name, count in line["styles"].items() if count)
        rows.append([line["condition"], *cells, dropped, styles])
    return table([*head, "samples", "styles"], rows)


def progress_table(study: Study) -> str:
    """Which parts were run: test runs by condition."""
    rows = []
    for condition in dict.fromkeys(x["condition"] for x in study.lines):
        counts = {arm: len(study.runs(condition, arm)) for arm in study.arms(condition)}
        full = ", ".join(f"`{arm}` {count}" for arm, count in counts.items())
        rows.append([condition, full or "none yet"])
    return table(["condition", "test runs (seeds) of each arm"], rows)


def _drift(key: str) -> Pick:
    return lambda line: (line.get("drift") or {}).get(key)


BLOCKS: dict[str, Callable[[Study, Sequence[str]], str]] = {
    "progress": lambda study, names: progress_table(study),
    "rates": lambda study, names: rates_table(study),
    "references": lambda study, names: references_table(study),
    "accuracy": accuracy_table,
    "differences": difference_table,
    "gains": gain_table,
    "drift": drift_table,
    "cost": cost_table,
}


def fill_page(page: str, study: Study) -> str:
    """The page with the tables between its marker comments replaced.

    A marker is `<!-- study: BLOCK condition, condition -->`, ended by `<!-- end -->`; no condition
    means all that have a test run. Raises DcodError for a block that is not in BLOCKS.
    """
    done = study.conditions()

    def fill(found: re.Match[str]) -> str:
        block, wanted = found[1], [name.strip() for name in found[2].split(",") if name.strip()]
        if block not in BLOCKS:
            raise DcodError(f"study page: no table {block!r}; there are {', '.join(BLOCKS)}")
        names = [name for name in (wanted or done) if name in done]
        missing = [name for name in wanted if name not in done]
        text = BLOCKS[block](study, names) if names else ""
        if missing:
            text += f"\n\nNot run: {', '.join(missing)}."
        mark = f"<!-- study: {' '.join([block, ', '.join(wanted)]).rstrip()} -->"
        return f"{mark}\n\n{text.strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- study: (\S+) ?(.*?) ?-->.*?<!-- end -->", fill, page, flags=re.DOTALL)
