r"""The benchmarks that evaluate.sets knows by name: where they are and what their fields mean.

A new benchmark is one entry of BENCHMARKS; problems.py reads it. Hub ids and fields are those of
the published sets. A local JSONL copy has the same fields or those of a problem file.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    r"""Where one benchmark is, and its fields.

    `mark` says how the field `answer` holds the final answer: "hash" after `####` and "boxed" in
    \boxed{} of a worked solution, "list" as a list of answers, "" as it is.
    """

    hub: str
    split: str
    prompt: str = "problem"
    answer: str = "answer"
    subset: str = ""  # configuration of the hub dataset
    mark: str = ""
    name: str = ""  # field with the problem's id; empty: its position
    difficulty: str = ""  # field to group accuracy by
    tolerance: str = ""  # field with how far a number may be off
    instruction: str = BOXED  # follows each problem in the chat form


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", prompt="question", subset="main", mark="hash"),
    "math": Benchmark("DigitalLearningGmbH/MATH-lighteval", "test", answer="solution", mark="boxed",
                      difficulty="level"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", name="unique_id", difficulty="level"),
    "amc23": Benchmark("math-ai/amc23", "test", prompt="question", name="id"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", name="id"),
    "aime25": Benchmark("math-ai/aime25", "test", name="id"),
    # The subset: open-ended, text only, mathematics, English.
    "olympiadbench": Benchmark("Hothan/OlympiadBench", "train", subset="OE_TO_maths_en_COMP",
                               prompt="question", answer="final_answer", mark="list", name="id",
                               tolerance="error"),
    "aqua": Benchmark("deepmind/aqua_rat", "test", subset="raw", prompt="question",
                      answer="correct"),
    "omnimath": Benchmark("KbsdJames/Omni-MATH", "test", difficulty="difficulty"),
}  # fmt: skip


class SetEntry(NamedTuple):
    """An entry of evaluate.sets in its parts; "" for what it leaves to the benchmark."""

    name: str
    place: str = ""
    prompt_field: str = ""
    answer_field: str = ""


def parse_set(text: str) -> SetEntry:
    """The parts of "gsm8k", "x=f.jsonl" or "x=f.jsonl prompt_field=ask answer_field=gold".

    Raises ValueError for an entry without a name, for an unknown name without a place and for an
    unknown field key.
    """
    head, *pairs = re.split(r"\s+(\w+)=", text.strip())
    keys = dict(zip(pairs[::2], map(str.strip, pairs[1::2]), strict=True))
    name, _, place = (part.strip() for part in head.partition("="))
    if not name or any(mark in name for mark in "/\\ "):
        raise ValueError(
            f"evaluate.sets: {text!r} has no name; expected name=FILE, such as mine=problems.jsonl"
        )
    if wrong := [key for key in keys if key not in SetEntry._fields[2:] or not keys[key]]:
        raise ValueError(
            f"evaluate.sets: {text!r} has {wrong[0]}={keys[wrong[0]]}; behind the file of a set "
            "come prompt_field=NAME and answer_field=NAME"
        )
    if name not in BENCHMARKS and not place:
        raise ValueError(
            f"evaluate.sets: {name!r} is no benchmark ({', '.join(BENCHMARKS)}); "
            f"a set of your own is {name}=FILE.jsonl"
        )
    return SetEntry(name, place, **keys)
