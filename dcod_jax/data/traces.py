"""Where raw traces come from: JSONL files, globs and HF datasets, read as a stream.

Every problem of a record is reported with its file and line. It stops the run, or, with a
callback for bad records, is handed over and the stream goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow

from dcod_jax.copies import local_copy, local_directory
from dcod_jax.data import lines, schema
from dcod_jax.data.answers import batch_name, is_request
from dcod_jax.data.forms import read_record
from dcod_jax.data.json_text import parse
from dcod_jax.data.kept import Kept
from dcod_jax.data.lines import Content, TooLong
from dcod_jax.data.presets import Fields
from dcod_jax.data.records import BadRecordError, RawTrace, Record, size_of
from dcod_jax.errors import DcodError
from dcod_jax.files import NO_HUB_ID, Path, as_path, find, near, why_no_hub_id

log = logging.getLogger(__name__)

_TABLES = {".parquet": "parquet", ".pq": "parquet"}
_TABLES |= {".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
_SUFFIXES = (
    f"{', '.join(lines.SUFFIXES)}, each also .gz, .bz2, .xz or .zst, or {', '.join(_TABLES)}"
)
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves
_INFO = ("dataset_info.json", "dataset_infos.json")  # beside files of the hub
# Directories of other things, by a file in them.
_OTHERS = {"*.array_record": "a prepared dataset (data.dataset)", "*.safetensors": "a model"}
LONGEST = 8 << 20  # bytes of a record
_ROWS = 16  # of a table that are Python objects at a time
HINT = "mend the record, or set prepare.on_bad_record=quarantine to go on without such records"


@dataclasses.dataclass(frozen=True)
class Source:
    """One place to read from; `kind` is jsonl, parquet, arrow, saved (save_to_disk) or hub."""

    kind: str
    path: str
    split: str = "train"


OnBad = Callable[[RawTrace, str], None]  # source and text of a record that cannot be read; why
OnDrop = Callable[[RawTrace, str, str], None]  # the same of one that is no mistake; its reason


def find_sources(source: str, *, split: str = "train", key: str = "data.traces") -> list[Source]:
    """Comma-separated files, globs, directories or hub ids, in the order given.

    Raises DcodError when a part names nothing.
    """
    parts = [part.strip() for part in source.split(",") if part.strip()]
    if not parts:
        raise DcodError(f"{key} is empty; expected JSONL files, a glob or an HF dataset")
    return [found for part in parts for found in _find_part(part, split=split, key=key)]


def _find_part(part: str, *, split: str, key: str) -> list[Source]:
    if any(mark in part for mark in "*?["):
        if not (files := find(part)):
            raise DcodError(f"{key}: the pattern {part!r} matches no file")
        return [_file(file, key=key) for file in files]
    path = as_path(part)
    if path.is_file():
        return [_file(path, key=key)]
    if path.is_dir():
        return _directory(path, split=split, key=key)
    if lines.is_records(part) or (why := why_no_hub_id(part)) == NO_HUB_ID:
        raise DcodError(
            f"{key}: no such file or directory: {part} (neither a file, a directory nor a hub id, "
            f"owner/name){near(path)}"
        )
    if why:
        raise DcodError(
            f"{key}: there is no file or directory {part!r} here, and the hub is not asked: {why}"
        )
    return [Source("hub", part, split)]


def _file(path: Path, *, key: str) -> Source:
    if lines.is_records(path.name):
        return Source("jsonl", str(path))
    if path.suffix.lower() in _TABLES:
        return Source(_TABLES[path.suffix.lower()], str(path))
    suffix = "".join(lines.suffixes(path))
    raise DcodError(f"{key}: {path} has the suffix {suffix!r}; expected {_SUFFIXES}")


def _directory(path: Path, *, split: str, key: str) -> list[Source]:
    for pattern, what in _OTHERS.items():
        if any(path.rglob(pattern)):
            raise DcodError(f"{key}: {path} is {what}, and holds no raw traces")
    if any((path / name).is_file() for name in _SAVED):
        return [Source("saved", str(path), split)]
    files = sorted(p for p in path.rglob("*") if _is_traces(p, path) and p.is_file())
    of_split = re.compile(rf"(.*[-_.])?{re.escape(split)}")  # train-00000-of-00002, x_train
    named = [p for p in files if of_split.match(p.stem) or p.parent.name == split]
    if not files:
        raise DcodError(
            f"{key}: {path} holds no traces: expected an HF dataset (save_to_disk), or files of "
            f"{_SUFFIXES}"
        )
    return [_file(p, key=key) for p in (named or files)]


def _is_traces(file: Path, directory: Path) -> bool:
    """Whether a file of a directory is of traces: hidden ones and what a hub adds are not."""
    named = lines.is_records(file.name) or file.suffix.lower() in _TABLES
    hidden = "/." in str(file).removeprefix(str(directory))
    return named and not hidden and file.name not in _INFO


def describe(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Path, records, bytes and content hash of each source, for manifests and progress bars.

    Those of a .gz file are of what it holds: packing the same traces again changes nothing.
    """
    return [_describe(source) for source in sources]


def _describe(source: Source) -> dict[str, Any]:
    if source.kind == "hub":
        rows = _open_rows(source)
        splits = rows.info.splits or {}
        count = splits[source.split].num_examples if source.split in splits else 0
        return {"path": source.path, "kind": "hub", "split": source.split, "records": count}
    path = as_path(source.path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest, size = hashlib.sha256(), 0
    for file in files:
        with lines.open_file(file) as stream:
            while block := stream.read(lines.PIECE):
                digest.update(block)
                size += len(block)
    if source.kind == "jsonl":
        records = lines.count_records(source.path)
    elif source.kind == "arrow":
        records = sum(batch.num_rows for batch in _table(source, LONGEST))
    elif source.kind == "parquet":
        records = _parquet(source).metadata.num_rows
    else:
        records = len(_open_rows(source))
    found = {"path": source.path, "kind": source.kind, "bytes": size, "sha256": digest.hexdigest()}
    return (
        found | {"records": records} | ({"split": source.split} if source.kind == "saved" else {})
    )


def read_traces(
    sources: Sequence[Source],
    fields: Fields,
    *,
    longest: int = LONGEST,
    on_bad: OnBad | None = None,
    on_drop: OnDrop | None = None,
    on_record: Callable[[int], None] | None = None,
) -> Iterator[RawTrace]:
    """The traces of all sources, in order, one record in memory at a time.

    `on_bad` is given what cannot be read, `on_drop` records of more than `longest` bytes and
    requests that failed, and the stream goes on; without it such a record raises DcodError
    "file:line: what is wrong". `on_record(1)` is called for every record.
    """
    requests = Kept()  # JSON of the prompts of batch outputs that come later
    answered = Kept()  # those that had an output
    with contextlib.closing(_contents(sources, longest)) as contents:
        for where, content in contents:
            try:
                for trace in _traces_of(
                    content, fields, where, requests, answered, longest=longest
                ):
                    if not trace.failed:
                        yield trace
                    elif on_drop is None:
                        raise BadRecordError(trace.failed)
                    else:
                        reason = "too_long" if isinstance(content, TooLong) else "failed_request"
                        on_drop(trace, trace.failed, reason)
            except BadRecordError as error:
                if on_bad is None:
                    raise DcodError(f"{where}: {error}; {HINT}") from error
                on_bad(RawTrace([], source=where, record=_as_text(content)), str(error))
            if on_record:
                on_record(1)
    lost = (name for name in requests if not answered.get(name))
    if first := next(lost, None):
        count = 1 + sum(1 for _ in lost)
        log.warning("%d requests of batches have no output, the first is %r", count, first)


def _contents(sources: Sequence[Source], longest: int) -> Generator[tuple[str, Content]]:
    for source in sources:
        plain = source.kind == "jsonl"
        own = lines.read_contents(source.path, limit=longest) if plain else None
        yield from own or _read_rows(source, longest)


def _traces_of(
    content: Content, fields: Fields, where: str, requests: Kept, answered: Kept, *, longest: int
) -> list[RawTrace]:
    """The traces of one record; a request is remembered for the outputs that follow."""
    if isinstance(content, TooLong):
        why = f"{content.size:,} bytes, prepare.record_bytes={longest:,}"
        return [RawTrace([], failed=why, source=where, record=_as_text(content))]
    if isinstance(content, BadRecordError):
        raise content
    record = parse(content) if isinstance(content, bytes) else content
    if isinstance(record, dict) and is_request(record):
        schema.check(record, {"body": schema.ASKED, "params": schema.ASKED})
        name, text = batch_name(record) or "", json.dumps(record, default=str)
        if requests.get(name, text) != text and not answered.get(name):
            raise BadRecordError(
                f"custom_id {name!r} has another request before, and no output between them: "
                "which one an output answers cannot be told; name each request file before its own "
                "output file, and give each request an id of its own"
            )
        requests[name], answered[name] = text, 0
        return []
    if isinstance(record, dict) and (name := batch_name(record)):
        answered[name] = 1
    return read_record(record, fields, source=where, requests=requests)


def _as_text(content: object) -> str:
    if isinstance(content, TooLong):
        content = content.begins[:1000]
    if isinstance(content, bytes):
        return content.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return json.dumps(content, ensure_ascii=False, default=str)


def _read_rows(source: Source, longest: int) -> Iterator[tuple[str, Content]]:
    if source.kind in _TABLES.values():
        label, rows = source.path, _table_rows(source, longest)
    else:
        label, rows = f"{source.path}[{source.split}]", _open_rows(source)
    try:
        for number, row in enumerate(rows, 1):
            yield f"{label}:{number}", _row(row, longest)
    # Text that is no UTF-8, dates that Python has not, unknown time zones.
    except (pyarrow.ArrowException, ValueError, ArithmeticError, LookupError) as error:
        raise _unreadable(source, error) from error


def _row(row: Record, longest: int) -> Content:
    try:
        size = size_of(row)
    except BadRecordError as error:
        return error
    texts = {name: value[:200] for name, value in row.items() if isinstance(value, str)}
    return _as_called(dict(row)) if size <= longest else TooLong(json.dumps(texts).encode(), size)


# Where a struct of a table has a name of every other row's, with null: it is absent.
_CALLED = ("arguments", "args", "input", "tools", "available_tools", "functions")


def _as_called(value: Any, inside: bool = False) -> Any:
    """A row without nulls inside of calls' arguments and tools' definitions; maps as objects."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)
    if isinstance(value, dict):
        there = {k: v for k, v in value.items() if v is not None or not inside}
        # A list under `input` holds messages, not a call's arguments.
        called = [k for k, v in there.items() if k in _CALLED and (k, type(v)) != ("input", list)]
        return {k: _as_called(v, inside or k in called) for k, v in there.items()}
    return [_as_called(v, inside) for v in value] if isinstance(value, list) else value


def _table_rows(source: Source, longest: int) -> Iterator[Record]:
    """The rows of a table, of which a few are Python objects at a time."""
    for batch in _table(source, longest):
        rows = max(1, min(_ROWS, _ROWS * longest * batch.num_rows // max(batch.nbytes, 1)))
        for start in range(0, batch.num_rows, rows):
            yield from batch.slice(start, rows).to_pylist()


def _table(source: Source, longest: int) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a .parquet or .arrow file (a stream or a file), one batch in memory."""
    try:
        if source.kind == "parquet":
            # A column's value may come again in every row, as the number of one in its dictionary.
            file = _parquet(source)
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            most = max((group.total_byte_size for group in groups), default=1)
            yield from file.iter_batches(max(1, min(_ROWS, _ROWS * longest // max(most, 1))))
            return
        file = pyarrow.memory_map(str(local_copy(as_path(source.path))))
        if file.read(6) == b"ARROW1":
            whole = pyarrow.ipc.open_file(file)
            yield from map(whole.get_batch, range(whole.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(source, error) from error


def _parquet(source: Source) -> Any:
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(str(local_copy(as_path(source.path))), memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: Exception) -> DcodError:
    return DcodError(f"{source.path} is not a readable table or HF dataset: {error}")


def _open_rows(source: Source) -> Any:
    """An HF dataset: streamed from the hub (or its local cache), else random access to files."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = as_path(source.path)
    try:
        if source.kind == "hub":
            return datasets.load_dataset(source.path, split=source.split, streaming=True)
        found: Any = datasets.load_from_disk(str(local_directory(path)))
    except (OSError, ValueError, DatasetsError) as error:
        if source.kind != "hub":
            raise _unreadable(source, error) from error
        reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        raise DcodError(
            f"data.traces: there is no file or directory {source.path!r} here, and the hub "
            f"dataset {source.path!r}, split {source.split!r}, cannot be opened "
            f"({reason}); without the hub give a local path"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if source.split not in found:
        raise DcodError(
            f"{source.path} has the splits {', '.join(map(str, found))}, not {source.split!r}; "
            "set data.split"
        )
    return found[source.split]
