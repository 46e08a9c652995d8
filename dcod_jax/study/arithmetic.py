"""The quickstart's domain: chains of one-digit sums and differences with worked solutions.

A problem is an expression such as "8 + 5 - 4" inside a short question; a worked solution is a few
steps in one of STYLES and a last line "#### 9". A template is a problem's operator sequence
("+-") and, apart from it, its phrasing; both are divided over the splits by the tables below, so
no problem, no operator sequence and no phrasing of a split occurs in another one.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcod_jax.errors import DcodError

# Operator sequences and phrasings that only this split has; "train" has all the other sequences.
# A held-out sequence is never the longest: a tiny model that saw no chain with these signs at
# these places fails on it, while one that ends where it never saw one end is within its reach.
# Several of several lengths, because how a model takes to one or two sequences is luck.
OPERATORS: dict[str, tuple[str, ...]] = {
    "validation": ("-", "-+-", "++-+", "+--+", "-++-"),
    "eval": ("+-", "+-+", "--+", "+-++", "-+-+", "++--"),
}
# Many training phrasings of many lengths: with twenty of them even a good teacher lost half of its
# accuracy on an unseen one, because it found the numbers by their distance from the start.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "train": (
        *("{}=", "{}.", "{}?", "Add {}.", "Do {}.", "Get {}.", "Now {}.", "So {}?", "Sum {}."),
        *("Find {}.", "Give {}.", "Make {}.", "Next {}.", "Say {}.", "Tell {}.", "Then {}?"),
        *("Count {}.", "Guess {}.", "I need {}.", "Once more {}.", "Show me {}.", "Take {}."),
        *("Bring me {}.", "Compute {}.", "I want {}.", "Quickly {}.", "Reckon {}.", "Write {}."),
        *("Do the sum {}.", "Please do {}.", "Tell me {}.", "The sum {}?", "Try it {}."),
        *("Can you do {}?", "How about {}?", "How much is {}?", "Now what is {}?", "What is {}?"),
        *("Figure out {}.", "Let us see {}.", "The result {}?", "What makes {}?", "Work out {}."),
        *("I have to find {}.", "My sum is {}.", "Who can tell me {}?", "Which number is {}?"),
        *("Give me the total {}.", "Here is one more {}.", "Would you work out {}?"),
    ),
    "validation": ("Solve {}.", "Value of {}?", "Determine {}."),
    "eval": ("Calculate {}.", "Evaluate {}.", "How big is {}?"),
}
TERMS = (2, 6)  # shortest and longest chain

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))


@dataclasses.dataclass(frozen=True)
class Chain:
    """One question with its answer; operators and phrasing are the halves of its template."""

    id: str
    numbers: tuple[int, ...]
    operators: str  # one of + and - for each number after the first
    phrasing: str
    split: str

    @property
    def expression(self) -> str:
        """numbers (8, 5, 4), operators "+-" -> "8+5-4"."""
        rest = (f"{op}{n}" for op, n in zip(self.operators, self.numbers[1:], strict=True))
        return str(self.numbers[0]) + "".join(rest)

    @property
    def answer(self) -> int:
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
        return {"id": self.id, "prompt": prompt, "answer": str(self.answer)}


def split_of(operators: str) -> str:
    """The split an operator sequence belongs to: "+-" -> "eval", "++" -> "train"."""
    return next((name for name, own in OPERATORS.items() if operators in own), "train")


def parse_expression(expression: str) -> tuple[tuple[int, ...], str]:
    """ "8 + 5 - 4" -> ((8, 5, 4), "+-")."""
    if not re.fullmatch(r"\d+( ?[+-] ?\d+)+", expression):
        raise DcodError(f'expected a chain such as "8 + 5 - 4", got {expression!r}')
    numbers = tuple(int(number) for number in re.findall(r"\d+", expression))
    return numbers, "".join(re.findall(r"[+-]", expression))


def make_problems(expressions: Iterable[str], *, seed: int) -> Iterator[Chain]:
    """Distinct problems in the order of their expressions, each phrased as its split allows.

    Chains whose value falls below zero on the way are left out: a tiny model then needs a third
    of the facts.
    """
    seen: set[str] = set()
    for expression in expressions:
        numbers, operators = parse_expression(expression)
        key = "".join(expression.split())
        if key in seen:
            continue
        seen.add(key)
        split = split_of(operators)
        phrasing = random.Random(f"{seed} {key}").choice(PHRASINGS[split])
        problem = Chain(key, numbers, operators, phrasing, split)
        if min(problem.running_values()) >= 0:
            yield problem


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


STYLES = {"equations": solve_equations, "words": solve_words, "groups": solve_groups}


def worked_solution(problem: Chain, style: str) -> str:
    """The steps in a style of STYLES, then the line "#### answer"."""
    return f"{STYLES[style](problem)}\n#### {problem.answer}"


def worked_traces(
    problems: Iterable[Chain], shares: dict[str, float], *, seed: int
) -> Iterator[dict[str, str]]:
    """One trace record a problem, its style drawn with probability proportional to `shares`."""
    names = list(shares)
    for problem in problems:
        draw = random.Random(f"{seed} style {problem.id}")
        style = draw.choices(names, [shares[name] for name in names])[0]
        completion = worked_solution(problem, style)
        yield {**problem.record(), "completion": completion, "style": style}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character (printable ASCII and newline) with a chat template.

    "<|end|>" ends a turn and the text; padding has a token of its own. 101 tokens.
    """
    names = [*SPECIAL_TOKENS, *ALPHABET]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
