"""One raw trace, and the checked reading of a record's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from dcod_jax.errors import DcodError

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

Message = dict[str, str]
Record: TypeAlias = Mapping[str, Any]  # one JSON object


class BadRecordError(DcodError):
    """A record that cannot be read; the message has no file and line yet."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where the parts of a record are; an empty name stands for the synonyms above."""

    prompt: str = ""
    completion: str = ""
    answer: str = "answer"
    system_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class RawTrace:
    """One trace as delivered; nothing is tokenised yet. A form's reader fills the first five."""

    messages: list[Message]
    token_ids: list[Any] | None = None  # of the completion
    token_bytes: list[bytes] | None = None  # where an API gives token texts in place of ids
    logprobs: list[Any] | None = None  # one number a token
    finish_reason: str = ""
    id: str = ""
    first_completion: int = 0  # assistant messages from this index on are the teacher's
    source: str = ""  # "file:line"
    record: Any = None  # the whole record, for the quarantine
    answer: str | None = None
    model: str = ""  # the teacher's name and sampling temperature where the record tells
    temperature: float | None = None

    def prompt_text(self) -> str:
        """The conversation before the completion, without system messages."""
        last = max(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        end = self.first_completion if self.first_completion else last
        shown = [m["content"] for m in self.messages[:end] if m["role"] != "system"]
        return "\n".join(shown)

    def completion_text(self) -> str:
        """The last assistant message: where the final answer is."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"][-1]


def kind_of(value: object) -> str:
    return "null" if value is None else type(value).__name__


def read_list(record: Record, name: str) -> list[Any] | None:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise BadRecordError(f"{name} must be a list, found {kind_of(value)}")
    return value


def read_text(value: object, name: str) -> str:
    """A non-empty string; parts [{"type": "text", "text": ...}] are joined."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise BadRecordError(f"{name} has a part of type {other[0]!r}; only text is supported")
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadRecordError(f"{name} must be a string, found {kind_of(value)}")
    if not value.strip():
        raise BadRecordError(f"{name} is empty")
    return check_unicode(value, name)


def check_unicode(text: str, name: str) -> str:
    r"""Refuse half of a surrogate pair, which JSON can spell (\ud83d) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name} holds {text[error.start]!a} at character {error.start}, half a surrogate pair"
        ) from error
    return text


def read_messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{name} must be a non-empty list of messages, found {kind_of(value)}")
    return [read_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def read_message(value: object, name: str) -> Message:
    """A message with role and content, or ShareGPT's with from and value."""
    sharegpt = isinstance(value, dict) and "from" in value and "role" not in value
    by, text, roles = ("from", "value", SHAREGPT_ROLES) if sharegpt else ("role", "content", ROLES)
    if not isinstance(value, dict) or by not in value or text not in value:
        found = ", ".join(value) if isinstance(value, dict) else kind_of(value)
        raise BadRecordError(f"{name} must have {by} and {text}, found {found}")
    if str(value[by]) not in roles:
        told = "is from" if sharegpt else "has the role"
        raise BadRecordError(f"{name} {told} {value[by]!r}; expected {', '.join(roles)}")
    for extra in ("tool_calls", "reasoning_content", "reasoning"):
        if value.get(extra) and not sharegpt:
            raise BadRecordError(
                f"{name} carries {extra} beside its content, which would be lost; write it into "
                "content in the form that the student is to produce"
            )
    return {"role": roles[str(value[by])], "content": read_text(value[text], f"{name}.{text}")}


def assistant(value: object, name: str) -> list[Message]:
    return [{"role": "assistant", "content": read_text(value, name)}]


def sampled(beside: Record, messages: list[Message], **more: Any) -> RawTrace:
    """A completion with the token ids, log-probs and finish reason that the record has for it."""
    more |= {n: read_list(beside, n) for n in ("token_ids", "logprobs") if n not in more}
    return RawTrace(messages, finish_reason=str(beside.get("finish_reason") or ""), **more)
