"""Problems to ask: JSONL in the fields people have, each named by its file and line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from dcod_jax.data.formats import PROMPT_FIELDS
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its reference answer ("" where none is known)."""

    id: str
    messages: list[dict[str, str]]
    answer: str
    fields: dict[str, Any]  # the record as read
    source: str  # "file:line"
    difficulty: str = ""  # as the set has it; "" where it has none


def read_problems(
    path: Location,
    *,
    system_prompt: str = "",
    prompt_field: str = "",
    answer_field: str = "answer",
    limit: int = 0,
    need_answer: bool = True,
) -> list[Problem]:
    """Problems of a JSONL file: {"prompt" | "question" | "problem" | "messages", "answer", "id"?}.

    {"question": "1 + 1?", "answer": 2} -> one user message, answer "2". `prompt_field` replaces
    the synonyms. Raises DcodError with file:line for a line that is not such a record and for an
    id that occurs twice.
    """
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for source, record in read_records(as_path(path)):
        if limit and len(problems) == limit:
            break
        messages = _messages(record, prompt_field=prompt_field, source=source)
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        answer = _answer(record, answer_field, source=source)
        if not answer and need_answer:
            raise DcodError(
                f"{source}: no field {answer_field!r} or an empty one; expected a reference "
                f"answer, got {', '.join(record)}; set prepare.answer_field"
            )
        name = str(len(problems) if record.get("id") is None else record["id"])
        if name in seen:
            raise DcodError(f"{source}: id {name!r} was used before at {seen[name]}")
        seen[name] = source
        problems.append(Problem(name, messages, answer, record, source))
    if not problems:
        raise DcodError(f"{path}: no problems; expected one JSON object a line")
    return problems


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of a JSONL file; raises DcodError for a line that is no JSON object."""
    if not path.is_file():
        raise DcodError(f"{path}: no such file; expected a JSONL file of problems")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DcodError(f"{source}: not UTF-8 at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise DcodError(f"{source}: not JSON ({error}); is the line cut off?") from None
        if not isinstance(record, dict):
            raise DcodError(f"{source}: expected a JSON object, got {type(record).__name__}")
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DcodError(f"{source}: {half!a} is half a surrogate pair, no text") from None
        yield source, record


def _answer(record: dict[str, Any], field: str, *, source: str) -> str:
    """The reference answer as text; "" where there is none."""
    value = record.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise DcodError(
            f"{source}: field {field!r} must be text or a number, got {str(value)[:60]}; several "
            'answers are one text ("2, 3"); prepare.answer_field names another field'
        )
    return str(value).strip()


def _messages(record: dict[str, Any], *, prompt_field: str, source: str) -> list[dict[str, str]]:
    wanted = (prompt_field,) if prompt_field else (*PROMPT_FIELDS, "messages")
    name = next((field for field in wanted if record.get(field) is not None), None)
    if name is None:
        raise DcodError(
            f"{source}: no prompt; expected one of {', '.join(wanted)}, got {', '.join(record)}; "
            "set prepare.prompt_field"
        )
    value = record[name]
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value and all(_is_message(m) for m in value):
        while value and value[-1]["role"] == "assistant":
            value = value[:-1]
        if value:
            return [{"role": m["role"], "content": m["content"]} for m in value]
    raise DcodError(
        f"{source}: field {name!r} must be non-empty text or a list of "
        f'{{"role", "content"}} messages before the answer, got {str(value)[:60]!r}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
