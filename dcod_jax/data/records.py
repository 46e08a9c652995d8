"""The on-disk trace dataset: ArrayRecord shards and a manifest; writer, reader and extension.

    with DatasetWriter(directory, shard_records=8192, manifest={...}) as writer:
        writer.write(trace)
    extend(directory, teacher={...}, settings={...}, score_shard=function)  # adds log-probs
    TraceDataset(directory).read([3, 1])

At every moment, kill -9 included, the directory is the old complete dataset, the new one, or
recognisably none: files are written under a temporary name, forced to disk and renamed, and the
manifest, which alone makes them a dataset, comes last. Equal traces give equal bytes.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

# The compiled reader and writer; they come without type stubs.
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from dcod_jax.data import manifest as manifests
from dcod_jax.data import score_progress as progress
from dcod_jax.data.codec import decode, encode, score_kind
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    Location,
    Path,
    as_path,
    commit_file,
    file_entry,
    local_copy,
    replace_file,
    scratch,
    to_json,
)
from dcod_jax.parallel import hosts
from dcod_jax.types import Trace

# One record per chunk, no compression: two to three times the random reads of zstd for a fifth
# more bytes (token ids and float log-probs hardly compress).
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def _write_shard(path: Path, traces: Sequence[Trace]) -> dict[str, Any]:
    """Write a whole shard under a temporary name, check it, name it; returns its manifest entry."""
    records = [encode(trace) for trace in traces]
    try:
        with scratch(path) as temporary:
            writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for record in records:
                writer.write(record)
            writer.close()
            entry = file_entry(temporary) | {"file": path.name}
            commit_file(temporary, path)
    except (RuntimeError, OSError) as error:
        raise DcodError(f"cannot write {path}: {error}; free space and run it again") from error
    return entry | {
        "records": len(traces),
        "tokens": sum(len(trace.token_ids) for trace in traces),
        "completion_tokens": sum(int(np.count_nonzero(t.completion_mask)) for t in traces),
    }


class DatasetWriter:
    """Writes a dataset into a directory; it exists as such only after a clean exit of `with`.

    `manifest` holds the caller's fields (see data/manifest.py). What an interrupted run left is
    removed on entry. Raises DcodError when the directory already is a dataset, when traces with
    and without log-probs are mixed, when an id comes twice, or when nothing was written.
    """

    def __init__(
        self,
        directory: Location,
        *,
        shard_records: int,
        manifest: dict[str, Any],
    ):
        if shard_records < 1:
            raise DcodError(f"prepare.shard_records={shard_records} must be at least 1")
        self._directory = as_path(directory)
        self._shard_records = shard_records
        self._fields = dict(manifest)
        self._buffer: list[Trace] = []
        self._shards: list[dict[str, Any]] = []
        self._lengths: list[tuple[int, int]] = []
        self._ids: set[str] = set()
        self._kind: tuple[bool, int] | None = None

    def __enter__(self) -> DatasetWriter:
        if (self._directory / manifests.MANIFEST).exists():
            raise DcodError(
                f"{self._directory} already holds a complete dataset; "
                "remove it or choose another directory (data.dataset)"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        manifests.remove_all_but(self._directory, ())
        return self

    def write(self, trace: Trace) -> None:
        kind = score_kind(trace)
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            raise DcodError(
                f"trace {trace.id!r} has (log-probs, top-k) {kind}, the ones before it "
                f"{self._kind}; a dataset holds one or the other"
            )
        if trace.id in self._ids:
            raise DcodError(f"trace id {trace.id!r} comes twice; ids must be unique")
        if len(trace.token_ids) < 2 or not np.any(trace.completion_mask[1:]):
            raise DcodError(f"trace {trace.id!r} has no completion token that could be a target")
        if trace.completion_mask[0]:
            raise DcodError(f"trace {trace.id!r} begins with its completion; a prompt is needed")
        self._ids.add(trace.id)
        completion = int(np.count_nonzero(trace.completion_mask))
        self._lengths.append((len(trace.token_ids), completion))
        self._buffer.append(trace)
        if len(self._buffer) == self._shard_records:
            self._flush()

    def update_manifest(self, **fields: Any) -> None:
        """Add or replace fields that are known only once the traces were read."""
        self._fields.update(fields)

    def _flush(self) -> None:
        path = self._directory / f"traces-{len(self._shards):05d}.array_record"
        self._shards.append(_write_shard(path, self._buffer))
        self._buffer = []

    def _finish(self) -> None:
        if self._buffer:
            self._flush()
        if self._kind is None:
            raise DcodError(f"no trace was written to {self._directory}; all were dropped?")
        path = self._directory / manifests.LENGTHS
        lengths = io.BytesIO()
        np.save(lengths, np.asarray(self._lengths, "<i4"))
        replace_file(path, lengths.getvalue())
        totals = {
            name: sum(shard[name] for shard in self._shards)
            for name in ("records", "tokens", "completion_tokens")
        }
        own = {
            "format": manifests.FORMAT,
            "version": manifests.VERSION,
            "shards": self._shards,
            "lengths": file_entry(path),
            "totals": totals,
            "scored": self._kind[0],
            "top_k": self._kind[1],
        }
        manifests.write_manifest(self._directory, self._fields | own)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()


class TraceDataset:
    """A complete dataset, read at random; safe to share between threads.

    With `verify` every shard is hashed on opening. Raises DcodError naming the damaged or missing
    file, what its manifest says and what was found.
    """

    def __init__(self, directory: Location, *, verify: bool = True):
        self.directory = as_path(directory)
        self.manifest = manifests.read_manifest(self.directory)
        manifests.check_file(self.directory, self.manifest["lengths"], verify=True)
        for shard in self.manifest["shards"]:
            manifests.check_file(self.directory, shard, verify=verify)
        self.lengths: np.ndarray = _read_lengths(self.directory, self.manifest)
        self.scored: bool = self.manifest["scored"]
        self.top_k: int = self.manifest["top_k"]
        self._ends = np.cumsum([shard["records"] for shard in self.manifest["shards"]])
        self._readers: dict[int, tuple[Any, threading.Lock]] = {}
        self._lock = threading.Lock()
        if len(self.lengths) != len(self):
            raise DcodError(
                f"{self.directory}: {len(self.lengths)} lengths but {len(self)} records; "
                "prepare the dataset again"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _reader(self, shard: int) -> tuple[Any, threading.Lock]:
        with self._lock:
            if shard not in self._readers:
                entry = self.manifest["shards"][shard]
                path = local_copy(self.directory / entry["file"], sha256=entry["sha256"])
                reader = array_record_module.ArrayRecordReader(
                    str(path), _READER_OPTIONS, file_reader_buffer_size=1 << 12
                )
                self._readers[shard] = reader, threading.Lock()
            return self._readers[shard]

    def read_records(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The encoded records of these traces, in the order asked for."""
        wanted = np.asarray(indices, np.int64)
        if np.any((wanted < 0) | (wanted >= len(self))):
            raise DcodError(f"trace index out of range: {self.directory} holds {len(self)} traces")
        shards = np.searchsorted(self._ends, wanted, side="right")
        starts = np.append(0, self._ends)
        records: list[bytes] = [b""] * len(wanted)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            positions = (wanted[places] - starts[shard]).tolist()
            reader, lock = self._reader(shard)
            try:
                with lock:
                    # seek and read take 4 us of CPU a record, reader.read(positions) 20; the
                    # latter's threads also abort a process that ends while they read.
                    for place, position in zip(places.tolist(), positions, strict=True):
                        reader.seek(position)
                        records[place] = reader.read()
            except RuntimeError as error:
                name = self.manifest["shards"][shard]["file"]
                raise DcodError(
                    f"{self.directory / name} is damaged: {error}; restore the file from a good "
                    "copy, or prepare (and score) the dataset again"
                ) from error
        return records

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Trace]:
        """These traces, in the order asked for."""
        return [decode(record) for record in self.read_records(indices)]


def _read_lengths(directory: Path, manifest: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO((directory / manifest["lengths"]["file"]).read_bytes()))


def check_fingerprints(
    dataset: TraceDataset,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    teacher: str | None = None,
) -> None:
    """Refuse a dataset made with another tokenizer, chat template or teacher (None: not checked).

    Compares with manifest["tokenizer"]["fingerprint"], ["template"]["fingerprint"] and
    ["teacher"]["weights"].
    """
    checks = (
        (
            "tokenizer",
            "fingerprint",
            tokenizer,
            "set student.tokenizer or prepare the traces again",
        ),
        ("template", "fingerprint", template, "set student.chat_template or prepare them again"),
        ("teacher", "weights", teacher, "set teacher.path, or score again with score.overwrite"),
    )
    for name, key, expected, mend in checks:
        found = (dataset.manifest.get(name) or {}).get(key)
        if expected is not None and found != expected:
            raise DcodError(
                f"{dataset.directory / manifests.MANIFEST}: written with another {name}: "
                f"expected {key} {expected}, found {found}; {mend}"
            )


def extend(
    directory: Location,
    *,
    teacher: dict[str, Any],
    settings: dict[str, Any],
    score_shard: Callable[[list[Trace]], list[Trace]],
    on_shard: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    process: int = 0,
    processes: int = 1,
    write: bool = True,
) -> dict[str, Any]:
    """Add a teacher's log-probs to a dataset, shard by shard; returns the new manifest.

    `score_shard` gets a shard's traces without scores and returns them with; it must not depend on
    earlier calls. `on_shard(done, total)` is told of progress. Killed at any time, the same call
    goes on with the shards that are left and ends with the same bytes; until the end the directory
    stays the old dataset. A run with the manifest's own teacher and settings does nothing.

    Of several processes all call this. Either each scores every processes-th shard from `process`
    on, and the first one writes the manifest when all are there; or all compute along and one
    has `write`.

    Raises DcodError when another teacher scored, or began to score, and `overwrite` is not given.
    """
    dataset = TraceDataset(directory)
    directory, manifest = dataset.directory, dataset.manifest
    teacher, settings = json.loads(to_json([teacher, settings]))
    if manifest.get("teacher") == teacher and manifest.get("score") == settings:
        if write:
            manifests.remove_all_but(directory, manifests.listed(manifest))
        return manifest
    if dataset.scored and not overwrite:
        name = (manifest.get("teacher") or {}).get("name", "the source of the traces")
        raise DcodError(
            f"{directory} already holds log-probs from {name}, made with settings "
            f"{manifest.get('score')}; set score.overwrite=True to replace them"
        )
    work = progress.describe(manifest, teacher, settings)
    done = progress.finished(directory, work, overwrite=overwrite)
    own = progress.noted(directory, work, process)
    shards = manifest["shards"]
    starts = np.cumsum([0, *(shard["records"] for shard in shards)]).tolist()
    for number in range(process, len(shards), processes):
        if number in done:
            continue
        traces = dataset.read(range(starts[number], starts[number + 1]))
        bare = [Trace(t.id, t.token_ids, t.completion_mask, meta=t.meta) for t in traces]
        scored = score_shard(bare)
        progress.check_scored(bare, scored, shard=shards[number]["file"])
        if write:
            entry = _write_shard(directory / progress.shard_name(work, number), scored)
            done[number] = progress.score_sums(scored) | {"shard": entry}
            own.append(done[number])
            progress.save(directory, work, own, process)
        if on_shard is not None:
            on_shard(number + 1, len(shards))
    hosts.barrier(f"scoring {directory.name}")
    if write and process == 0:
        if processes > 1:
            done = progress.finished(directory, work, overwrite=overwrite)
        _publish_scores(directory, manifest, work, done)
    hosts.barrier(f"the manifest of {directory.name}")
    return manifests.read_manifest(directory)


def _publish_scores(
    directory: Path, manifest: dict[str, Any], work: dict[str, Any], done: dict[int, dict[str, Any]]
) -> None:
    """Name the scored shards in the manifest, in their order, and remove the old ones."""
    missing = sorted(set(range(len(manifest["shards"]))) - set(done))
    if missing:
        raise DcodError(
            f"{directory}: the scored shards {missing} are missing or damaged although every "
            "process finished; run the same command again, it makes these alone"
        )
    entries = [done[number] for number in sorted(done)]
    scored_manifest = progress.scored_manifest(manifest, work, entries)
    manifests.write_manifest(directory, scored_manifest)
    # Only now: the manifest no longer names the old shards.
    manifests.remove_all_but(directory, manifests.listed(scored_manifest))
