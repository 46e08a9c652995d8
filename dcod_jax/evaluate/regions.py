r"""Sets of real numbers with known ends: unions, intersections and what they leave out.

`Region` is the entry; ends are exact. Standard library only.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
from collections.abc import Iterable

from dcod_jax.evaluate.numerals import close

End = fractions.Fraction | float  # a float is infinite


@dataclasses.dataclass(frozen=True, order=True)
class Span:
    """An interval; an end with its side: -1 just below the number, 0 at it, 1 just above it.

    (1, 3] is low=(1, 1), high=(3, 0); the point 2 is low=(2, 0), high=(2, 0).
    """

    low: tuple[End, int]
    high: tuple[End, int]


@dataclasses.dataclass(frozen=True)
class Region:
    """Spans in order, none of which touch each other."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Region:
        """The union of spans: (1,3] and (3,5) are (1,5), (1,3) and (3,5) are not."""
        merged: list[Span] = []
        for span in sorted(s for s in spans if s.low <= s.high):
            last = merged[-1] if merged else None
            touches = last is not None and (
                span.low <= last.high
                or (span.low[0] == last.high[0] and span.low[1] - last.high[1] == 1)
            )
            if last is not None and touches:
                merged[-1] = Span(last.low, max(last.high, span.high))
            else:
                merged.append(span)
        return cls(tuple(merged))

    def __or__(self, other: Region) -> Region:
        return Region.of((*self.spans, *other.spans))

    def __and__(self, other: Region) -> Region:
        return Region.of(
            Span(max(a.low, b.low), min(a.high, b.high)) for a in self.spans for b in other.spans
        )

    def __invert__(self) -> Region:
        edges = [(-math.inf, 1)]
        for span in self.spans:
            edges += [(span.low[0], span.low[1] - 1), (span.high[0], span.high[1] + 1)]
        edges.append((math.inf, -1))
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return Region.of(Span(low, high) for low, high in pairs)

    def same(self, other: Region) -> bool:
        """Equal ends, decimals to six digits."""
        return len(self.spans) == len(other.spans) and all(
            a[1] == b[1] and (a[0] == b[0] or (not _infinite(a, b) and close(a[0], b[0])))
            for one, two in zip(self.spans, other.spans, strict=True)
            for a, b in ((one.low, two.low), (one.high, two.high))
        )


def _infinite(*ends: tuple[End, int]) -> bool:
    return any(isinstance(value, float) for value, _ in ends)


def interval(brackets: str, low: End, high: End) -> Region:
    """ "[)" and 1, 3 -> [1,3)."""
    return Region.of([Span((low, int(brackets[0] == "(")), (high, -int(brackets[1] == ")")))])


def point(value: End) -> Region:
    return Region.of([Span((value, 0), (value, 0))])


LINE = interval("()", -math.inf, math.inf)
