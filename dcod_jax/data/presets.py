"""Where the parts of a record are: synonyms, and the columns of public data sets by name.

A new data set is a line in PRESETS. Names are compared without regard to case; one that ends in
`*` stands for every column that begins so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dcod_jax.data.reasoning import Reasoning

PROMPT_FIELDS = ("prompt", "question", "problem", "instruction")
PROMPTS = (*PROMPT_FIELDS, "query", "input")
COMPLETIONS = (
    *("completion", "completions", "response", "responses", "output", "outputs"),
    *("generation", "generations", "generated_solution", "attempt"),
)
HUMAN = ("solution",)  # read where nothing else can be the completion
CONVERSATIONS = ("messages", "conversations", "conversation", "contents")
ANSWERS = ("answer", "final_answer", "expected_answer", "reference_answer", "gold_answer")
ANSWERS = (*ANSWERS, "ground_truth", "gt_answer")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
REASONINGS = ("reasoning_content", "reasoning", "thinking", "thinking_trajectories")
FINISHES = ("finish_reason", "finish_reasons", "done_reason", "stop_reason", "status")
COMPLETE = ("is_reasoning_complete", "is_complete", "is_finished", "finished", "completed", "done")
CUT = ("truncated", "is_truncated", "cut_off")  # true where the completion is not whole
VERDICTS = ("correct", "is_correct", "correctness", "correctness_math_verify", "correctness_llama")
VERDICTS = (*VERDICTS, "verified", "is_verified", "passed", "label")
UNREADABLE = ("image", "images", "video", "videos", "audio", "audios")


_AS_WRITTEN = Reasoning()


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where the parts of a record are; an empty name stands for the synonyms above."""

    prompt: str = ""
    completion: str = ""
    answer: str = "answer"
    system_prompt: str = ""  # the text of a system message for traces that have none
    reasoning_field: str = ""
    reasoning: Reasoning = _AS_WRITTEN
    teacher: str = "teacher"
    weight: str = ""  # empty: traces have no weights


def _preset(prompt: str, completion: str, answer: str = "answer", reasoning: str = "") -> Fields:
    return Fields(prompt, completion, answer, reasoning_field=reasoning)


_CHAT = _preset("", "messages")
_SHAREGPT = _preset("", "conversations")
PRESETS = {
    "openr1": _preset("problem", "generations", "answer"),
    "openthoughts": _SHAREGPT,
    "bespoke_stratos": _SHAREGPT,
    "s1k": _preset("question", "attempt", reasoning="thinking_trajectories"),
    "s1k_1_1": _preset("question", "deepseek_attempt", reasoning="deepseek_thinking_trajectory"),
    "limo": _preset("question", "solution", "answer"),
    "deepmath": _preset("question", "r1_solution_*", "final_answer"),
    "numinamath": _CHAT,
    "openmathinstruct2": _preset("problem", "generated_solution", "expected_answer"),
    "openmathreasoning": _preset("problem", "generated_solution", "expected_answer"),
    "nemotron": _preset("input", "output"),
    "metamathqa": _preset("query", "response"),
    "mathinstruct": _preset("instruction", "output"),
    "am_r1": _CHAT,
    "mixture_of_thoughts": _CHAT,
    "codeforces_cots": _preset("prompt", "generation"),
    "dolphin_r1": _preset("messages", "answer", "", "reasoning"),
    "medical_o1": _preset("Question", "Response", reasoning="Complex_CoT"),
    "openorca": _preset("question", "response"),
    "slimorca": _SHAREGPT,
    "ultrachat": _CHAT,
    "orca_math": _preset("question", "answer", ""),
    "alpaca": _preset("instruction", "output"),
}


def propose(columns: object) -> list[str]:
    """Presets whose named columns are all there and that are told apart by them."""
    have = {str(name).lower() for name in columns} if isinstance(columns, dict) else set()
    found = []
    for name, fields in PRESETS.items():
        if fields.completion in HUMAN:  # told apart by no column from a person's text
            continue
        parts = (fields.prompt, fields.completion, fields.reasoning_field)
        named = [part.lower() for part in parts if part]
        named += [fields.answer] if fields.answer not in ("", "answer") else []
        if len(named) > 1 and all(
            any(h.startswith(n[:-1]) for h in have) if n.endswith("*") else n in have for n in named
        ):
            found.append((len(named), name))
    return [name for _, name in sorted(found, key=lambda item: -item[0])]


def fields_of(prepare: Any, reasoning: Reasoning) -> Fields:
    """The columns of config.prepare: what a key names, else what its preset names."""
    preset = PRESETS.get(prepare.form, Fields())
    own_answer = prepare.answer_field if prepare.answer_field != Fields.answer else preset.answer
    return Fields(
        prompt=prepare.prompt_field or preset.prompt,
        completion=prepare.completion_field or preset.completion,
        answer=own_answer,
        system_prompt=prepare.system_prompt,
        reasoning_field=prepare.reasoning_field or preset.reasoning_field,
        reasoning=reasoning,
        teacher=prepare.teacher_field,
        weight=prepare.weight_field,
    )
