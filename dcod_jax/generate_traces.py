"""Sample traces from the teacher for a file of prompts: JSONL that prepare reads.

Reads generate.prompts, writes run_dir/traces.jsonl; blocks of sequences are appended one by one,
and the same command after an interruption goes on behind the last whole block.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dcod_jax.config import run_verb
from dcod_jax.data import chat
from dcod_jax.data.formats import PROMPT_FIELDS
from dcod_jax.data.manifest import file_sha256, replace_file, to_json
from dcod_jax.evals import Problem, decode_text, read_problems, stop_ids
from dcod_jax.generate import Sample, sample
from dcod_jax.mesh import make_mesh
from dcod_jax.progress import track
from dcod_jax.scoring import Teacher, open_teacher
from dcod_jax.types import DcodError

BATCHES_IN_BLOCK = 4  # decoded between two appends


def traces_path(config: Any) -> Path:
    """Where the sampled traces of a run are."""
    return Path(config.run_dir) / "traces.jsonl"


def generate_traces(config: Any) -> Path:
    """generate.samples traces for each prompt at generate.temperature; returns the JSONL's path.

    A trace cut at max_new_tokens is kept and marked `"finish_reason": "length"`. The manifest
    beside the file (traces.jsonl.manifest.json) says what was read and counts what was written.
    A finished file of the same prompts, teacher and settings is left as it is.
    """
    if jax.process_count() > 1:
        raise DcodError("generate_traces runs on one host; start it there alone")
    if not config.generate.prompts:
        raise DcodError("generate.prompts is empty; expected a JSONL file of {prompt, answer}")
    problems = read_problems(
        config.generate.prompts,
        system_prompt=config.prepare.system_prompt,
        prompt_field=config.prepare.prompt_field,
        answer_field=config.prepare.answer_field,
        need_answer=False,
    )
    teacher = open_teacher(config.teacher, chat_template=config.student.chat_template)
    path = traces_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(path, _request(config, teacher))
    if progress.finished():
        print(f"{path}: these traces were sampled before; nothing to do")
        return path
    prompts = [chat.encode_prompt(teacher.tokenizer, p.messages) for p in problems]
    total = len(problems) * config.generate.samples
    block = BATCHES_IN_BLOCK * config.generate.batch_size
    done = progress.resume()
    draw = _sampler(config, teacher)
    with (
        track("sampling", total, unit="traces", done=done, enabled=config.train.progress) as bar,
        open(progress.partial, "ab") as file,
    ):
        for start in range(done, total, block):
            indices = range(start, min(start + block, total))
            samples = draw(
                [prompts[index // config.generate.samples] for index in indices],
                indices=indices,
                on_batch=lambda sequences, tokens: bar(sequences),
            )
            lines = [
                _line(config, teacher.tokenizer, problems, index, drawn)
                for index, drawn in zip(indices, samples, strict=True)
            ]
            file.write("".join(lines).encode("utf-8"))
            progress.commit(file, indices.stop, samples, empty=lines.count(""))
    manifest = progress.finish()
    print(
        f"{path}: {manifest['traces']} traces of {len(problems)} prompts, {manifest['tokens']} "
        f"tokens, {manifest['truncated']} cut at {config.generate.max_new_tokens} tokens; "
        f"{manifest['empty']} empty ones left out"
    )
    return path


def _request(config: Any, teacher: Teacher) -> dict[str, Any]:
    """What the result follows from; the batch size and the place of the prompts are not in it."""
    return {
        "prompts_sha256": file_sha256(config.generate.prompts),
        "system_prompt": config.prepare.system_prompt,
        "prompt_field": config.prepare.prompt_field,
        "completion_field": config.prepare.completion_field,
        "answer_field": config.prepare.answer_field,
        "teacher": teacher.provenance(),
        "tokenizer": chat.tokenizer_fingerprint(teacher.tokenizer),
        "template": chat.template_fingerprint(teacher.tokenizer),
        "seed": config.seed,
        "samples": config.generate.samples,
        "temperature": config.generate.temperature,
        "max_new_tokens": config.generate.max_new_tokens,
    }


def _sampler(config: Any, teacher: Teacher) -> Callable[..., list[Sample]]:
    """The loaded teacher as a function of (prompts, indices, on_batch)."""
    mesh = make_mesh(**config.mesh)
    model_config, params = teacher.load(mesh)
    return functools.partial(
        sample,
        model_config,
        params,
        max_new_tokens=config.generate.max_new_tokens,
        temperature=config.generate.temperature,
        seed=config.seed,
        batch_size=config.generate.batch_size,
        eos_ids=stop_ids(model_config, teacher.tokenizer),
        valid_vocab=len(teacher.tokenizer),
        compute_dtype=config.teacher.dtype,
        mesh=mesh,
    )


def _line(
    config: Any, tokenizer: Any, problems: Sequence[Problem], index: int, drawn: Sample
) -> str:
    """One trace in the fields that prepare looks for; the problem's other fields are kept.

    Nothing where the teacher stopped at once: there is no completion to learn from.
    """
    place, copy = divmod(index, config.generate.samples)
    problem, text = problems[place], decode_text(tokenizer, drawn.token_ids)
    if not text.strip():
        return ""
    prompt_field = config.prepare.prompt_field or "prompt"
    completion_field = config.prepare.completion_field or "completion"
    replaced = ("id", "messages", prompt_field, completion_field, *PROMPT_FIELDS)
    record = {name: value for name, value in problem.fields.items() if name not in replaced}
    plain = len(problem.messages) == 1
    record |= {
        "id": problem.id if config.generate.samples == 1 else f"{problem.id}-{copy}",
        prompt_field: problem.messages[0]["content"] if plain else problem.messages,
        completion_field: text if plain else [{"role": "assistant", "content": text}],
        "token_ids": drawn.token_ids,
        "logprobs": drawn.logprobs,
        "temperature": config.generate.temperature,
        "finish_reason": "stop" if drawn.finished else "length",
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


class _Progress:
    """The growing file, the record of how far it is whole, and the manifest at the end."""

    def __init__(self, path: Path, request: dict[str, Any]):
        self.path, self.request = path, request
        self.partial = path.with_name(path.name + ".partial")
        self.record = path.with_name(path.name + ".partial.json")
        self.manifest = path.with_name(path.name + ".manifest.json")
        self.counts = {"sampled": 0, "traces": 0, "empty": 0, "tokens": 0, "truncated": 0}

    def finished(self) -> bool:
        """Whether the result is there; DcodError when it is another request's."""
        if not self.path.exists():
            return False
        if self.manifest.exists():
            found = json.loads(self.manifest.read_text())
            if found["request"] == self.request and found["sha256"] == file_sha256(self.path):
                return True
            changed = [k for k, v in self.request.items() if found["request"].get(k) != v]
            reason = f"with other {', '.join(changed)}" if changed else "and changed since"
        else:
            reason = "by something else (it has no manifest)"
        raise DcodError(f"{self.path} was written {reason}; move it away or change run_dir")

    def resume(self) -> int:
        """Sequences that are whole; what was written after them is cut off."""
        if self.record.exists() and self.partial.exists():
            found = json.loads(self.record.read_text())
            if found["request"] == self.request and self.partial.stat().st_size >= found["bytes"]:
                os.truncate(self.partial, found["bytes"])
                self.counts = found["counts"]
                if self.counts["sampled"]:
                    print(f"going on behind {self.counts['sampled']} traces sampled before")
                return self.counts["sampled"]
        self.partial.write_bytes(b"")
        return 0

    def commit(self, file: Any, sampled: int, block: Sequence[Sample], *, empty: int) -> None:
        """Record the block only after its bytes are on the disk."""
        file.flush()
        os.fsync(file.fileno())
        self.counts = {
            "sampled": sampled,
            "traces": self.counts["traces"] + len(block) - empty,
            "empty": self.counts["empty"] + empty,
            "tokens": self.counts["tokens"] + sum(len(s.token_ids) for s in block),
            "truncated": self.counts["truncated"] + sum(not s.finished for s in block),
        }
        state = {"request": self.request, "bytes": file.tell(), "counts": self.counts}
        replace_file(self.record, to_json(state))

    def finish(self) -> dict[str, Any]:
        manifest = self.counts | {"request": self.request, "sha256": file_sha256(self.partial)}
        replace_file(self.manifest, to_json(manifest))
        os.replace(self.partial, self.path)
        self.record.unlink(missing_ok=True)
        return manifest


if __name__ == "__main__":
    run_verb("generate_traces", generate_traces)
