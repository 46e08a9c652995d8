"""Problems to ask: files in the fields people have, and the benchmarks of benchmarks.py."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from dcod_jax.data import json_text, lines
from dcod_jax.data.presets import PROMPT_FIELDS
from dcod_jax.data.records import BadRecordError, size_of
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import reference_answer
from dcod_jax.evaluate.benchmarks import BENCHMARKS, Benchmark, SetEntry, parse_set
from dcod_jax.evaluate.options import option_reference, read_options, with_options
from dcod_jax.files import Location, Path, as_path

log = logging.getLogger(__name__)

_MARKS = {"hash": "####", "boxed": "\\boxed"}
# Where the field of a file is named.
PREPARE_KEYS = "set prepare.{}"
SET_KEYS = "write {}=NAME behind the file in evaluate.sets"
LONGEST = 1 << 25  # bytes of a record
MOST, LARGEST = 2_000_000, 1 << 30  # problems of a file, which are all held, and their bytes
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
    tolerance: float = 0.0  # how far a number may be off


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """One set as it is asked; `name` is "" for evaluate.problems."""

    name: str
    problems: tuple[Problem, ...]
    instruction: str
    skipped: int = 0  # problems whose reference answer is empty


def problem_file(config: Any, path: Location, *, limit: int = 0) -> ProblemSet:
    """A file of problems in the fields of prepare.*, named ""."""
    names = ("system_prompt", "prompt_field", "answer_field")
    fields = {name: config.prepare[name] for name in names}
    skipped: list[str] = []
    problems = read_problems(path, **fields, limit=limit, skipped=skipped)
    return ProblemSet("", tuple(problems), "", len(skipped))


def problem_sets(config: Any) -> list[ProblemSet]:
    """evaluate.problems (named "") and every set of evaluate.sets, each at most evaluate.limit."""
    sets = []
    skipped: list[str]
    system_prompt, limit = config.prepare.system_prompt, config.evaluate.limit
    if config.evaluate.problems:
        sets.append(problem_file(config, config.evaluate.problems, limit=limit))
    for text in config.evaluate.sets:
        entry = parse_set(text)
        given = {"system_prompt": system_prompt, "limit": limit, "skipped": (skipped := [])}
        problems = read_set(entry, **given)
        benchmark = BENCHMARKS.get(entry.name)
        instruction = benchmark.instruction if benchmark else ""
        sets.append(ProblemSet(entry.name, tuple(problems), instruction, len(skipped)))
    return sets


# ---------------------------------------------------------------- files


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(file:line, record) of a file of records (data/lines.py), one in memory at a time.

    Those of a JSON array are file[0], file[1], ... Raises DcodError for what is no JSON object, and
    for a record beyond LONGEST.
    """
    if not path.is_file():
        raise DcodError(f"{path}: no such file; expected a JSONL file of problems")
    array = lines.is_array(path)
    with contextlib.closing(lines.read_contents(str(path), limit=LONGEST)) as contents:
        for place, (line, content) in enumerate(contents):
            source = f"{path}[{place}]" if array else line
            if isinstance(content, lines.TooLong):
                raise DcodError(
                    f"{source}: {content.size:,} bytes, more than the {LONGEST:,} of a record"
                )
            try:
                record = json_text.parse(content) if isinstance(content, bytes) else content
            except BadRecordError as error:
                record = error
            if isinstance(record, BadRecordError):
                raise DcodError(f"{source}: {record}")
            if not isinstance(record, dict):
                raise DcodError(f"{source}: expected a JSON object, got {type(record).__name__}")
            yield source, record


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A benchmark, with the names that its prompt and answer may have, and what sets them."""

    benchmark: Benchmark
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    keys: str
    need_answer: bool = True

    def problem(self, record: Record, source: str, default: str) -> Problem | None:
        """The problem of a record; None where the reference answer is empty."""
        messages = self._messages(record, source)
        value, answer = self._answer(record, source)
        if self.need_answer and not answer:
            return None
        if options := read_options(record, source):
            messages[-1]["content"] = with_options(messages[-1]["content"], options)
            answer = option_reference(value, options, source) if answer else ""
        own = self.benchmark
        names = [n for n in (own.name, "id") if record.get(n) is not None]
        groups = [n for n in (own.difficulty, "difficulty", "level") if n in record]
        return Problem(
            id=str(record[names[0]]) if names else default,
            messages=messages,
            answer=answer,
            fields=record,
            source=source,
            difficulty=difficulty_group(record[groups[0]]) if groups else "",
            tolerance=_tolerance(record.get(own.tolerance), source),
        )

    def _messages(self, record: Record, source: str) -> list[dict[str, str]]:
        for value in map(record.get, self.prompts):
            if isinstance(value, str) and value.strip():
                return [{"role": "user", "content": value}]
            turns = value if isinstance(value, list) and all(map(_is_message, value)) else []
            while turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            if turns:
                return [{"role": m["role"], "content": m["content"]} for m in turns]
        there = {name: record[name] for name in self.prompts if name in record}
        raise DcodError(
            f"{source}: no prompt; expected non-empty text or a list of "
            f'{{"role", "content"}} messages before the answer in one of '
            f"{', '.join(self.prompts)}, got {str(there)[:60] if there else ', '.join(record)}; "
            f"{self.keys.format('prompt_field')}"
        )

    def _answer(self, record: Record, source: str) -> tuple[Any, str]:
        """The value of the field, and the reference answer in it; "" where there is none."""
        names = [name for name in self.answers if name in record]
        name = next((name for name in names if record[name] is not None), self.answers[0])
        value, mark = record.get(name), self.benchmark.mark
        hint = self.keys.format("answer_field")
        if not names and self.need_answer:
            raise DcodError(
                f"{source}: no answer; expected one in {name!r}, got {', '.join(record)}; {hint}"
            )
        if mark == "list":
            value = _joined(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None, ""
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            raise DcodError(
                f"{source}: field {name!r} must be text or a number, got {str(value)[:60]}; "
                f'several answers are one text ("2, 3"); or {hint}'
            )
        text = str(value).strip()
        if not text or mark not in _MARKS or name != self.benchmark.answer:
            return value, text
        if _MARKS[mark] not in text:
            raise DcodError(
                f"{source}: field {name!r} has no {_MARKS[mark]}, where the final answer of a "
                "worked solution is expected"
            )
        return value, reference_answer(text)


def _collect(
    rows: Iterable[tuple[str, Record]],
    fields: _Fields,
    empty: str,
    *,
    system_prompt: str = "",
    limit: int = 0,
    skipped: list[str] | None = None,
) -> list[Problem]:
    """The problems of at most `limit` rows, whose ids must differ.

    The sources of those without a reference answer go to `skipped`.
    """
    found: dict[str, Problem] = {}
    without, held = [] if skipped is None else skipped, 0
    for number, (source, record) in enumerate(rows):
        problem = fields.problem(record, source, str(number))
        if problem is None:
            without.append(source)
            continue
        if problem.id in found:
            before = found[problem.id].source
            raise DcodError(f"{source}: id {problem.id!r} was used before at {before}")
        if system_prompt and problem.messages[0]["role"] != "system":
            lead = {"role": "system", "content": system_prompt}
            problem = dataclasses.replace(problem, messages=[lead, *problem.messages])
        found[problem.id] = problem
        held += size_of(record)
        if len(found) > MOST or held > LARGEST:
            raise DcodError(
                f"{source}: more than {MOST:,} problems, or {LARGEST:,} bytes of them, which are "
                "all held; split the file"
            )
        if len(found) == limit:  # 0: none
            break
    if without:
        log.warning(
            "%d problems are skipped, as their reference answer is empty (the first: %s)",
            len(without),
            without[0],
        )
    if not found:
        raise DcodError(f"{empty}; {len(without)} with an empty answer" if without else empty)
    return list(found.values())


def read_problems(
    path: Location,
    *,
    prompt_field: str = "",
    answer_field: str = "answer",
    need_answer: bool = True,
    keys: str = PREPARE_KEYS,
    **options: Any,
) -> list[Problem]:
    """Problems of a file: {"prompt" | "question" | "problem" | "messages", "answer", "id"?}.

    {"question": "1 + 1?", "answer": 2} -> one user message, answer "2". `prompt_field` replaces
    the synonyms; `keys` says where the fields are set; `options` are those of _collect. Raises
    DcodError with file:line for what is no such record and for an id that occurs twice.
    """
    prompts = (prompt_field,) if prompt_field else (*PROMPT_FIELDS, "messages")
    return _collect(
        read_records(as_path(path)),
        _Fields(Benchmark("", ""), prompts, (answer_field,), keys, need_answer),
        f"{path}: no problems; expected one JSON object a line",
        **options,
    )


def read_set(entry: SetEntry, **options: Any) -> list[Problem]:
    """The problems of a benchmark, from a local file, a dataset directory or the hub.

    `entry.place` is the file, directory or hub id; "": the benchmark's own hub id. A file of a name
    that is no benchmark has the fields of any problem file. Under another answer field how it
    marks the answer is not known, and the whole field is the answer.
    """
    name, place, prompt_field, answer_field = entry
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        names = {"prompt_field": prompt_field, "answer_field": answer_field or "answer"}
        return read_problems(place, **names, keys=SET_KEYS, **options)
    local = bool(place) and as_path(place).is_file()
    synonyms = tuple(dict.fromkeys((benchmark.prompt, *PROMPT_FIELDS)))
    if answer_field:
        benchmark = dataclasses.replace(benchmark, answer=answer_field, mark="")
    fields = _Fields(
        benchmark,
        (prompt_field,) if prompt_field else synonyms,
        (answer_field,) if answer_field else (benchmark.answer, "answer"),
        SET_KEYS,
    )
    return _collect(
        read_records(as_path(place)) if local else _hub_rows(benchmark, name, place),
        fields,
        f"evaluate.sets: {name} has no problems in {place or benchmark.hub}",
        **options,
    )


# ---------------------------------------------------------------- what fields hold


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def difficulty_group(value: object) -> str:
    """The name of a difficulty: "Level 3" and 3 stay, 6.5 is "6-7", what is no such value is ""."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{math.floor(value)}-{math.floor(value) + 1}"
    return str(int(value)) if isinstance(value, float) else str(value)


def _tolerance(value: object, source: str) -> float:
    """ "1e-1" -> 0.1; of several, one for each answer, the smallest; none is 0."""
    if value is None or not str(value).strip():
        return 0.0
    try:
        found = min(float(part) for part in str(value).split(","))
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise DcodError(f"{source}: expected numbers of at least 0 as tolerance, got {value!r}")
    return found


def _joined(value: Any) -> Any:
    """["2", "3"] -> "2, 3", also where the list was written as text."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) < 1 << 16:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
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
