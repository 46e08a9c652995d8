"""Operations on numbers that stay exact where they can: powers, roots, binomials, logarithms.

Sizes are bounded. Standard library only.
"""

from __future__ import annotations

import cmath
import fractions
import math
import operator
from collections.abc import Callable

Value = fractions.Fraction | float | complex
Function = Callable[..., Value]

MAX_BITS = 20_000  # of an exact power
MAX_TERMS = 1_000  # of a sum or product
EXACT = 1e-11  # values that differ by less, relatively, are equal


class UnknownError(Exception):
    """What stands here is not understood, or has no value."""


def _bits(value: fractions.Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def whole(value: Value) -> int:
    """The value as an int; UnknownError where it is none."""
    if isinstance(value, fractions.Fraction) and value.denominator == 1:
        return value.numerator
    raise UnknownError


def real(value: Value) -> fractions.Fraction | float:
    """The value without an imaginary part that is rounding; UnknownError where it has one."""
    if isinstance(value, fractions.Fraction):
        return value
    if abs(value.imag) > EXACT * abs(value.real):
        raise UnknownError
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


def power(base: Value, exponent: Value) -> Value:
    """base ** exponent: exact where both are rational and small, of odd roots the real one."""
    if not isinstance(exponent, fractions.Fraction):
        return complex(base) ** complex(exponent)
    power, degree = exponent.numerator, exponent.denominator
    if not isinstance(base, fractions.Fraction):
        base = complex(base)
        if degree > 1 and degree % 2 and not base.imag and base.real < 0:  # the real root
            return complex(-((-base.real) ** (1 / degree))) ** power
        return base ** (power if degree == 1 else complex(exponent))
    size = _bits(base)
    if size > 1 and (size * abs(power) > MAX_BITS or degree > 64):
        return complex(base) ** complex(exponent)
    return (_root(base, degree) if degree > 1 else base) ** power


def add(left: Value, right: Value) -> Value:
    """The sum, 0 where it is no more than rounding of its terms."""
    return _settled(left + right, max(abs(left), abs(right)))


def _settled(value: Value, scale: float | fractions.Fraction) -> Value:
    """Zero, for what rounding left of it where terms of this size cancelled."""
    if isinstance(value, complex) and abs(value) <= 1e-14 * scale < math.inf:
        return fractions.Fraction(0)
    return value


def _near_zero(function: Callable[[complex], Value]) -> Callable[[Value], Value]:
    return lambda value: _settled(function(complex(value)), abs(value) / 10)


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(k, fractions.Fraction) and k.denominator == 1 and 0 <= k <= MAX_TERMS:
        if isinstance(n, fractions.Fraction) and k * _bits(n) > 2 * MAX_BITS:
            raise UnknownError
        return math.prod(((n - i) / (i + 1) for i in range(int(k))), start=fractions.Fraction(1))
    return factorial(n) / factorial(k) / factorial(n - k)


def factorial(value: Value) -> Value:
    """n!, by the gamma function where n is not whole; UnknownError beyond MAX_TERMS."""
    if isinstance(value, fractions.Fraction) and value.denominator == 1 and value >= 0:
        if value > MAX_TERMS:
            raise UnknownError
        return fractions.Fraction(math.factorial(int(value)))
    return complex(math.gamma(real(value) + 1))


def _rounded(sign: int) -> Callable[[Value], Value]:
    def rounded(value: Value) -> Value:
        part = sign * real(value)
        near = part if isinstance(part, fractions.Fraction) else part + EXACT
        return fractions.Fraction(sign * math.floor(near))

    return rounded


def _integers(function: Callable[..., int]) -> Callable[..., Value]:
    return lambda *values: fractions.Fraction(function(*map(whole, values)))


def _inverse(function: Callable[[complex], complex]) -> Callable[[Value], Value]:
    return lambda value: 1 / function(complex(value))


def _log(value: Value, base: Value | None = None) -> Value:
    return cmath.log(value) / cmath.log(10 if base is None else base)


def _absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, fractions.Fraction) else complex(abs(value))


FUNCTIONS: dict[str, Function] = {
    **{f"\\{name}": _near_zero(getattr(cmath, name)) for name in ("sin", "cos", "tan")},
    **{f"\\{name}": getattr(cmath, name) for name in ("sinh", "cosh", "tanh")},
    **{f"\\arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    **{"\\abs": _absolute, "\\cis": lambda value: cmath.exp(1j * value)},
    **{"\\sec": _inverse(cmath.cos), "\\csc": _inverse(cmath.sin)},
    "\\cot": _near_zero(_inverse(cmath.tan)),
    **{"\\ln": cmath.log, "\\exp": cmath.exp, "\\log": _log, "\\lg": _log},
}
OF_SEVERAL: dict[str, Function] = {
    **{"\\gcd": _integers(math.gcd), "\\lcm": _integers(math.lcm)},
    **{"\\max": lambda *v: max(v, key=real), "\\min": lambda *v: min(v, key=real)},
    **{"C": _binomial, "P": lambda n, k: _binomial(n, k) * factorial(k)},
}
OF_TWO: dict[str, Function] = {"\\frac": operator.truediv, "\\binom": _binomial}
BETWEEN: dict[str, Function] = {
    **dict.fromkeys(("*", "\\cdot", "\\times"), operator.mul),
    **dict.fromkeys(("/", "\\div"), operator.truediv),
    **dict.fromkeys(("mod", "\\bmod", "\\mod"), operator.mod),
}
AROUND: dict[str, Function] = {"\\lfloor": _rounded(1), "\\lceil": _rounded(-1), "|": _absolute}
CONSTANTS: dict[str, Value] = {"\\pi": complex(math.pi), "e": complex(math.e), "i": 1j}
