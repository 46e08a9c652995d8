"""Reasoning and answer: the marks between them, and how a template writes them.

Reasoning comes inside a completion, between marks, or in a field of its own; `Reasoning.fold`
makes the first of the second, in the form of the student's template.
"""

from __future__ import annotations

import dataclasses
import re

from dcod_jax.errors import DcodError

# What begins a part of a completion, and what must end it.
MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
_BLOCKS = "|".join(f"{re.escape(mark)}(.*?){re.escape(end)}" for mark, end in MARKS.items())
_BLOCK = re.compile(rf"^[ \t]*(?:{_BLOCKS})\s*", re.DOTALL | re.MULTILINE)
# Names of fields that hold reasoning, whatever else they are called.
_THOUGHTS = re.compile(
    r"reasoning|think|thought|rationale|cot$|trajector|scratchpad|monolog", re.IGNORECASE
)
# Names that tell about reasoning: reasoning_type, thinking_level.
_ABOUT = re.compile(
    r"(type|mode|model|style|level|category|tokens|length|language|source|format|quality|score|"
    r"domain|skill|topic|tag)s?$",
    re.IGNORECASE,
)
# Solutions of the data set's own, which are not the teacher's: gt_cot, reference_rationale, ...
_GIVEN = re.compile(r"(gt|gold|ground_?truth|reference|human|expert|official)_", re.IGNORECASE)
_ANSWERS = {"<|begin_of_solution|>": "<|end_of_solution|>", "<answer>": "</answer>"}
_SWITCHES = (
    "on off true false yes no none low medium high auto enabled disabled minimal max xhigh default "
    "think no_think thinking nan null n/a"
).split()


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """What becomes of reasoning, and how the template writes it.

    `policy`: auto (kept), keep (kept, and a trace without it refused), drop (left out).
    """

    policy: str = "auto"
    opening: str = "<think>\n"
    closing: str = "\n</think>\n\n"
    in_prompt: bool = False  # the generation prompt has the opening already

    def fold(self, text: str, reasoning: str) -> str:
        """A completion and its reasoning as one text.

        ("so", "4") -> "<think>\\nso\\n</think>\\n\\n4". Raises DcodError where the completion has
        other reasoning of its own.
        """
        text, reasoning = self.complete(text), self._bare(reasoning, text)
        own, answer = split(text)
        if self.policy == "drop":
            found = reasoning.strip() or _BLOCK.search(text)
            return _BLOCK.sub("", text).lstrip("\n") if found else text
        if reasoning.strip() and own.strip() and own.split() != reasoning.split():
            raise DcodError(
                "the completion holds reasoning, and so does a field beside it, and they differ; "
                "set prepare.reasoning_field to the one that is meant, or take one out"
            )
        if own.strip() or not reasoning.strip():
            return text
        return f"{self.opening}{reasoning.strip()}{self.closing}{answer.lstrip()}"

    def _bare(self, reasoning: str, text: str) -> str:
        """The reasoning of a field without its marks: "<think>so</think>" -> "so"."""
        inside, answer = split(self.complete(reasoning))
        if inside and answer.strip() and answer.split() != split(text)[1].split():
            raise DcodError(
                "the field of reasoning holds reasoning and another answer than the completion; "
                "set prepare.completion_field to the one that is meant"
            )
        mark = next((mark for mark in MARKS if reasoning.lstrip().startswith(mark)), "")
        return inside or reasoning.lstrip().removeprefix(mark)

    def complete(self, text: str) -> str:
        """With the opening mark where a completion begins after it: "so</think>4" and its kind."""
        for mark, end in MARKS.items():
            if end in text and mark not in text.partition(end)[0]:
                opening = self.opening if self.opening.strip() == mark else f"{mark}\n"
                return opening + text.lstrip("\n")
        return text


def split(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a completion: "<think>so</think>4" -> ("so", "4")."""
    for mark, end in MARKS.items():
        if text.lstrip().startswith(mark) and end in text:
            inside, _, answer = text.lstrip().removeprefix(mark).partition(end)
            return inside, answer.lstrip()
    return "", text


def has_reasoning(text: str) -> bool:
    """Whether a completion holds reasoning that is begun and ended, and not empty."""
    whole = Reasoning().complete(text)
    return any(any(map(str.strip, filter(None, m.groups()))) for m in _BLOCK.finditer(whole))


def may_be_reasoning(name: str, value: object) -> bool:
    """Whether a field that nothing read is named like a teacher's reasoning and holds sentences."""
    name = name.rpartition(".")[2]
    named = _THOUGHTS.search(name) and not _GIVEN.match(name) and not _ABOUT.search(name)
    return bool(named) and _has_words(value)


def _has_words(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_words, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and " " in value.strip()


def unfinished(text: str) -> str:
    """Why a completion is not whole, or "": a part that is begun and not ended, or no answer."""
    place, parts = 0, MARKS | _ANSWERS
    while True:
        rest = text[place:].lstrip()
        mark = next((mark for mark in parts if rest.startswith(mark)), None)
        if mark is None:
            break
        found = text.find(parts[mark], place)
        if found < 0:
            return f"{mark} is not ended by {parts[mark]}"
        place = found + len(parts[mark])
        if mark in MARKS and not text[place:].strip():
            return f"nothing follows {parts[mark]}"
    for mark, end in parts.items():  # one that is begun on a later line
        *_, last = (0, *(m.end() for m in re.finditer(rf"(?m)^[ \t]*{re.escape(mark)}", text)))
        if last and text.find(end, last) < 0:
            return f"{mark} is not ended by {end}"
    return ""


def is_switch(value: object) -> bool:
    """Whether a field named like reasoning only turns it on: {"reasoning": "on"}."""
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in _SWITCHES
    )
