"""Where the parts of a record are: synonyms, and the columns of public data sets by name.

A new data set is a line in PRESETS. Names are compared without regard to case; one that ends in
`*` stands for every column that begins so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dcod_jax.data.json_text import parse
from dcod_jax.data.reasoning import Reasoning
from dcod_jax.data.records import BadRecordError

PROMPT_FIELDS = ("prompt", "question_concat", "question", "problem", "instruction")  # 2nd: SVAMP
PROMPTS = (*PROMPT_FIELDS, "query", "input")
COMPLETIONS = (
    *("completion", "completions", "response", "responses", "output", "outputs"),
    *("generation", "generations", "generated_solution", "generated_text", "output_text"),
    "attempt",
)
HUMAN = ("solution",)  # read where nothing else can be the completion
# Columns that may hold a teacher's text under a name of their own: `solution` is then not taken.
SUSPECTS = re.compile(
    r"attempt|generat|solution|respon|complet|output|trajector|reason|thought|think|rationale|cot$|"
    r"assistant|predict|gpt|deepseek|qwen|qwq|claude|gemini|gemma|llama|mistral|(^|_)(r1|llm)|"
    r"teacher_|(sample|candidate|(^|_)trace|(^|_)trial)s?$|rollout|reannotat",
    re.IGNORECASE,
)
# Of those names, the ends that stand for what is told of a problem, solution or model.
ABOUT = re.compile(
    r"(?<![a-z])(valid|comment|verdict|difficulty|level|type|source|model|grade|score|rate|rating|"
    r"judge?ment|language|label|hint|test|tag|topic|concept|skill|category|categories|domain|"
    r"keyword)s?$|^(clinical|test)_",
    re.IGNORECASE,
)
CONVERSATIONS = ("messages", "conversations", "conversation", "contents")
ANSWERS = ("answer", "final_answer", "expected_answer", "reference_answer", "gold_answer")
ANSWERS = (*ANSWERS, "ground_truth", "gt_answer")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "instructions")
SYSTEMS = (*SYSTEMS, "system_instructions", "sys_prompt")
HISTORIES = ("history", "chat_history", "conversation_history", "previous_messages")
TOOLS = ("tools", "available_tools", "tool_definitions")
REASONINGS = ("reasoning_content", "reasoning", "thinking", "thinking_trajectories")
REASONINGS = (*REASONINGS, "reasoning_contents", "reasonings", "thinkings")
UNREADABLE = re.compile("(image|video|audio)s?(paths?|files?|urls?)?")  # of a `plain` name
# What is worth naming inside of an object that nothing read.
TELLING = re.compile(
    r"\.[^.]*(reason|think|thought|rationale|cot$|correct|verif|reward|score|grade|judg|answer|"
    r"truth|stop|trunc|instruction|tools$|system)[^.]*$",
    re.IGNORECASE,
)
# Parts of an API's request or answer, which are read as such.
_CONTAINERS = {"response", "request", "body", "result", "message", "params", "usage"}
_CONTAINERS |= {"modelInput", "modelOutput", "tools", "input", "output", "prompt", "completion"}


def plain(name: str) -> str:
    """A name without what does not matter in it: finishReason is finish_reason."""
    return re.sub(r"[\s_-]", "", name.lower())


def listed(value: Any) -> Any:
    """A list or object that a table holds as its text; else the value: "[True]" -> [True]."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    text = value
    if re.fullmatch(r"\s*\[[\w\s,'.-]*\]\s*", text):  # as Python writes flags and words
        for own, word in (("'", '"'), ("True", "true"), ("False", "false"), ("None", "null")):
            text = text.replace(own, word)
    try:
        found = parse(text)
    except BadRecordError:
        return value
    return found if isinstance(found, list | dict) else value


def leaves(record: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Names and values, those inside of objects with a dotted name: metadata.is_correct."""
    for name, value in record.items():
        yield name, value
        short = not isinstance(value, str) or len(value) < 1 << 16
        inner = listed(value) if depth and short and name not in _CONTAINERS else None
        if isinstance(inner, dict) and inner:
            inside = leaves({str(key): inner[key] for key in inner}, depth - 1)
            yield from ((f"{name}.{key}", found) for key, found in inside)


_AS_WRITTEN = Reasoning()


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where the parts of a record are; an empty name stands for the synonyms above."""

    prompt: str = ""
    completion: str = ""
    answer: str = "answer"
    reasoning_field: str = ""
    verdict: str = ""  # a preset's column with a verdict under a name of its own
    system_prompt: str = ""  # the text of a system message for traces that have none
    reasoning: Reasoning = _AS_WRITTEN
    teacher: str = "teacher"
    weight: str = ""  # empty: traces have no weights

    def chosen(self) -> list[str]:
        """The names that are no synonyms."""
        parts = (self.prompt, self.completion, self.answer, self.reasoning_field)
        return [name for name in (*parts, self.teacher, self.weight, self.verdict) if name]


_DEEPSEEK = ("deepseek_attempt", "answer", "deepseek_thinking_trajectory", "deepseek_grade")
PRESETS = {
    "openr1": Fields("problem", "generations"),
    "openthoughts_metadata": Fields("problem", "deepseek_solution", "", "deepseek_reasoning"),
    "s1k": Fields("question", "attempt", reasoning_field="thinking_trajectories"),
    "s1k_1_1": Fields("question", *_DEEPSEEK),
    "limo": Fields("question", "solution"),
    "deepmath": Fields("question", "r1_solution_*", "final_answer"),
    **dict.fromkeys(
        ("openmathinstruct2", "openmathreasoning"),
        Fields("problem", "generated_solution", "expected_answer"),
    ),
    "nemotron": Fields("input", "output"),
    "metamathqa": Fields("query", "response"),
    "codeforces_cots": Fields("prompt", "generation"),
    "dolphin_r1": Fields("messages", "answer", "", "reasoning"),
    "medical_o1": Fields("Question", "Response", reasoning_field="Complex_CoT"),
    "openorca": Fields("question", "response"),
    "orca_math": Fields("question", "answer", ""),
    **dict.fromkeys(("mathinstruct", "alpaca"), Fields("instruction", "output")),
    **dict.fromkeys(
        ("numinamath", "am_r1", "mixture_of_thoughts", "ultrachat"), Fields("", "messages")
    ),
    **dict.fromkeys(("openthoughts", "bespoke_stratos", "slimorca"), Fields("", "conversations")),
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
        verdict=preset.verdict,
        teacher=prepare.teacher_field,
        weight=prepare.weight_field,
    )
