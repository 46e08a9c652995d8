"""Answers sampled from a model, graded, and kept as JSON lines."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from dcod_jax.bounds import Bound, check, flag, mapping, optional, text, whole
from dcod_jax.data.tokenizer import Tokenizer
from dcod_jax.data.turns import stop_ids
from dcod_jax.evaluate.grading import Expected, grade
from dcod_jax.evaluate.problems import Problem, read_records
from dcod_jax.evaluate.prompts import PLAIN_STOP
from dcod_jax.files import Location, as_path
from dcod_jax.sample.decoding import DecodingParams
from dcod_jax.sample.sampler import Sample, sample

LOOP_REPEATS = 4  # repetitions of a unit at the end of a text that make a loop
LOOP_CHARACTERS = 60  # and how many characters that must cover
LOOP_WINDOW = 4_000  # characters looked at; a unit has at most a fourth of them


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
    reason: str = ""  # of the grade: "correct" or why not
    repeats: bool = False  # ends in a loop
    difficulty: str = ""


def decode_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of a completion without special tokens."""
    ids = list(token_ids)
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def answer(
    model: DecodingParams,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Problem, int]],
    prompts: Sequence[Sequence[int]],
    *,
    indices: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int,
    grade_truncated: bool = False,
    on_batch: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> list[Generation]:
    """One graded answer for each (problem, number of the sample), in order.

    `indices` names the sequences for their random numbers: an answer depends on its index and
    `sampling.seed` alone, so that a part asked again later comes out the same. The last number of
    an answer that was cut off is its answer only with `grade_truncated`.
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
    found = []
    for (problem, number), one in zip(asked, drawn, strict=True):
        text, complete = text_of(tokenizer, one), one.finished or grade_truncated
        verdict = grade(text, Expected(problem.answer, problem.tolerance, complete))
        found.append(
            Generation(
                id=problem.id,
                completion=text,
                answer=problem.answer,
                extracted=verdict.extracted,
                correct=verdict.correct,
                finished=one.finished,
                tokens=len(one.token_ids),
                sample=number,
                reason=verdict.reason,
                repeats=loops(text),
                difficulty=problem.difficulty,
            )
        )
    return found


def sampling_of(settings: Any, *, seed: int, stop: tuple[str, ...] = ()) -> Sampling:
    """generate.* or evaluate.* of the config as a record; stop: texts that end an answer, too."""
    names = ("temperature", "samples", "top_p", "top_k", "min_p")
    values = {name: settings[name] for name in names}
    return Sampling(seed=seed, stop=(*settings.stop, *stop), **values)


def evaluation_sampling(config: Any, *, seed: int = 0) -> Sampling:
    """How evaluate.* draws answers; the plain form stops at the next question."""
    stop = (PLAIN_STOP,) if config.evaluate.form == "plain" else ()
    return sampling_of(config.evaluate, seed=seed, stop=stop)


def sample_options(sampling: Sampling, tokenizer: Tokenizer) -> dict[str, Any]:
    """The arguments of sampler.sample that say how tokens are drawn."""
    options = dataclasses.asdict(sampling)
    del options["samples"]
    stop = options.pop("stop")
    return options | {"stop_strings": stop, "decode": functools.partial(decode_text, tokenizer)}


def text_of(tokenizer: Tokenizer, drawn: Sample) -> str:
    """The text of a sample, without a stop string that ended it."""
    return decode_text(tokenizer, drawn.token_ids) if drawn.text is None else drawn.text


def loops(text: str) -> bool:
    """Whether a text ends in a repetition: one unit at least 4 times, over 60 characters or more.

    A unit has at most 1,000 characters; the last one may be cut off. The Z function of the
    reversed text tells how far each period goes back.
    """
    reverse = text.rstrip()[-LOOP_WINDOW:][::-1]
    length = len(reverse)
    shared = [0] * length  # shared[p]: how far the text before its last p characters equals its end
    left = right = 0
    for place in range(1, length):
        size = min(shared[place - left], right - place) if place < right else 0
        while place + size < length and reverse[size] == reverse[place + size]:
            size += 1
        shared[place] = size
        if place + size > right:
            left, right = place, place + size
        if place + size >= max(LOOP_REPEATS * place, LOOP_CHARACTERS):
            return True
    return False


def to_line(generation: Generation) -> str:
    """One JSON line with its newline."""
    return json.dumps(dataclasses.asdict(generation), ensure_ascii=False) + "\n"


def read_generations(path: Location) -> list[Generation]:
    """The generations of a file of such lines; DcodError for a line that is none."""
    found = []
    for source, record in read_records(as_path(path)):
        check(record, _LINE, source=source)
        found.append(Generation(**{"extracted": None} | mapping(_LINE).kept(record)))
    return found


_LINE: dict[str, Bound] = dict.fromkeys(
    ("id", "completion", "answer", "reason", "difficulty"), text(1 << 26)
)
_LINE |= dict.fromkeys(("correct", "finished", "repeats"), flag())
_LINE |= {"extracted": optional(text(1 << 26)), "tokens": whole(0, 1 << 53)}
_LINE |= {"sample": whole(0, 1 << 53)}
