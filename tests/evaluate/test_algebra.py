"""Expressions are equal exactly where their values are; no expression takes long."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import sympy

from dcod_jax.evaluate.equality import equal
from dcod_jax.evaluate.grading import grade

FORMS: tuple[Callable[[Any], Any], ...]
FORMS = (sympy.expand, sympy.factor, sympy.together, sympy.cancel)


def expression(draw: random.Random, depth: int, names: tuple[Any, ...]) -> Any:
    """A random expression of these variables, with integers, fractions, roots and functions."""
    if depth == 0:
        number = sympy.Rational(draw.randint(1, 12), draw.choice((1, 1, 2, 3, 7)))
        return draw.choice(names) if names and draw.random() < 0.55 else number
    one = expression(draw, depth - 1, names)
    other = expression(draw, draw.randrange(depth), names)
    kind = draw.randrange(8)
    if kind == 0:
        return one - other
    if kind == 1:
        return one / (other or 2)
    if kind == 2:
        return one ** draw.randint(2, 3)
    if kind == 3:
        return sympy.sqrt(one + draw.randint(1, 5)) if names else sympy.sqrt(abs(one) + 1)
    if kind == 4 and depth == 1:
        return draw.choice((sympy.sin, sympy.cos, sympy.log, sympy.exp))(one)
    return one + other if kind < 6 else one * other


def test_random_expressions_equal_their_other_forms_and_nothing_else() -> None:
    draw, compared, wrong = random.Random(0), 0, []
    while compared < 120:
        names = tuple(map(sympy.Symbol, draw.choice(("", "x", "xy", "ab", "n"))))
        one = expression(draw, draw.randint(1, 3), names)
        form = draw.choice(FORMS)
        other = form(one)
        if one.has(sympy.I, sympy.zoo, sympy.nan) or len(sympy.latex(one)) > 150:
            continue
        compared += 1
        latex, plain = sympy.latex(other), str(other).replace("**", "^")
        wrong += [(sympy.latex(one), text) for text in (latex, plain)
                  if not equal(text, sympy.latex(one), tolerance=0.0)]  # fmt: skip
        changed = draw.choice((other + 1, other - sympy.Rational(1, 7), 2 * other + 1, other + 2))
        if changed != other and equal(sympy.latex(changed), sympy.latex(one), tolerance=0.0):
            wrong.append((sympy.latex(one), "not", sympy.latex(changed)))
    assert not wrong


SAME = [
    ("sqrt(sin(n)+3)", r"\sqrt{\sin(n)+3}"),
    ("sqrt(2 - log(5))", r"\sqrt{2-\log(5)}"),
    ("sqrt(1 + (x+1)*(x+2))", r"\sqrt{x^2+3x+3}"),
    ("cbrt(sqrt(5) + (2))", r"\sqrt[3]{\sqrt5+2}"),
    ("exp(-(x+1)**2)", "e^{-(x+1)^2}"),
    ("2*atan(x)", r"2\arctan x"),
    ("abs(x - (1))", "|x-1|"),
    (r"\sin\pi", "0"),
    (r"\cot\frac{\pi}{2}", "0"),
    (r"e^{i\pi}+1", "0"),
    (r"\sin^2x+\cos^2x-1", "0"),
    (r"\sqrt2^2-2", "0"),
    (r"\lfloor 10^{18}/7\rfloor", "142857142857142857"),
    ("y = 3 - 2x", "4x + 2y = 6"),
    (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_by_algebra(one: str, other: str) -> None:
    assert equal(one, other)
    assert equal(other, one)


OTHER = [
    ("|x|+|y|", "|x+y|"),
    (r"\sqrt{x^2y^2}", "xy"),
    ("y = |x|", "y = x"),
    ("x(y-1) = 0", "x(y-2) = 0"),
    ("|x| = 1", "x = 1"),
    (r"\frac{1}{x} = 2", "x = 2"),
    (r"\lfloor 10^{18}/7\rfloor", "142857142857142848"),
    (r"6.6\cdot 10^{-34}\pi", r"3.3\cdot 10^{-34}\pi"),
    (r"10^{200}\pi\cdot 10^{200}\pi-10^{200}\pi\cdot 10^{200}\pi", "0"),
]


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_not_equal_by_algebra(one: str, other: str) -> None:
    assert not equal(one, other)
    assert not equal(other, one)


def _nested(levels: int) -> str:
    return r"\int_{" * levels + "0" + "}^1xdx" * levels


HOSTILE = {
    "limits of integrals": (_nested(30), "5"),
    "sums of integrals": (r"\sum_{j=1}^{99}\sum_{k=1}^{999}\int_0^1xdx", "5"),
    "binomial of a large number": (r"\binom{\binom{1000}{500}}{1000}", "5"),
    "binomial of a small number": (r"\binom{10^{-4900}}{1000}", "5"),
    "many integrals": (", ".join(rf"\int_0^1xt^{k}dt" for k in range(25)), r"x, x^2\pi"),
    "two integrals, their limits exchanged": (r"\int_0^1\int_0^2 x dx dy", "1"),
    "unclosed fractions": (r"\frac{" * 4_000, "5"),
    "\\over": (r"\over" * 4_000 + "{", "5"),
    "spaces": ("1" + " " * 20_000 + "x", "5"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_expression_takes_long(kind: str) -> None:
    answer, reference = HOSTILE[kind]
    start = time.process_time()
    assert not equal(answer, reference)
    assert time.process_time() - start < 10  # 1 on two cores; without bounds, for ever


def test_a_number_of_too_many_chinese_digits_is_none() -> None:
    assert not grade(r"\boxed{一" + "亿" * 1_000 + "}", "5").correct
