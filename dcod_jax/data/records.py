"""What is known of one trace before it is tokenised, and the error of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from dcod_jax.errors import DcodError

DEEPEST = 200  # levels of nesting
LONGEST_NAME = 4096  # characters
MOST_PARTS = 1_000_000
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
        """The same turns behind earlier messages."""
        shifted = frozenset(i + len(earlier) for i in self.unsupervised)
        return Turns([*earlier, *self.messages], shifted, self.extras)


def kind_of(value: object) -> str:
    """The type of a value as messages name it; None is null."""
    return "null" if value is None else type(value).__name__


def size_of(value: Any, depth: int = 0) -> int:
    """About the bytes of a value as JSON; BadRecordError where it is nested too deep."""
    if isinstance(value, str | bytes):
        return len(value)
    if depth > DEEPEST:
        raise BadRecordError(f"nested more than {DEEPEST} deep")
    if isinstance(value, Mapping):
        return sum(len(str(name)) + size_of(inner, depth + 1) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return sum(size_of(inner, depth + 1) for inner in value)
    return 8


def check_name(text: str, name: str) -> None:
    """Refuse what is kept over records where it is as long as a text."""
    if len(text) > LONGEST_NAME:
        raise BadRecordError(f"{name} has {len(text):,} characters, at most {LONGEST_NAME:,} fit")


def check_parts(completions: int, columns: int, messages: int = 0) -> None:
    """Refuse what takes too long: each completion is read with all columns and messages."""
    if (parts := completions * (columns + messages)) > MOST_PARTS:
        raise BadRecordError(
            f"{completions:,} completions beside {columns:,} columns and {messages:,} messages are "
            f"{parts:,} parts, more than {MOST_PARTS:,}; write several records"
        )


def truth(value: object) -> bool | None:
    """true, 1, "True" and their like, and their opposites; None for what is neither."""
    words: dict[str, bool] = dict.fromkeys("true yes y 1 1.0".split(), True)
    words |= dict.fromkeys("false no n 0 0.0".split(), False)
    known = isinstance(value, bool | int | float | str)
    return words.get(str(value).strip().lower()) if known else None


def read_list(record: Record, name: str) -> list[Any] | None:
    """The list under a name, None where it is absent; BadRecordError for another type."""
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise BadRecordError(f"{name} must be a list, found {kind_of(value)}")
    return value


def check_unicode(text: str, name: str) -> str:
    r"""Refuse half of a surrogate pair, which JSON can spell (\ud83d) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name} holds {text[error.start]!a} at character {error.start}, half a surrogate pair"
        ) from error
    return text
