"""Columns whose messages or lists came packed: as JSON text in tables, as lists by key, as one."""

from __future__ import annotations

import re
from typing import Any

from dcod_jax.data import lines, presets
from dcod_jax.data.presets import Fields
from dcod_jax.data.raw import BadRecordError, Record


def unpacked(record: Record, fields: Fields) -> dict[str, Any]:
    """The record with lists of messages and of completions where they are packed.

    {"messages": '[{"role": "user", "content": "a"}]'} -> {"messages": [{"role": "user", ...}]}
    """
    texts = {*presets.PROMPTS, *presets.COMPLETIONS, fields.prompt, fields.completion}
    found = dict(record)
    for name, value in record.items():
        talk = name in presets.CONVERSATIONS
        if not talk and name not in texts:
            continue
        if isinstance(value, dict) and name != "response" and {"role", "from"} & value.keys():
            both = isinstance(value.get("role", value.get("from")), list)
            found[name] = _transposed(value, name) if both else [value]
        elif isinstance(value, str) and value.lstrip().startswith("["):
            found[name] = _from_text(value, name, lists=talk or name.endswith("s"))
    return found


def _transposed(value: Record, name: str) -> list[dict[str, Any]]:
    """{"role": [a, b], "content": [x, y]} as messages."""
    columns = {key: column for key, column in value.items() if column is not None}
    sizes = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise BadRecordError(f"{name} has lists of different lengths by key; write messages")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _from_text(text: str, name: str, *, lists: bool) -> Any:
    try:
        value = lines.parse(text.encode())
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
