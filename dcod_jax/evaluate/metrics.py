"""Metrics of graded answers: accuracy, pass@k, maj@k, by length, by difficulty, defects.

A metric is a function of all answers to one set that returns plain numbers. A new one is an entry
of METRICS, its key in results.json, and, where it has a table, a line of `detail_tables`.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dcod_jax.errors import DcodError
from dcod_jax.evaluate.generations import Generation
from dcod_jax.evaluate.spelling import canonical
from dcod_jax.evaluate.statistics import bootstrap_interval, share_interval, wilson
from dcod_jax.evaluate.units import quantity

SUBSETS = 2_000  # majority votes of one problem: of all subsets, or of this many drawn ones
Rows = Mapping[str, Mapping[str, Any]]  # model -> what `measure` returns

# ---------------------------------------------------------------- accuracy


def by_problem(generations: Sequence[Generation]) -> dict[str, list[Generation]]:
    """The answers to each problem; raises DcodError when one has more of them than another."""
    groups: dict[str, list[Generation]] = {}
    for generation in generations:
        groups.setdefault(generation.id, []).append(generation)
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1:
        raise DcodError(f"problems have {sorted(counts)} answers; expected equally many for each")
    return groups


def problem_scores(generations: Sequence[Generation]) -> dict[str, float]:
    """The share of correct answers of each problem: pass@1."""
    groups = by_problem(generations)
    return {name: sum(g.correct for g in group) / len(group) for name, group in groups.items()}


def accuracy(generations: Sequence[Generation]) -> tuple[float, float, float]:
    """Share of correct answers with its 95 % interval.

    Wilson's with one answer a problem, else `share_interval` over problems.
    """
    scores, answers = problem_scores(generations), len(generations)
    correct = sum(g.correct for g in generations)
    if answers == len(scores):
        return correct / answers, *wilson(correct, answers)
    return correct / answers, *share_interval(list(scores.values()))


def paired_difference(
    first: Sequence[Generation], second: Sequence[Generation], *, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of second minus first on the same problems, with its bootstrap 95 % interval.

    Problems are resampled in pairs, so what both models find hard cancels. Raises DcodError when
    the two have other problems.
    """
    before, after = problem_scores(first), problem_scores(second)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise DcodError(
            f"the two runs differ in {len(odd)} problems (such as {odd[0]!r}); a paired "
            "comparison needs the same ones"
        )
    change = [after[name] - before[name] for name in before]
    return sum(change) / len(change), *bootstrap_interval(change, bounds=(-1.0, 1.0), seed=seed)


def measure(generations: Sequence[Generation], *, seconds: float) -> dict[str, Any]:
    """The row of one model in results.json: accuracy, counts, and METRICS as "details"."""
    groups, defects = by_problem(generations), degenerate(generations)
    return {
        "problems": len(groups),
        "correct": sum(g.correct for g in generations),
        **dict(zip(("accuracy", "low", "high"), accuracy(generations), strict=True)),
        **{name: defects[name] for name in ("no_answer", "truncated")},
        "tokens": sum(g.tokens for g in generations),
        "seconds": seconds,
        "samples": len(generations) // len(groups),
        "details": {name: metric(generations) for name, metric in METRICS.items()},
    }


# ---------------------------------------------------------------- several answers to a problem


def pass_at_k(total: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, hold a correct one.

    1 − C(n−c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374; (4, 1, 2) -> 0.5.
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise DcodError(f"pass@{k} of {correct} correct among {total}: need 1 <= k <= n, c <= n")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def vote_key(answer: str | None) -> Hashable:
    """Equal for answers that count as one in a vote: spelling, number format, unit do not matter.

    "18.0", "$18$" and "18 m" are one; "1/2" and "0.5" are two, as no algebra is done.
    """
    if answer is None:
        return None
    one = quantity(canonical(answer))
    text = re.sub(r"\s", "", one.value)
    try:
        value = float(text) * one.factor
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def majority_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int, *, seed: int = 0
) -> float:
    """Expected correctness of the most frequent of k answers drawn without replacement.

    None has no vote; no vote at all is wrong; a tie is broken at random, in expectation. Exact
    where there are at most SUBSETS subsets, else over as many drawn ones.
    """
    total = len(answers)
    if len(correct) != total or not 1 <= k <= total:
        raise DcodError(f"maj@{k} of {total} answers and {len(correct)} verdicts: need 1 <= k <= n")
    keys = [vote_key(answer) for answer in answers]
    if math.comb(total, k) <= SUBSETS:
        subsets = itertools.combinations(range(total), k)
    else:
        generator = np.random.default_rng(seed)
        subsets = (generator.permutation(total)[:k].tolist() for _ in range(SUBSETS))
    return float(np.mean([_vote(keys, correct, subset) for subset in subsets]))


def _vote(keys: Sequence[Hashable], correct: Sequence[bool], subset: Sequence[int]) -> float:
    counts: dict[Hashable, list[bool]] = {}
    for index in subset:
        if keys[index] is not None:
            counts.setdefault(keys[index], []).append(bool(correct[index]))
    if not counts:
        return 0.0
    most = max(map(len, counts.values()))
    tied = [marks for marks in counts.values() if len(marks) == most]
    return sum(sum(marks) / len(marks) for marks in tied) / len(tied)


def ks(samples: int) -> list[int]:
    """The k that a table shows: powers of two up to n, and n itself; 6 -> [1, 2, 4, 6]."""
    powers = [1 << i for i in range(samples.bit_length()) if 1 << i < samples]
    return [*powers, samples]


def _at_k(
    generations: Sequence[Generation], score: Callable[[Sequence[Generation], int], float]
) -> dict[str, list[float]]:
    """{k: [mean over problems, low, high]}."""
    groups = list(by_problem(generations).values())
    found = {}
    for k in ks(len(groups[0])):
        values = [score(group, k) for group in groups]
        found[str(k)] = [sum(values) / len(values), *share_interval(values)]
    return found


# ---------------------------------------------------------------- groups of answers, defects


def length_bins(tokens: Sequence[int], *, bins: int = 4) -> list[tuple[int, int]]:
    """Inclusive ranges of about equally many lengths: [1, 2, 3, 4], bins=2 -> [(1, 2), (3, 4)].

    Equal lengths are never split, so there may be fewer bins.
    """
    ranges: list[tuple[int, int]] = []
    for piece in np.array_split(np.sort(np.asarray(tokens, np.int64)), bins):
        if not len(piece):
            continue
        low, high = int(piece[0]), int(piece[-1])
        low = max(low, ranges[-1][1] + 1) if ranges else low
        if low <= high:
            ranges.append((low, high))
    return ranges


def by_length(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """Accuracy in quartiles of the tokens of an answer."""
    rows = []
    for low, high in length_bins([g.tokens for g in generations]):
        inside = [g.correct for g in generations if low <= g.tokens <= high]
        share = sum(inside) / len(inside)
        rows.append({"from": low, "to": high, "answers": len(inside), "accuracy": share})
    return rows


def by_difficulty(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """Accuracy for each difficulty; [] where the set has none."""
    groups: dict[str, list[Generation]] = {}
    for generation in generations:
        if generation.difficulty:
            groups.setdefault(generation.difficulty, []).append(generation)
    rows = []
    for name in sorted(groups, key=_natural):
        found = dict(zip(("accuracy", "low", "high"), accuracy(groups[name]), strict=True))
        rows.append({"difficulty": name, "problems": len(by_problem(groups[name]))} | found)
    return rows


def _natural(name: str) -> list[Any]:
    """ "Level 10" after "Level 2"."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def degenerate(generations: Sequence[Generation]) -> dict[str, float]:
    """Shares of all answers that have a defect."""
    total = len(generations)
    return {
        "no_answer": sum(g.extracted is None for g in generations) / total,
        "truncated": sum(not g.finished for g in generations) / total,
        "loops": sum(g.repeats for g in generations) / total,
    }


METRICS: dict[str, Callable[[Sequence[Generation]], Any]] = {
    "pass_at_k": lambda generations: _at_k(
        generations, lambda group, k: pass_at_k(len(group), sum(g.correct for g in group), k)
    ),
    "maj_at_k": lambda generations: _at_k(
        generations,
        lambda group, k: majority_at_k([g.extracted for g in group], [g.correct for g in group], k),
    ),
    "by_length": by_length,
    "by_difficulty": by_difficulty,
    "degenerate": degenerate,
    "reasons": lambda generations: dict(
        sorted(collections.Counter(g.reason for g in generations).items())
    ),
}

# ---------------------------------------------------------------- tables


def number_table(title: str, first: str, *headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def show(*tables: Table) -> None:
    """Print tables to stdout, 110 columns wide where that is no terminal."""
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    console.print(*tables)


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.1%} ({low:{sign}.1%} to {high:{sign}.1%})"


def accuracy_table(title: str, rows: Rows, *, baseline: str) -> Table:
    """Accuracy with its interval, and the paired difference to the baseline."""
    minus = f"minus {baseline} (paired 95 %)"
    headings = ("correct", "accuracy", "95 % interval", minus, "no answer", "cut off")
    table = number_table(title, "model", *headings)
    keys = ("difference", "difference_low", "difference_high")
    for name, row in rows.items():
        of = "" if row["samples"] == 1 else f" of {row['samples'] * row['problems']}"
        table.add_row(
            name,
            f"{row['correct']}{of}",
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            _interval(*(row[key] for key in keys), sign="+") if keys[0] in row else "",
            f"{row['no_answer']:.1%}",
            f"{row['truncated']:.1%}",
        )
    return table


def _long_table(title: str, parts: Mapping[str, Sequence[Sequence[str]]], *headings: str) -> Table:
    """A table with several rows for each model, the first of which names it."""
    table = number_table(title, "model", *headings)
    for name, rows in parts.items():
        for place, cells in enumerate(rows):
            table.add_row("" if place else name, *cells)
    return table


def _difficulty_table(title: str, details: Rows) -> Table:
    title += ": accuracy by difficulty (95 %)"
    table = number_table(title, "difficulty", "problems", *details)
    for groups in zip(*(row["by_difficulty"] for row in details.values()), strict=True):
        shown = [_interval(one["accuracy"], one["low"], one["high"]) for one in groups]
        table.add_row(groups[0]["difficulty"], str(groups[0]["problems"]), *shown)
    return table


def detail_tables(title: str, rows: Rows) -> list[Table]:
    """The tables of one set that have something to show."""
    details = {name: row["details"] for name, row in rows.items()}
    kinds = ("pass_at_k", "maj_at_k")
    at_k = {name: [[k, *(_interval(*row[kind][k]) for kind in kinds)] for k in row["pass_at_k"]]
            for name, row in details.items()}  # fmt: skip
    lengths = {name: [[f"{part['from']} to {part['to']}", str(part["answers"]),
                       f"{part['accuracy']:.1%}"] for part in row["by_length"]]
               for name, row in details.items()}  # fmt: skip
    defects = {name: [[f"{share:.1%}" for share in row["degenerate"].values()]]
               for name, row in details.items()}  # fmt: skip
    tables = [
        _long_table(f"{title}: accuracy by answer length (quartiles of each model's answers)",
                    lengths, "tokens", "answers", "accuracy"),
        _long_table(f"{title}: degenerate outputs, share of all answers",
                    defects, "no answer", "cut off", "ends in a loop"),
    ]  # fmt: skip
    first = next(iter(details.values()))
    if first["by_difficulty"]:
        tables.insert(1, _difficulty_table(title, details))
    if len(first["pass_at_k"]) > 1:
        tables.insert(
            0, _long_table(f"{title}: pass@k and maj@k (95 %)", at_k, "k", "pass@k", "maj@k")
        )
    return tables
