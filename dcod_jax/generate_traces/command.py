"""Sample traces from the teacher, or the student, for a file of prompts: JSONL for prepare.

It reads generate.prompts and writes run_dir/traces.jsonl, with the model's log-probs of its own
tokens. Useless traces go to traces.rejected.jsonl with the reason: empty, truncated, and, where the
prompt has a reference answer and prepare.filter_correct is set, wrong_answer or no_answer. The same
command after an interruption goes on with the blocks that are left (data/blocks.py). Of several
processes each samples every n-th block with the teacher on its own devices, where it fits there;
the result has the bytes of one process.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from dcod_jax.data.blocks import BlockFiles
from dcod_jax.data.presets import PROMPT_FIELDS
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from dcod_jax.data.turns import stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.generations import sample_options, sampling_of, text_of
from dcod_jax.evaluate.grading import REJECTED_AS, graded
from dcod_jax.evaluate.problems import Problem, read_problems
from dcod_jax.evaluate.prompts import PromptForm, encode_prompts
from dcod_jax.files import Path, as_path, file_sha256
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.models import hf
from dcod_jax.parallel import hosts
from dcod_jax.sample.sampler import Sample, decoding_params, sample
from dcod_jax.score.teacher import Teacher, open_start, open_teacher

log = logging.getLogger(__name__)

BATCHES_IN_BLOCK = 4  # decoded between two appends
REJECTED = "traces.rejected.jsonl"  # beside traces.jsonl


def traces_path(config: Any) -> Path:
    """Where the sampled traces of a run are."""
    return as_path(config.run_dir) / "traces.jsonl"


def generate_traces(config: Any) -> Path:
    """generate.samples traces for each prompt at generate.temperature; returns the JSONL's path.

    The manifest beside the file (traces.jsonl.manifest.json) says what was read and counts what
    was written and rejected. A finished file of the same prompts, teacher and settings is left as
    it is.
    """
    if not config.generate.prompts:
        raise DcodError("generate.prompts is empty; expected a JSONL file of {prompt, answer}")
    problems = read_problems(
        config.generate.prompts,
        system_prompt=config.prepare.system_prompt,
        prompt_field=config.prepare.prompt_field,
        answer_field=config.prepare.answer_field,
        need_answer=False,
    )
    if config.generate.model == "student":
        teacher = open_start(config)
    else:
        teacher = open_teacher(config.teacher, template=template_of(config.student))
    path = traces_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = ("sampled", "traces", "tokens", "rejected")
    files = BlockFiles([path, path.with_name(REJECTED)], _request(config, teacher), counts=counts)
    manifest, other = files.finished()
    if other:
        raise DcodError(f"{path} was written {other}; move it away or change run_dir")
    if manifest:
        log.info("%s: these traces were sampled before; nothing to do", path)
        return path
    with locked(path.with_name(f".{path.name}.lock"), what=str(path)):
        hosts.barrier(f"the lock of {path.name}")
        _sample_rest(config, teacher, problems, files)
        manifest = files.finish()
    rejected = ", ".join(f"{count} {name}" for name, count in manifest["rejected"].items())
    log.info(
        f"{path}: {manifest['traces']} traces of {len(problems)} prompts, {manifest['tokens']} "
        f"tokens; rejected: {rejected or 'none'}"
    )
    return path


def _sample_rest(
    config: Any, teacher: Teacher, problems: Sequence[Problem], files: BlockFiles
) -> None:
    """Sample and grade the blocks that are left; of several processes each takes every n-th."""
    mesh, process, processes = hosts.share(config)
    copies = config.generate.samples
    block_size = BATCHES_IN_BLOCK * config.generate.batch_size
    done, left = files.pending(len(problems) * copies, block_size)
    if done and hosts.first():
        log.info("going on behind %d traces sampled before", done)
    own = left[process::processes]
    if not own:
        return
    prompts = encode_prompts(
        problems,
        teacher.tokenizer,
        hf.read_config(teacher.path),
        form=PromptForm(),
        key="generate.max_new_tokens",
        max_new_tokens=config.generate.max_new_tokens,
    )
    draw = _sampler(config, teacher, mesh)
    total, enabled = sum(map(len, own)), config.train.progress
    with track("sampling", total, unit="traces", enabled=enabled) as bar:
        for block in own:
            asked = [(problems[index // copies], index % copies) for index in block]
            samples = draw(
                [prompts[index // copies] for index in block],
                indices=block,
                on_batch=lambda sequences, tokens: bar(sequences),
            )
            lines: list[list[str]] = [[], []]  # of what is accepted, of what is rejected
            reasons: collections.Counter[str] = collections.Counter()
            to_grade = _to_grade(config, teacher, asked, samples)
            for (record, reason), grade in graded(to_grade):
                if grade is not None and not grade.correct:
                    reason = REJECTED_AS[grade.reason]
                if reason:
                    reasons[reason] += 1
                    record |= {"rejected": reason, "extracted": grade and grade.extracted}
                lines[bool(reason)].append(json.dumps(record, ensure_ascii=False) + "\n")
            counts = {
                "sampled": len(block),
                "traces": len(lines[0]),
                "tokens": sum(len(s.token_ids) for s in samples),
                "rejected": dict(reasons),
            }
            if processes > 1 or hosts.first():
                files.write(block, ["".join(part) for part in lines], counts)


def _to_grade(
    config: Any, teacher: Teacher, asked: Sequence[tuple[Problem, int]], samples: Sequence[Sample]
) -> Iterator[tuple[tuple[dict[str, Any], str], str, str | None]]:
    """((record, reason to reject it), completion, reference answer where it is graded)."""
    for (problem, copy), drawn in zip(asked, samples, strict=True):
        text = text_of(teacher.tokenizer, drawn)
        reason = "empty" if not text.strip() else "" if drawn.finished else "truncated"
        graded = config.prepare.filter_correct and problem.answer and not reason
        record = _record(config, problem, copy, text, drawn)
        yield (record, reason), text, problem.answer if graded else None


def _request(config: Any, teacher: Teacher) -> dict[str, Any]:
    """What the result follows from; the batch size and the place of the prompts are not in it."""
    names = ("system_prompt", "prompt_field", "completion_field", "answer_field", "filter_correct")
    return {
        "prompts_sha256": file_sha256(config.generate.prompts),
        **{name: config.prepare[name] for name in names},
        "teacher": teacher.provenance(),
        "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
        "template": template_fingerprint(teacher.tokenizer),
        "sampling": dataclasses.asdict(sampling_of(config.generate, seed=config.seed)),
        "max_new_tokens": config.generate.max_new_tokens,
    }


def _sampler(config: Any, teacher: Teacher, mesh: Mesh | None) -> Callable[..., list[Sample]]:
    """The loaded teacher as a function of (prompts, indices, on_batch)."""
    model_config, params = teacher.load(mesh)
    return functools.partial(
        sample,
        decoding_params(
            model_config,
            params,
            valid_vocab=len(teacher.tokenizer),
            compute_dtype=config.teacher.dtype,
            mesh=mesh,
        ),
        max_new_tokens=config.generate.max_new_tokens,
        batch_size=config.generate.batch_size,
        eos_ids=stop_ids(model_config, teacher.tokenizer),
        **sample_options(sampling_of(config.generate, seed=config.seed), teacher.tokenizer),
    )


def _record(config: Any, problem: Problem, copy: int, text: str, drawn: Sample) -> dict[str, Any]:
    """One trace in the fields that prepare looks for; the problem's other fields are kept."""
    prompt_field = config.prepare.prompt_field or "prompt"
    completion_field = config.prepare.completion_field or "completion"
    replaced = ("id", "messages", prompt_field, completion_field, *PROMPT_FIELDS)
    record = {name: value for name, value in problem.fields.items() if name not in replaced}
    plain = len(problem.messages) == 1
    return record | {
        "id": problem.id if config.generate.samples == 1 else f"{problem.id}-{copy}",
        prompt_field: problem.messages[0]["content"] if plain else problem.messages,
        completion_field: text if plain else [{"role": "assistant", "content": text}],
        "token_ids": drawn.token_ids,
        "logprobs": drawn.logprobs,
        "temperature": config.generate.temperature,
        "finish_reason": "stop" if drawn.finished else "length",
    }
