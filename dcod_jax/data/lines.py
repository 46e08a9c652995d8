"""Files of records, one at a time: JSONL, JSON arrays and CSV, packed or not.

A record of more bytes than a limit is never held: it is read in pieces and told as TooLong.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import csv
import dataclasses
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import pyarrow

from dcod_jax.data.records import BadRecordError
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path

PACKED = (".gz", ".bz2", ".xz", ".zst")
_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".ldjson", *_TABLES)
PIECE = 1 << 18  # bytes read at a time
# How files of other kinds begin, which are told by their names.
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_MAGIC |= {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_MAGIC |= {b"PK\x03\x04": ".zip, which is not read: unpack it"}
_XZ_MEMORY = 1 << 28
_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


@dataclasses.dataclass(frozen=True)
class TooLong:
    """A record beyond the limit: how it begins, and its bytes."""

    begins: bytes
    size: int


# What a file holds at one place: JSON text, a row, or why there is none.
Content: TypeAlias = bytes | dict[str, Any] | TooLong | BadRecordError


def suffixes(path: Path) -> tuple[str, str]:
    """(what a file's name says that it holds, how it is packed), in lower case."""
    suffix = path.suffix.lower()
    return (as_path(path.stem).suffix.lower(), suffix) if suffix in PACKED else (suffix, "")


def is_records(name: str) -> bool:
    """Whether a file of this name is read here."""
    return suffixes(as_path(name))[0] in SUFFIXES


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where its name ends in .gz, .bz2, .xz or .zst."""
    with path.open("rb") as packed, contextlib.ExitStack() as stack:
        try:
            stream = io.BufferedReader(_unpacked(path.suffix.lower(), packed), PIECE)
            stack.enter_context(stream)
            if stream.peek(32).startswith(b"version https://git-lfs"):
                raise DcodError(f"{path} is a pointer of Git LFS and not the file: git lfs pull")
            yield stream
        except (
            EOFError,
            zlib.error,
            lzma.LZMAError,
            gzip.BadGzipFile,
            pyarrow.ArrowException,
        ) as e:
            raise _damaged(path, e) from e
        except OSError as error:  # bz2 and zstd tell of damage by an OSError without a number
            if path.suffix.lower() not in PACKED or error.errno is not None:
                raise
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DcodError:
    suffix = path.suffix.lower()
    kind = {".gz": "gzip", ".zst": "zstd"}.get(suffix, suffix[1:])
    why = str(error) or type(error).__name__
    with path.open("rb") as file:
        begins = file.read(8)
    packed = any(begins.startswith(magic) for magic, end in _MAGIC.items() if end == suffix)
    cure = "" if packed else f", or name it without {path.suffix} where it is not packed"
    return DcodError(f"{path} is not a whole {kind} file: {why}; pack it again{cure}")


def _unpacked(suffix: str, packed: Any) -> Any:
    if suffix == ".gz":
        return gzip.open(packed, "rb")
    if suffix == ".bz2":
        return bz2.open(packed, "rb")
    if suffix == ".xz":
        return _Xz(packed)
    return _Zstd(packed) if suffix == ".zst" else packed


class _Xz(io.RawIOBase):
    """An xz file's content, where unpacking it takes at most _XZ_MEMORY bytes."""

    def __init__(self, packed: Any):
        self.packed, self.stream = packed, lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        rest = b""
        while True:
            if self.stream.eof:  # another stream may follow, behind zeros
                rest = self.stream.unused_data.lstrip(b"\0")
                while not rest:
                    if not (piece := self.packed.read(PIECE)):
                        return 0
                    rest = piece.lstrip(b"\0")
                self.stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self.stream.needs_input and not (rest := rest or self.packed.read(PIECE)):
                raise EOFError("it ends in the middle")
            content = self.stream.decompress(rest, len(buffer))
            rest = b""
            if content:
                buffer[: len(content)] = content
                return len(content)


class _Zstd(io.RawIOBase):
    """A zstd file's content, by pyarrow; one that ends in the middle raises EOFError."""

    def __init__(self, packed: Any):
        self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def read_contents(location: str, *, limit: int) -> Generator[tuple[str, Content]]:
    """("file:line", what is there) of every record; nothing above `limit` bytes is held."""
    path = as_path(location)
    with open_file(path) as file:
        table = _TABLES.get(suffixes(path)[0])
        start = file.peek(4096)[:4096]
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            kind = "UTF-32" if start.startswith(b"\xff\xfe\0\0") else "UTF-16"
            raise DcodError(
                f"{path}: {kind}, where UTF-8 is expected; convert it: iconv -f {kind} -t UTF-8"
            )
        if other := next((end for magic, end in _MAGIC.items() if start.startswith(magic)), ""):
            mend = "write it as JSONL"
            if not path.name.endswith(other):
                mend = f"its name must end in {other}"
            raise DcodError(f"{path} holds no text but a packed file: {mend}")
        if start.startswith(b"\xef\xbb\xbf"):
            file.read(3)
        if table:
            found = _rows(file, table, limit=limit, name=location)
        elif start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            found = _elements(file, limit=limit)
        else:
            found = ((n, line) for n, line in _lines(file, limit=limit) if not _blank(line))
        for number, content in found:
            yield f"{location}:{number}", content


def _blank(line: bytes | TooLong) -> bool:
    return isinstance(line, bytes) and not line.strip()


def count_records(location: str) -> int:
    """Records of a JSON array or a table; lines of a JSONL file, empty ones included."""
    path = as_path(location)
    if suffixes(path)[0] not in _TABLES and not is_array(path):
        with open_file(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(PIECE), b""))
    return sum(1 for _ in read_contents(location, limit=PIECE))


def is_array(path: Path) -> bool:
    """Whether a file, which is no table, is one JSON array."""
    with open_file(path) as file:
        start = file.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return suffixes(path)[0] not in _TABLES and start.startswith(b"[")


def _lines(file: io.BufferedReader, *, limit: int) -> Iterator[tuple[int, bytes | TooLong]]:
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) <= limit or line.endswith(b"\n"):
            yield number, line
            continue
        begins, size, piece = line[:PIECE], len(line), b""
        del line  # not held beside the pieces
        while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
            size += len(piece)
        yield number, TooLong(begins, size)


def _elements(file: io.BufferedReader, *, limit: int) -> Iterator[tuple[int, Content]]:
    """(line, text) of the elements of a JSON array."""
    element, depth, string, escaped, given = _Element(limit), 0, False, False, False
    for chunk in iter(lambda: file.read(PIECE), b""):
        place = taken = 0
        if escaped:
            place, escaped = 1, False
        while found := (_INSIDE if string else _OUTSIDE).search(chunk, place):
            place, mark = found.end(), found.group()
            if string:
                string = mark != b'"'
                escaped = string and place == len(chunk)
                place += string
                continue
            string = mark == b'"'
            depth += (mark in b"[{") - (mark in b"]}")
            if depth == 1 and mark == b"[" and not given:
                given, taken = True, place
                element.line += chunk[:place].count(b"\n")
            elif (depth == 1 and mark == b",") or depth == 0:
                element.add(chunk[taken : found.start()])
                taken = place
                if mark == b"," or not element.blank:
                    yield element.take()
                if depth == 0:
                    break
        if depth == 0:
            rest = chunk[taken:] + file.read(PIECE)
            if rest.strip():
                told = rest.strip()[:30].decode("utf-8", "replace")
                why = f"invalid JSON: the file goes on with {told!r} behind the ] of its array"
                yield element.line, BadRecordError(f"{why}; write a record a line")
            return
        element.add(chunk[taken:])
    if not element.blank:
        yield element.take()
    yield element.line, BadRecordError("truncated JSON: the array has no ] at its end")


class _Element:
    """One element of an array as it is read, never more than `limit` bytes of it."""

    def __init__(self, limit: int):
        self.limit, self.text, self.size = limit, bytearray(), 0
        self.line, self.after = 1, 0  # of its beginning; line breaks inside it

    @property
    def blank(self) -> bool:
        return not self.text.strip()

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if not self.text:  # white space before it is not of it
            kept = piece.lstrip()
            self.line += piece[: len(piece) - len(kept)].count(b"\n")
            piece, self.size = kept, len(kept)
            self.after = 0
        self.after += piece.count(b"\n")
        self.text += piece[: max(0, self.limit + 1 - len(self.text))]

    def take(self) -> tuple[int, bytes | TooLong]:
        text, size, line = bytes(self.text), self.size, self.line
        self.line += self.after if text else 0
        self.text, self.size = bytearray(), 0
        return line, text if size <= self.limit else TooLong(text[:PIECE], size)


def _rows(
    file: io.BufferedReader, comma: str, *, limit: int, name: str
) -> Iterator[tuple[int, Content]]:
    """(line, row) of a table with a header; an empty cell is an absent field."""
    csv.field_size_limit(limit)
    number = 0

    size = 0  # of the row that is being read

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(file, limit=limit):
            size += line.size if isinstance(line, TooLong) else len(line)
            if isinstance(line, TooLong) or size > limit:
                raise csv.Error(f"a row of more than {limit:,} bytes")
            yield line.decode("utf-8")

    rows = csv.reader(lines(), delimiter=comma, strict=True)
    header: list[str] = []
    try:
        for row in rows:
            size = 0
            if not header:
                header = row
                twice = [cell for cell, count in collections.Counter(row).items() if count > 1]
                if twice or (len(row) == 1 and re.search(r"\w[;\t,|]\s*\w", row[0])):
                    why = (
                        f"names {twice[0][:60]!r} twice"
                        if twice
                        else f"is one cell, {row[0][:60]!r}"
                    )
                    raise csv.Error(f"the header {why}; columns are parted by {comma!r}")
            elif row and len(row) != len(header):
                yield (
                    rows.line_num,
                    BadRecordError(f"{len(row)} cells, where the header names {len(header)}"),
                )
            elif row:  # a blank line is none
                yield rows.line_num, {n: v or None for n, v in zip(header, row, strict=True)}
            number = rows.line_num
    except (csv.Error, UnicodeDecodeError) as error:
        raise DcodError(
            f"{name}:{number + 1}: not a readable table ({error}); write it as UTF-8 JSONL"
        ) from error
