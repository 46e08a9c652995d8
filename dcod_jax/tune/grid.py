"""What a tuning tries: candidates from tune.grid, and the steps that each round gives them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from dcod_jax.errors import DcodError, nearest

# Keys that every candidate must share, or accuracies and steps could not be compared.
SHARED = ("run_dir", "compare", "tune.", "train.steps", "train.best_metric", "train.eval")
SHARED += ("evaluate.", "data.", "prepare.", "generate.", "score.", "hosts.", "mesh.")
_MOST = 1000  # candidates


def candidates(grid: Sequence[str], known: Container[str]) -> list[tuple[str, ...]]:
    """The changes of each candidate: one alternative of each entry, the last entry fastest.

    ("optim.learning_rate=1e-5|3e-5",) -> [("optim.learning_rate=1e-5",), (…=3e-5,)]. An alternative
    may be several changes, "loss.weights.name=sigmoid loss.weights.temperature=0.3", and a bare
    value is one of the entry's first key. Raises DcodError for a key that is unknown or shared.
    """
    axes: list[list[tuple[str, ...]]] = []
    for entry in grid:
        axes.append([])
        first, equals, _ = (part.strip() for part in entry.partition("="))
        _check_key(f"{first}{equals}", entry, known)
        for text in entry.split("|"):
            changes = [text.strip()]
            if text.partition("=")[0].strip() in known:
                changes = text.split()
            elif text.strip():
                changes = [f"{first}={text.strip()}"]
            for change in changes:
                _check_key(change, entry, known)
            axes[-1].append(tuple(changes))
    if (count := math.prod(map(len, axes))) > _MOST:
        raise DcodError(f"tune.grid names {count:,} candidates; at most {_MOST:,} are tried")
    found = [tuple(itertools.chain(*parts)) for parts in itertools.product(*axes)]
    for changes in found:
        keys = [change.partition("=")[0] for change in changes]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise DcodError(f"tune.grid sets {', '.join(twice)} twice in one candidate")
    if len(set(found)) < len(found):
        raise DcodError("tune.grid names the same candidate twice")
    return found


def _check_key(change: str, entry: str, known: Container[str]) -> None:
    key, equals, _ = change.partition("=")
    if not equals or key not in known:
        names = known if isinstance(known, Mapping) else ()
        raise DcodError(
            f"tune.grid: {entry!r} has {change!r}, where a key of the config and its value are "
            f'expected{nearest(key, list(names))}: "optim.learning_rate=1e-5|3e-5"'
        )
    if key.startswith(SHARED):
        raise DcodError(f"tune.grid: {key} is the same for all candidates; set it in the recipe")


@dataclasses.dataclass(frozen=True)
class Rung:
    """One round: so many candidates are trained up to this step."""

    candidates: int
    steps: int


def rungs(count: int, *, steps: int, factor: int, budget: int) -> list[Rung]:
    """Successive halving: of each round's candidates one in `factor` goes on, from where it is.

    The last round has one candidate and ends at `steps`; each other one ends `factor` times as late
    as that before it, and as late as the budget (optimizer steps over all candidates) lets it.
    12 candidates, 200 steps, factor 3, budget 600 -> [12 to 17, 4 to 51, 2 to 153, 1 to 200].
    Raises DcodError where the budget is less than it takes with a first round of one step.
    """
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // factor))

    def after(first: int) -> list[Rung]:
        ends = [first * factor**i for i in range(len(sizes) - 1)] + [steps]
        return [Rung(size, end) for size, end in zip(sizes, ends, strict=True)]

    longest = (steps - 1) // factor ** max(len(sizes) - 2, 0)
    if len(sizes) > 1 and longest < 1:
        raise DcodError(
            f"train.steps={steps} are too few for {count} candidates in {len(sizes)} rounds "
            f"(tune.factor={factor}); lengthen it, or make tune.grid smaller"
        )
    least = spent(after(1))
    if budget < least:
        raise DcodError(
            f"tune.budget={budget} steps are too few: {count} candidates in {len(sizes)} rounds "
            f"take at least {least}, of which the chosen one has train.steps={steps}"
        )
    if len(sizes) == 1:
        return after(steps)
    more = spent(after(2)) - least  # for each step of the first round: spent is linear in it
    return after(min(longest, 1 + (budget - least) // more))


def spent(rounds: Sequence[Rung]) -> int:
    """Optimizer steps of all candidates over all rounds."""
    before = [0, *(rung.steps for rung in rounds)]
    return sum(r.candidates * (r.steps - b) for r, b in zip(rounds, before, strict=False))


def candidates_and_rounds(flat: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[Rung]]:
    """(candidates, rounds) of a config's {key: value}; raises DcodError for what cannot be."""
    found = candidates(flat["tune.grid"], flat)
    steps = flat["train.steps"]
    budget = flat["tune.budget"] or 4 * steps
    return found, rungs(len(found), steps=steps, factor=flat["tune.factor"], budget=budget)


def config_errors(flat: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a grid: it could not be tried, compared or paid for."""
    if not flat["tune.grid"] or flat["tune.factor"] < 2:  # which config_checks.py refuses
        return
    if flat["compare"]:
        yield "tune.grid and compare are both set: they are two ways to name variants"
    if not flat["train.best_metric"]:
        yield "tune.grid needs train.best_metric, by which it chooses: accuracy or eval/nll"
    try:
        candidates_and_rounds(flat)
    except DcodError as error:
        yield str(error)
