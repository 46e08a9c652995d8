"""One raw trace, and the checked reading of a record's messages."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from dcod_jax.data.presets import TELLING, Fields, leaves, listed
from dcod_jax.data.reasoning import Reasoning, has_reasoning, is_switch, may_be_reasoning
from dcod_jax.errors import DcodError

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# ShareGPT's and Gemini's names, understood in every conversation.
_OTHERS = {"human": "user", "gpt": "assistant", "model": "assistant"}
_OTHERS |= {"observation": "tool", "function_response": "tool", "function": "tool"}
_OTHERS |= {"ai": "assistant", "chatgpt": "assistant"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Where a part of type thinking has its text, in the words of the APIs.
_THINKING = ("thinking", "reasoning", "text", "content", "summary")
_THINKING = (*_THINKING, "reasoningContent", "reasoningText")  # Bedrock
_REASONING_PARTS = ("reasoning_details", "thinking_blocks", "thought", "thoughts")
# Whether a turn is trained on, in the words of trainers; and keys that may be another's.
_TRAINED = (
    "weight",
    "train",
    "training",
    "loss",
    "trainable",
    "train_on_turn",
    "loss_weight",
    "loss_mask",
)
_MAYBE_TRAINED = re.compile("mask|train|loss|learn|supervis", re.IGNORECASE)
# A message's other keys that carry nothing to train on.
_TEXTS = ("content", "value", "text", "parts")
_PLAIN_KEYS = {"role", "from", *_TEXTS, *REASONING_KEYS}
_PLAIN_KEYS |= {*_REASONING_PARTS, *_TRAINED, "masked", "finish_reason", "stop_reason"}
_PLAIN_KEYS |= {"refusal", "annotations", "audio", "tool_calls", "function_call"}

Message = dict[str, Any]  # role and content, and where there are some tool_calls
Record: TypeAlias = Mapping[str, Any]  # one JSON object


class BadRecordError(DcodError):
    """A record that cannot be read; the message has no file and line yet."""


@dataclasses.dataclass(frozen=True)
class RawTrace:
    """One trace as delivered; nothing is tokenised yet. A form's reader fills the first part."""

    messages: list[Message]
    token_ids: list[Any] | None = None  # of the completion
    token_bytes: list[bytes] | None = None  # where an API gives token texts in place of ids
    logprobs: list[Any] | None = None  # one number a token
    finish_reason: str = ""
    failed: str = ""  # why a request gave no completion
    unfinished: str = ""  # why the completion is not whole
    verdict: bool | None = None  # the record's own judgement of this completion
    verdict_of: str = ""  # the columns that give it
    told: tuple[Record, ...] = ()  # what is of this completion alone, to judge it by
    unsupervised: frozenset[int] = frozenset()  # assistant messages that are not the teacher's
    extras: frozenset[str] = frozenset()  # columns of the record that nothing reads

    id: str = ""
    first_completion: int = 0  # assistant messages from this index on are the teacher's
    source: str = ""  # "file:line"
    record: Any = None  # the whole record, for the quarantine
    answer: str | None = None
    model: str = ""  # the teacher's name and sampling temperature where the record tells
    temperature: float | None = None
    teacher: str = ""  # the name in score.teachers of the one that scores it
    weight: float | None = None  # of its tokens in the loss
    tools: list[Any] | None = None  # definitions that the template shows

    def supervised(self) -> list[int]:
        """Indices of the messages that are trained on."""
        return [
            i
            for i, m in enumerate(self.messages)
            if i >= self.first_completion and m["role"] == "assistant"
            if i not in self.unsupervised
        ]

    def prompt_text(self) -> str:
        """The conversation before the completion, without system messages."""
        end = self.first_completion if self.first_completion else self.supervised()[-1]
        shown = [m["content"] for m in self.messages[:end] if m["role"] != "system"]
        return "\n".join(shown)

    def completion_text(self) -> str:
        """The last supervised message: where the final answer is."""
        return self.messages[self.supervised()[-1]]["content"]


@dataclasses.dataclass(frozen=True)
class Turns:
    """Messages, and what they carry beside role and content."""

    messages: list[Message]
    unsupervised: frozenset[int] = frozenset()
    extras: frozenset[str] = frozenset()
    told: tuple[Record, ...] = ()  # what supervised messages tell of themselves

    def after(self, earlier: list[Message]) -> Turns:
        shifted = frozenset(i + len(earlier) for i in self.unsupervised)
        return Turns([*earlier, *self.messages], shifted, self.extras)


def kind_of(value: object) -> str:
    return "null" if value is None else type(value).__name__


def truth(value: object) -> bool | None:
    """true, 1, "True" and their like, and their opposites; None for what is neither."""
    words: dict[str, bool] = dict.fromkeys("true yes y 1 1.0".split(), True)
    words |= dict.fromkeys("false no n 0 0.0".split(), False)
    known = isinstance(value, bool | int | float | str)
    return words.get(str(value).strip().lower()) if known else None


def read_list(record: Record, name: str) -> list[Any] | None:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise BadRecordError(f"{name} must be a list, found {kind_of(value)}")
    return value


def read_text(value: object, name: str) -> str:
    """A non-empty string; parts [{"type": "text", "text": ...}] are joined."""
    text, reasoning = parts(value, name)
    if reasoning:
        raise BadRecordError(f"{name} has a part of type 'thinking', where no answer is")
    if not text.strip():
        raise BadRecordError(f"{name} is empty")
    return text


def parts(value: object, name: str) -> tuple[str, str]:
    """(text, reasoning) of a string or of typed parts."""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list) or not value or not all(isinstance(p, dict) for p in value):
        found = "an empty list" if value == [] else kind_of(value)
        raise BadRecordError(f"{name} must be a string, found {found}")
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in value:
        kind = str(part.get("type") or ("text" if "text" in part else ", ".join(part)))
        place = "thinking" if kind.startswith("reasoning") or kind == "summary_text" else kind
        place = "text" if kind in ("output_text", "input_text") else place
        if place not in texts or kind == "reasoning.encrypted":
            raise BadRecordError(f"{name} has a part of type {kind!r}; only text is supported")
        keys = _THINKING if place == "thinking" else ("text",)
        if not any(key in part for key in keys):
            raise BadRecordError(f"{name} has a part of type {kind!r} without {' or '.join(keys)}")
        inner = next((part[key] for key in keys if part.get(key)), "")
        inner = [inner] if isinstance(inner, dict) else inner
        inner = "".join(parts(inner, f"{name}.{place}")) if isinstance(inner, list) else inner
        place = "thinking" if part.get("thought") is True else place  # Gemini
        if not isinstance(inner, str):
            raise BadRecordError(f"{name}.{place} must be a string, found {kind_of(inner)}")
        texts[place].append(inner)
    return "".join(texts["text"]), "\n".join(texts["thinking"])


def thoughts(value: object, name: str) -> list[str]:
    """The texts of a field of reasoning: one, one for each completion, or [] where it has none."""
    if isinstance(value, dict):
        value = next((value[key] for key in _THINKING if value.get(key)), None)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ["".join(parts(value, name))]
    texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BadRecordError(f"{name} must be a string or strings, found {kind_of(value)}")
    return [text or "" for text in texts] if any((text or "").strip() for text in texts) else []


def check_unicode(text: str, name: str) -> str:
    r"""Refuse half of a surrogate pair, which JSON can spell (\ud83d) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name} holds {text[error.start]!a} at character {error.start}, half a surrogate pair"
        ) from error
    return text


def read_messages(value: object, name: str, fields: Fields) -> Turns:
    """The messages of a conversation; system messages without text are left out."""
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{name} must be a non-empty list of messages, found {kind_of(value)}")
    messages, skipped, extras, told = [], set(), set(), []
    for index, item in enumerate(value):
        message = read_message(item, f"{name}[{index}]", fields)
        extras |= {f"{name}[].{key}" for key in unread(item, message, f"{name}[{index}]", fields)}
        if not message["content"].strip() and "tool_calls" not in message:
            continue
        if message["role"] == "assistant":
            if _is_supervised(item, f"{name}[{index}]"):
                told.append({k: v for k, v in item.items() if k not in _TEXTS})
            else:
                skipped.add(len(messages))
        messages.append(message)
    if not messages:
        raise BadRecordError(f"{name} holds no message with text")
    return Turns(messages, frozenset(skipped), frozenset(extras), tuple(told))


def _is_supervised(message: Record, name: str) -> bool:
    given = {key: message[key] for key in (*_TRAINED, "masked") if message.get(key) is not None}
    for key, value in given.items():
        if truth(value) is None:
            raise BadRecordError(f"{name}.{key} is {value!r}; expected 0 or 1")
    return all(truth(value) == (key != "masked") for key, value in given.items())


def unread(item: Record, message: Message, name: str, fields: Fields) -> list[str]:
    """Keys of a message that nothing reads.

    Refuses those of an assistant's that may say what its turn lacks.
    """
    found = {k: v for k, v in item.items() if k not in _PLAIN_KEYS}
    found = {
        k: v
        for k, v in leaves(found)
        if v not in (None, "", [], {}) and k != fields.reasoning_field
    }
    for key, value in found.items() if message["role"] == "assistant" else ():
        if _MAYBE_TRAINED.search(key) and "." not in key:
            raise BadRecordError(
                f"{name}.{key} may say whether the turn is trained on; known are "
                f"{', '.join(_TRAINED)} (0 or false: not) and masked; rename it, or take it out"
            )
        if may_be_reasoning(key, value):
            check_reasoned(key, message["content"], fields)
    return [key for key in found if "." not in key or TELLING.search(key)]


def check_reasoned(name: str, text: str, fields: Fields) -> None:
    """Refuse a completion without reasoning beside an unread field that may hold it."""
    rule: Reasoning = fields.reasoning
    if rule.policy != "drop" and not has_reasoning(text):
        raise BadRecordError(
            f"{name} may be the reasoning of the completion, which has none: set "
            f"prepare.reasoning_field={name}, or prepare.reasoning=drop to leave reasoning out"
        )


def read_message(value: object, name: str, fields: Fields) -> Message:
    """A message of any dialect: role or from, content, value or parts; reasoning is folded in."""
    if isinstance(value, dict) and "parts" in value and value.keys().isdisjoint(("role", "from")):
        value = {"role": "user", **value}  # Gemini's, which may leave it out
    by = "from" if isinstance(value, dict) and "from" in value and "role" not in value else "role"
    texts = ("value", "content", "text") if by == "from" else ("content", "value", "parts", "text")
    text = next((t for t in texts if isinstance(value, dict) and value.get(t) is not None), "")
    if not isinstance(value, dict) or by not in value:
        found = ", ".join(value) if isinstance(value, dict) else kind_of(value)
        raise BadRecordError(f"{name} must have {by} and {texts[0]}, found {found}")
    given = value[by].strip().lower() if isinstance(value[by], str) else value[by]
    role = (ROLES | _OTHERS).get(given) if isinstance(given, str) else None
    if role is None:
        told = "is from" if by == "from" else "has the role"
        expected = ", ".join([*ROLES, *_OTHERS])
        raise BadRecordError(f"{name} {told} {value[by]!r}; expected {expected}")
    calls = _read_calls(value, name)
    if calls and role != "assistant":
        raise BadRecordError(f"{name} has tool calls, and the role {role!r}")
    reasoning = _reasoning_of(value, name, fields) if role == "assistant" else ""
    if not text and not reasoning and not calls:
        null = " (null)" if any(key in value for key in texts) else ""
        raise BadRecordError(
            f"{name} must have {by} and {texts[0]}{null}, found {', '.join(value)}"
            + (f"; refusal: {str(value['refusal'])[:80]}" if value.get("refusal") else "")
        )
    content, thought = parts(value[text], f"{name}.{text}") if text else ("", "")
    if role == "system" and not content.strip():
        return {"role": role, "content": ""}
    if role != "assistant":
        return {"role": role, "content": read_text(value[text], f"{name}.{text}")}
    reasoning = reasoning or thought
    if calls and not content.strip() and not reasoning.strip():
        return {"role": role, "content": "", **calls}
    return {"role": role, "content": fold(content, reasoning, f"{name}.{text}", fields), **calls}


def _read_calls(message: Record, name: str) -> dict[str, Any]:
    """{"tool_calls": [...]} with arguments as objects, the form that templates read, or {}."""
    given, legacy = message.get("tool_calls"), message.get("function_call")
    calls, found = given or ([legacy] if legacy else []), []
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        inner = call.get("function", call) if isinstance(call, dict) else {}
        inner = inner if isinstance(inner, dict) else {}
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(inner.get("name"), str) or not isinstance(arguments, dict):
            raise BadRecordError(
                f"{name}: tool call {index} must have a name and arguments, an object or its JSON "
                f"text, found {str(call)[:80]}"
            )
        function = {"name": inner["name"], "arguments": arguments}
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", "function": function, **own})
    return {"tool_calls": found} if found else {}


def _reasoning_of(message: Record, name: str, fields: Fields) -> str:
    """The reasoning of a message that has it in a key of its own."""
    chosen = fields.reasoning_field
    own = dict(leaves(message)) if "." in chosen else message
    given = {key: value for key, value in own.items() if value and not is_switch(value)}
    keys = (chosen,) if chosen in own else REASONING_KEYS
    if keys is REASONING_KEYS and given.keys().isdisjoint(keys):
        keys = _REASONING_PARTS
    found = {key: given[key] for key in keys if key in given}
    texts = {key: "\n".join(thoughts(value, f"{name}.{key}")) for key, value in found.items()}
    for key, text in texts.items():
        readable = isinstance(value := found[key], str | list) or (
            isinstance(value, dict) and not value.keys().isdisjoint(_THINKING)
        )
        if not text and not readable:
            raise BadRecordError(f"{name}.{key} must be a string, found {kind_of(value)}")
    texts = {key: text for key, text in texts.items() if text}
    differ = len({" ".join(text.split()) for text in texts.values()}) > 1
    if differ and fields.reasoning.policy != "drop":
        raise BadRecordError(
            f"{name} has different reasoning in {' and '.join(texts)}; "
            "prepare.reasoning_field names the one that is meant"
        )
    return next(iter(texts.values()), "")


def with_own_reasoning(message: Message, beside: Record) -> Message:
    """A message with the reasoning that is beside it in its choice or object."""
    if any(message.get(key) for key in REASONING_KEYS):
        return message
    return message | {key: beside[key] for key in REASONING_KEYS if beside.get(key)}


def fold(text: str, reasoning: str, name: str, fields: Fields) -> str:
    """A completion with its reasoning, as `Reasoning.fold`; refused where both are empty."""
    if not text.strip() and not reasoning.strip():
        raise BadRecordError(f"{name} is empty")
    rule: Reasoning = fields.reasoning
    try:
        whole = rule.fold(text, reasoning)
    except DcodError as error:
        raise BadRecordError(f"{name}: {error}") from error
    return whole if whole.strip() else f"{rule.opening}{rule.closing}"  # no answer: unfinished


def assistant(value: object, name: str, fields: Fields, reasoning: str = "") -> Turns:
    """One assistant message of a text (or of parts)."""
    text, thought = parts(value, name)
    content = fold(text, reasoning or thought, name, fields)
    return Turns([{"role": "assistant", "content": content}])


def read_tools(value: object, functions: object = None) -> list[Any] | None:
    """Tool definitions: a list, or its JSON text; None where there are none.

    functions: OpenAI's older form of them.
    """
    if isinstance(older := listed(functions), list) and not value:
        value = [{"type": "function", "function": one} for one in older]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"tools is no JSON list of definitions: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict | str) for tool in value):
        raise BadRecordError(f"tools must be a list of definitions, found {kind_of(value)}")
    return value
