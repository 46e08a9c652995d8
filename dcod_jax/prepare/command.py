"""Raw traces to a tokenised, filtered trace dataset: data.traces -> data.dataset/train (and eval).

Wrong, duplicate, overlapping and too long traces are dropped (filters.py), counted, and written
to quarantine.jsonl; nothing is ever shortened. The dataset appears under its name only when it
is complete; a run with the same inputs then does nothing.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from dcod_jax.config import dataset_dir, dataset_lock
from dcod_jax.configs.base import get_config
from dcod_jax.data import chat
from dcod_jax.data.dataset import MANIFEST, DatasetWriter, check_own_dataset, read_manifest
from dcod_jax.data.kept import Kept
from dcod_jax.data.records import RawTrace
from dcod_jax.data.teachers import teacher_entries
from dcod_jax.data.tokenizer import (
    Tokenizer,
    chat_template,
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.data.traces import Source, describe, find_sources
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    UPLOADING,
    Path,
    as_path,
    file_sha256,
    move_tree,
    naming,
    publish,
    remove_tree,
    unfinished,
)
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.parallel import hosts
from dcod_jax.prepare import overlap
from dcod_jax.prepare.filters import Counts, Filter

log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
LAST = f"train/{MANIFEST}"  # makes the directory a prepared dataset
# What decides the result, beside the content of the files and the tokenizer.
_SETTINGS = (
    "data.split data.eval_fraction data.max_length prepare.prompt_field prepare.completion_field "
    "prepare.form prepare.reasoning prepare.reasoning_field prepare.record_bytes "
    "prepare.answer_field prepare.system_prompt prepare.filter_correct "
    "prepare.deduplicate prepare.overlap_ngram prepare.logprobs prepare.on_bad_record "
    "prepare.shard_records prepare.teacher_field prepare.weight_field"
).split()


def prepare(config: Any) -> Path:
    """Write the dataset that the config names, if it is not there; returns its directory.

    Of several processes the first one works, and the others wait for it.
    """
    root = as_path(dataset_dir(config))
    if hosts.first():
        if is_prepared(config):
            log.info("%s: already prepared from these inputs; nothing to do", root)
        else:
            with locked(dataset_lock(config), what=f"data.dataset={root}"):
                _write_dataset(config, root)
    hosts.barrier("prepare on process 0")
    return root


def _inputs(config: Any) -> tuple[dict[str, list[Source]], dict[str, list[dict[str, Any]]]]:
    """By key of the config its raw traces and their descriptions; DcodError when one is missing."""
    split, key = config.data.split, "data.eval_traces"
    train = find_sources(traces_source(config), split=split)
    held_out = (
        find_sources(config.data.eval_traces, split=split, key=key)
        if config.data.eval_traces
        else []
    )
    sources = {"data.traces": train, key: held_out}
    return sources, {key: describe(found) for key, found in sources.items()}


def traces_source(config: Any) -> str:
    """data.traces, or what generate_traces writes for generate.prompts."""
    if config.data.traces or not config.generate.prompts:
        return config.data.traces
    return str(as_path(config.run_dir) / "traces.jsonl")


def _identity(
    config: Any, tokenizer: Tokenizer, files: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """All that the dataset follows from, flat, as a manifest gives it back.

    Files stand for their content where it is known: a moved file is the same.
    """
    if config.data.eval_traces and config.data.eval_fraction:
        raise DcodError(
            "data.eval_traces and data.eval_fraction are both set; held-out traces come from one"
        )
    for name in config.prepare.overlap_files:
        if not as_path(name).is_file():
            raise DcodError(f"prepare.overlap_files: no such file: {name}")
    identity = _settings(config) | {
        "prepare.overlap_files": [file_sha256(name) for name in config.prepare.overlap_files],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat template": template_fingerprint(tokenizer),
    }
    for key, found in files.items():
        identity[key] = [
            {k: file[k] for k in file if k != "path" or "sha256" not in file} for file in found
        ]
    return json.loads(json.dumps(identity))


def _settings(config: Any) -> dict[str, Any]:
    """The values of _SETTINGS, and which teacher the traces of which files are of."""
    values = config.to_dict()
    found = {key: values[key.split(".")[0]][key.split(".")[1]] for key in _SETTINGS}
    files = {entry.name: entry.files for entry in teacher_entries(config) if entry.files}
    return found | ({"files of score.teachers": files} if files else {})


def check_settings(config: Any, split: Path) -> None:
    """Refuse a prepared split that has other settings than the config, with both values.

    A config without raw traces takes the dataset as it is.
    """
    found = read_manifest(split).get("prepared_from")
    if found and traces_source(config):
        _compare(split.parent, found, json.loads(json.dumps(_settings(config))))


def earlier_dataset(root: Path) -> Path:
    """Where the scored dataset waits that prepare.replace replaced, until score has run again."""
    return root.with_name(f"{root.name}.before")


def remove_earlier(root: Path) -> None:
    """Remove earlier_dataset, but where it holds other files."""
    try:
        check_own_dataset(earlier_dataset(root), QUARANTINE)
    except DcodError as error:
        log.warning("%s", error)
        return
    remove_tree(earlier_dataset(root))


def _compare(root: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a dataset that was made from something else, naming what differs."""
    base = get_config().to_dict()  # a key that came later had its default's effect before
    known = {key: base[key.split(".")[0]][key.split(".")[1]] for key in _SETTINGS}
    found = known | found
    differ = []
    for key in (key for key in wanted if key not in found or found[key] != wanted[key]):
        plain = not isinstance(wanted[key], list) and key not in ("tokenizer", "chat template")
        was = f" (it was {found.get(key)!r}, now {wanted[key]!r})" if plain else ""
        differ.append(f"{key}{was}")
    if differ:
        raise DcodError(
            f"{root} was prepared with other inputs; different: {', '.join(differ)}. Remove it, "
            "set data.dataset (or run_dir) to a new directory, or set prepare.replace=True, which "
            "keeps the scores of traces that do not change"
        )


def is_prepared(config: Any) -> bool:
    """Whether data.dataset is there, complete and made from this config's inputs.

    Raw traces that are no longer there are not asked for: a dataset can be taken to another
    machine without them. Raises DcodError when the dataset was made from other inputs.
    """
    root = as_path(dataset_dir(config))
    if (root / MANIFEST).is_file():  # a single dataset that was named directly
        return True
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if unfinished(root, last=LAST):
        return False
    if not (root / "train" / MANIFEST).is_file():
        raise DcodError(
            f"data.dataset={root} exists and is not a dataset that prepare wrote; set data.dataset "
            "to a new directory, and data.traces to raw traces"
        )
    manifest = read_manifest(root / "train")
    if not traces_source(config):
        return True
    files = {}
    try:
        _, files = _inputs(config)
    except DcodError as error:
        log.warning("%s: taken as it is, the raw traces cannot be compared (%s)", root, error)
    wanted = _identity(config, student_tokenizer(config.student), files)
    try:
        _compare(root, manifest.get("prepared_from", {}), wanted)
    except DcodError as error:
        if not config.prepare.replace:
            raise
        log.info("%s", error)
        return False
    return True


def _write_dataset(config: Any, root: Path) -> None:
    tokenizer, student, settings = student_tokenizer(config.student), config.student, config.prepare
    if chat_template(tokenizer) is None:
        log.info(
            "%s has no chat template: a prompt and its completion are joined (docs/data.md)",
            student.tokenizer or student.path,
        )
    sources, files = _inputs(config)
    identity = _identity(config, tokenizer, files)
    work = root.with_name(root.name + ".partial")
    for directory in (work, root, earlier_dataset(root)):  # which are all removed or replaced
        check_own_dataset(directory, QUARANTINE, UPLOADING)
    remove_tree(work)  # what an interrupted run left is not resumed
    work.mkdir(parents=True)
    dropped = work / QUARANTINE

    def writer(key: str, name: str) -> DatasetWriter:
        """Writes train or eval, made from the files of `key`."""
        manifest = {
            "tokenizer": {
                "fingerprint": identity["tokenizer"],
                "source": student.tokenizer or student.path or student.config,
                "size": len(tokenizer),
            },
            "template": {"fingerprint": identity["chat template"]},
            "sources": files[key],
            "prepared_from": identity,
            "config": json.loads(json.dumps(config.to_dict())),
        }
        size = settings.shard_records
        return DatasetWriter(work / name, shard_records=size, manifest=manifest)

    total = sum(file["records"] for found in files.values() for file in found)
    shown = config.train.progress and total > 0
    # What is no Unicode stays the JSON escape that it was in the traces.
    with (
        naming(root),
        _rare_collections(),
        dropped.open("w", encoding="utf-8", errors="backslashreplace") as quarantine,
        track(f"preparing {root.name}", total, unit="records", enabled=shown) as advance,
    ):
        run = Filter(config, tokenizer, quarantine, advance=advance)
        counts = {}
        for key, name in (("data.eval_traces", "eval"), ("data.traces", "train")):
            if sources[key]:
                counts |= _write_splits(
                    run, key, name, sources=sources[key], writer=writer, quarantine=dropped
                )
    if (root / LAST).is_file() and "score" in read_manifest(root / "train"):
        remove_tree(earlier_dataset(root))
        move_tree(root, earlier_dataset(root))
    publish(work, root, last=LAST)  # what is there is empty or may be replaced, as checked above
    _print_counts(root, counts)
    if run.unread:
        told = ", ".join(f"{name} ({count:,})" for name, count in sorted(run.unread.items()))
        print(f"columns that nothing read, with the number of traces: {told}")


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Records are trees, which Python frees without its collector; its searches take a tenth."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


# The reason of most dropped records -> what keeps them.
_HINTS = {
    "too_long": "; raise data.max_length and data.seq_len",
    "wrong_answer": "; prepare.filter_correct=false keeps wrong answers",
    "no_answer": "; prepare.filter_correct=false keeps traces without an answer",
    "all held out": "; lower data.eval_fraction",
    "none": "; the files hold no record",
}


def _write_splits(
    run: Filter,
    key: str,
    name: str,
    *,
    sources: list[Source],
    writer: Callable[[str, str], DatasetWriter],
    quarantine: Path,
) -> dict[str, Counts]:
    """Write the traces of `key` to the split `name`, data.eval_fraction of train's to eval."""
    run.counts, held, prompts = Counts(), 0, Kept()
    fraction = run.config.data.eval_fraction if name == "train" else 0.0
    with contextlib.ExitStack() as stack:
        split = stack.enter_context(writer(key, name))
        held_out = None
        for trace, encoded in run.run(sources):
            if name == "eval":
                prompts.add(overlap.prompt_key(trace))
            elif run.counts.kept == 1:
                sample = chat.render_sample(run.tokenizer, encoded)
                print(f"first trace kept ({trace.source}), supervised part marked:\n{sample}\n")
            if _is_held_out(trace, fraction):
                held_out = held_out or stack.enter_context(writer(key, "eval"))
                held += 1
                held_out.write(encoded)
            else:
                split.write(encoded)
        run.held_out = prompts if name == "eval" else None
        counts = {name: Counts(run.counts.kept - held, run.counts.dropped)}
        read = run.counts.manifest()["read"]
        if not counts[name].kept:
            run.quarantine.flush()
            dropped = run.counts.dropped.most_common()
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped)
            hint = _HINTS.get(dropped[0][0] if dropped else "all held out" if held else "none", "")
            raise DcodError(
                f"no trace of {key} is left for its split ({read} read, {held} held out; dropped: "
                f"{reasons or 'none'}); the dropped records are in {quarantine}{hint}"
            )
        told = counts[name].manifest() | ({"read": read, "held_out": held} if held else {})
        split.manifest |= {"counts": told, **run.provenance()}
        if held_out is not None:
            counts["eval"] = Counts(kept=held)
            held_out.manifest |= {"counts": counts["eval"].manifest(), **run.provenance()}
        elif fraction:
            raise DcodError(
                f"data.eval_fraction={fraction} held out none of the "
                f"{run.counts.kept} traces kept; raise it, or set data.eval_traces"
            )
    return counts


def _is_held_out(trace: RawTrace, fraction: float) -> bool:
    """By the prompt alone, so that no prompt is in both splits, whatever else is in the files."""
    if not fraction:
        return False
    digest = hashlib.sha256(overlap.prompt_key(trace)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
