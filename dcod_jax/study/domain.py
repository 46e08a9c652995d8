"""The study's problems of a domain by operand range and length, its traces, and their noise.

Test sets: "in" is drawn as the traces are; "operands" has first numbers that no training problem
has; "longer" has more terms than the traces (the warm start saw that length in its own style,
without which no student solves any).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dcod_jax import config as configs
from dcod_jax.data import chat
from dcod_jax.data.dataset import MANIFEST, DatasetWriter, TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import extract_answer
from dcod_jax.models.config import ModelConfig
from dcod_jax.sample.sampler import Sample, decoding_params, sample
from dcod_jax.score.scoring import score_settings, score_traces
from dcod_jax.study import arithmetic, letters
from dcod_jax.study.arithmetic import Chain, worked_traces
from dcod_jax.types import Params, Trace

DOMAINS = {"arithmetic": arithmetic, "letters": letters}  # study.domain
_BARE = dict.fromkeys(("logprobs", "topk_ids", "topk_logprobs", "tail_logprobs"))
_SHARE = "0 < SHARE <= 1"
SETS = ("in", "operands", "longer")  # test sets, beside "validation"
StudyProblem = Chain | letters.Moves


def domain_of(config: Any) -> ModuleType:
    """The module of study.domain: draw_problem, STYLES, style_of, SYMBOLS."""
    if config.study.domain not in DOMAINS:
        raise DcodError(
            f"study.domain={config.study.domain!r}: there are {', '.join(sorted(DOMAINS))}"
        )
    return DOMAINS[config.study.domain]


def problem_stream(
    config: Any, name: str, terms: Sequence[int], first: Sequence[int]
) -> Iterator[StudyProblem]:
    """Endless random problems of study.domain with these terms and first operands.

    Both ranges are inclusive. A problem may come twice.
    """
    draw, kind = random.Random(f"{config.seed} {name}"), domain_of(config)
    while True:
        if problem := kind.draw_problem(draw, terms, first):
            yield problem


def held_out(config: Any) -> dict[str, list[StudyProblem]]:
    """{"validation" and each of SETS: distinct problems}, none of which is in two of them."""
    study = config.study
    taken: set[str] = set()
    ranges = {
        "validation": (study.terms, study.first_operands),
        "in": (study.terms, study.first_operands),
        "operands": (study.terms, study.held_out_operands),
        "longer": (study.longer_terms, study.first_operands),
    }
    found: dict[str, list[StudyProblem]] = {name: [] for name in ranges}
    for name, (terms, first) in ranges.items():
        stream = problem_stream(config, name, terms, first)
        while len(found[name]) < study.problems:
            problem = next(stream)
            if problem.expression not in taken:
                taken.add(problem.expression)
                found[name].append(problem)
    return found


def training_problems(config: Any, name: str, terms: Sequence[int]) -> Iterator[StudyProblem]:
    """Endless problems outside every held-out set."""
    forbidden = {p.expression for problems in held_out(config).values() for p in problems}
    stream = problem_stream(config, name, terms, config.study.first_operands)
    return (problem for problem in stream if problem.expression not in forbidden)


def teacher_recipe(config: Any, shape: ModelConfig) -> Any:
    """The recipe of a start that is the teacher: every style, and the given teacher's size."""
    return configs.replace(
        config,
        {
            "study.start_styles": tuple(domain_of(config).STYLES),
            "study.start_steps": config.study.teacher_steps,
            "study.width": shape.hidden_size,
            "study.layers": shape.num_layers,
        },
    )


# ---------------------------------------------------------------- texts


def prompt_ids(tokenizer: Any, problem: StudyProblem) -> list[int]:
    """Token ids of the problem's prompt, the student's turn opened."""
    return chat.encode_prompt(tokenizer, [{"role": "user", "content": problem.record()["prompt"]}])


def is_correct(problem: StudyProblem, text: str) -> bool:
    """Whether the text ends in the answer; the domain's answers need no algebra."""
    found = extract_answer(text)
    return found is not None and found.answer == str(problem.answer)


def disturb(text: str, draw: random.Random, symbols: str) -> str:
    """One of the `symbols` in the steps replaced by another; the last line, the answer, stays.

    Such a trace passes a filter by its final answer: "8+5=13\\n#### 13" -> "8+7=13\\n#### 13".
    """
    steps, mark, answer = text.rpartition("\n####")
    places = [i for i, character in enumerate(steps) if character in symbols]
    if not places:
        return text
    place = draw.choice(places)
    other = draw.choice([symbol for symbol in symbols if symbol != steps[place]])
    return steps[:place] + other + steps[place + 1 :] + mark + answer


def to_trace(tokenizer: Any, name: str, prompt: str, completion: str) -> Trace:
    """The trace of one prompt and completion."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    ids, mask = chat.encode(tokenizer, messages)
    return Trace(name, ids, mask)


# ---------------------------------------------------------------- traces


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """A model in memory with its tokenizer."""

    config: ModelConfig
    params: Params
    tokenizer: Any

    def answers(
        self, prompts: Sequence[Sequence[int]], config: Any, **options: Any
    ) -> list[Sample]:
        """Continuations; options are temperature, seed and indices of `sample`."""
        return sample(
            decoding_params(
                self.config, self.params, valid_vocab=len(self.tokenizer), compute_dtype="float32"
            ),
            prompts,
            max_new_tokens=config.generate.max_new_tokens,
            batch_size=config.generate.batch_size,
            eos_ids=(self.tokenizer.eos_token_id,),
            **options,
        )

    def text(self, drawn: Sample) -> str:
        """The text of a continuation, without special tokens."""
        return self.tokenizer.decode(
            drawn.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def start_traces(config: Any, tokenizer: Any) -> list[Trace]:
    """Worked solutions in the start's own styles, of problems of the start's lengths."""
    study = config.study
    stream = training_problems(config, "start", study.start_terms)
    problems = [next(stream) for _ in range(study.start_problems)]
    shares = dict.fromkeys(study.start_styles, 1.0)
    styles = domain_of(config).STYLES
    records = worked_traces(problems, shares, seed=config.seed, styles=styles)
    return [
        to_trace(tokenizer, f"{i}", record["prompt"], record["completion"])
        for i, record in enumerate(records)
    ]


def teacher_traces(config: Any, teacher: StudyModel) -> tuple[list[Trace], dict[str, Any]]:
    """`study.traces` samples of a model, filtered, then disturbed; and how they came about."""
    study = config.study
    stream = training_problems(config, "traces", study.terms)
    draw = random.Random(f"{config.seed} noise")
    kept: list[Trace] = []
    counts = {"sampled": 0, "wrong": 0, "other style": 0, "unfinished": 0, "disturbed": 0}
    kind = domain_of(config)
    styles: Counter[str] = Counter()
    while len(kept) < study.traces:
        if counts["sampled"] >= 40 * study.traces:
            raise DcodError(
                f"only {len(kept)} of study.traces={study.traces} usable traces after "
                f"{counts['sampled']} samples ({counts}); lower generate.temperature or "
                "study.traces"
            )
        problems = [next(stream) for _ in range(config.generate.batch_size)]
        drawn = teacher.answers(
            [prompt_ids(teacher.tokenizer, p) for p in problems],
            config,
            temperature=config.generate.temperature,
            seed=config.seed,
            indices=range(counts["sampled"], counts["sampled"] + len(problems)),
        )
        for problem, answer in zip(problems, drawn, strict=True):
            if len(kept) == study.traces:
                break
            text = teacher.text(answer)
            counts["sampled"] += 1
            reason = _why_not(config, problem, answer, text, draw)
            if reason:
                counts[reason] += 1
                continue
            styles[kind.style_of(text)] += 1
            if draw.random() < study.noise:
                text = disturb(text, draw, kind.SYMBOLS)
                counts["disturbed"] += 1
            prompt = problem.record()["prompt"]
            kept.append(to_trace(teacher.tokenizer, f"{len(kept)}", prompt, text))
    return kept, {"counts": counts, "styles": dict(styles)}


def _share(text: str) -> float:
    """A share of the traces; 0.0 where the text is none."""
    try:
        share = float(text)
    except ValueError:
        return 0.0
    return share if 0 < share <= 1 else 0.0


def style_shares(config: Any) -> dict[str, float]:
    """{style: share of its traces that is kept} of study.styles; empty: all of all."""
    known = domain_of(config).STYLES
    entries = (entry.partition(":") for entry in config.study.styles or known)
    shares = {name: _share(share) if mark else 1.0 for name, mark, share in entries}
    if not all(shares.values()):
        raise DcodError(
            f"study.styles={config.study.styles}: expected STYLE or STYLE:SHARE, {_SHARE}"
        )
    if unknown := shares.keys() - known.keys():
        raise DcodError(f"study.styles names {', '.join(unknown)}; there are {', '.join(known)}")
    return shares


def _why_not(
    config: Any, problem: StudyProblem, answer: Sample, text: str, draw: random.Random
) -> str:
    if not answer.finished or not text.strip():
        return "unfinished"
    if config.prepare.filter_correct and not is_correct(problem, text):
        return "wrong"
    share = style_shares(config).get(domain_of(config).style_of(text), 0.0)
    if share < 1 and draw.random() >= share:
        return "other style"
    return ""


def select(traces: Sequence[Trace], scores: Sequence[float], share: float) -> list[Trace]:
    """The share of the traces with the highest scores, in their own order; ties by that order."""
    count = max(round(share * len(traces)), 1)
    best = sorted(range(len(traces)), key=lambda i: (-scores[i], i))[:count]
    return [traces[i] for i in sorted(best)]


def selection(config: Any) -> tuple[str, float]:
    """study.select "likely:0.3" -> ("likely", 0.3); raises DcodError for anything else."""
    if config.study.select == "own":
        return "own", 1.0
    rule, _, text = config.study.select.partition(":")
    share = _share(text)
    if rule not in ("likely", "short") or not share:
        raise DcodError(
            f"study.select={config.study.select!r}: expected likely:SHARE (the traces most "
            f"probable under the start, mean log-prob a token) or short:SHARE, {_SHARE}; or own "
            "(the start's own answers, right or wrong, scored by the teacher)"
        )
    return rule, share


def open_of_start(
    path: Path,
    config: Any,
    whole: TraceDataset,
    start: Callable[[], StudyModel],
    teacher: StudyModel,
    *,
    scored: bool,
) -> TraceDataset:
    """The dataset at `path` of study.select, `scored` by the start; made if missing."""
    if not (path / MANIFEST).exists():
        rule, share = selection(config) if config.study.select else ("", 1.0)
        if rule == "own":
            changes = {"prepare.filter_correct": False, "study.noise": 0.0, "study.styles": ()}
            traces, manifest = teacher_traces(configs.replace(config, changes), start())
            traces = _scored(config, teacher, traces)
        else:
            traces = whole.read(range(len(whole)))
            manifest = {key: whole.manifest[key] for key in ("counts", "styles")}
        bare = [dataclasses.replace(trace, **_BARE) for trace in traces]
        known = _scored(config, start(), bare) if scored or rule == "likely" else []
        logprobs = [np.asarray(trace.logprobs) for trace in known]
        if scored:
            pairs = zip(traces, logprobs, strict=True)
            traces = [dataclasses.replace(trace, start_logprobs=own) for trace, own in pairs]
            manifest["start"] = {"weights": path.name}
        if rule == "likely":
            traces = select(traces, [float(x.mean()) for x in logprobs], share)
        elif rule == "short":
            traces = select(traces, [-float(t.completion_mask.sum()) for t in traces], share)
        _write(path, traces, manifest)
    return TraceDataset(path)


def dataset_path(directory: Path, config: Any, *, start: bool) -> Path:
    """Path of the trace dataset of these settings under `directory`."""
    kind = "start" if start else "teacher"
    content = json.dumps(_settings(config, kind), sort_keys=True)
    return directory / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def open_traces(
    path: Path, config: Any, teacher: StudyModel | None, tokenizer: Any
) -> TraceDataset:
    """The dataset at dataset_path, made if missing: the teacher's samples, or the start's."""
    if not (path / MANIFEST).exists():
        if teacher is None:
            traces, report = start_traces(config, tokenizer), {}
        else:
            traces, report = teacher_traces(config, teacher)
            traces = _scored(config, teacher, traces)
        report["settings"] = _settings(config, "start" if teacher is None else "teacher")
        _write(path, traces, report)
    return TraceDataset(path)


def _write(path: Path, traces: Sequence[Trace], manifest: dict[str, Any]) -> None:
    with DatasetWriter(path, shard_records=8192, manifest=manifest) as writer:
        for trace in traces:
            writer.write(trace)


def _settings(config: Any, kind: str) -> dict[str, Any]:
    keys = "terms longer_terms first_operands held_out_operands problems".split()
    keys += {
        "start": "start_terms start_styles start_problems".split(),
        "teacher": "traces noise styles".split(),
    }[kind]
    found: dict[str, Any] = {f"study.{key}": config.study[key] for key in keys}
    if kind == "teacher":
        found["generate"] = [config.generate.temperature, config.generate.max_new_tokens]
        found["filter"] = config.prepare.filter_correct
        found["score"] = [config.teacher.path, config.score.top_k]
    if config.study.domain != "arithmetic" or config.study.teacher_steps:
        found["domain"] = [config.study.domain, config.study.teacher_steps]
    return found | {"seed": config.seed}


def _scored(config: Any, teacher: StudyModel, traces: list[Trace]) -> list[Trace]:
    vocab = len(teacher.tokenizer)
    top_k = min(config.score.top_k, vocab)
    settings = score_settings(config, compute_dtype="float32", valid_vocab=vocab, top_k=top_k)
    return score_traces(teacher.config, teacher.params, traces, settings=settings)
