"""Raw traces to a tokenised, filtered trace dataset: data.traces -> data.dataset/train (and eval).

In this order a trace is dropped, counted and written to quarantine.jsonl when it is malformed
(prepare.on_bad_record=quarantine), was cut off by the sampler (truncated), ends in a wrong or no
answer (where a reference exists), has a held-out prompt, is a duplicate, overlaps with an
evaluation set, or is longer than data.max_length. Nothing is ever shortened. The dataset appears
under its name only when it is complete; a run with the same inputs then does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from dcod_jax.config import dataset_dir, run_verb
from dcod_jax.data import chat, overlap
from dcod_jax.data.delivered import delivered_logprobs
from dcod_jax.data.formats import Fields, RawTrace
from dcod_jax.data.manifest import MANIFEST, file_sha256, read_manifest
from dcod_jax.data.records import DatasetWriter
from dcod_jax.data.traces import BadRecord, Source, describe, find_sources, read_traces
from dcod_jax.grading import Grader
from dcod_jax.progress import track
from dcod_jax.scoring import load_any_tokenizer
from dcod_jax.types import DcodError, Trace

QUARANTINE = "quarantine.jsonl"
# What decides the result, beside the content of the files and the tokenizer.
_SETTINGS = (
    "data.split data.eval_fraction data.max_length prepare.prompt_field prepare.completion_field "
    "prepare.answer_field prepare.system_prompt prepare.filter_correct prepare.grade_timeout "
    "prepare.deduplicate prepare.overlap_ngram prepare.logprobs prepare.on_bad_record "
    "prepare.shard_records"
).split()
_GRADE_REASONS = {
    "wrong": "wrong_answer",
    "no_answer": "no_answer",
    "timeout": "grading_timeout",
    "error": "grading_error",
}


# ---------------------------------------------------------------- inputs and their identity


def traces_source(config: Any) -> str:
    """data.traces, or what generate_traces writes for generate.prompts."""
    if config.data.traces or not config.generate.prompts:
        return config.data.traces
    return str(Path(config.run_dir) / "traces.jsonl")


def load_tokenizer(config: Any) -> Any:
    """The student's tokenizer: student.tokenizer, else the one beside its weights or config."""
    home = config.student.tokenizer or config.student.path or config.student.config
    if not home:
        raise DcodError(
            "no tokenizer: set student.path, student.config or student.tokenizer; traces are "
            "tokenised for the student"
        )
    path = Path(home)
    path = path.parent if path.name == "config.json" else path
    return load_any_tokenizer(path, chat_template=config.student.chat_template)


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that a dataset is made from."""

    train: list[Source]
    held_out: list[Source]
    train_files: list[dict[str, Any]]
    held_out_files: list[dict[str, Any]]
    tokenizer: Any
    identity: dict[str, Any]  # flat; equal for runs with equal results


def _content(files: Sequence[dict[str, Any]]) -> list[Any]:
    """The files without their paths, where the content is known: a moved file is the same."""
    return [
        {k: v for k, v in file.items() if k != "path" or "sha256" not in file} for file in files
    ]


def _identity(config: Any, tokenizer: Any) -> dict[str, Any]:
    settings = {key: _value(config, key) for key in _SETTINGS}
    overlaps = []
    for name in config.prepare.overlap_files:
        if not Path(name).is_file():
            raise DcodError(f"prepare.overlap_files: no such file: {name}")
        overlaps.append(file_sha256(name))
    return settings | {
        "prepare.overlap_files": overlaps,
        "tokenizer": chat.tokenizer_fingerprint(tokenizer),
        "chat template": chat.template_fingerprint(tokenizer),
    }


def _inputs(config: Any) -> _Inputs:
    tokenizer = load_tokenizer(config)
    split = config.data.split
    train = find_sources(traces_source(config), split=split)
    held_out = []
    if config.data.eval_traces:
        if config.data.eval_fraction:
            raise DcodError(
                "data.eval_traces and data.eval_fraction are both set; held-out traces come from "
                "one of them"
            )
        held_out = find_sources(config.data.eval_traces, split=split, key="data.eval_traces")
    train_files, held_out_files = describe(train), describe(held_out)
    identity = _identity(config, tokenizer) | {
        "data.traces": _content(train_files),
        "data.eval_traces": _content(held_out_files),
    }
    identity = json.loads(json.dumps(identity))  # as it is read back from a manifest
    return _Inputs(train, held_out, train_files, held_out_files, tokenizer, identity)


def _compare(root: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a dataset that was made from something else, naming what differs."""
    differ = []
    for key in wanted:
        if key in found and found[key] == wanted[key]:
            continue
        plain = not isinstance(wanted[key], list) and key not in ("tokenizer", "chat template")
        was = f" (it was {found.get(key)!r}, now {wanted[key]!r})" if plain else ""
        differ.append(f"{key}{was}")
    if differ:
        raise DcodError(
            f"{root} was prepared with other inputs; different: {', '.join(differ)}. Remove it, "
            "or set data.dataset (or run_dir) to a new directory"
        )


def _existing(root: Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset of this verb, None where there is nothing yet."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    if not (root / "train" / MANIFEST).is_file():
        raise DcodError(
            f"{root} exists and is not a dataset that prepare wrote; remove it, or set "
            "data.dataset to a new directory"
        )
    return read_manifest(root / "train")


def is_prepared(config: Any) -> bool:
    """Whether data.dataset is there, complete and made from this config's inputs.

    Raw traces that are no longer there are not asked for: a dataset can be taken to another
    machine without them. Raises DcodError when the dataset was made from other inputs.
    """
    root = Path(dataset_dir(config))
    if (root / MANIFEST).is_file():  # a single dataset that was named directly
        return True
    manifest = _existing(root)
    if manifest is None:
        return False
    if not traces_source(config):
        return True
    tokenizer = load_tokenizer(config)
    wanted = json.loads(json.dumps(_identity(config, tokenizer)))
    with contextlib.suppress(DcodError):
        wanted = _inputs(config).identity
    _compare(root, manifest.get("prepared_from", {}), wanted)
    return True


# ---------------------------------------------------------------- filters


@dataclasses.dataclass
class _Counts:
    """Of one split: every trace read is kept or dropped for one reason."""

    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def manifest(self) -> dict[str, Any]:
        read = self.kept + sum(self.dropped.values())
        return {"read": read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


class _Filter:
    """The filters with what they remember: keys seen, prompts held out, ids given."""

    def __init__(self, config: Any, tokenizer: Any, quarantine: IO[str]):
        self.config, self.tokenizer, self.quarantine = config, tokenizer, quarantine
        prepare = config.prepare
        self.fields = Fields(
            prompt=prepare.prompt_field,
            completion=prepare.completion_field,
            answer=prepare.answer_field,
            system_prompt=prepare.system_prompt,
        )
        self.index = overlap.build_index(
            prepare.overlap_files, size=prepare.overlap_ngram, prompt_field=prepare.prompt_field
        )
        self.seen: set[bytes] = set()
        self.held_out: set[bytes] = set()  # prompts of data.eval_traces
        self.ids: collections.Counter[str] = collections.Counter()
        self.counts = _Counts()
        self.models: set[str] = set()
        self.temperatures: set[float] = set()
        self.unused_logprobs = 0

    def drop(self, reason: str, detail: str, *, source: str, record: Any, name: str = "") -> None:
        self.counts.dropped[reason] += 1
        line = {"source": source, "id": name, "reason": reason, "detail": detail, "record": record}
        self.quarantine.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def _drop(self, trace: RawTrace, reason: str, detail: str) -> None:
        self.drop(reason, detail, source=trace.source, record=trace.record, name=trace.id)

    def _bad(self, bad: BadRecord) -> None:
        self.drop("bad_record", bad.reason, source=bad.source, record=bad.text)

    def run(self, sources: Sequence[Source], grader: Grader, advance: Any) -> Iterator[Any]:
        """(RawTrace, Trace) of what is kept."""
        on_bad = self._bad if self.config.prepare.on_bad_record == "quarantine" else None
        raw = read_traces(sources, self.fields, on_bad=on_bad, on_record=advance)
        grading = self.config.prepare.filter_correct
        whole = (trace for trace in raw if self._whole(trace))
        graded = grader.stream(
            (trace, trace.completion_text(), trace.answer if grading else None) for trace in whole
        )
        for trace, grade in graded:
            if grade is not None and not grade.correct:
                detail = (
                    f"answer {grade.extracted!r} by rule {grade.rule}, expected {trace.answer!r}"
                )
                self._drop(trace, _GRADE_REASONS[grade.reason], detail)
            elif self._unique(trace) and (encoded := self._encode(trace)) is not None:
                self.counts.kept += 1
                yield trace, encoded

    def _whole(self, trace: RawTrace) -> bool:
        if trace.finish_reason == "length":
            self._drop(trace, "truncated", "finish_reason is length: it would teach a false end")
            return False
        return True

    def _unique(self, trace: RawTrace) -> bool:
        """Whether no held-out prompt, no earlier trace and no evaluation set has this text."""
        if overlap.prompt_key(trace) in self.held_out:
            self._drop(trace, "held_out_prompt", "the prompt is in data.eval_traces")
            return False
        key = overlap.trace_key(trace)
        if self.config.prepare.deduplicate and key in self.seen:
            self._drop(trace, "duplicate", "an earlier trace has this prompt and completion")
            return False
        found = self.index.find(trace)
        if found:
            self._drop(trace, "overlap", found)
            return False
        self.seen.add(key)
        return True

    def _encode(self, trace: RawTrace) -> Trace | None:
        """The tokenised trace; None when it was dropped."""
        limit = self.config.data.max_length
        try:
            ids, mask = chat.encode(
                self.tokenizer, trace.messages, first_completion=trace.first_completion
            )
            if len(ids) > limit:
                self._drop(trace, "too_long", f"{len(ids)} tokens, data.max_length={limit}")
                return None
            logprobs = None
            if self.config.prepare.logprobs == "require":
                logprobs = delivered_logprobs(self.tokenizer, trace, ids[mask])
        except DcodError as error:
            if self.config.prepare.on_bad_record == "error":
                raise DcodError(f"{trace.source}: {error}") from error
            self._drop(trace, "bad_record", str(error))
            return None
        self.unused_logprobs += trace.logprobs is not None and logprobs is None
        self.models |= {trace.model} - {""}
        self.temperatures |= {trace.temperature} - {None}
        self.ids[trace.id] += 1
        again = self.ids[trace.id]
        name = trace.id if again == 1 else f"{trace.id}#{again}"
        meta = {"source": trace.source} | ({"answer": trace.answer} if trace.answer else {})
        return Trace(name, ids, mask, logprobs=logprobs, meta=meta)


# ---------------------------------------------------------------- the verb


def prepare(config: Any, *, progress: bool = True) -> Path:
    """Write the dataset that the config names, if it is not there; returns its directory."""
    root = Path(dataset_dir(config))
    if "://" in str(root):
        raise DcodError(f"data.dataset={root}: prepare writes to a local directory; copy it after")
    manifest = _existing(root)
    inputs = _inputs(config)
    if manifest is not None:
        _compare(root, manifest.get("prepared_from", {}), inputs.identity)
        print(f"{root}: already prepared from the same inputs; nothing to do")
        return root
    work = root.with_name(root.name + ".partial")  # what an interrupted run left is not resumed
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with (work / QUARANTINE).open("w", encoding="utf-8") as quarantine:
        run = _Filter(config, inputs.tokenizer, quarantine)
        total = sum(f["records"] for f in [*inputs.train_files, *inputs.held_out_files])
        shown = progress and config.train.progress and total > 0
        with (
            Grader(timeout=config.prepare.grade_timeout, workers=config.prepare.workers) as grader,
            track(f"preparing {root.name}", total, unit="records", enabled=shown) as advance,
        ):
            counts = _write_splits(config, inputs, run, work, grader=grader, advance=advance)
    if root.exists():
        root.rmdir()  # empty, as checked above
    work.rename(root)
    _print_counts(root, counts)
    return root


def _write_splits(
    config: Any, inputs: _Inputs, run: _Filter, work: Path, *, grader: Grader, advance: Any
) -> dict[str, _Counts]:
    counts: dict[str, _Counts] = {}
    if inputs.held_out:
        with _writer(config, inputs, inputs.held_out_files, work / "eval") as writer:
            for trace, encoded in run.run(inputs.held_out, grader, advance):
                run.held_out.add(overlap.prompt_key(trace))
                writer.write(encoded)
            counts["eval"] = _finish(writer, run, "data.eval_traces")
    run.counts = _Counts()
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(_writer(config, inputs, inputs.train_files, work / "train"))
        held_out, held = None, 0
        for trace, encoded in run.run(inputs.train, grader, advance):
            if run.counts.kept == 1:
                sample = chat.render_sample(inputs.tokenizer, encoded)
                print(f"first trace kept ({trace.source}), supervised part marked:\n{sample}\n")
            if _is_held_out(trace, config.data.eval_fraction):
                if held_out is None:
                    held_out = _writer(config, inputs, inputs.train_files, work / "eval")
                    held_out = stack.enter_context(held_out)
                held += 1
                held_out.write(encoded)
            else:
                train.write(encoded)
        total = _finish(train, run, "data.traces", held_out=held)
        counts["train"] = total
        if held_out is not None:
            counts["eval"] = _Counts(kept=held)
            held_out.update_manifest(counts=counts["eval"].manifest(), **_provenance(run))
        elif config.data.eval_fraction:
            raise DcodError(
                f"data.eval_fraction={config.data.eval_fraction} held out none of the "
                f"{total.kept} traces kept; raise it, or set data.eval_traces"
            )
    return counts


def _is_held_out(trace: RawTrace, fraction: float) -> bool:
    """By the prompt alone, so that no prompt is in both splits, whatever else is in the files."""
    if not fraction:
        return False
    digest = hashlib.sha256(overlap.prompt_key(trace)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _writer(
    config: Any, inputs: _Inputs, files: list[dict[str, Any]], directory: Path
) -> DatasetWriter:
    tokenizer = inputs.tokenizer
    home = config.student.tokenizer or config.student.path or config.student.config
    manifest = {
        "tokenizer": {
            "fingerprint": chat.tokenizer_fingerprint(tokenizer),
            "source": home,
            "size": len(tokenizer),
        },
        "template": {"fingerprint": chat.template_fingerprint(tokenizer)},
        "sources": files,
        "prepared_from": inputs.identity,
        "config": json.loads(json.dumps(config.to_dict())),
    }
    return DatasetWriter(directory, shard_records=config.prepare.shard_records, manifest=manifest)


def _provenance(run: _Filter) -> dict[str, Any]:
    """What the traces themselves said about who sampled them, and what became of log-probs."""
    settings, policy = run.config.teacher, run.config.prepare.logprobs
    fields: dict[str, Any] = {
        "sampled_by": {
            "models": sorted(run.models),
            "temperatures": sorted(run.temperatures),
        },
        "delivered_logprobs": {"policy": policy, "traces_ignored": run.unused_logprobs},
    }
    if policy == "require":
        named = settings.name or ", ".join(sorted(run.models)) or "the source of the traces"
        fields["teacher"] = {
            "name": named,
            "revision": settings.revision,
            "weights": "unknown: log-probs were delivered with the traces",
        }
    return fields


def _finish(writer: DatasetWriter, run: _Filter, key: str, *, held_out: int = 0) -> _Counts:
    """Counts into the manifest; refuses a split that keeps nothing."""
    counts = run.counts
    reasons = ", ".join(f"{name} {count}" for name, count in counts.dropped.most_common())
    if counts.kept == held_out:
        run.quarantine.flush()
        raise DcodError(
            f"no trace of {key} is left for its split ({counts.manifest()['read']} read, "
            f"{held_out} held out; dropped: {reasons or 'none'}); the dropped records are in "
            f"{run.quarantine.name}"
        )
    manifest = counts.manifest()
    if held_out:
        manifest |= {"kept": counts.kept - held_out, "held_out": held_out}
    writer.update_manifest(counts=manifest, **_provenance(run))
    return counts


def _print_counts(root: Path, counts: dict[str, _Counts]) -> None:
    table = Table("split", "outcome", "traces", title=str(root))
    for split, count in counts.items():
        table.add_row(split, "kept", f"{count.kept:,}")
        for reason, number in sorted(count.dropped.items()):
            table.add_row(split, f"dropped: {reason}", f"{number:,}")
    Console().print(table)
    if any(count.dropped for count in counts.values()):
        print(f"dropped records: {root / QUARANTINE}")


if __name__ == "__main__":
    run_verb("prepare", prepare)
