"""What a value of a file may be, as a table that is checked before anything is computed from it.

check({"layers": 10**9}, {"layers": whole(1, 4096)}, source="config.json") raises DcodError:
config.json: layers=1000000000 must be a whole number from 1 to 4096.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dcod_jax.errors import DcodError

_SHOWN = 80  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True)
class Bound:
    """A kind of value, its ends (of a number, else of a length), and the bounds of its parts."""

    words: str
    types: tuple[type, ...]
    low: int | float = -math.inf
    high: int | float = math.inf
    items: Bound | None = None  # of a list, or of the values of an object with any keys
    fields: Mapping[str, Bound] | None = None  # of an object
    optional: bool = False  # absent or null is accepted
    others: tuple[Bound, ...] = ()  # one of these is accepted, too

    def fault(self, value: Any) -> tuple[str, Any, Bound] | None:
        """(place below the value, what is there, what it must be) of the first wrong part."""
        if value is None and self.optional:
            return None
        for other in self.others:
            if type(value) in other.types:
                return other.fault(value)
        if type(value) not in self.types:  # exactly: a bool is no whole number
            return "", value, self
        size: Any = value if isinstance(value, int | float) else len(value or ())
        if not self.low <= size <= self.high:  # also of NaN
            return "", value, self
        for name, part, bound in self._parts(value):
            if found := bound.fault(part):
                return f"{name}{found[0]}", found[1], found[2]
        return None

    def kept(self, value: Any) -> Any:
        """A value that holds, without the fields of objects that the bound does not name."""
        for other in self.others:
            if type(value) in other.types:
                return other.kept(value)
        if isinstance(value, dict) and self.fields is not None:
            return {key: of.kept(value[key]) for key, of in self.fields.items() if key in value}
        if self.items is None or value is None:
            return value
        if isinstance(value, dict):
            return {key: self.items.kept(part) for key, part in value.items()}
        return [self.items.kept(part) for part in value]

    def _parts(self, value: Any) -> list[tuple[str, Any, Bound]]:
        found = []
        if self.items is not None:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            found += [(f"[{key!r}]", part, self.items) for key, part in pairs]
        for key, bound in (self.fields or {}).items():
            found.append((f".{key}", value.get(key), bound))
        return found


def whole(low: int, high: int) -> Bound:
    """An int in [low, high]."""
    return Bound(f"a whole number from {low} to {high}", (int,), low, high)


def number(low: int | float, high: int | float) -> Bound:
    """An int or a float in [low, high], which no NaN is."""
    return Bound(f"a number from {low:g} to {high:g}", (int, float), low, high)


def flag() -> Bound:
    """A bool."""
    return Bound("true or false", (bool,))


def text(longest: int = 1 << 20) -> Bound:
    """A text, by its length in characters."""
    return Bound(f"a text of at most {longest} characters", (str,), 0, longest)


def array(items: Bound | None = None, *, fewest: int = 0, most: int = 1 << 24) -> Bound:
    """A list or tuple, by its length, of parts that are as `items` says."""
    of = f" of {fewest} to {most} parts"
    return Bound(f"a list{of}", (list, tuple), fewest, most, items=items)


def mapping(fields: Mapping[str, Bound] | None = None, *, items: Bound | None = None) -> Bound:
    """An object with these fields, or whose values are all as `items` says; others may be there."""
    return Bound("an object", (dict,), items=items, fields=fields)


def either(bound: Bound, other: Bound) -> Bound:
    """What one of the two says of values of its kind."""
    return dataclasses.replace(bound, words=f"{bound.words}, or {other.words}", others=(other,))


def optional(bound: Bound) -> Bound:
    """The same, or absent or null."""
    return dataclasses.replace(bound, words=f"{bound.words}, or null", optional=True)


def check(values: Mapping[str, Any], bounds: Mapping[str, Bound], *, source: object) -> None:
    """Raise DcodError with key, value and bound of the first value that is not what it must be."""
    for key, bound in bounds.items():
        if found := bound.fault(values.get(key)):
            place, value, wanted = found
            if value is None:
                raise DcodError(f"{source}: {key}{place} is missing; it must be {wanted.words}")
            shown = repr(value)
            shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
            raise DcodError(f"{source}: {key}{place}={shown} must be {wanted.words}")
