"""Chains of one-digit sums and differences with worked solutions, the quickstart's domain too.

A problem is an expression such as "8 + 5 - 4" inside a short question; a worked solution is a few
steps in one of STYLES and a last line "#### 9".
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

LARGEST = 20  # of the sum of the added numbers: a tiny model learns the facts below it in minutes
SYMBOLS = "0123456789"  # of the steps that noise replaces


@dataclasses.dataclass(frozen=True)
class Chain:
    """One question with its answer; its expression is its id."""

    numbers: tuple[int, ...]
    operators: str  # one of + and - for each number after the first
    phrasing: str = "{}="

    @property
    def expression(self) -> str:
        """numbers (8, 5, 4), operators "+-" -> "8+5-4"."""
        rest = (f"{op}{n}" for op, n in zip(self.operators, self.numbers[1:], strict=True))
        return str(self.numbers[0]) + "".join(rest)

    @property
    def answer(self) -> int:
        """The value of the whole expression."""
        return self.running_values()[-1]

    def running_values(self) -> list[int]:
        """The value after each number, from the left: 8+5-4 -> [8, 13, 9]."""
        values = [self.numbers[0]]
        for op, number in zip(self.operators, self.numbers[1:], strict=True):
            values.append(values[-1] + number if op == "+" else values[-1] - number)
        return values

    def record(self) -> dict[str, str]:
        """The JSONL record that `generate` and `evaluate` read."""
        prompt = self.phrasing.format(self.expression)
        return {"id": self.expression, "prompt": prompt, "answer": str(self.answer)}


def draw_problem(draw: random.Random, terms: Sequence[int], first: Sequence[int]) -> Chain | None:
    """A chain with a length and first operand in these inclusive ranges, or None.

    The other operands are 1 to 9. No running value is negative, and the added numbers sum to at
    most LARGEST; None where the draw is not so.
    """
    count = draw.randint(*terms)
    numbers = [draw.randint(*first), *(draw.randint(1, 9) for _ in range(count - 1))]
    operators = "".join(draw.choice("+-") for _ in range(count - 1))
    problem = Chain(tuple(numbers), operators)
    added = sum(n for op, n in zip("+" + operators, numbers, strict=True) if op == "+")
    return problem if min(problem.running_values()) >= 0 and added <= LARGEST else None


def solve_equations(problem: Chain) -> str:
    """8+5-4 -> "8+5=13\\n13-4=9"."""
    values = problem.running_values()
    steps = zip(values, problem.operators, problem.numbers[1:], values[1:], strict=False)
    return "\n".join(f"{before}{op}{number}={after}" for before, op, number, after in steps)


def solve_words(problem: Chain) -> str:
    """8+5-4 -> "8 up 5: 13, down 4: 9"."""
    words = {"+": "up", "-": "down"}
    steps = zip(problem.operators, problem.numbers[1:], problem.running_values()[1:], strict=True)
    moves = (f"{words[op]} {number}: {after}" for op, number, after in steps)
    return f"{problem.numbers[0]} " + ", ".join(moves)


def solve_groups(problem: Chain) -> str:
    """8-4+5-1 -> "plus 8+5=13\\nminus 4+1=5\\n13-5=8": both groups summed, then the difference."""
    signed = list(zip("+" + problem.operators, problem.numbers, strict=True))
    totals: list[int] = []
    lines: list[str] = []
    for name, sign in (("plus", "+"), ("minus", "-")):
        group = [number for op, number in signed if op == sign]
        steps: list[str] = []
        total = group[0] if group else 0
        for number in group[1:]:
            steps.append(f"{total}+{number}={total + number}")
            total += number
        totals.append(total)
        if group:
            lines.append(f"{name} " + (", ".join(steps) or str(total)))
    if "-" in problem.operators:
        lines.append(f"{totals[0]}-{totals[1]}={totals[0] - totals[1]}")
    return "\n".join(lines)


def solve_values(problem: Chain) -> str:
    """8+5-4 -> "8 > 13 > 9"."""
    return " > ".join(map(str, problem.running_values()))


def solve_chain(problem: Chain) -> str:
    """8+5-4 -> "8+5=13-4=9"."""
    steps = zip(problem.operators, problem.numbers[1:], problem.running_values()[1:], strict=True)
    return f"{problem.numbers[0]}" + "".join(f"{op}{number}={after}" for op, number, after in steps)


def solve_table(problem: Chain) -> str:
    """8+5-4 -> "+8 8; +5 13; -4 9"."""
    steps = zip("+" + problem.operators, problem.numbers, problem.running_values(), strict=True)
    return "; ".join(f"{op}{number} {after}" for op, number, after in steps)


Solve = Callable[[Any], str]  # a problem's steps in one style
# The shipped teacher writes the first three.
STYLES: Mapping[str, Solve] = {
    "equations": solve_equations,
    "words": solve_words,
    "groups": solve_groups,
    "values": solve_values,
    "chain": solve_chain,
    "table": solve_table,
}


def style_of(text: str) -> str:
    """The style of STYLES that a worked solution of three and more terms is written in."""
    if text.startswith(("plus", "minus")):
        return "groups"
    if " up " in text or " down " in text:
        return "words"
    if any(line.count("=") > 1 for line in text.splitlines()):
        return "chain"
    return "values" if " > " in text else "table" if "; " in text else "equations"


def worked_solution(problem: Any, style: str, styles: Mapping[str, Solve] = STYLES) -> str:
    """The steps in a style of `styles`, then the line "#### answer"."""
    return f"{styles[style](problem)}\n#### {problem.answer}"


def worked_traces(
    problems: Iterable[Any],
    shares: Mapping[str, float],
    *,
    seed: int,
    styles: Mapping[str, Solve] = STYLES,
) -> Iterator[dict[str, str]]:
    """One trace record a problem, its style drawn with probability proportional to `shares`."""
    names = list(shares)
    for problem in problems:
        draw = random.Random(f"{seed} style {problem.expression}")
        style = draw.choices(names, [shares[name] for name in names])[0]
        completion = worked_solution(problem, style, styles)
        yield {**problem.record(), "completion": completion, "style": style}
