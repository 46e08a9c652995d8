"""Sets of real numbers, as what holds for a number and where that may change.

Two sets are the same where they agree at every end, between the ends and beyond them. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import itertools
import math
import operator
from collections.abc import Callable

from dcod_jax.evaluate.algebra import Work, read
from dcod_jax.evaluate.numerals import close
from dcod_jax.evaluate.operations import Value

End = fractions.Fraction | float
_GRID = [fractions.Fraction(n, 4) for n in range(-200, 201)]  # between which ends are looked for
_ZERO = 1e-9
_SIGNS: dict[str, Callable[[End, int], bool]] = {
    **{"<": operator.lt, "\\le": operator.le, ">": operator.gt, "\\ge": operator.ge},
    "\\ne": operator.ne,
}


@dataclasses.dataclass(frozen=True)
class Region:
    """The numbers for which `holds`; it is the same for all numbers between two `ends`."""

    ends: frozenset[End]
    holds: Callable[[End], bool]

    def __or__(self, other: Region) -> Region:
        return Region(self.ends | other.ends, lambda x: self.holds(x) or other.holds(x))

    def __and__(self, other: Region) -> Region:
        return Region(self.ends | other.ends, lambda x: self.holds(x) and other.holds(x))

    def __invert__(self) -> Region:
        return Region(self.ends, lambda x: not self.holds(x))

    def same(self, other: Region) -> bool:
        """Whether both hold the same numbers; ends are equal to six digits."""
        ends: list[End] = []
        for end in sorted(self.ends | other.ends):
            if not ends or not close(end, ends[-1]):
                ends.append(end)
        between = [(one + two) / 2 for one, two in itertools.pairwise(ends)]
        beyond = [ends[0] - 1, ends[-1] + 1] if ends else [fractions.Fraction(0)]
        return all(self.holds(x) == other.holds(x) for x in (*ends, *between, *beyond))


def _difference(left: End, right: End) -> End:
    """0 for what is equal to six digits."""
    difference = left - right
    return 0.0 if math.isfinite(difference) and close(left, right) else difference


def interval(brackets: str, low: End, high: End) -> Region:
    """ "[)" and 1, 3 -> [1,3)."""
    above = _SIGNS[">" if brackets[0] == "(" else "\\ge"]
    below = _SIGNS["<" if brackets[1] == ")" else "\\le"]
    ends = frozenset(end for end in (low, high) if math.isfinite(end))
    return Region(ends, lambda x: above(_difference(x, low), 0) and below(_difference(x, high), 0))


def point(value: End) -> Region:
    """The region of one number."""
    return interval("[]", value, value)


def where(terms: list[str], signs: list[str]) -> tuple[str, Region] | None:
    r"""The variable, and the numbers for which -1 < 2x - 3 \le 5 holds; None for several."""
    names: set[str] = set()
    found = []
    for left, sign, right in zip(terms, signs, terms[1:], strict=False):
        difference = read(f"{left}-({right})")
        if difference is None:
            return None
        difference.work = Work()
        names |= difference.names
        found.append((difference, sign))
    if len(names) != 1:
        return None
    (name,) = names
    regions = [_where(lambda x, f=f: _real(f({name: x})), _SIGNS[sign]) for f, sign in found]
    return name, functools.reduce(operator.and_, regions)


def _real(value: Value | None) -> End | None:
    if isinstance(value, complex):
        return None if abs(value.imag) > _ZERO else 0.0 if abs(value.real) < _ZERO else value.real
    return value


def _where(difference: Callable[[End], End | None], sign: Callable[[End, int], bool]) -> Region:
    def holds(x: End) -> bool:
        found = difference(x)
        return found is not None and sign(found, 0)

    zero, one = difference(fractions.Fraction(0)), difference(fractions.Fraction(1))
    if zero is not None and one is not None and zero != one:  # a linear one has its exact end
        end = zero / (zero - one)
        there = difference(-end - 1)
        if there is not None and difference(end) == 0 and (
            close(there, zero - (end + 1) * (one - zero))):  # fmt: skip
            return Region(frozenset([end]), holds)
    values: list[tuple[End, End]]
    values = [(x, found) for x in _GRID if (found := difference(x)) is not None]
    ends: set[End] = {x for x, found in values if found == 0}
    for (low, before), (high, after) in itertools.pairwise(values):
        if before * after < 0:
            ends.add(_between(difference, float(low), float(high), rising=after > 0))
    return Region(frozenset(ends), holds)


def _between(
    difference: Callable[[End], End | None], low: float, high: float, *, rising: bool
) -> float:
    """Where a function changes its sign, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        found = difference(fractions.Fraction(middle))
        low, high = (low, middle) if found is not None and (found > 0) == rising else (middle, high)
    return round(high, 12)


LINE = interval("()", -math.inf, math.inf)
