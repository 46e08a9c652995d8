"""Problems asked and graded: accuracy with intervals, every generation kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from dcod_jax.data import chat
from dcod_jax.data.tokenizer import stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.grading import Grader
from dcod_jax.evaluate.problems import Problem, read_records
from dcod_jax.evaluate.statistics import change_interval, loops, share_interval, wilson
from dcod_jax.files import Location, as_path
from dcod_jax.models.config import ModelConfig
from dcod_jax.sample.decoding import DecodingParams
from dcod_jax.sample.sampler import Sample, decoding_params, sample
from dcod_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn: temperature 0 is greedy; n answers for each problem."""

    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # texts that end an answer and are not part of it


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
    sample: int = 0  # which of the problem's answers
    reason: str = ""  # of the grade: one of grading.REASONS
    repeats: bool = False  # ends in a loop (eval_stats.loops)
    difficulty: str = ""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Accuracy with its 95 % interval: Wilson's for one answer a problem, else by resampling."""

    problems: int
    correct: int  # of problems times samples answers
    accuracy: float
    low: float
    high: float
    no_answer: float  # share of outputs in which no final answer was found
    truncated: float  # share of outputs cut at max_new_tokens
    tokens: int  # generated
    seconds: float
    generations: tuple[Generation, ...]
    samples: int = 1

    def summary(self) -> dict[str, Any]:
        """The numbers without the generations, for a results file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "generations"}


# ---------------------------------------------------------------- evaluation


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
    with Grader(timeout=grade_timeout, workers=workers) as grader:
        generations = answer(
            decoding_params(
                model_config,
                params,
                valid_vocab=len(tokenizer),
                compute_dtype=compute_dtype,
                mesh=mesh,
            ),
            tokenizer,
            [(problem, 0) for problem in problems],
            [chat.encode_prompt(tokenizer, problem.messages) for problem in problems],
            indices=range(len(problems)),
            sampling=Sampling(),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            grader=grader,
            on_batch=on_batch,
        )
    return summarize(generations, seconds=time.monotonic() - start)


def answer(
    model: DecodingParams,
    tokenizer: Any,
    asked: Sequence[tuple[Problem, int]],
    prompts: Sequence[Sequence[int]],
    *,
    indices: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int,
    grader: Grader,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """One graded answer for each (problem, number of the sample), in order.

    `indices` names the sequences for their random numbers: an answer depends on its index and
    `sampling.seed` alone, so that a part asked again later comes out the same.
    """
    drawn = sample(
        model,
        prompts,
        indices=indices,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        eos_ids=stop_ids(model.config, tokenizer),
        on_batch=on_batch,
        **sample_options(sampling, tokenizer),
    )
    texts = [text_of(tokenizer, s) for s in drawn]
    graded = grader.stream(
        (place, text, problem.answer)
        for place, (text, (problem, _)) in enumerate(zip(texts, asked, strict=True))
    )
    return [
        Generation(
            id=asked[place][0].id,
            completion=texts[place],
            answer=asked[place][0].answer,
            extracted=judged.extracted,
            correct=judged.correct,
            finished=drawn[place].finished,
            tokens=len(drawn[place].token_ids),
            sample=asked[place][1],
            reason=judged.reason,
            repeats=loops(texts[place]),
            difficulty=asked[place][0].difficulty,
        )
        for place, judged in graded
    ]


def sampling_of(settings: Any, *, seed: int, stop: tuple[str, ...] = ()) -> Sampling:
    """generate.* or evaluate.* of the config as a record; stop: texts that end an answer, too."""
    names = ("temperature", "samples", "top_p", "top_k", "min_p")
    values = {name: settings[name] for name in names}
    return Sampling(seed=seed, stop=(*settings.stop, *stop), **values)


def sample_options(sampling: Sampling, tokenizer: Any) -> dict[str, Any]:
    """The arguments of generate.sample that say how tokens are drawn."""
    return {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop_strings": sampling.stop,
        "decode": functools.partial(decode_text, tokenizer),
    }


def text_of(tokenizer: Any, drawn: Sample) -> str:
    """The text of a sample, without a stop string that ended it."""
    return decode_text(tokenizer, drawn.token_ids) if drawn.text is None else drawn.text


def summarize(generations: Sequence[Generation], *, seconds: float) -> EvalResult:
    """Counts, rates and the interval of graded generations, equally many for each problem.

    With one answer a problem the interval is Wilson's; with more, `share_interval`.
    """
    total, correct = len(generations), sum(g.correct for g in generations)
    scores = problem_scores(generations)
    samples = max(1, total // max(len(scores), 1))
    if samples == 1:
        low, high = wilson(correct, total)
    else:
        low, high = share_interval(list(scores.values()))
    return EvalResult(
        problems=len(scores),
        correct=correct,
        accuracy=correct / total,
        low=low,
        high=high,
        no_answer=sum(g.extracted is None for g in generations) / total,
        truncated=sum(not g.finished for g in generations) / total,
        tokens=sum(g.tokens for g in generations),
        seconds=seconds,
        generations=tuple(generations),
        samples=samples,
    )


def by_problem(generations: Sequence[Generation]) -> dict[str, list[Generation]]:
    """The answers to each problem; raises DcodError when one has more of them than another."""
    groups: dict[str, list[Generation]] = {}
    for generation in generations:
        groups.setdefault(generation.id, []).append(generation)
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1:
        raise DcodError(f"problems have {sorted(counts)} answers; expected equally many for each")
    return groups


def problem_scores(generations: Sequence[Generation]) -> dict[str, float]:
    """The share of correct answers of each problem: pass@1."""
    groups = by_problem(generations)
    return {name: sum(g.correct for g in group) / len(group) for name, group in groups.items()}


def paired_difference(
    first: Sequence[Generation],
    second: Sequence[Generation],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Accuracy of second minus first on the same problems, with its bootstrap 95 % interval.

    Problems are resampled in pairs, so what both models find hard cancels; a problem's score is
    the share of its answers that are correct. Raises DcodError when the two were not evaluated on
    the same problems.
    """
    before, after = problem_scores(first), problem_scores(second)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise DcodError(
            f"the two runs differ in {len(odd)} problems (such as {odd[0]!r}); a paired "
            "comparison needs the same ones"
        )
    change = [after[name] - before[name] for name in before]
    low, high = change_interval(change, resamples=resamples, seed=seed)
    return sum(change) / len(change), low, high


# ---------------------------------------------------------------- keeping


def to_line(generation: Generation) -> str:
    """One JSON line with its newline."""
    return json.dumps(dataclasses.asdict(generation), ensure_ascii=False) + "\n"


def read_generations(path: Location) -> list[Generation]:
    """The generations of a file of such lines."""
    return [Generation(**record) for _, record in read_records(as_path(path))]
