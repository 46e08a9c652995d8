"""Greedy accuracy on held-out problems, with intervals and every generation kept."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dcod_jax.data import chat
from dcod_jax.data.formats import PROMPT_FIELDS
from dcod_jax.generate import sample
from dcod_jax.grading import grade
from dcod_jax.models.config import ModelConfig
from dcod_jax.paths import Location, Path, as_path
from dcod_jax.types import DcodError, Params

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its reference answer ("" where none is known)."""

    id: str
    messages: list[dict[str, str]]
    answer: str
    fields: dict[str, Any]  # the record as read
    source: str  # "file:line"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model answered to one problem, and the judgement."""

    id: str
    completion: str
    answer: str  # reference
    extracted: str | None  # the final answer found; None: there is none
    correct: bool
    finished: bool  # False: cut at max_new_tokens
    tokens: int


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Greedy accuracy with its Wilson 95 % interval."""

    problems: int
    correct: int
    accuracy: float
    low: float
    high: float
    no_answer: float  # share of outputs in which no final answer was found
    truncated: float  # share of outputs cut at max_new_tokens
    tokens: int  # generated
    seconds: float
    generations: tuple[Generation, ...]

    def summary(self) -> dict[str, Any]:
        """The numbers without the generations, for a results file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "generations"}


# ---------------------------------------------------------------- problems


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
    for source, record in _records(as_path(path)):
        if limit and len(problems) == limit:
            break
        messages = _messages(record, prompt_field=prompt_field, source=source)
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        answer = record.get(answer_field)
        if answer is None and need_answer:
            raise DcodError(
                f"{source}: no field {answer_field!r}; expected a reference answer, got "
                f"{', '.join(record)}; set prepare.answer_field"
            )
        name = str(record.get("id", len(problems)))
        if name in seen:
            raise DcodError(f"{source}: id {name!r} was used before at {seen[name]}")
        seen[name] = source
        answer = "" if answer is None else str(answer)
        problems.append(Problem(name, messages, answer, record, source))
    if not problems:
        raise DcodError(f"{path}: no problems; expected one JSON object a line")
    return problems


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DcodError(f"{path}: no such file; expected a JSONL file of problems")
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
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
        yield source, record


def _messages(record: dict[str, Any], *, prompt_field: str, source: str) -> list[dict[str, str]]:
    wanted = (prompt_field,) if prompt_field else (*PROMPT_FIELDS, "messages")
    name = next((field for field in wanted if field in record), None)
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


# ---------------------------------------------------------------- evaluation


def stop_ids(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: those of the model's config and the tokenizer's own."""
    found = set(config.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if not found:
        raise DcodError(
            "neither the model's config.json (eos_token_id) nor its tokenizer (eos_token) names a "
            "stop token; add one, or every completion would run to the length limit"
        )
    return tuple(sorted(found))


def decode_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text of a completion without special tokens."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def evaluate(
    model_config: ModelConfig,
    params: Params,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    batch_size: int,
    compute_dtype: Any,
    grade_timeout: float,
    workers: int = 0,
    mesh: Mesh | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Decode every problem greedily and grade the final answers."""
    start = time.monotonic()
    prompts = [chat.encode_prompt(tokenizer, problem.messages) for problem in problems]
    samples = sample(
        model_config,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        seed=0,
        batch_size=batch_size,
        eos_ids=stop_ids(model_config, tokenizer),
        valid_vocab=len(tokenizer),
        compute_dtype=compute_dtype,
        mesh=mesh,
        on_batch=on_batch,
    )
    texts = [decode_text(tokenizer, s.token_ids) for s in samples]
    pairs = [(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    grades = grade(pairs, timeout=grade_timeout, workers=workers)
    generations = tuple(
        Generation(
            id=problem.id,
            completion=text,
            answer=problem.answer,
            extracted=judged.extracted,
            correct=judged.correct,
            finished=drawn.finished,
            tokens=len(drawn.token_ids),
        )
        for problem, text, judged, drawn in zip(problems, texts, grades, samples, strict=True)
    )
    return summarize(generations, seconds=time.monotonic() - start)


def summarize(generations: Sequence[Generation], *, seconds: float) -> EvalResult:
    """Counts, rates and the interval of graded generations."""
    total = len(generations)
    correct = sum(g.correct for g in generations)
    low, high = wilson(correct, total)
    return EvalResult(
        problems=total,
        correct=correct,
        accuracy=correct / total,
        low=low,
        high=high,
        no_answer=sum(g.extracted is None for g in generations) / total,
        truncated=sum(not g.finished for g in generations) / total,
        tokens=sum(g.tokens for g in generations),
        seconds=seconds,
        generations=tuple(generations),
    )


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson score interval (95 %) of a proportion (Wilson 1927); (0, 10) -> (0.0, 0.278)."""
    if total < 1:
        raise DcodError("an interval needs at least one problem")
    share, square = correct / total, Z95 * Z95
    scale = 1 + square / total
    center = (share + square / (2 * total)) / scale
    spread = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / scale
    low = 0.0 if correct == 0 else center - spread
    high = 1.0 if correct == total else center + spread
    return low, high


def paired_difference(
    first: Sequence[Generation],
    second: Sequence[Generation],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Accuracy of second minus first on the same problems, with its bootstrap 95 % interval.

    Problems are resampled in pairs, so what both models find hard cancels. Raises DcodError when
    the two were not evaluated on the same problems.
    """
    before = {g.id: g.correct for g in first}
    after = {g.id: g.correct for g in second}
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise DcodError(
            f"the two runs differ in {len(odd)} problems (such as {odd[0]!r}); a paired "
            "comparison needs the same ones"
        )
    change = np.array([int(after[name]) - int(before[name]) for name in before], np.int8)
    generator = np.random.default_rng(seed)
    # A resample is n draws with replacement: counts of the values -1, 0, 1 are multinomial.
    shares = np.array([(change == value).mean() for value in (-1, 0, 1)])
    draws = generator.multinomial(len(change), shares, size=resamples)
    means = (draws[:, 2] - draws[:, 0]) / len(change)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(change.mean()), float(low), float(high)


# ---------------------------------------------------------------- keeping


def write_generations(path: Location, generations: Sequence[Generation]) -> None:
    """Every generation with its grade, one JSON object a line."""
    lines = [json.dumps(dataclasses.asdict(g), ensure_ascii=False) for g in generations]
    as_path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_generations(path: Location) -> list[Generation]:
    """What write_generations wrote."""
    return [Generation(**record) for _, record in _records(as_path(path))]
