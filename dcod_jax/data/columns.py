"""Which columns of a record hold what: chosen names, else synonyms; and what nothing reads."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from dcod_jax.data import presets, raw, records, schema
from dcod_jax.data.presets import CONVERSATIONS, Fields, leaves, listed, plain
from dcod_jax.data.reasoning import GIVEN, has_reasoning, is_switch
from dcod_jax.data.records import BadRecordError, Message, Record, Turns

_SHARED = {"id", "custom_id", "model", "temperature"}  # read in every form


def find(record: Record, names: Sequence[str]) -> str | None:
    """The record's own spelling of the first of the names that it has a value for, as `plain`."""
    exact = next((name for name in names if record.get(name) is not None), None)
    return exact or next(iter(find_each(record, names)), None)


def find_each(record: Record, names: Sequence[str]) -> list[str]:
    """The record's own spellings of those of the names that it has values for."""
    own = _by_plain(tuple([key for key, value in record.items() if value is not None]))
    found = [name if record.get(name) is not None else own.get(_asked(name)) for name in names]
    return [name for name in found if name is not None]


@functools.lru_cache(maxsize=16)  # records of a file mostly have the same columns
def _by_plain(names: tuple[str, ...]) -> dict[str, str]:
    return {plain(str(name)): name for name in names}


_asked = functools.lru_cache(maxsize=1024)(plain)  # of names in the code or the config


@functools.lru_cache(maxsize=1024)
def unreadable(name: str) -> bool:
    """Whether a column holds what is no text, or the place of it."""
    return bool(presets.UNREADABLE.fullmatch(plain(name)))


def _numbered(record: Record, pattern: str) -> list[str]:
    """The columns that a name with a * stands for, those of lower numbers first."""
    parts = map(re.escape, pattern.split("*"))
    wanted = re.compile("(.*)".join(parts), re.IGNORECASE)
    found = [name for name, value in record.items() if wanted.fullmatch(name) and value is not None]
    if len(found) > 1000:
        raise BadRecordError(f"{len(found)} columns are {pattern}, more than 1000")
    return sorted(found, key=lambda name: ([int(n) for n in re.findall(r"\d{1,9}", name)], name))


def ends_with_answer(record: Record, name: str, fields: Fields) -> bool:
    """Whether a column is a whole conversation, to be taken as it is."""
    if name in CONVERSATIONS:
        return True
    chosen = name in (fields.completion, fields.prompt)
    return chosen and _answered(record, name) and _by(record[name][0]) not in {"", *raw.ANSWERING}


def _by(message: object) -> str:
    """The role that a message names, or ""."""
    found = message if isinstance(message, dict) else {}
    return str(found.get("role", found.get("from", ""))).strip().lower()


def _answered(record: Record, name: str) -> bool:
    value = record.get(name)
    return isinstance(value, list) and bool(value) and _by(value[-1]) in raw.ANSWERING


def completion_columns(record: Record, fields: Fields) -> list[str]:
    """The columns with the teacher's text; [] where none is known.

    Raises BadRecordError where several may be it and their texts differ.
    """
    if fields.completion:
        if "*" in fields.completion:
            return _numbered(record, fields.completion)
        name = find(record, [fields.completion])
        return [name] if name else []
    if fields.prompt and _answered(record, fields.prompt):
        return [fields.prompt]
    talks = [name for name in CONVERSATIONS if record.get(name) is not None]
    found = [name for name in talks if _answered(record, name)]
    found = list(dict.fromkeys([*found, *find_each(record, presets.COMPLETIONS)]))
    texts = {name: _texts(record[name]) for name in found}
    if any(texts.values()):
        found = [name for name in found if texts[name]]
    if len({tuple(texts[name]) for name in found}) > 1:
        raise BadRecordError(
            f"{len(found)} columns may be the completion, and their texts differ: "
            f"{', '.join(found)}; {_choose(record)}"
        )
    if found:
        return found[:1]
    return talks[:1] or _human(record)


def _human(record: Record) -> list[str]:
    """A column that may hold a person's solution, where no other text can be the teacher's."""
    name = find(record, presets.HUMAN)
    if name is None:
        return []
    others = [key for key, value in record.items() if key != name and _is_suspect(key, value)]
    if others:
        told = f"{name} may be a person's text, and {', '.join(others)} the teacher's"
        raise BadRecordError(f"{told}; {_choose(record)}")
    return [name]


def _is_suspect(name: str, value: object) -> bool:
    """Whether a column holds sentences that may be a teacher's: by its name, roles or marks."""
    texts = [text for text in _texts(value) if " " in text]
    named = presets.SUSPECTS.search(name) and not presets.ABOUT.search(name)
    samples = len(texts) > 1 and all("\\boxed" in text for text in texts)
    sure = samples or _answered({name: value}, name) or any(map(has_reasoning, texts))
    return bool(texts and (named or sure)) and not GIVEN.match(name)


def _choose(record: Record) -> str:
    found = presets.propose(record)
    preset = f" (or prepare.form={found[0]}, whose columns these are)" if found else ""
    return f"set prepare.completion_field to the one that is meant{preset}"


def _texts(value: object) -> list[str]:
    """The texts of a column, to compare columns; [] where it holds none."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    items = value if isinstance(value, list) else []
    items = items[-1:] if items and _by(items[-1]) else items  # of messages the last
    keys = ("content", "value", "text", "response")
    found = [next(filter(None, map(i.get, keys)), i) if isinstance(i, dict) else i for i in items]
    return [text.strip() for text in found if isinstance(text, str)]


def missing(record: Record, fields: Fields, part: str) -> BadRecordError:
    """The error for a record without a prompt or completion."""
    chosen: str = getattr(fields, part)
    names = [chosen] if chosen else list({"prompt": presets.PROMPTS}.get(part, presets.COMPLETIONS))
    names.sort(key="question_concat".__eq__)  # SVAMP's is no name to choose
    known = " or ".join(names[:6]) + (" (docs/data.md names all)" if len(names) > 6 else "")
    known += "" if chosen or part == "prompt" else ", or messages"
    have = [name if value is not None else f"{name} (null)" for name, value in record.items()]
    return BadRecordError(
        f"no {part}: expected the field {known}, found {', '.join(have) or 'nothing'}"
        f"{hint(record, fields, part, names)}; prepare.{part}_field names another one"
    )


def hint(record: Record, fields: Fields, part: str, names: Sequence[str] = ()) -> str:
    """What may be the missing part of a record, and the key for it."""
    chosen: str = getattr(fields, part)
    talks = [n for n in record if n not in (chosen, "rejected") and _answered(record, str(n))]
    given = [name for name, value in record.items() if value is not None]
    close = dict.fromkeys(m for n in names for m in get_close_matches(n, given, 2, 0.7))
    sure = {m for n in names for m in get_close_matches(n, given, 1, 0.9)}  # completon
    close = [n for n in close if n in sure or any(" " in text for text in _texts(record[n]))][:3]
    found = "".join(f"; if it is {name}: prepare.{part}_field={name}" for name in close)
    asked = find(record, presets.PROMPTS)
    inner = [n for n in given if n != asked and _holds_records(record[n])]
    looks = presets.propose(record)
    better = [n for n in ("chosen", "preferred_output") if n in given]
    if looks and not chosen:
        return f"{found}; these are the columns of prepare.form={looks[0]}"
    if inner and not close:
        return f"; {inner[0]} holds records: write each as a line of its own (jq -c '.{inner[0]}')"
    if part == "completion" and asked and len(several := _siblings(record)) > 1:
        key = "prepare.completion_field=" + re.sub(r"\d+$", "*", several[0])
        return f"{found}; for {', '.join(several)} set {key}"
    if part == "completion" and better:
        return f"{found}; of a preference pair the better one is prepare.{part}_field={better[0]}"
    if part == "completion" and talks:
        return f"{found}; {talks[0]} holds messages: prepare.completion_field={talks[0]}"
    if {"role", "content"} <= record.keys() or {"from", "value"} <= record.keys():
        return found + '; one message alone is no record: write {"messages": [...]}'
    texts = [n for n in given if n not in (asked, *presets.REASONINGS, *presets.SYSTEMS)]
    texts = [n for n in texts if any(" " in text for text in _texts(record[n]))]
    if part == "completion" and not chosen and not found and len(texts) == 1 + (asked is None):
        found = "" if asked else f"; if it is {texts[0]}: prepare.prompt_field={texts[0]}"
        found += f"; if it is {texts[-1]}: prepare.completion_field={texts[-1]}"
    if list(record) == ["text"]:
        found += "; in one text prompt and completion cannot be told apart: write messages"
    return found


def _holds_records(value: object) -> bool:
    """Whether a column is an object, or a list of objects, with a prompt of its own or messages."""
    value = value[0] if isinstance(value, list) and value else value
    names = [*presets.PROMPTS, *CONVERSATIONS]
    return isinstance(value, dict) and "role" not in value and find(value, names) is not None


def _siblings(record: Record) -> list[str]:
    """Columns of text that differ in a number at their end: answer_1, answer_2."""
    found = [n for n, value in record.items() if re.search(r"\d$", n) and isinstance(value, str)]
    stems = [re.sub(r"\d{1,99}$", "", name) for name in found]
    counts = collections.Counter(stems)
    return [n for n, stem in zip(found, stems, strict=True) if counts[stem] > 1]


class Row:
    """A record being read, the names of the columns that were, and of those without a value."""

    def __init__(self, record: Record, fields: Fields, *, nulls: Sequence[str] = ()):
        self.record, self.fields, self.nulls = record, fields, nulls
        self.used = {*_SHARED, *(n for n in map(str, record) if unreadable(n) and not record[n])}
        self.tools: list[Any] | None = None
        self.telling: list[tuple[str, str, Any]] | None = None  # what told.py finds in `leaves`

    @functools.cached_property
    def leaves(self) -> list[tuple[str, Any]]:
        """Names and values of the record, those inside of objects with a dotted name."""
        return list(leaves(self.record))

    def get(self, name: str) -> Any:
        """The column's value, None where it is absent; it counts as read."""
        self.used.add(name)
        return self.record.get(name)

    def unread(self) -> dict[str, Any]:
        """Columns that nothing read, and what tells of a completion inside of objects."""
        return {
            name: value
            for name, value in self.leaves
            if name not in self.used and ("." not in name or presets.TELLING.search(name))
            if name.partition(".")[0] not in self.used
        }

    def prompt(self, *, first: str = "") -> list[Message]:
        """The prompt of the record; the column `first` is preferred where the record has it."""
        chosen = self.fields.prompt
        name = first if self.record.get(first) is not None and not chosen else None
        said = {n: v for n, v in self.record.items() if not isinstance(v, str) or v.strip()}
        names = [chosen] if chosen else [*presets.PROMPTS, *CONVERSATIONS]
        name = name or find(said, names[: len(presets.PROMPTS)]) or find(self.record, names)
        if name is None:
            raise missing(self.record, self.fields, "prompt")
        value = self.get(name)
        earlier = self._history()
        if isinstance(value, list):
            if value and isinstance(value[0], str):
                raise BadRecordError(f"{name} is a list of texts; a prompt is one text or messages")
            return [*earlier, *raw.read_messages(value, name, self.fields).messages]
        text = raw.read_text(value, name)
        known = ("input", "context", "passage", "body")  # Alpaca, Dolly, DROP, SVAMP
        parts = find_each(self.record, self.fields.chosen())  # what is asked for stands elsewhere
        for own in find_each(self.record, known[name.lower() != "instruction" :]):
            value = self.record[own]
            more: list[Any] = value if isinstance(value, list) else [value]
            if own not in (name, *parts) and all(isinstance(part, str) for part in more):
                self.used.add(own)
                there = "".join(text.split())
                given = [part for part in more if part.strip()]
                new = [part for part in given if "".join(part.split()) not in there]
                text += "".join(f"\n\n{part}" for part in new if part.strip() != "<noinput>")
        return [*earlier, {"role": "user", "content": text}]

    def _history(self) -> list[Message]:
        """Earlier turns in a column of their own: [[question, answer], ...] or messages."""
        own = find(self.record, presets.HISTORIES) or "history"
        value = listed(self.get(own))
        if not value or (isinstance(value, str) and not value.strip()):
            return []
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return raw.read_messages(value, own, self.fields).messages
        found: list[Message] = []
        for index, pair in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(pair, list) or len(pair) != 2:
                have = f"found {str(pair)[:60]}"
                raise BadRecordError(f"{own}[{index}] must be [question, answer], {have}")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                found.append({"role": role, "content": raw.read_text(text, f"{own}[{index}]")})
        return found

    def system(self, messages: list[Message]) -> list[Message]:
        """The system message to put first: the record's, else prepare.system_prompt."""
        own = messages[0]["content"] if messages[0]["role"] == "system" else None
        texts: list[str] = []
        for name in find_each(self.record, presets.SYSTEMS):
            value = None if name == self.fields.prompt else self.get(name)
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(value, dict):  # a message, or a part of one
                value = value.get("parts", value.get("content", [value]))
            text = raw.read_text(value, name)
            if own is not None and own.strip() != text.strip():
                inside = find(self.record, CONVERSATIONS) or "the messages"
                raise BadRecordError(
                    f"two system messages: one inside {inside}, one in the field {name}"
                )
            texts.append(text)
        if len(set(texts)) > 1:
            raise BadRecordError(f"two of {', '.join(presets.SYSTEMS)} differ; leave one")
        text = texts[0] if texts else self.fields.system_prompt
        return [{"role": "system", "content": text}] if text and own is None else []

    def reasoning(self) -> list[str]:
        """The texts of a column of reasoning, one for each completion."""
        chosen = self.fields.reasoning_field
        if chosen:
            self._check_there(chosen, "reasoning_field", self.record)
        found = {}
        for own in find_each(self.record, [chosen] if chosen else presets.REASONINGS):
            value = self.record[own]
            if own in found or is_switch(value):
                continue
            if texts := raw.thoughts(value, own):
                self.used.add(own)
                found[own] = texts
        return raw.only(found, self.fields)

    def _check_there(self, chosen: str, key: str, known: Record) -> None:
        """Refuse the name of a column that the record does not have, not even as null."""
        inside = [
            m for v in known.values() if isinstance(v, list) for m in v if isinstance(m, dict)
        ]
        have = [*known, *self.record, *self.nulls, *(name for m in inside for name, _ in leaves(m))]
        if plain(chosen) not in {plain(str(name)) for name in have}:
            close = get_close_matches(chosen, map(str, have), n=1)
            raise BadRecordError(
                f"no field {chosen!r}, which prepare.{key} names (null where a record has none); "
                f"found {', '.join(map(str, self.record))}"
                + (f" (the nearest is {close[0]!r})" if close else "")
            )

    def with_reasoning(self, turns: Turns, thought: str) -> Turns:
        """A conversation whose last message has its reasoning in a column beside it."""
        last = turns.messages[-1]
        if not thought or last["role"] != "assistant":
            return turns
        content = raw.fold(last["content"], thought, "the last message", self.fields)
        messages = [*turns.messages[:-1], last | {"content": content}]
        return dataclasses.replace(turns, messages=messages)

    def answer(self, known: Record) -> str | None:
        """The reference answer, from `known` or the record."""
        chosen = self.fields.answer
        names = presets.ANSWERS if chosen == "answer" else [chosen]
        if chosen not in ("", "answer"):
            self._check_there(chosen, "answer_field", known)
        name = find(known, names) if chosen else None
        if name is None or name in self.used - _SHARED or str(known[name]).strip() == "":
            return None
        value = known[name] if isinstance(known[name], list) else listed(known[name])
        one = isinstance(value, list) and len(value) == 1  # '["5"]' of a table; "[5]" is an answer
        one = one and (value is known[name] or isinstance(value[0], str))
        value = value[0] if one else known[name]
        self.used.add(name)
        if not isinstance(value, str) and schema.number(value):
            kind = f"{value}" if isinstance(value, float) else records.kind_of(value)
            raise BadRecordError(
                f"{name} must be a string or a number, found {kind}; "
                "prepare.answer_field names another field"
            )
        return str(value)

    def teacher(self, known: Record, index: int, count: int) -> str:
        """The name of a completion's teacher: the record's, or in a list with one for each."""
        value = self._own(known, self.fields.teacher, index, count)
        if value is None or isinstance(value, str):
            return (value or "").strip()
        raise BadRecordError(
            f"{self.fields.teacher} must be the name of a teacher, found {records.kind_of(value)}; "
            "prepare.teacher_field names another field, or none where it is empty"
        )

    def weight(self, known: Record, index: int, count: int) -> float | None:
        """The weight of a completion, as `teacher`; None without prepare.weight_field."""
        name = self.fields.weight
        if not name:
            return None
        value = self._own(known, name, index, count)
        found = str(value)[:30]
        if isinstance(value, str):  # of a table
            try:
                value = float(value)
            except ValueError:
                value = None
        if value is None or schema.number(value) or value < 0:
            raise BadRecordError(
                f"{name} must be a finite number >= 0, found {found!r}; it is the weight "
                "that prepare.weight_field asks for (1 leaves a trace as it is)"
            )
        return float(value)

    def _own(self, known: Record, name: str, index: int, count: int) -> Any:
        value = known.get(name) if name else None
        self.used.add(name)
        return value[index] if isinstance(value, list) and len(value) == count else value
