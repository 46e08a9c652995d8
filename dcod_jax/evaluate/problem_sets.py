"""What is asked (evaluate.problems, evaluate.sets), and in what form."""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dcod_jax.data import chat
from dcod_jax.data.formats import PROMPT_FIELDS
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import reference_answer
from dcod_jax.evaluate.benchmarks import BENCHMARKS, Benchmark, parse_set
from dcod_jax.evaluate.problems import Problem, read_problems, read_records
from dcod_jax.evaluate.statistics import difficulty_group
from dcod_jax.files import as_path

EXEMPLARS = pathlib.Path(__file__).parents[1] / "assets" / "evaluate" / "exemplars.jsonl"
PLAIN_STOP = "\nQuestion:"  # a base model in the plain form goes on with the next question
_MARKS = {"hash": "####", "boxed": "\\boxed"}


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """One set as it is asked; `name` is "" for evaluate.problems."""

    name: str
    problems: tuple[Problem, ...]
    instruction: str


@dataclasses.dataclass(frozen=True)
class PromptForm:
    """How a problem becomes a prompt: chat turns, or plain "Question: … Answer:" text."""

    form: str = "chat"
    exemplars: tuple[tuple[str, str], ...] = ()  # (question, worked answer)
    instruction: str = ""  # behind every question

    def prompt(self, tokenizer: Any, problem: Problem) -> list[int]:
        """Token ids up to where the answer starts; raises DcodError with the problem's place."""
        try:
            if self.form == "plain":
                return chat.encode_text(tokenizer, self._text(problem))
            return chat.encode_prompt(tokenizer, self._messages(problem))
        except DcodError as error:
            raise DcodError(f"{problem.source}: {error}") from error

    def _ask(self, question: str) -> str:
        return f"{question}\n{self.instruction}" if self.instruction else question

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        *before, last = problem.messages
        system = [m for m in before if m["role"] == "system"]
        talk = [m for m in before if m["role"] != "system"]
        shown = []
        for question, answer in self.exemplars:
            shown += [
                {"role": "user", "content": self._ask(question)},
                {"role": "assistant", "content": answer},
            ]
        return [*system, *shown, *talk, {**last, "content": self._ask(last["content"])}]

    def _text(self, problem: Problem) -> str:
        lead = "".join(m["content"] + "\n\n" for m in problem.messages if m["role"] == "system")
        asked = [m for m in problem.messages if m["role"] != "system"]
        if [m["role"] for m in asked] != ["user"]:
            raise DcodError("evaluate.form=plain asks one question, this is a conversation")
        pairs = [f"Question: {self._ask(q)}\nAnswer: {a}\n\n" for q, a in self.exemplars]
        return lead + "".join(pairs) + f"Question: {self._ask(asked[0]['content'])}\nAnswer:"


def prompt_form(config: Any, problem_set: ProblemSet) -> PromptForm:
    """The form that evaluate.form, .shots, .exemplars and .instruction ask for."""
    settings = config.evaluate
    chosen = settings.instruction
    return PromptForm(
        settings.form,
        read_exemplars(settings.exemplars, settings.shots),
        problem_set.instruction if chosen == "auto" else chosen,
    )


def read_exemplars(path: str, shots: int) -> tuple[tuple[str, str], ...]:
    """The first `shots` pairs of a JSONL file {"prompt", "completion"}; "": those built in."""
    if not shots:
        return ()
    pairs = []
    for source, record in read_records(as_path(path) if path else EXEMPLARS):
        pair = record.get("prompt"), record.get("completion")
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise DcodError(f'{source}: an exemplar is {{"prompt": text, "completion": text}}')
        pairs.append(pair)
    if len(pairs) < shots:
        raise DcodError(
            f"evaluate.shots={shots}, but {path or 'the built-in file'} has {len(pairs)} exemplars;"
            " lower it or name a longer file in evaluate.exemplars"
        )
    return tuple(pairs[:shots])


# ---------------------------------------------------------------- reading


def problem_sets(config: Any) -> list[ProblemSet]:
    """evaluate.problems (named "") and every set of evaluate.sets, each at most evaluate.limit."""
    sets = []
    if config.evaluate.problems:
        problems = read_problems(
            config.evaluate.problems,
            system_prompt=config.prepare.system_prompt,
            prompt_field=config.prepare.prompt_field,
            answer_field=config.prepare.answer_field,
            limit=config.evaluate.limit,
        )
        sets.append(ProblemSet("", tuple(map(_with_own_difficulty, problems)), ""))
    for entry in config.evaluate.sets:
        name, place = parse_set(entry)
        problems = read_set(name, place, limit=config.evaluate.limit)
        if config.prepare.system_prompt:
            lead = {"role": "system", "content": config.prepare.system_prompt}
            problems = [dataclasses.replace(p, messages=[lead, *p.messages]) for p in problems]
        instruction = BENCHMARKS[name].instruction if name in BENCHMARKS else ""
        sets.append(ProblemSet(name, tuple(problems), instruction))
    return sets


def _with_own_difficulty(problem: Problem) -> Problem:
    value = problem.fields.get("difficulty", problem.fields.get("level"))
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return dataclasses.replace(problem, difficulty=difficulty_group(value) if plain else "")


def read_set(name: str, place: str = "", *, limit: int = 0) -> list[Problem]:
    """The problems of a benchmark, from a local JSONL file, a dataset directory or the hub.

    `place` is the file, directory or hub id; "": the benchmark's own hub id. A file of a name that
    is no benchmark has the fields of any problem file.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        return [_with_own_difficulty(p) for p in read_problems(place, limit=limit)]
    local = bool(place) and as_path(place).is_file()
    rows = read_records(as_path(place)) if local else _hub_rows(benchmark, name, place)
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for source, record in rows:
        if limit and len(problems) == limit:
            break
        problem = _problem(benchmark, record, source, default=str(len(problems)))
        if problem.id in seen:
            raise DcodError(f"{source}: id {problem.id!r} was used before at {seen[problem.id]}")
        seen[problem.id] = source
        problems.append(problem)
    if not problems:
        raise DcodError(f"evaluate.sets: {name} has no problems in {place or benchmark.hub}")
    return problems


def _problem(benchmark: Benchmark, record: dict[str, Any], source: str, default: str) -> Problem:
    prompts, names = (benchmark.prompt, *PROMPT_FIELDS), (benchmark.name, "id")
    field = next((n for n in prompts if isinstance(record.get(n), str) and record[n].strip()), None)
    if field is None:
        raise DcodError(
            f"{source}: no problem; expected text in one of {', '.join(dict.fromkeys(prompts))}, "
            f"got {', '.join(record)}"
        )
    return Problem(
        id=next((str(record[n]) for n in names if record.get(n) is not None), default),
        messages=[{"role": "user", "content": record[field]}],
        answer=_answer(benchmark, record, source),
        fields=record,
        source=source,
        difficulty=difficulty_group(record.get(benchmark.difficulty)),
    )


def _answer(benchmark: Benchmark, record: dict[str, Any], source: str) -> str:
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
    if benchmark.mark in _MARKS and own is not None:
        if _MARKS[benchmark.mark] not in text:
            raise DcodError(
                f"{source}: field {benchmark.answer!r} has no {_MARKS[benchmark.mark]}, where the "
                "final answer of a worked solution is expected"
            )
        return reference_answer(text)
    return text.strip()


def _joined(value: Any) -> Any:
    """["2", "3"] -> "2, 3", also where the list was written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _hub_rows(benchmark: Benchmark, name: str, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
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


def content(problem_set: ProblemSet) -> str:
    """What of a set decides its result, as text to hash."""
    rows = [[p.id, p.messages, p.answer] for p in problem_set.problems]
    return json.dumps(rows, ensure_ascii=False, sort_keys=True)


def check_exemplars(exemplars: Sequence[tuple[str, str]], problem_set: ProblemSet) -> None:
    """Refuse an exemplar that is one of the problems: it would give the answer away."""
    asked = {p.messages[-1]["content"].strip(): p.source for p in problem_set.problems}
    for question, _ in exemplars:
        if question.strip() in asked:
            raise DcodError(
                f"an exemplar of evaluate.exemplars is the problem at {asked[question.strip()]}: "
                f"{question[:60]!r}"
            )
