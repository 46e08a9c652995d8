"""Words of three letters and moves of their places, with worked solutions; answers are words.

A problem is "dab 1 r 2=": a digit swaps the letter at that place with the next one, "r" turns the
word round. A worked solution is a few steps in one of STYLES and a last line "#### bda".
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

SYMBOLS = "abcdefghi"  # of a problem's word; no other text of a worked solution has them
MOVES = {"1": (1, 0, 2), "2": (0, 2, 1), "r": (2, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Moves:
    """One word and its moves; its expression is its id."""

    word: str
    moves: str

    @property
    def expression(self) -> str:
        """The word and its moves: "dab 1 r"."""
        return " ".join([self.word, *self.moves])

    @property
    def answer(self) -> str:
        """The word after the last move."""
        return self.words()[-1]

    def words(self) -> list[str]:
        """The word at the start and after each move: dab 1 r -> ["dab", "adb", "bda"]."""
        found = [self.word]
        for move in self.moves:
            found.append("".join(found[-1][place] for place in MOVES[move]))
        return found

    def record(self) -> dict[str, str]:
        """The JSONL record that `generate` and `evaluate` read."""
        return {"id": self.expression, "prompt": f"{self.expression}=", "answer": self.answer}


def draw_problem(draw: random.Random, terms: Sequence[int], first: Sequence[int]) -> Moves:
    """A word whose first letter is one of these (1 is "a"), and one move fewer than terms."""
    count = draw.randint(*terms) - 1
    head = SYMBOLS[draw.randint(*first) - 1]
    rest = draw.sample([letter for letter in SYMBOLS if letter != head], 2)
    return Moves(head + "".join(rest), "".join(draw.choice(tuple(MOVES)) for _ in range(count)))


def solve_steps(problem: Moves) -> str:
    """dab 1 r -> "1 adb\\nr bda"."""
    steps = zip(problem.moves, problem.words()[1:], strict=True)
    return "\n".join(f"{move} {word}" for move, word in steps)


def solve_words(problem: Moves) -> str:
    """dab 1 r -> "dab now, jump 1: adb, turn: bda"."""
    steps = zip(problem.moves, problem.words()[1:], strict=True)
    told = (f"{'turn' if move == 'r' else f'jump {move}'}: {word}" for move, word in steps)
    return ", ".join((f"{problem.word} now", *told))


def solve_tracks(problem: Moves) -> str:
    """dab 1 r -> "d 22\\na 13\\nb 31": the place of each letter after each move."""
    later = problem.words()[1:]
    return "\n".join(
        f"{letter} " + "".join(f"{word.index(letter) + 1}" for word in later)
        for letter in problem.word
    )


STYLES = {"steps": solve_steps, "words": solve_words, "tracks": solve_tracks}


def style_of(text: str) -> str:
    """The style of STYLES that a worked solution is written in."""
    if " now" in text:
        return "words"
    return "tracks" if text[:1] in SYMBOLS else "steps"
