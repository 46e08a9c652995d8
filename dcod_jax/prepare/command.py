"""Raw traces to a tokenised, filtered trace dataset: data.traces -> data.dataset/train (and eval).

Wrong, duplicate, overlapping and too long traces are dropped (filters.py), counted, and written
to quarantine.jsonl; nothing is ever shortened. The dataset appears under its name only when it
is complete; a run with the same inputs then does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from dcod_jax.config import dataset_dir
from dcod_jax.data import chat
from dcod_jax.data.dataset import MANIFEST, DatasetWriter, read_manifest
from dcod_jax.data.formats import RawTrace
from dcod_jax.data.tokenizer import (
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.data.traces import Source, describe, find_sources
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.grading import Grader
from dcod_jax.files import Path, as_path, file_sha256, publish, remove_tree, unfinished
from dcod_jax.logs import track
from dcod_jax.parallel import hosts
from dcod_jax.prepare import overlap
from dcod_jax.prepare.filters import Counts, Filter

QUARANTINE = "quarantine.jsonl"
LAST = f"train/{MANIFEST}"  # makes the directory a prepared dataset
# What decides the result, beside the content of the files and the tokenizer.
_SETTINGS = (
    "data.split data.eval_fraction data.max_length prepare.prompt_field prepare.completion_field "
    "prepare.answer_field prepare.system_prompt prepare.filter_correct prepare.grade_timeout "
    "prepare.deduplicate prepare.overlap_ngram prepare.logprobs prepare.on_bad_record "
    "prepare.shard_records"
).split()


# ---------------------------------------------------------------- inputs and their identity


def traces_source(config: Any) -> str:
    """data.traces, or what generate_traces writes for generate.prompts."""
    if config.data.traces or not config.generate.prompts:
        return config.data.traces
    return str(as_path(config.run_dir) / "traces.jsonl")


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


def _contents(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """The files without their paths, where the content is known: a moved file is the same."""

    def content(file: dict[str, Any]) -> dict[str, Any]:
        return {name: file[name] for name in file if name != "path" or "sha256" not in file}

    return {
        "data.traces": [content(file) for file in train],
        "data.eval_traces": [content(file) for file in held_out],
    }


def _identity(config: Any, tokenizer: Any) -> dict[str, Any]:
    if config.data.eval_traces and config.data.eval_fraction:
        raise DcodError(
            "data.eval_traces and data.eval_fraction are both set; held-out traces come from one"
        )
    settings = {key: _value(config, key) for key in _SETTINGS}
    overlaps = []
    for name in config.prepare.overlap_files:
        if not as_path(name).is_file():
            raise DcodError(f"prepare.overlap_files: no such file: {name}")
        overlaps.append(file_sha256(name))
    return settings | {
        "prepare.overlap_files": overlaps,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat template": template_fingerprint(tokenizer),
    }


def _sources(config: Any) -> tuple[list[Source], list[Source]]:
    """(train, held out); DcodError when one is not there."""
    split = config.data.split
    train = find_sources(traces_source(config), split=split)
    if not config.data.eval_traces:
        return train, []
    return train, find_sources(config.data.eval_traces, split=split, key="data.eval_traces")


def _inputs(config: Any) -> _Inputs:
    tokenizer = student_tokenizer(config.student)
    identity = _identity(config, tokenizer)
    train, held_out = _sources(config)
    train_files, held_out_files = describe(train), describe(held_out)
    identity |= _contents(train_files, held_out_files)
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
    if unfinished(root, last=LAST):
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
    root = as_path(dataset_dir(config))
    if (root / MANIFEST).is_file():  # a single dataset that was named directly
        return True
    manifest = _existing(root)
    if manifest is None:
        return False
    if not traces_source(config):
        return True
    wanted = _identity(config, student_tokenizer(config.student))
    try:
        train, held_out = _sources(config)
        wanted |= _contents(describe(train), describe(held_out))
    except DcodError as error:
        print(f"{root}: taken as it is, the raw traces cannot be compared ({error})")
    wanted = json.loads(json.dumps(wanted))
    _compare(root, manifest.get("prepared_from", {}), wanted)
    return True


# ---------------------------------------------------------------- the verb


def prepare(config: Any, *, progress: bool = True) -> Path:
    """Write the dataset that the config names, if it is not there; returns its directory."""
    root = as_path(dataset_dir(config))
    if is_prepared(config):
        print(f"{root}: already prepared from these inputs; nothing to do")
        return root
    inputs = _inputs(config)
    work = _work(root)  # what an interrupted run left is not resumed
    remove_tree(work)
    work.mkdir(parents=True)
    # What is no Unicode stays the JSON escape that it was in the traces.
    with (work / QUARANTINE).open("w", encoding="utf-8", errors="backslashreplace") as quarantine:
        run = Filter(config, inputs.tokenizer, quarantine)
        total = sum(f["records"] for f in [*inputs.train_files, *inputs.held_out_files])
        shown = progress and config.train.progress and total > 0
        with (
            Grader(timeout=config.prepare.grade_timeout, workers=config.prepare.workers) as grader,
            track(f"preparing {root.name}", total, unit="records", enabled=shown) as advance,
        ):
            counts = _write_splits(config, inputs, run, work, grader=grader, advance=advance)
    publish(work, root, last=LAST)  # what is there is empty, as checked above
    _print_counts(root, counts)
    return root


def _work(root: Path) -> Path:
    """Where the dataset is until it is complete."""
    return root.with_name(root.name + ".partial")


def _write_splits(
    config: Any, inputs: _Inputs, run: Filter, work: Path, *, grader: Grader, advance: Any
) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    if inputs.held_out:
        with _writer(config, inputs, inputs.held_out_files, work / "eval") as writer:
            for trace, encoded in run.run(inputs.held_out, grader, advance):
                run.held_out.add(overlap.prompt_key(trace))
                writer.write(encoded)
            counts["eval"] = _finish(writer, run, "data.eval_traces")
    run.counts = Counts()
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
        counts["train"] = Counts(total.kept - held, total.dropped)
        if held_out is not None:
            counts["eval"] = Counts(kept=held)
            held_out.update_manifest(counts=counts["eval"].manifest(), **run.provenance())
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
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "source": home,
            "size": len(tokenizer),
        },
        "template": {"fingerprint": template_fingerprint(tokenizer)},
        "sources": files,
        "prepared_from": inputs.identity,
        "config": json.loads(json.dumps(config.to_dict())),
    }
    return DatasetWriter(directory, shard_records=config.prepare.shard_records, manifest=manifest)


def _finish(writer: DatasetWriter, run: Filter, key: str, *, held_out: int = 0) -> Counts:
    """Counts into the manifest; refuses a split that keeps nothing."""
    counts = run.counts
    reasons = ", ".join(f"{name} {count}" for name, count in counts.dropped.most_common())
    if counts.kept == held_out:
        run.quarantine.flush()
        raise DcodError(
            f"no trace of {key} is left for its split ({counts.manifest()['read']} read, "
            f"{held_out} held out; dropped: {reasons or 'none'}); the dropped records are in "
            f"{_work(as_path(dataset_dir(run.config))) / QUARANTINE}"
        )
    manifest = counts.manifest()
    if held_out:
        manifest |= {"kept": counts.kept - held_out, "held_out": held_out}
    writer.update_manifest(counts=manifest, **run.provenance())
    return counts


def _print_counts(root: Path, counts: dict[str, Counts]) -> None:
    table = Table("split", "outcome", "traces")
    for split, count in counts.items():
        table.add_row(split, "kept", f"{count.kept:,}")
        for reason, number in sorted(count.dropped.items()):
            table.add_row(split, f"dropped: {reason}", f"{number:,}")
    print(f"{root}:")  # as the table's title it would be broken at the table's width
    Console().print(table)
    if any(count.dropped for count in counts.values()):
        print(f"dropped records: {root / QUARANTINE}")


def prepare_once(config: Any) -> None:
    """The verb: of several processes the first one works, the others wait for it."""
    if hosts.first():
        prepare(config)
    hosts.barrier("prepare on process 0")
