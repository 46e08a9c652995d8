r"""Equality that needs algebra, by math-verify; run by grading's worker processes alone.

sympy may take forever, eat the memory or crash on what a model wrote. At import this file needs
the standard library only.
"""

from __future__ import annotations

import cmath
from typing import Any

from dcod_jax.evaluate.equality import Algebra
from dcod_jax.evaluate.numerals import close

EXACT = 1e-9  # exact constants that differ by more, relatively, are not equal


def load_algebra() -> Algebra:
    """math-verify's comparison of two LaTeX expressions; raises what sympy raises."""
    from math_verify import verify
    from math_verify.parser import NormalizationConfig, normalize_latex, parse_latex_cached
    from sympy import Float
    from sympy.core import random

    # Units are taken off before, and answers come without their box.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )

    def same(predicted: str, reference: str, tolerance: float) -> bool:
        random.seed(0)  # simplification tries random numbers; equal inputs give equal verdicts
        parsed: list[Any] = [
            parse_latex_cached(normalize_latex(text, spelling)) for text in (predicted, reference)
        ]
        left, right = parsed
        first, second = _numeric(left), _numeric(right)
        if first is not None and second is not None:
            if abs(first - second) <= tolerance:
                return True
            if left.atoms(Float) or right.atoms(Float):
                return close(first, second)
            if abs(first - second) > EXACT * max(abs(first), abs(second)):
                return False
        return verify([right], [left], timeout_seconds=None)

    return same


def _numeric(expression: Any) -> complex | None:
    """The value of a constant; None for what has variables or no finite value."""
    if not getattr(expression, "is_number", False):
        return None
    try:
        value = complex(expression.evalf(20))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if cmath.isfinite(value) else None
