r"""The benchmarks that evaluate knows by name: where they are, and what their fields mean.

Data only; problem_sets.py reads them. Hub ids and fields are as the sets are published; a local
JSONL copy has the same fields, or those of any problem file ({prompt, answer}).
"""

from __future__ import annotations

import dataclasses

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    r"""One set. `mark` says how the answer is written inside `answer` when it is a worked solution:
    "hash" (`#### N`), "boxed" (\boxed{N}); "list": a list of answers; "": the field is it."""

    hub: str
    split: str
    prompt: str
    answer: str
    subset: str = ""  # configuration of the hub dataset
    mark: str = ""
    name: str = ""  # field of the problem's id; empty: its place
    difficulty: str = ""  # field to group accuracy by
    instruction: str = BOXED  # added behind each problem in the chat form


BENCHMARKS = {
    "gsm8k": Benchmark(
        hub="openai/gsm8k",
        subset="main",
        split="test",
        prompt="question",
        answer="answer",
        mark="hash",
    ),
    "math": Benchmark(
        hub="DigitalLearningGmbH/MATH-lighteval",
        split="test",
        prompt="problem",
        answer="solution",
        mark="boxed",
        difficulty="level",
    ),
    "math500": Benchmark(
        hub="HuggingFaceH4/MATH-500",
        split="test",
        prompt="problem",
        answer="answer",
        name="unique_id",
        difficulty="level",
    ),
    "amc23": Benchmark(
        hub="math-ai/amc23",
        split="test",
        prompt="question",
        answer="answer",
        name="id",
    ),
    "aime24": Benchmark(
        hub="HuggingFaceH4/aime_2024",
        split="train",
        prompt="problem",
        answer="answer",
        name="id",
    ),
    "aime25": Benchmark(
        hub="math-ai/aime25",
        split="test",
        prompt="problem",
        answer="answer",
        name="id",
    ),
    "olympiadbench": Benchmark(
        hub="Hothan/OlympiadBench",
        subset="OE_TO_maths_en_COMP",  # open-ended, text only, mathematics, English
        split="train",
        prompt="question",
        answer="final_answer",
        mark="list",
        name="id",
    ),
    "omnimath": Benchmark(
        hub="KbsdJames/Omni-MATH",
        split="test",
        prompt="problem",
        answer="answer",
        difficulty="difficulty",
    ),
}


def parse_set(text: str) -> tuple[str, str]:
    """(name, place) of an entry of evaluate.sets: "gsm8k" -> ("gsm8k", ""), "x=f.jsonl" -> ...

    The place of a benchmark is its hub id when none is given. Raises ValueError for a name that is
    no benchmark and has no place.
    """
    name, _, place = text.partition("=")
    name, place = name.strip(), place.strip()
    if not name or any(mark in name for mark in "/\\ "):
        raise ValueError(
            f"evaluate.sets: {text!r} has no name; expected name=FILE, such as mine=problems.jsonl"
        )
    if name not in BENCHMARKS and not place:
        raise ValueError(
            f"evaluate.sets: {name!r} is no benchmark ({', '.join(BENCHMARKS)}); "
            f"a set of your own is {name}=FILE.jsonl"
        )
    return name, place
