r"""Equality that needs algebra: two expressions are evaluated, exactly where they are rational.

`same_expression` and `read` are the entries. Variables are given numbers. An expression that is not
understood has no value and equals no other. Time is bounded. Standard library only.
"""

from __future__ import annotations

import cmath
import dataclasses
import fractions
import functools
import operator
import random
import re
from collections.abc import Callable

from dcod_jax.evaluate import operations as ops
from dcod_jax.evaluate.numerals import close, is_rounded
from dcod_jax.evaluate.operations import UnknownError, Value
from dcod_jax.evaluate.spelling import EQUALS, split

Values = dict[str, Value]
Evaluated = Callable[[Values], Value]

_STEPS = 400  # of an integral
_MAX_WORK = 15_000  # operations in a comparison of two answers
_TOKEN = re.compile(
    r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?|\\[A-Za-z]+|mod(?![A-Za-z])"
    r"|[A-Za-z](?:_(?:\w|\{\w{1,3}\}))?'*|[-+*/^!|(){}\[\],_=])"
)
_VARIABLE = re.compile(
    r"[A-Za-z](?:_\{?\w{1,3}\}?)?"
    r"|\\(?:theta|alpha|beta|gamma|lambda|mu|phi|omega|sigma|delta|epsilon|rho|tau)"
)
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
_ENDS = {*_CLOSING.values(), *ops.BETWEEN}


@dataclasses.dataclass
class Work:
    """The operations that a comparison of two answers has done."""

    done: int = 0
    imaginary: bool = False  # whether something was, on the way to a value


class Expression:
    """The function that an expression is of the variables in `names`."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        place = 0
        while match := _TOKEN.match(text, place):
            self.tokens.append(match.group(1))
            place = match.end()
        if text[place:].strip():
            raise UnknownError
        self.tokens.append("")
        self.place = 0
        self.names: set[str] = set()
        self.inside: list[str] = []  # the brackets that are open
        self.work = Work()
        self.evaluated = self._sum()
        self._take("")

    def __call__(self, values: Values) -> Value | None:
        """The value; None where there is none, or where `work` is too much already."""
        try:
            value = self.evaluated(values)
        except (UnknownError, KeyError, ArithmeticError, ValueError, RecursionError, TypeError):
            return None
        return value if isinstance(value, fractions.Fraction) or cmath.isfinite(value) else None

    @property
    def _next(self) -> str:
        return self.tokens[self.place]

    def _take(self, *expected: str) -> str:
        token = self._next
        if expected and token not in expected:
            raise UnknownError
        self.place += 1
        return token

    def _apply(self, function: Callable[..., Value], *given: Evaluated) -> Evaluated:
        return lambda values: self._checked(function(*(one(values) for one in given)))

    def _checked(self, value: Value) -> Value:
        """The value; what takes too long, or is too large, has none."""
        self.work.done += 1
        if isinstance(value, fractions.Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            self.work.done += bits >> 6 if bits <= 2 * ops.MAX_BITS else _MAX_WORK
        else:
            value = complex(value)
            self.work.imaginary |= _imaginary(value)
        if self.work.done > _MAX_WORK:
            raise UnknownError
        return value

    def _sum(self) -> Evaluated:
        found = self._product()
        while self._next in ("+", "-"):
            minus, term = self._take() == "-", self._product()
            term = self._apply(lambda value: -value, term) if minus else term
            found = self._apply(ops.add, found, term)
        return found

    def _product(self) -> Evaluated:
        found = self._signed()
        while True:
            before, token = self.tokens[self.place - 1], self._next
            if token in ops.BETWEEN:
                found = self._apply(ops.BETWEEN[self._take()], found, self._signed())
            elif self._begins() and not (token[0].isdigit() and before[-1].isalnum()):
                found = self._apply(operator.mul, found, self._power())
            else:
                return found

    def _begins(self) -> bool:
        """Whether a factor begins here."""
        token = self._next
        if token == "|":
            return self.inside[-1:] != ["|"]
        return bool(re.match(r"[\w.({\[\\]", token)) and token not in _ENDS

    def _signed(self) -> Evaluated:
        if self._next not in ("+", "-"):
            return self._power()
        negative, found = self._take() == "-", self._signed()
        return self._apply(lambda value: -value, found) if negative else found

    def _power(self) -> Evaluated:
        found = self._primary()
        while self._next in ("^", "!"):
            if self._take() == "!":
                found = self._apply(ops.factorial, found)
            else:
                found = self._apply(ops.power, found, self._signed())
        return found

    def _group(self) -> Evaluated:
        opened = self._take(*_CLOSING)
        self.inside.append(opened)
        found = self._sum()
        self.inside.pop()
        self._take(_CLOSING[opened])
        return self._apply(ops.AROUND[opened], found) if opened in ops.AROUND else found

    def _primary(self) -> Evaluated:
        token = self._next
        if token in _CLOSING:
            return self._group()
        self._take()
        if token[:1].isdigit() or token[:1] == ".":
            number = fractions.Fraction(token.removesuffix("."))
            return lambda values: number
        if token in ops.OF_TWO:
            return self._apply(ops.OF_TWO[token], self._group(), self._group())
        if token == "\\sqrt":
            degree = self._group() if self._next == "[" else lambda values: fractions.Fraction(2)
            return self._apply(lambda value, n: ops.power(value, 1 / n), self._group(), degree)
        if token in ("\\sum", "\\prod", "\\int"):
            return self._over_a_range(token)
        if token in ops.FUNCTIONS:
            return self._function(token)
        if token in ops.OF_SEVERAL and self._next == "(" and (found := self._of_several(token)):
            return found
        if token in ops.CONSTANTS:
            return lambda values: values.get(token, ops.CONSTANTS[token])
        if not _VARIABLE.fullmatch(token):
            raise UnknownError
        self.names.add(token)
        return lambda values: values[token]

    def _of_several(self, token: str) -> Evaluated | None:
        r"""\gcd(a, b), C(5, 2); None for C(x)."""
        start = self.place
        self._take("(")
        given = [self._sum()]
        while self._next == ",":
            self._take()
            given.append(self._sum())
        if len(given) < 2:
            self.place = start
            return None
        self._take(")")
        return self._apply(ops.OF_SEVERAL[token], *given)

    def _function(self, token: str) -> Evaluated:
        r"""\sin^2 x, \log_2 8, \ln|x|."""
        base: list[Evaluated] = []
        exponent: Evaluated | None = None
        if self._next == "_":
            self._take()
            base = [self._primary()]
        if self._next == "^":
            self._take()
            start, exponent = self.place, self._signed()
            inverse, power = f"\\arc{token[1:]}", "".join(self.tokens[start : self.place])
            if power.strip("{}") == "-1" and inverse in ops.FUNCTIONS:
                token, exponent = inverse, None
        if base and token != "\\log":
            raise UnknownError
        if self._next in _CLOSING:
            given = self._group()
        else:
            given = self._signed()
            while self._begins() and self._next not in (*ops.FUNCTIONS, "("):
                given = self._apply(operator.mul, given, self._power())
        found = self._apply(ops.FUNCTIONS[token], given, *base)
        return self._apply(ops.power, found, exponent) if exponent else found

    def _differential(self) -> int:
        """The place of the d that ends the integral whose body begins here."""
        inner = 0
        for place, token in enumerate(self.tokens[self.place :], self.place):
            inner += (token == "\\int") - (token == "d")
            if inner < 0:
                return place
        raise UnknownError

    def _over_a_range(self, token: str) -> Evaluated:
        r"""\sum_{k=1}^{4} k^2 and \int_0^1 2x dx, by Boole's rule."""
        self._take("_")
        integral, name = token == "\\int", ""
        if not integral:
            self._take("{")
            name = self._take()
            self._take("=")
        low = self._primary() if integral else self._sum()
        if not integral:
            self._take("}")
        self._take("^")
        high = self._signed()
        if integral:
            end = self._differential()
            name, self.tokens[end] = self.tokens[end + 1], ""
        known = name in self.names
        body = self._sum() if integral else self._product()
        if integral:
            self._take("")
            self._take(name)
        if not known:
            self.names.discard(name)
        if integral:
            return lambda values: self._integral(low(values), high(values), body, values, name)
        function = operator.mul if token == "\\prod" else operator.add

        def evaluated(values: Values) -> Value:
            first, last = ops.whole(low(values)), ops.whole(high(values))
            if last - first > ops.MAX_TERMS:
                raise UnknownError
            found: Value = fractions.Fraction(token == "\\prod")
            for k in range(first, last + 1):
                term = body({**values, name: fractions.Fraction(k)})
                found = self._checked(function(found, term))
            return found

        return evaluated

    def _integral(
        self, low: Value, high: Value, body: Evaluated, values: Values, name: str
    ) -> Value:
        width, found = high - low, fractions.Fraction(0)
        for k in range(_STEPS + 1):
            weight = 7 if k in (0, _STEPS) else (14, 32, 12, 32)[k % 4]
            term = body({**values, name: low + width * k / _STEPS})
            found = self._checked(found + weight * term)
        return found * width * 2 / (45 * _STEPS)


@functools.lru_cache(256)
def read(text: str) -> Expression | None:
    """The function that an expression is, or an equation's left side less its right one."""
    sides = split(text, EQUALS)
    try:
        return Expression(f"{sides[0]}-({sides[1]})" if len(sides) == 2 else text)
    except (UnknownError, RecursionError, IndexError, ValueError):
        return None


# ---------------------------------------------------------------- compared


def same_expression(left: str, right: str, tolerance: float, work: Work) -> bool:
    r"""Whether two expressions or equations are equal; `work` adds up over calls.

    >>> same_expression(r"\binom{5}{2}", "10", 0.0, Work())
    True
    """
    first, second = read(left), read(right)
    equations = [len(split(text, EQUALS)) == 2 for text in (left, right)]
    if first is None or second is None or equations[0] != equations[1]:
        return False
    first.work = second.work = work
    names = sorted(first.names | second.names)
    try:
        if not names:
            constants = _values(first, second, [{}])
            return any(_same_constant((left, right), pair, tolerance) for pair in constants)
        known = _values(first, second, _points(names))
        if len(known) < 2:
            return False
        if equations[0]:
            return _same_equation(first, second, names, known)
    except OverflowError:
        return False
    return all(_equal(*pair) for pair in known)


def _values(
    first: Expression, second: Expression, points: list[Values]
) -> list[tuple[Value, Value]]:
    """Both values where both have one; from the third point on, where both stay real."""
    found = []
    for place, point in enumerate(points):
        first.work.imaginary = False
        one, other = first(point), second(point)
        if one is not None and other is not None and (place < 2 or not first.work.imaginary):
            found.append((one, other))
    return found


def _points(names: list[str]) -> list[Values]:
    """Numbers for the variables: fractions, whole numbers and, last, fractions of both signs."""
    draw = random.Random(0)
    fraction = [[fractions.Fraction(draw.randint(110, 390), 101) for _ in names] for _ in range(3)]
    integer = [[fractions.Fraction(n) for n in draw.sample(range(3, 60), len(names))]
               for _ in range(2)]  # fmt: skip
    rows = [*fraction[:2], *integer, [-value for value in fraction[2]]]
    if len(names) > 1:
        rows.append([value * (-1) ** place for place, value in enumerate(fraction[2])])
    return [dict(zip(names, row, strict=True)) for row in rows]


def _equal(left: Value, right: Value) -> bool:
    if isinstance(left, fractions.Fraction) and isinstance(right, fractions.Fraction):
        return left == right
    return abs(left - right) <= ops.EXACT * max(abs(left), abs(right))


def _imaginary(value: Value) -> bool:
    return isinstance(value, complex) and abs(value.imag) > ops.EXACT * abs(value)


def _same_constant(texts: tuple[str, str], values: tuple[Value, Value], tolerance: float) -> bool:
    decimal = any(re.search(r"\d\.|\.\d", text) for text in texts)
    return (
        _equal(*values)
        or abs(values[0] - values[1]) <= tolerance
        or (decimal and close(*values))
        or is_rounded(texts, values)
    )


def _same_equation(
    first: Expression, second: Expression, names: list[str], known: list[tuple[Value, Value]]
) -> bool:
    """Whether one equation is a multiple of the other, or both have one solution for variables."""
    ratios = [one / other for one, other in known if other]
    if len(ratios) == len(known) and all(_equal(ratio, ratios[0]) for ratio in ratios):
        return ratios[0] != 0
    solved = 0
    for place, point in enumerate(_points(names) if first.names == second.names else []):
        for name in names:
            one, other = _solved(first, point, name), _solved(second, point, name)
            if one is None or other is None or (place > 1 and _imaginary(one)):
                continue
            if not _equal(one, other):
                return False
            solved += 1
    return solved > 0


def _solved(equation: Expression, point: Values, name: str) -> Value | None:
    """The value of a variable in an equation that is linear in it."""
    zero, one, three = (equation({**point, name: fractions.Fraction(n)}) for n in (0, 1, 3))
    if zero is None or one is None or three is None or one == zero:
        return None
    return -zero / (one - zero) if _equal(three - zero, 3 * (one - zero)) else None
