"""The trace dataset on disk: its manifest, its writer and its reader.

    with DatasetWriter(directory, shard_records=8192, manifest={...}) as writer:
        writer.write(trace)
    TraceDataset(directory).read([3, 1])

A directory is a dataset when it holds manifest.json, which is written last. So at every moment,
kill -9 included, the directory is a complete dataset or recognisably none. The manifest's fields:

    format, version        of this layout
    shards                 [{file, records, tokens, completion_tokens, bytes, sha256}, ...]
    lengths                {file, bytes, sha256}: int32 [records, 2], tokens and completion tokens
    totals                 {records, tokens, completion_tokens}
    scored, top_k          whether every trace has teacher log-probs; K of the stored top-k, or 0
    tokenizer, template    {fingerprint, source, ...}: what made the token ids and the mask
    teacher                {name, revision, weights, ...} or absent; weights is a content hash
    start                  likewise, of the student whose log-probs every trace has beside them
    alignment              of a teacher with another tokenizer: spans, tokens and bytes, or absent
    counts, config, ...    whatever else the writing verb reports (kept and dropped by reason, ...)

It holds no time stamps and no absolute order of work, so equal traces give equal bytes.
"""

from __future__ import annotations

import io
import re
import threading
from array import array as array_of_numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

# The compiled reader and writer; they come without type stubs.
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from dcod_jax.bounds import array, check, either, flag, mapping, number, optional, text, whole
from dcod_jax.copies import local_copy
from dcod_jax.data.codec import decode, encode, score_kind
from dcod_jax.data.kept import Kept
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    Location,
    Path,
    as_path,
    atomic_write,
    file_entry,
    file_sha256,
    file_size,
    read_json,
    replace_file,
    room,
    to_json,
)
from dcod_jax.stores import RemotePath
from dcod_jax.types import Trace

FORMAT = "dcod_jax.traces"
VERSION = 1
MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
_SIZE, _TOTALS = whole(0, 1 << 53), ("records", "tokens", "completion_tokens")
_FILE = {"file": text(255), "bytes": _SIZE, "sha256": text(64)}
SHARD = mapping({**_FILE, **dict.fromkeys(_TOTALS, _SIZE)})
_NUMBER = number(-1e308, 1e308)
_MADE_BY = dict.fromkeys(("fingerprint", "weights", "source"), optional(text()))
_MADE_BY |= {"teachers": optional(mapping(items=mapping()))}
_REASONS = mapping(items=_SIZE)
_FIELDS = {
    "shards": array(SHARD, fewest=1, most=1 << 20),
    "lengths": mapping(_FILE),
    "totals": mapping(dict.fromkeys(_TOTALS, _SIZE)),
    "scored": flag(),
    "top_k": whole(0, 1 << 24),
    "alignment": optional(mapping({"longest_span": whole(0, 1 << 31)})),
    **dict.fromkeys(("tokenizer", "template", "teacher", "start"), optional(mapping(_MADE_BY))),
    "counts": optional(mapping({"dropped": optional(_REASONS)}, items=either(_SIZE, _REASONS))),
    "sources": optional(array(mapping())),
    "by_teacher": optional(mapping(items=mapping(items=_NUMBER))),
    **dict.fromkeys(("mean_logprob", "captured_mass"), optional(_NUMBER)),
    "teachers": optional(array(text())),
    "weighted": optional(flag()),
}
_OWN_FILE = re.compile(
    r"(manifest\.json|lengths\.npy|(traces|scored-[0-9a-f]+)-\d+\.array_record|"
    r"scores\.partial-[0-9a-f]+/[\d-]+\.json)(\.tmp)?"
)
_NOBODYS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*")  # of the system
_MEND = "restore the file from a good copy, or prepare (and score) the dataset again"
# One record per chunk, no compression: two to three times the random reads of zstd for a fifth
# more bytes (token ids and float log-probs hardly compress).
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the file that makes a dataset valid, whole or not at all."""
    replace_file(directory / MANIFEST, to_json(manifest))


def read_manifest(directory: Location) -> dict[str, Any]:
    """The manifest of a complete dataset.

    Raises DcodError when the directory is missing, half written, or of another format or version.
    """
    directory = as_path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DcodError(
            f"{directory} is not a directory; expected a trace dataset "
            "(write one with `python -m dcod_jax.prepare`, or set data.dataset)"
        )
    if not path.is_file():
        inner = sorted(p.parent.name for p in directory.glob(f"*/{MANIFEST}"))
        hint = (
            f"it holds the datasets {', '.join(inner)}: name one of them"
            if inner
            else "prepare was interrupted before the dataset was complete, or never ran; "
            "run the same `python -m dcod_jax.prepare` command again"
        )
        raise DcodError(f"{directory} has no {MANIFEST}: {hint}")
    manifest = read_json(path, mend="prepare the dataset again")
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise DcodError(
            f"{path}: expected format {FORMAT} version {VERSION}, found {str(found[0])[:80]} "
            f"version {str(found[1])[:80]}; prepare the dataset again with this version of dcod_jax"
        )
    check(manifest, _FIELDS, source=path)
    shards = manifest["shards"]
    for entry in (*shards, manifest["lengths"]):
        if not entry["file"] or set(entry["file"]) & set("/\\\0") or entry["file"] == "..":
            raise DcodError(f"{path}: {entry['file']!r} is no file beside it; {_MEND}")
    for name in _TOTALS:
        if (total := sum(shard[name] for shard in shards)) != manifest["totals"][name]:
            raise DcodError(
                f"{path}: totals.{name}={manifest['totals'][name]}, the shards have {total}; the "
                f"file was edited or damaged: {_MEND}"
            )
    return manifest


def _check_file(directory: Path, entry: dict[str, Any], *, verify: bool) -> None:
    """Compare a file with its manifest entry: presence and size, with `verify` also the hash."""
    path = directory / entry["file"]
    if not path.is_file():
        raise DcodError(f"{path} is missing, but {MANIFEST} lists it; {_MEND}")
    if (size := file_size(path)) != entry["bytes"]:
        raise DcodError(
            f"{path} is damaged: expected {entry['bytes']} bytes, found {size}; {_MEND}"
        )
    # The copy of a remote file is hashed as it is fetched.
    if verify and local_copy(path, sha256=entry["sha256"]) is path:
        actual = file_sha256(path)
        if actual != entry["sha256"]:
            raise DcodError(
                f"{path} is damaged: expected sha256 {entry['sha256']}, found {actual}; {_MEND}"
            )


def split_paths(root: Path) -> list[Path]:
    """Directories of the datasets in `root`: train and, if there, eval; else root itself."""
    found = [root / name for name in ("train", "eval") if (root / name).is_dir()]
    return found if found[:1] == [root / "train"] else [root]


def remove_unlisted(directory: Path, manifest: dict[str, Any] | None = None) -> None:
    """Delete this format's files that the manifest does not list; other files are left alone."""
    kept = {MANIFEST}
    if manifest:
        kept |= {entry["file"] for entry in [*manifest["shards"], manifest["lengths"]]}
    for path in list(directory.glob("*")):
        if path.name not in kept and _OWN_FILE.fullmatch(path.name):
            path.unlink()


def check_own_dataset(root: Path, *others: str) -> None:
    """Raise DcodError where a directory of datasets holds what this format and `others` do not."""
    for path in root.rglob("*") if root.is_dir() else ():
        name = str(path).removeprefix(f"{root}/")
        own = _OWN_FILE.fullmatch(re.sub("^(train|eval)/", "", name)) or name in others
        own = own or _NOBODYS.fullmatch(path.name)
        if not own and (isinstance(path, RemotePath) or path.is_symlink() or not path.is_dir()):
            mend = "move the file away, or set data.dataset to another directory"
            raise DcodError(f"{path} is not of the dataset {root}, which is left as it is: {mend}")


def check_fingerprints(
    dataset: TraceDataset,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    teacher: str | None = None,
    start: str | None = None,
) -> None:
    """Refuse a dataset of another tokenizer, chat template, teacher or start (None: not checked).

    Compares the manifest's tokenizer.fingerprint, template.fingerprint, teacher.weights and
    start.weights.
    """
    checks = (
        ("tokenizer", "fingerprint", tokenizer, "student.tokenizer or prepare the traces again"),
        ("template", "fingerprint", template, "student.chat_template or prepare them again"),
        ("teacher", "weights", teacher, "teacher.path, or score again with score.overwrite"),
        ("start", "weights", start, "student.path, or score again with score.student=True"),
    )
    for name, key, expected, mend in checks:
        found = (dataset.manifest.get(name) or {}).get(key)
        if expected is not None and found != expected:
            raise DcodError(
                f"{dataset.directory / MANIFEST}: written with another {name}: "
                f"expected {key} {expected}, found {found}; set {mend}"
            )


def write_shard(path: Path, traces: Sequence[Trace]) -> dict[str, Any]:
    """Write a whole shard under a temporary name, check it, name it; returns its manifest entry."""
    records = [encode(trace) for trace in traces]
    try:
        with atomic_write(path) as temporary:
            writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for record in records:
                writer.write(record)
            writer.close()
            entry = file_entry(temporary) | {"file": path.name}
    except (RuntimeError, OSError) as error:
        raise DcodError(f"cannot write {path}: {error}; {room(error)} and run it again") from error
    return entry | {
        "records": len(traces),
        "tokens": sum(len(trace.token_ids) for trace in traces),
        "completion_tokens": sum(int(np.count_nonzero(t.completion_mask)) for t in traces),
    }


class DatasetWriter:
    """Writes a dataset into a directory; it exists as such only after a clean exit of `with`.

    `manifest` holds the caller's fields. What an interrupted run left is removed on entry. Raises
    DcodError when the directory already is a dataset, when traces with and without log-probs are
    mixed, when an id comes twice, or when nothing was written.
    """

    def __init__(self, directory: Location, *, shard_records: int, manifest: dict[str, Any]):
        if shard_records < 1:
            raise DcodError(f"prepare.shard_records={shard_records} must be at least 1")
        self._directory = as_path(directory)
        self._shard_records = shard_records
        self.manifest = dict(manifest)  # fields may be added until the last trace is written
        self._buffer: list[Trace] = []
        self._shards: list[dict[str, Any]] = []
        self._lengths, self._ids = array_of_numbers("i"), Kept()
        self._kind: tuple[bool, int] | None = None

    def __enter__(self) -> DatasetWriter:
        if (self._directory / MANIFEST).exists():
            raise DcodError(
                f"{self._directory} already holds a complete dataset; "
                "remove it or choose another directory (data.dataset)"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        remove_unlisted(self._directory)
        return self

    def write(self, trace: Trace) -> None:
        """Append a trace; DcodError for one that cannot stand beside the traces before it."""
        kind = score_kind(trace)
        self._kind = self._kind or kind
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
        self._ids[trace.id] = 1
        completion = int(np.count_nonzero(trace.completion_mask))
        self._lengths.extend((len(trace.token_ids), completion))
        self._buffer.append(trace)
        if len(self._buffer) == self._shard_records:
            self._flush()

    def _flush(self) -> None:
        path = self._directory / f"traces-{len(self._shards):05d}.array_record"
        self._shards.append(write_shard(path, self._buffer))
        self._buffer = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._buffer:
            self._flush()
        if self._kind is None:
            raise DcodError(f"no trace was written to {self._directory}; all were dropped?")
        lengths = io.BytesIO()
        np.save(lengths, np.asarray(self._lengths, "<i4").reshape(-1, 2))
        replace_file(self._directory / LENGTHS, lengths.getvalue())
        own = {
            "format": FORMAT,
            "version": VERSION,
            "shards": self._shards,
            "lengths": file_entry(self._directory / LENGTHS),
            "totals": {name: sum(shard[name] for shard in self._shards) for name in _TOTALS},
            "scored": self._kind[0],
            "top_k": self._kind[1],
        }
        write_manifest(self._directory, self.manifest | own)


def _read_lengths(path: Path, records: int) -> np.ndarray:
    """int32 [records, 2] of a file whose head is, but for blanks, the one that numpy writes."""
    content = path.read_bytes()
    start = 10 + int.from_bytes(content[8:10], "little")
    head = b"{'descr': '<i4', 'fortran_order': False, 'shape': (%d, 2), }" % records
    found = content[:8], content[10:start].strip(), len(content) - start
    if found != (b"\x93NUMPY\x01\x00", head, 8 * records):
        raise DcodError(
            f"{path}: {len(content)} bytes that begin with {content[10 : min(start, 200)]!r}, "
            f"expected {head!r} and {8 * records} bytes behind it; {_MEND}"
        )
    lengths = np.frombuffer(content, "<i4", offset=start).reshape(records, 2)
    tokens, completion = lengths.T
    if not ((completion >= 1) & (completion < tokens)).all():
        raise DcodError(f"{path}: a trace without a prompt or a completion token; {_MEND}")
    return lengths


class TraceDataset:
    """A complete dataset, read at random; safe to share between threads.

    With `verify` every shard is hashed on opening. Raises DcodError naming the damaged or missing
    file, what its manifest says and what was found.
    """

    def __init__(self, directory: Location, *, verify: bool = True):
        self.directory = as_path(directory)
        self.manifest = read_manifest(self.directory)
        lengths, self._shards = self.manifest["lengths"], self.manifest["shards"]
        _check_file(self.directory, lengths, verify=True)
        for shard in self._shards:
            _check_file(self.directory, shard, verify=verify)
        # [N, 2]: tokens, completion tokens
        self.lengths = _read_lengths(
            self.directory / lengths["file"], self.manifest["totals"]["records"]
        )
        self.scored: bool = self.manifest["scored"]
        self.top_k: int = self.manifest["top_k"]
        # Whether the teacher's log-probs are of spans of several tokens (score/alignment.py).
        self.spans: bool = (self.manifest.get("alignment") or {}).get("longest_span", 1) > 1
        self.starts = np.cumsum([0, *(shard["records"] for shard in self._shards)])  # of shards
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            entry = self._shards[shard]
            path = local_copy(self.directory / entry["file"], sha256=entry["sha256"])
            reader = array_record_module.ArrayRecordReader(
                str(path), _READER_OPTIONS, file_reader_buffer_size=1 << 12
            )
            if (count := reader.num_records()) != entry["records"]:
                raise DcodError(
                    f"{path} has {count} records, {MANIFEST} says {entry['records']}; {_MEND}"
                )
            self._readers[shard] = reader
        return self._readers[shard]

    def read_records(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The encoded records of these traces, in the order asked for."""
        wanted = np.asarray(indices, np.int64)
        if np.any((wanted < 0) | (wanted >= len(self))):
            raise DcodError(f"trace index out of range: {self.directory} holds {len(self)} traces")
        shards = np.searchsorted(self.starts, wanted, side="right") - 1
        records: list[bytes] = [b""] * len(wanted)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            positions = (wanted[places] - self.starts[shard]).tolist()
            try:
                with self._lock:
                    reader = self._reader(shard)
                    # seek and read take 4 us of CPU a record, reader.read(positions) 20; the
                    # latter's threads also abort a process that ends while they read.
                    for place, position in zip(places.tolist(), positions, strict=True):
                        reader.seek(position)
                        records[place] = reader.read()
            except RuntimeError as error:
                path = self.directory / self._shards[shard]["file"]
                raise DcodError(f"{path} is damaged: {error}; {_MEND}") from error
        return records

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Trace]:
        """These traces, in the order asked for."""
        return [decode(record) for record in self.read_records(indices)]
