"""JSON that somebody else wrote: a record, or a text inside of one. All of it is checked alike."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

from dcod_jax.data.records import DEEPEST, LONGEST_NAME, BadRecordError, check_unicode

_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(content: bytes | str) -> Any:
    """The value of a JSON text; BadRecordError for what is none or no Unicode."""
    try:
        line = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid UTF-8 at byte {error.start} ({error.reason})") from error
    _check_depth(line)
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        ends = text[-30:]
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        what = f"truncated JSON (the line ends {ends!r})" if cut else "invalid JSON"
        several = text in ("{", "data: [DONE]") or text.startswith("data: ")
        if several or error.msg == "Extra data":
            what += "; a record is one line, or one element of an array"
        elif not cut and error.pos < 3:
            table = "" if text[:1] in "{[" else "; a table's name ends in .csv, .tsv or .parquet"
            what += f" (the line begins {text[:30]!r}{table})"
        raise BadRecordError(f"{what}: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # numbers of thousands of digits
        raise BadRecordError(f"invalid JSON: {error}") from error
    if _HALF.search(line):
        _check_text(value, "")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if max(map(len, found), default=0) > LONGEST_NAME:  # names are kept over records
        raise BadRecordError(f"an object has a name of more than {LONGEST_NAME} characters")
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRecordError(f"an object has the name {twice[:60]!a} twice; leave one")
    return found


def _check_depth(line: bytes) -> None:
    if line.count(b"[") + line.count(b"{") <= DEEPEST:
        return
    depth = 0
    for found in _BRACKETS.finditer(line):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found.group(), 0)
        if depth > DEEPEST:
            raise BadRecordError(f"invalid JSON: nested more than {DEEPEST} deep")


def _check_text(value: Any, name: str) -> None:
    """Refuse half of a surrogate pair anywhere in the record, names included."""
    if isinstance(value, str):
        check_unicode(value, name or "the record")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_text(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, f"a name in {name or 'the record'}")
            _check_text(item, f"{name}.{key}" if name else key)
