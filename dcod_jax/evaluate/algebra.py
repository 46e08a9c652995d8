r"""Equality that needs algebra: two expressions are evaluated, exactly where they are rational.

`same_expression` is the entry. Variables are given numbers. An expression that is not understood
has no value and equals no other. Time is bounded. Standard library only.
"""

from __future__ import annotations

import cmath
import fractions
import functools
import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterator

from dcod_jax.evaluate.numerals import close, is_rounded
from dcod_jax.evaluate.spelling import EQUALS, split

Value = fractions.Fraction | complex
Values = dict[str, Value]
Evaluated = Callable[[Values], Value]

MAX_BITS = 20_000  # of an exact number
MAX_TERMS = 1_000  # of a sum or product
EXACT = 1e-11  # values that differ by less, relatively, are equal
_STEPS = 400  # of an integral
_MAX_WORK = 20_000  # operations of one expression in a comparison
_TOKEN = re.compile(
    r"\s*(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w]))?)"
    r"|\s*(?P<name>\\?[A-Za-z]+(?:_(?:\w|\{\w{1,3}\}))?'*)(?!')|\s*(?P<sign>[-+*/^!|(){}\[\],_=])"
)
_NAME = re.compile(r"\\(?:theta|alpha|beta|gamma|lambda|mu|phi|omega|sigma|delta|epsilon|rho|tau)")
_TIMES, _OVER = ("*", "\\cdot", "\\times"), ("/", "\\div")
_OPENS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}


class _UnknownError(Exception):
    """What stands here is not understood, or has no value."""


# ---------------------------------------------------------------- operations


def _whole(value: Value) -> int:
    if isinstance(value, fractions.Fraction) and value.denominator == 1:
        return value.numerator
    raise _UnknownError


def _real(value: Value) -> fractions.Fraction | float:
    if isinstance(value, fractions.Fraction):
        return value
    if abs(value.imag) > EXACT * abs(value.real):
        raise _UnknownError
    return value.real


def _root(value: fractions.Fraction, degree: int) -> Value:
    """The real root where there is one, exact where it is rational."""
    if value < 0 and degree % 2:
        return -_root(-value, degree)
    if value >= 0 and degree <= 64:
        parts = [round(int(n) ** (1 / degree)) if n < 1 << 1000 and degree > 2 else math.isqrt(n)
                 for n in (value.numerator, value.denominator)]  # fmt: skip
        found = fractions.Fraction(*parts) if parts[1] else None
        if found is not None and found**degree == value:
            return found
    return complex(value) ** (1 / degree)


def _power(base: Value, exponent: Value) -> Value:
    if not isinstance(exponent, fractions.Fraction):
        return complex(base) ** complex(exponent)
    power, degree = exponent.numerator, exponent.denominator
    if not isinstance(base, fractions.Fraction):
        base = complex(base)
        if degree > 1 and degree % 2 and not base.imag and base.real < 0:  # the real root
            return complex(-((-base.real) ** (1 / degree))) ** power
        return base ** (power if degree == 1 else complex(exponent))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size > 1 and (size * abs(power) > MAX_BITS or degree > 64):
        return complex(base) ** complex(exponent)
    return (_root(base, degree) if degree > 1 else base) ** power


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(k, fractions.Fraction) and k.denominator == 1 and 0 <= k <= MAX_TERMS:
        return math.prod(((n - i) / (i + 1) for i in range(int(k))), start=fractions.Fraction(1))
    return _factorial(n) / _factorial(k) / _factorial(n - k)


def _factorial(value: Value) -> Value:
    if isinstance(value, fractions.Fraction) and value.denominator == 1 and value >= 0:
        if value > MAX_TERMS:
            raise _UnknownError
        return fractions.Fraction(math.factorial(int(value)))
    return complex(math.gamma(_real(value) + 1))


def _rounded(sign: int) -> Callable[[Value], Value]:
    return lambda v: fractions.Fraction(sign * math.floor(sign * _real(v) + EXACT))


def _integers(function: Callable[..., int]) -> Callable[..., Value]:
    return lambda *values: fractions.Fraction(function(*map(_whole, values)))


def _inverse(function: Callable[[complex], complex]) -> Callable[[Value], Value]:
    return lambda value: 1 / function(complex(value))


def _log(value: Value, base: Value | None = None) -> Value:
    return cmath.log(value) / cmath.log(10 if base is None else base)


def _absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, fractions.Fraction) else complex(abs(value))


_TRIGONOMETRIC: dict[str, Callable[[Value], Value]] = {
    **{name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{"cot": _inverse(cmath.tan), "sec": _inverse(cmath.cos), "csc": _inverse(cmath.sin)},
}
_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    **{f"\\{name}": function for name, function in _TRIGONOMETRIC.items()},
    **{f"\\arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    **{"\\ln": cmath.log, "\\exp": cmath.exp, "\\log": _log, "\\lg": _log},
}
_OF_SEVERAL: dict[str, Callable[..., Value]] = {
    **{"\\gcd": _integers(math.gcd), "\\lcm": _integers(math.lcm)},
    **{"\\max": lambda *v: max(v, key=_real), "\\min": lambda *v: min(v, key=_real)},
    **{"C": _binomial, "P": lambda n, k: _binomial(n, k) * _factorial(k)},
}
_CONSTANTS: dict[str, Value] = {"\\pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_INVERSES = {name: f"\\arc{name[1:]}" for name in ("\\sin", "\\cos", "\\tan")}
_CLOSED = {"\\lfloor": _rounded(1), "\\lceil": lambda v: -_rounded(1)(-v), "|": _absolute}


# ---------------------------------------------------------------- reading


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    while match := _TOKEN.match(text, place):
        place = match.end()
        name = match.group("name")
        if name and not name.startswith("\\") and len(name.partition("_")[0]) > 1:
            if name == "mod":
                name = "\\bmod"
            else:  # a product of letters; an index belongs to the last one
                found += list(name.partition("_")[0][:-1])
                name = name[len(name.partition("_")[0]) - 1 :]
        found.append(name or match.group("number") or match.group("sign"))
    if text[place:].strip():
        raise _UnknownError
    return found


class _Reader:
    """The function that an expression is of the variables in `names`."""

    def __init__(self, text: str) -> None:
        self.tokens = [*_tokens(text), ""]
        self.place = 0
        self.names: set[str] = set()
        self.inside: list[str] = []  # the brackets that are open
        self.work = 0

    @property
    def next(self) -> str:
        return self.tokens[self.place]

    def take(self, *expected: str) -> str:
        token = self.next
        if expected and token not in expected:
            raise _UnknownError
        self.place += 1
        return token

    def apply(self, function: Callable[..., Value], *given: Evaluated) -> Evaluated:
        return lambda values: self.checked(function(*(one(values) for one in given)))

    def checked(self, value: Value) -> Value:
        """The value; what takes too long, or is too large, has none."""
        self.work += 1
        if isinstance(value, fractions.Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            self.work += bits >> 6
            if bits > 2 * MAX_BITS:
                raise _UnknownError
        if self.work > _MAX_WORK:
            raise _UnknownError
        return value if isinstance(value, fractions.Fraction) else complex(value)

    def whole(self) -> Evaluated:
        found = self.sum()
        self.take("")
        return found

    def sum(self) -> Evaluated:
        found = self.product()
        while self.next in ("+", "-"):
            function = operator.add if self.take() == "+" else operator.sub
            found = self.apply(function, found, self.product())
        return found

    def product(self) -> Evaluated:
        found = self.signed()
        while True:
            before, token = self.tokens[self.place - 1], self.next
            if token in _TIMES or token in _OVER or token == "\\bmod":
                self.take()
                function = operator.mul if token in _TIMES else operator.truediv
                function = operator.mod if token == "\\bmod" else function
                found = self.apply(function, found, self.signed())
            elif self.begins() and not (token[0].isdigit() and before[-1].isalnum()):
                found = self.apply(operator.mul, found, self.power())
            else:
                return found

    def begins(self) -> bool:
        """Whether a factor begins here."""
        token = self.next
        if token == "|":
            return self.inside[-1:] != ["|"]
        closing = token in (*_OPENS.values(), "\\bmod") or token in _TIMES or token in _OVER
        return bool(re.match(r"[\w.({\[\\]", token)) and not closing

    def signed(self) -> Evaluated:
        if self.next in ("+", "-"):
            negative = self.take() == "-"
            found = self.signed()
            return self.apply(lambda value: -value, found) if negative else found
        return self.power()

    def power(self) -> Evaluated:
        found = self.primary()
        while self.next in ("^", "!"):
            if self.take() == "!":
                found = self.apply(_factorial, found)
            else:
                found = self.apply(_power, found, self.signed())
        return found

    def group(self) -> Evaluated:
        opened = self.take(*_OPENS)
        self.inside.append(opened)
        found = self.sum()
        self.inside.pop()
        self.take(_OPENS[opened])
        return self.apply(_CLOSED[opened], found) if opened in _CLOSED else found

    def primary(self) -> Evaluated:
        token = self.next
        if token in _OPENS:
            return self.group()
        self.take()
        if token[:1].isdigit() or token[:1] == ".":
            number = fractions.Fraction(token.rstrip(".") if token[-1:] == "." else token)
            return lambda values: number
        if token in ("\\frac", "\\binom"):
            function = operator.truediv if token == "\\frac" else _binomial
            return self.apply(function, self.group(), self.group())
        if token == "\\sqrt":
            degree = self.group() if self.next == "[" else lambda values: fractions.Fraction(2)
            inverse = self.apply(operator.truediv, lambda values: fractions.Fraction(1), degree)
            return self.apply(_power, self.group(), inverse)
        if token == "\\int" or token.startswith("\\int_"):
            return self.integral(token)
        if token.partition("_")[0] in ("\\sum", "\\prod"):
            return self.repeated(token)
        if token.partition("_")[0] in _FUNCTIONS:
            return self.function(token)
        if token in _OF_SEVERAL and self.next == "(" and (found := self.several(token)):
            return found
        return self.name(token)

    def name(self, token: str) -> Evaluated:
        plain = token.partition("_")[0]
        if token in _CONSTANTS:
            constant = _CONSTANTS[token]
            return lambda values: values.get(token, constant)
        if not (len(plain) == 1 and plain.isalpha()) and not _NAME.fullmatch(plain):
            raise _UnknownError
        self.names.add(token)
        return lambda values: values[token]

    def several(self, token: str) -> Evaluated | None:
        r"""\gcd(a, b), C(5, 2)."""
        start = self.place
        self.take("(")
        given = [self.sum()]
        while self.next == ",":
            self.take()
            given.append(self.sum())
        if len(given) < 2 or self.next != ")":
            self.place = start
            return None
        self.take(")")
        return self.apply(_OF_SEVERAL[token], *given)

    def function(self, token: str) -> Evaluated:
        r"""\sin^2 x, \log_2 8, \ln|x|."""
        name, _, index = token.partition("_")
        base, exponent, inverse = None, None, False
        if index:
            base = _Reader(index.strip("{}")).whole()
        while self.next in ("_", "^"):
            if self.take() == "_":
                base = self.primary()
            else:
                start = self.place
                exponent = self.signed()
                inverse = "".join(self.tokens[start : self.place]).strip("{}") == "-1"
        if base is not None and name != "\\log":
            raise _UnknownError
        function = _FUNCTIONS[name]
        if self.next in ("(", "{", "[", "|"):
            given = self.group()
        else:
            given = self.signed()
            while self.begins() and self.next.partition("_")[0] not in (*_FUNCTIONS, "("):
                given = self.apply(operator.mul, given, self.power())
        if inverse and name in _INVERSES:
            return self.apply(_FUNCTIONS[_INVERSES[name]], given)
        found = self.apply(function, given, *([base] if base else []))
        return self.apply(_power, found, exponent) if exponent else found

    def integral(self, token: str) -> Evaluated:
        r"""\int_0^1 2x dx, by Boole's rule."""
        low = _Reader(token[5:].strip("{}")).whole() if token[4:] else None
        if low is None:
            self.take("_")
            low = self.signed()
        self.take("^")
        high = self.signed()
        ends = [p for p in range(self.place, len(self.tokens) - 2) if self.tokens[p] == "d"]
        if not ends:
            raise _UnknownError
        name = self.tokens[ends[0] + 1]
        self.tokens[ends[0]] = ""
        known, body = name in self.names, self.sum()
        if self.place != ends[0]:
            raise _UnknownError
        self.place += 2
        if not known:
            self.names.discard(name)

        def evaluated(values: Values) -> Value:
            start, width = low(values), high(values) - low(values)
            found: Value = fractions.Fraction(0)
            for k in range(_STEPS + 1):
                weight = 7 if k in (0, _STEPS) else (14, 32, 12, 32)[k % 4]
                found += weight * body({**values, name: start + width * k / _STEPS})
            return found * width * 2 / (45 * _STEPS)

        return evaluated

    def repeated(self, token: str) -> Evaluated:
        r"""\sum_{k=1}^{4} k^2."""
        self.take("_")
        self.take("{")
        name = self.take()
        self.take("=")
        first = self.sum()
        self.take("}")
        self.take("^")
        last = self.signed()
        known = name in self.names
        term = self.product()
        if not known:
            self.names.discard(name)
        start, function = (1, operator.mul) if token == "\\prod" else (0, operator.add)

        def evaluated(values: Values) -> Value:
            low, high = _whole(first(values)), _whole(last(values))
            if high - low > MAX_TERMS:
                raise _UnknownError
            found: Value = fractions.Fraction(start)
            for k in range(low, high + 1):
                found = self.checked(function(found, term({**values, name: fractions.Fraction(k)})))
            return found

        return evaluated


# ---------------------------------------------------------------- compared


@functools.lru_cache(256)
def _read(text: str) -> tuple[_Reader, Evaluated] | None:
    """The function of an expression, of an equation its left side less the right; None: unknown."""
    sides = split(text, EQUALS)
    if len(sides) > 2:
        return None
    try:
        reader = _Reader(f"{sides[0]}-({sides[1]})" if len(sides) == 2 else text)
        return reader, reader.whole()
    except (_UnknownError, RecursionError, IndexError, ValueError):
        return None


def evaluate(text: str, values: Values | None = None) -> Value | None:
    """The value of an expression; None where it is not understood or has none."""
    found = _read(text)
    if found is None:
        return None
    try:
        value = found[1](values or {})
    except (_UnknownError, KeyError, ArithmeticError, ValueError, RecursionError, TypeError):
        return None
    return value if isinstance(value, fractions.Fraction) or cmath.isfinite(value) else None


def _points(names: list[str]) -> Iterator[Values]:
    """Numbers for the variables: fractions, whole numbers and, last, negative fractions."""
    draw = random.Random(0)
    for sign, whole in ((1, False), (1, False), (1, True), (1, True), (-1, False), (-1, True)):
        count = itertools.count(3)
        yield {
            name: fractions.Fraction(next(count) + draw.randint(0, 2) * len(names))
            if whole
            else fractions.Fraction(sign * draw.randint(110, 390), 101)
            for name in names
        }


def _equal(left: Value, right: Value) -> bool:
    if isinstance(left, fractions.Fraction) and isinstance(right, fractions.Fraction):
        return left == right
    return abs(left - right) <= EXACT * max(abs(left), abs(right))


def _same_constant(texts: tuple[str, str], values: list[Value], tolerance: float) -> bool:
    if _equal(*values) or abs(values[0] - values[1]) <= tolerance:
        return True
    if any(re.search(r"\d\.|\.\d", text) for text in texts) and close(*values):
        return True
    return is_rounded(texts, values)


def same_expression(left: str, right: str, tolerance: float) -> bool:
    r"""Whether two expressions or equations are equal.

    >>> same_expression(r"\binom{5}{2}", "10", 0.0)
    True
    """
    read = [_read(text) for text in (left, right)]
    if read[0] is None or read[1] is None or _is_equation(left) != _is_equation(right):
        return False
    read[0][0].work = read[1][0].work = 0
    names = sorted(read[0][0].names | read[1][0].names)
    try:
        if not names:
            values = [evaluate(text) for text in (left, right)]
            known = [value for value in values if value is not None]
            return len(known) == 2 and _same_constant((left, right), known, tolerance)
        return _same_at_points(left, right, names)
    except OverflowError:
        return False


def _same_at_points(left: str, right: str, names: list[str]) -> bool:
    pairs = [(evaluate(left, point), evaluate(right, point)) for point in _points(names)]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    if len(known) < 2:
        return False
    if _is_equation(left):
        return _same_equation(left, right, names, known)
    # A root or logarithm of a negative number is no real one, and decides nothing.
    first, rest = known[:2], known[2:]
    return all(_equal(*pair) for pair in first) and all(
        _equal(*pair) for pair in rest if not any(map(_imaginary, pair))
    )


def _is_equation(text: str) -> bool:
    return len(split(text, EQUALS)) > 1


def _imaginary(value: Value) -> bool:
    return isinstance(value, complex) and abs(value.imag) > EXACT * abs(value)


def _same_equation(
    left: str, right: str, names: list[str], known: list[tuple[Value, Value]]
) -> bool:
    """Whether one equation is a multiple of the other, or both have one solution for a variable."""
    ratios = [one / other for one, other in known if other]
    if len(ratios) == len(known) and all(_equal(ratio, ratios[0]) for ratio in ratios):
        return ratios[0] != 0
    point = next(_points(names))
    for name in names:
        solved = [_solved(text, point, name) for text in (left, right)]
        if solved[0] is not None and solved[1] is not None and _equal(solved[0], solved[1]):
            return True
    return False


def _solved(text: str, point: Values, name: str) -> Value | None:
    """The value of a variable in an equation that is linear in it."""
    at = [evaluate(text, {**point, name: fractions.Fraction(number)}) for number in (0, 1, 3)]
    if at[0] is None or at[1] is None or at[2] is None or at[0] == at[1]:
        return None
    slope = at[1] - at[0]
    return -at[0] / slope if _equal(at[2] - at[0], 3 * slope) else None
