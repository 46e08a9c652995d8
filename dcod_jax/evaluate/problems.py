"""Problems to ask: JSONL files in the fields people have, and the benchmarks of benchmarks.py."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dcod_jax.data.presets import PROMPT_FIELDS
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import reference_answer
from dcod_jax.evaluate.benchmarks import BENCHMARKS, Benchmark, parse_set
from dcod_jax.files import Location, Path, as_path, from_json

_MARKS = {"hash": "####", "boxed": "\\boxed"}
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its reference answer ("" where none is known)."""

    id: str
    messages: list[dict[str, str]]
    answer: str
    fields: Record  # the record as read
    source: str  # "file:line"
    difficulty: str = ""  # as the set has it; "" where it has none


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """One set as it is asked; `name` is "" for evaluate.problems."""

    name: str
    problems: tuple[Problem, ...]
    instruction: str


def problem_sets(config: Any) -> list[ProblemSet]:
    """evaluate.problems (named "") and every set of evaluate.sets, each at most evaluate.limit."""
    sets = []
    system_prompt, limit = config.prepare.system_prompt, config.evaluate.limit
    if config.evaluate.problems:
        problems = read_problems(
            config.evaluate.problems,
            system_prompt=system_prompt,
            prompt_field=config.prepare.prompt_field,
            answer_field=config.prepare.answer_field,
            limit=limit,
        )
        sets.append(ProblemSet("", tuple(problems), ""))
    for entry in config.evaluate.sets:
        name, place = parse_set(entry)
        problems = read_set(name, place, system_prompt=system_prompt, limit=limit)
        instruction = BENCHMARKS[name].instruction if name in BENCHMARKS else ""
        sets.append(ProblemSet(name, tuple(problems), instruction))
    return sets


# ---------------------------------------------------------------- files


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(file:line, record) of a JSONL file; raises DcodError for a line that is no JSON object."""
    if not path.is_file():
        raise DcodError(f"{path}: no such file; expected a JSONL file of problems")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = from_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DcodError(f"{source}: not UTF-8 at byte {error.start} of the line") from None
        except ValueError as error:
            raise DcodError(f"{source}: not JSON ({error}); is the line cut off?") from None
        if not isinstance(record, dict):
            raise DcodError(f"{source}: expected a JSON object, got {type(record).__name__}")
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DcodError(f"{source}: {half!a} is half a surrogate pair, no text") from None
        yield source, record


def _collect(
    rows: Iterable[tuple[str, Record]],
    parse: Callable[[Record, str, str], Problem],
    *,
    system_prompt: str,
    limit: int,
    empty: str,
) -> list[Problem]:
    """parse(record, source, default id) of at most `limit` rows; ids must differ."""
    found: dict[str, Problem] = {}
    for source, record in rows:
        if limit and len(found) == limit:
            break
        problem = parse(record, source, str(len(found)))
        if problem.id in found:
            before = found[problem.id].source
            raise DcodError(f"{source}: id {problem.id!r} was used before at {before}")
        if system_prompt and problem.messages[0]["role"] != "system":
            lead = {"role": "system", "content": system_prompt}
            problem = dataclasses.replace(problem, messages=[lead, *problem.messages])
        found[problem.id] = problem
    if not found:
        raise DcodError(empty)
    return list(found.values())


# ---------------------------------------------------------------- problem files


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

    def parse(record: Record, source: str, default: str) -> Problem:
        messages = _messages(record, prompt_field=prompt_field, source=source)
        answer = _text(record, answer_field, source=source)
        if not answer and need_answer:
            raise DcodError(
                f"{source}: no field {answer_field!r} or an empty one; expected a reference "
                f"answer, got {', '.join(record)}; set prepare.answer_field"
            )
        name = default if record.get("id") is None else str(record["id"])
        difficulty = difficulty_group(record.get("difficulty", record.get("level")))
        return Problem(name, messages, answer, record, source, difficulty)

    return _collect(
        read_records(as_path(path)),
        parse,
        system_prompt=system_prompt,
        limit=limit,
        empty=f"{path}: no problems; expected one JSON object a line",
    )


def _text(record: Record, field: str, *, source: str) -> str:
    """The reference answer; "" where there is none."""
    value = record.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise DcodError(
            f"{source}: field {field!r} must be text or a number, got {str(value)[:60]}; several "
            'answers are one text ("2, 3"); prepare.answer_field names another field'
        )
    return str(value).strip()


def _messages(record: Record, *, prompt_field: str, source: str) -> list[dict[str, str]]:
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


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def difficulty_group(value: object) -> str:
    """The name of a difficulty: "Level 3" and 3 stay, 6.5 is "6-7", what is no such value is ""."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{math.floor(value)}-{math.floor(value) + 1}"
    return str(int(value)) if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- benchmarks


def read_set(
    name: str, place: str = "", *, system_prompt: str = "", limit: int = 0
) -> list[Problem]:
    """The problems of a benchmark, from a local JSONL file, a dataset directory or the hub.

    `place` is the file, directory or hub id; "": the benchmark's own hub id. A file of a name that
    is no benchmark has the fields of any problem file.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        return read_problems(place, system_prompt=system_prompt, limit=limit)
    local = bool(place) and as_path(place).is_file()
    rows = read_records(as_path(place)) if local else _hub_rows(benchmark, name, place)

    def parse(record: Record, source: str, default: str) -> Problem:
        prompts, names = (benchmark.prompt, *PROMPT_FIELDS), (benchmark.name, "id")
        texts = [record[n] for n in prompts if isinstance(record.get(n), str) and record[n].strip()]
        if not texts:
            raise DcodError(
                f"{source}: no problem; expected text in one of "
                f"{', '.join(dict.fromkeys(prompts))}, got {', '.join(record)}"
            )
        return Problem(
            id=next((str(record[n]) for n in names if record.get(n) is not None), default),
            messages=[{"role": "user", "content": texts[0]}],
            answer=_benchmark_answer(benchmark, record, source),
            fields=record,
            source=source,
            difficulty=difficulty_group(record.get(benchmark.difficulty)),
        )

    return _collect(
        rows,
        parse,
        system_prompt=system_prompt,
        limit=limit,
        empty=f"evaluate.sets: {name} has no problems in {place or benchmark.hub}",
    )


def _benchmark_answer(benchmark: Benchmark, record: Record, source: str) -> str:
    """The reference answer, taken out of a worked solution where the benchmark has one."""
    own = record.get(benchmark.answer)
    value = record.get("answer") if own is None else own
    if benchmark.mark == "list":
        value = _joined(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, bool | dict) or not str(value).strip():
        raise DcodError(
            f"{source}: no answer; expected one in {benchmark.answer!r}, got {', '.join(record)}"
        )
    text = str(value)
    if benchmark.mark not in _MARKS or own is None:
        return text.strip()
    if _MARKS[benchmark.mark] not in text:
        raise DcodError(
            f"{source}: field {benchmark.answer!r} has no {_MARKS[benchmark.mark]}, where the "
            "final answer of a worked solution is expected"
        )
    return reference_answer(text)


def _joined(value: Any) -> Any:
    """["2", "3"] -> "2, 3", also where the list was written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _hub_rows(benchmark: Benchmark, name: str, place: str) -> Iterator[tuple[str, Record]]:
    """Rows of a dataset directory or a hub dataset."""
    import datasets
    from datasets.exceptions import DatasetsError

    source = place or benchmark.hub
    subset = None if place and place != benchmark.hub else benchmark.subset or None
    try:
        rows: Any = datasets.load_dataset(source, subset, split=benchmark.split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        raise DcodError(
            f"evaluate.sets: {name} cannot be read from {source!r}, split {benchmark.split!r} "
            f"({reason}); with a local copy write {name}=FILE.jsonl"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{source}[{benchmark.split}]:{number}", dict(row)
