"""Completions graded: their final answers are found and compared. Nothing a model wrote stops it:
every search is linear in the text, and every comparison is bounded in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from dcod_jax.evaluate.answers import extract_answer, reference_answer
from dcod_jax.evaluate.equality import equal

RULES = 9  # raised when verdicts change: older evaluations are not gone on with
REJECTED_AS = {"wrong": "wrong_answer", "no_answer": "no_answer"}  # why a trace is dropped


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one completion; `reason` is "correct" or a key of REJECTED_AS."""

    correct: bool
    reason: str
    extracted: str | None = None
    rule: str | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """The reference answer with how far a number may be off, and whether a completion was cut."""

    answer: str
    tolerance: float = 0.0
    complete: bool = True  # False: the last number of the completion is no answer


def grade(completion: str, answer: str | Expected) -> Grade:
    """The grade of a completion against a reference answer.

    >>> grade("so 4 eggs.\\n#### 4", "4").reason
    'correct'
    """
    expected = Expected(answer) if isinstance(answer, str) else answer
    found = extract_answer(completion, complete=expected.complete)
    if found is None:
        return Grade(False, "no_answer")
    reference = reference_answer(expected.answer)
    correct = equal(found.answer, reference, tolerance=expected.tolerance)
    return Grade(correct, "correct" if correct else "wrong", found.answer, found.rule)


def graded(items: Iterable[tuple[Any, str, str | Expected | None]]) -> Iterator[tuple[Any, Any]]:
    """(payload, completion, answer) -> (payload, Grade), lazily; None in place of no answer's."""
    for payload, completion, answer in items:
        yield payload, None if answer is None else grade(completion, answer)
