"""Sample traces from the teacher for a file of prompts: JSONL that prepare reads.

Reads generate.prompts, writes run_dir/traces.jsonl. Blocks of sequences are files of their own
until all are there, so the same command after an interruption goes on with those that are left. Of
several processes each samples every n-th block with the teacher on its own devices, where it fits
there; the bytes of the result are those of one process.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from dcod_jax import hosts
from dcod_jax.config import run_verb
from dcod_jax.data import chat
from dcod_jax.data.formats import PROMPT_FIELDS
from dcod_jax.data.manifest import commit_file, file_sha256, replace_file, to_json
from dcod_jax.evals import Problem, decode_text, read_problems, stop_ids
from dcod_jax.generate import Sample, sample
from dcod_jax.paths import Path, as_path
from dcod_jax.progress import track
from dcod_jax.scoring import Teacher, open_teacher
from dcod_jax.storage import remove_tree, scratch
from dcod_jax.types import DcodError

BATCHES_IN_BLOCK = 4


def traces_path(config: Any) -> Path:
    """Where the sampled traces of a run are."""
    return as_path(config.run_dir) / "traces.jsonl"


def generate_traces(config: Any) -> Path:
    """generate.samples traces for each prompt at generate.temperature; returns the JSONL's path.

    A trace cut at max_new_tokens is kept and marked `"finish_reason": "length"`. The manifest
    beside the file (traces.jsonl.manifest.json) says what was read and counts what was written.
    A finished file of the same prompts, teacher and settings is left as it is.
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
    teacher = open_teacher(config.teacher, chat_template=config.student.chat_template)
    path = traces_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(path, _request(config, teacher))
    if progress.finished():
        print(f"{path}: these traces were sampled before; nothing to do")
        return path
    pending = progress.pending(
        len(problems) * config.generate.samples,
        BATCHES_IN_BLOCK * config.generate.batch_size,
    )
    _draw(config, teacher, problems, progress, pending)
    hosts.barrier("sampling")
    if hosts.first():
        progress.finish()
    hosts.barrier("the manifest of the traces")
    manifest = json.loads(progress.manifest.read_text())
    print(
        f"{path}: {manifest['traces']} traces of {len(problems)} prompts, {manifest['tokens']} "
        f"tokens, {manifest['truncated']} cut at {config.generate.max_new_tokens} tokens; "
        f"{manifest['empty']} empty ones left out"
    )
    return path


def _draw(
    config: Any,
    teacher: Teacher,
    problems: Sequence[Problem],
    progress: _Progress,
    pending: Sequence[range],
) -> None:
    """Sample the blocks; of several processes each one takes every n-th."""
    mesh, process, processes = hosts.share(config)
    own = pending[process::processes]
    if not own:
        return
    prompts = [chat.encode_prompt(teacher.tokenizer, p.messages) for p in problems]
    draw = _sampler(config, teacher, mesh)
    total = sum(len(block) for block in own)
    with track("sampling", total, unit="traces", enabled=config.train.progress) as bar:
        for block in own:
            samples = draw(
                [prompts[index // config.generate.samples] for index in block],
                indices=block,
                on_batch=lambda sequences, tokens: bar(sequences),
            )
            lines = [
                _line(config, teacher.tokenizer, problems, index, drawn)
                for index, drawn in zip(block, samples, strict=True)
            ]
            if processes > 1 or hosts.first():
                progress.commit(block, lines, samples)


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


def _sampler(config: Any, teacher: Teacher, mesh: Any) -> Callable[..., list[Sample]]:
    """The loaded teacher as a function of (prompts, indices, on_batch)."""
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
    """The finished blocks, each a file of its own, and the result and its manifest at the end."""

    def __init__(self, path: Path, request: dict[str, Any]):
        self.path, self.request = path, request
        self.manifest = path.with_name(path.name + ".manifest.json")
        key = hashlib.sha256(to_json(request)).hexdigest()[:8]
        self.blocks = path.with_name(f"{path.name}.partial-{key}")

    def finished(self) -> bool:
        """Whether the result is there; DcodError when it is another request's."""
        if not self.path.exists():
            return False
        if self.manifest.exists():
            found = json.loads(self.manifest.read_text())
            if found["request"] == self.request and found["sha256"] == file_sha256(self.path):
                if hosts.first():
                    remove_tree(self.blocks)
                return True
            changed = [k for k, v in self.request.items() if found["request"].get(k) != v]
            reason = f"with other {', '.join(changed)}" if changed else "and changed since"
        else:
            reason = "by something else (it has no manifest)"
        raise DcodError(f"{self.path} was written {reason}; move it away or change run_dir")

    def _done(self) -> dict[range, dict[str, Any]]:
        """{sequences: counts} of the blocks that are whole, in order."""
        done = {}
        for file in sorted(self.blocks.glob("*.json")):
            first, last = map(int, file.stem.split("-"))
            done[range(first, last)] = json.loads(file.read_text())
        return done

    def pending(self, total: int, size: int) -> list[range]:
        """The sequences that are left, in blocks; the same on every process, as the first sees it.

        A run with another batch size goes on between the blocks that are there.
        """
        pending, start = [], 0
        if hosts.first():
            done = self._done()
            for block in [*done, range(total, total)]:
                gap = range(start, block.start)
                pending += [[i, min(i + size, gap.stop)] for i in gap[::size]]
                start = block.stop
            if done:
                print(f"going on behind {sum(map(len, done))} traces sampled before")
        told = hosts.exchange("share out the sampling", json.dumps(pending))[0]
        return [range(*block) for block in json.loads(told)]

    def commit(self, block: range, lines: Sequence[str], samples: Sequence[Sample]) -> None:
        """Write a block; its counts, which make it whole, come last."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        name = f"{block.start:09d}-{block.stop:09d}"
        replace_file(self.blocks / f"{name}.jsonl", "".join(lines).encode("utf-8"))
        empty = list(lines).count("")
        counts = {
            "sampled": len(block),
            "traces": len(samples) - empty,
            "empty": empty,
            "tokens": sum(len(s.token_ids) for s in samples),
            "truncated": sum(not s.finished for s in samples),
        }
        replace_file(self.blocks / f"{name}.json", to_json(counts))

    def finish(self) -> None:
        """Join the blocks in their order."""
        done = self._done()
        counts = {
            name: sum(block[name] for block in done.values())
            for name in ("sampled", "traces", "empty", "tokens", "truncated")
        }
        with scratch(self.path) as temporary:
            with temporary.open("wb") as whole:
                for block in done:
                    part = self.blocks / f"{block.start:09d}-{block.stop:09d}.jsonl"
                    whole.write(part.read_bytes())
            manifest = counts | {"request": self.request, "sha256": file_sha256(temporary)}
            replace_file(self.manifest, to_json(manifest))
            commit_file(temporary, self.path)
        remove_tree(self.blocks)


if __name__ == "__main__":
    run_verb("generate_traces", generate_traces)
