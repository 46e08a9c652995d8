"""What a graded set says beyond its accuracy: pass@k, maj@k, by length, by difficulty, defects."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from dcod_jax.evaluate.generations import Generation, by_problem
from dcod_jax.evaluate.statistics import (
    ks,
    length_bins,
    majority_at_k,
    pass_at_k,
    share_interval,
    wilson,
)


def details(generations: Sequence[Generation]) -> dict[str, Any]:
    """Plain numbers for results.json.

    pass@k, maj@k: {k: [mean, low, high]}, resampling problems; by_length: quartiles of the tokens
    of an answer; by_difficulty: [] where the set has none; degenerate: shares of all answers.
    """
    groups = list(by_problem(generations).values())
    chosen = ks(len(groups[0]))
    return {
        "pass_at_k": {str(k): _over(groups, lambda g, k=k: _pass(g, k)) for k in chosen},
        "maj_at_k": {str(k): _over(groups, lambda g, k=k: _majority(g, k)) for k in chosen},
        "by_length": _by_length(generations),
        "by_difficulty": _by_difficulty(generations),
        "degenerate": _degenerate(generations),
        "reasons": dict(sorted(collections.Counter(g.reason for g in generations).items())),
    }


def _pass(group: Sequence[Generation], k: int) -> float:
    return pass_at_k(len(group), sum(g.correct for g in group), k)


def _majority(group: Sequence[Generation], k: int) -> float:
    return majority_at_k([g.extracted for g in group], [g.correct for g in group], k)


def _over(
    groups: Sequence[Sequence[Generation]], score: Callable[[Sequence[Generation]], float]
) -> list[float]:
    values = [score(group) for group in groups]
    return [sum(values) / len(values), *share_interval(values)]


def _by_length(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    rows = []
    for low, high in length_bins([g.tokens for g in generations]):
        inside = [g for g in generations if low <= g.tokens <= high]
        share = sum(g.correct for g in inside) / len(inside)
        rows.append({"from": low, "to": high, "answers": len(inside), "accuracy": share})
    return rows


def _by_difficulty(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    found: dict[str, list[Generation]] = {}
    for generation in generations:
        if generation.difficulty:
            found.setdefault(generation.difficulty, []).append(generation)
    rows = []
    for name in sorted(found, key=_natural):
        groups = by_problem(found[name])
        correct, answers = sum(g.correct for g in found[name]), len(found[name])
        scores = [sum(g.correct for g in group) / len(group) for group in groups.values()]
        single = answers == len(groups)
        low, high = wilson(correct, answers) if single else share_interval(scores)
        rows.append(
            {
                "difficulty": name,
                "problems": len(groups),
                "accuracy": correct / answers,
                "low": low,
                "high": high,
            }
        )
    return rows


def _natural(name: str) -> list[Any]:
    """ "Level 10" after "Level 2"."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def _degenerate(generations: Sequence[Generation]) -> dict[str, float]:
    total = len(generations)
    return {
        "no_answer": sum(g.extracted is None for g in generations) / total,
        "truncated": sum(not g.finished for g in generations) / total,
        "loops": sum(g.repeats for g in generations) / total,
        "ungradable": sum(g.reason in ("timeout", "error") for g in generations) / total,
    }


# ---------------------------------------------------------------- tables


def detail_tables(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The tables of {model: details} of one set; those that have something to show."""
    tables = [_at_k(title, rows), _lengths(title, rows), _difficulties(title, rows)]
    return [table for table in (*tables, _defects(title, rows)) if table is not None]


def _at_k(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table | None:
    chosen = list(next(iter(rows.values()))["pass_at_k"])
    if len(chosen) < 2:
        return None
    table = Table(title=f"{title}: pass@k and maj@k (95 %)")
    table.add_column("model")
    table.add_column("k", justify="right")
    for heading in ("pass@k", "maj@k"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        for k in chosen:
            cells = [_interval(*row[kind][k]) for kind in ("pass_at_k", "maj_at_k")]
            table.add_row(name if k == chosen[0] else "", k, *cells)
    return table


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _lengths(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{title}: accuracy by answer length (quartiles of each model's answers)")
    table.add_column("model")
    for heading in ("tokens", "answers", "accuracy"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        for place, part in enumerate(row["by_length"]):
            span = f"{part['from']} to {part['to']}"
            shown = "" if place else name
            table.add_row(shown, span, str(part["answers"]), f"{part['accuracy']:.1%}")
    return table


def _difficulties(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table | None:
    first = next(iter(rows.values()))["by_difficulty"]
    if not first:
        return None
    table = Table(title=f"{title}: accuracy by difficulty (95 %)")
    table.add_column("difficulty")
    table.add_column("problems", justify="right")
    for name in rows:
        table.add_column(name, justify="right")
    for place, group in enumerate(first):
        cells = [row["by_difficulty"][place] for row in rows.values()]
        shown = [_interval(cell["accuracy"], cell["low"], cell["high"]) for cell in cells]
        table.add_row(group["difficulty"], str(group["problems"]), *shown)
    return table


def _defects(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{title}: degenerate outputs, share of all answers")
    table.add_column("model")
    headings = {
        "no_answer": "no answer",
        "truncated": "cut off",
        "loops": "ends in a loop",
        "ungradable": "grading timeout or error",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row['degenerate'][key]:.1%}" for key in headings))
    return table
