"""Columns whose messages or lists came packed: as JSON text in tables, as lists by key, as one."""

from __future__ import annotations

import re
from typing import Any

from dcod_jax.data import presets, raw
from dcod_jax.data.json_text import parse
from dcod_jax.data.presets import Fields, leaves, listed, plain
from dcod_jax.data.records import BadRecordError, Record


def unpacked(record: Record, fields: Fields) -> dict[str, Any]:
    """The record with lists of messages and of completions where they are packed.

    {"messages": '[{"role": "user", "content": "a"}]'} -> {"messages": [{"role": "user", ...}]}
    """
    texts = {*presets.PROMPTS, *presets.COMPLETIONS, fields.prompt, fields.completion}
    thoughts = {*presets.REASONINGS, fields.reasoning_field}
    found = _named_as_openai(record)
    for name, value in tuple(found.items()):
        talk = name in presets.CONVERSATIONS
        if name == "choices":
            found[name] = listed(value)
        if not talk and name not in texts | thoughts:
            continue
        answer = listed(value) if name in (*presets.COMPLETIONS, fields.completion) else None
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            found[name] = value["messages"]
            if value.get("tools") and "tools" not in found:
                found["tools"] = value["tools"]
        elif isinstance(value, dict) and name != "response" and {"role", "from"} & value.keys():
            both = isinstance(value.get("role", value.get("from")), list)
            found[name] = _transposed(value, name) if both else [value]
        elif isinstance(answer, dict) and _is_answer(answer) and "response" in (name, *found):
            found[name] = answer
        elif isinstance(answer, dict) and _is_answer(answer):
            found["response"] = answer
            del found[name]
        elif isinstance(value, str) and value.lstrip().startswith("["):
            lists = talk or name.endswith("s") or name in thoughts
            found[name] = _from_text(value, name, lists=lists)
        items = found.get(name)
        if (talk or name in (fields.prompt, fields.completion)) and isinstance(items, list):
            found[name] = [turn for item in items for turn in _turns_of(item, pairs=talk)]
    inside = dict(leaves(record)) if any("." in name for name in fields.chosen()) else {}
    chosen = {name: inside.get(name) for name in fields.chosen() if "." in name}
    return found | {name: value for name, value in chosen.items() if value is not None}


_ASKED = ("input", "human", "user", "question", "prompt", "instruction")
_ANSWERED = ("output", "assistant", "gpt", "bot", "response", "answer")


def _turns_of(item: Any, *, pairs: bool) -> list[Any]:
    """A message of LangChain as a message; where `pairs`, a question with its answer as two."""
    if not isinstance(item, dict) or {"role", "from"} & item.keys():
        return [item]
    kind = item.get("type")
    if isinstance(inner := item.get("kwargs") if "lc" in item else item.get("data"), dict):
        kind = inner.get("type", kind)
        if isinstance(path := item.get("id"), list) and path and "type" not in inner:
            kind = str(path[-1]).partition("Message")[0]
        beside = inner.get("additional_kwargs")
        item = {**(beside if isinstance(beside, dict) else {}), **inner}
    if isinstance(kind, str) and kind.lower() in raw.KNOWN and "content" in item:
        return [{"role": kind, **{k: v for k, v in item.items() if k not in ("type", "example")}}]
    own = {plain(str(name)): name for name in item}
    asked, answered = (
        next((own[name] for name in names if name in own), None) for names in (_ASKED, _ANSWERED)
    )
    if not pairs or asked is None or answered is None:
        return [item]
    rest = {k: v for k, v in item.items() if k not in (asked, answered, "system")}
    lead = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    question = [{"role": "user", "content": item[asked]}] if item[asked] else []
    return [*lead, *question, {"role": "assistant", "content": item[answered], **rest}]


def nulls(record: Record, fields: Fields) -> list[str]:
    """Columns without a value, and names inside of objects without one, or of no object."""
    found = [str(name) for name, value in record.items() if value is None]
    dotted = [name for name in fields.chosen() if "." in name]
    inside = dict(leaves(record)) if dotted else {}
    there = [name for name in dotted if name in inside or name.partition(".")[0] in found]
    return [*found, *there]


def _named_as_openai(record: Record) -> dict[str, Any]:
    """With the names of OpenAI's batches where the record is a line of Bedrock's."""
    if not isinstance(record.get("modelInput"), dict):
        return dict(record)
    found = {k: v for k, v in record.items() if k not in ("recordId", "modelInput", "modelOutput")}
    failed = {"error": record.get("error", "there is no modelOutput")}
    found |= {"custom_id": record.get("recordId"), "request": record["modelInput"]}
    return found | {"response": record.get("modelOutput") or failed}


def _is_answer(value: Record) -> bool:
    """Whether an object is the whole answer of an API, and not one text."""
    several = value.get("choices") or value.get("candidates") or [{"message": value.get("message")}]
    first = several[0] if isinstance(several, list) else None
    keys = first.keys() if isinstance(first, dict) else set()
    said = first.get("message") if isinstance(first, dict) else None
    return {"text", "finish_reason"} <= keys or "content" in keys or isinstance(said, dict)


def _transposed(value: Record, name: str) -> list[dict[str, Any]]:
    """{"role": [a, b], "content": [x, y]} as messages."""
    columns = {key: column for key, column in value.items() if column is not None}
    sizes = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise BadRecordError(f"{name} has lists of different lengths by key; write messages")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _from_text(text: str, name: str, *, lists: bool) -> Any:
    try:
        value = parse(text)
    except BadRecordError as error:
        if re.match(r"\s*\[\s*\{\s*['\"](role|from|content)|\s*\['" if lists else r"(?!)", text):
            raise BadRecordError(
                f"{name} is a list as text, {text[:40]!r}, and no JSON; write it as a JSON list"
            ) from error
        return text
    messages = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )
    several = lists and isinstance(value, list) and all(isinstance(v, str | dict) for v in value)
    return value if messages or several else text
