"""Files of this machine and objects of a store (gs://bucket/name), and what must appear whole.

Every path that a user gives goes through `as_path`. A local one is a pathlib.Path and behaves as
ever. One with a scheme is a RemotePath with the same methods, over fsspec.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from dcod_jax.errors import DcodError


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """protocol://key; the part of pathlib.Path's interface that the package uses.

    It is no os.PathLike: a library that wants a local file refuses it. What goes wrong on the way
    to the store is raised as OSError (FileNotFoundError where there is no such object).
    """

    protocol: str
    key: str  # bucket/name, without slashes at its ends

    def __str__(self) -> str:
        return f"{self.protocol}://{self.key}"

    # ------------------------------------------------------------ names

    def __truediv__(self, name: str) -> RemotePath:
        parts = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        return dataclasses.replace(self, key="/".join(parts))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return pathlib.PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        return pathlib.PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> RemotePath:
        above = self.key.rpartition("/")[0]
        return dataclasses.replace(self, key=above or self.key)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        return self

    # ------------------------------------------------------------ looking

    def exists(self) -> bool:
        with self._reaching("look at"):
            return bool(self.filesystem.exists(str(self)))

    def is_file(self) -> bool:
        with self._reaching("look at"):
            return bool(self.filesystem.isfile(str(self)))

    def is_dir(self) -> bool:
        with self._reaching("look at"):
            return bool(self.filesystem.isdir(str(self)))

    def size(self) -> int:
        with self._reaching("look at"):
            return int(self.filesystem.info(str(self))["size"])

    def version(self) -> str:
        """A text that changes when the object does."""
        with self._reaching("look at"):
            return str(self.filesystem.ukey(str(self)))

    def iterdir(self) -> Iterator[RemotePath]:
        with self._reaching("list"):
            found = self.filesystem.ls(str(self), detail=False)
        yield from sorted(path for path in map(self._of, found) if path != self)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Files below this directory whose name fits; objects only, a store has no directories."""
        with self._reaching("list"):
            found = self.filesystem.find(str(self))
        every = sorted(map(self._of, found))
        yield from (path for path in every if fnmatch.fnmatchcase(path.name, pattern))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        with self._reaching("list"):
            found = self.filesystem.glob(f"{self}/{pattern}" if self.key else f"{self}{pattern}")
        yield from sorted(map(self._of, found))

    # ------------------------------------------------------------ content

    def open(self, mode: str = "r", **options: Any) -> Any:
        with self._reaching("open"):
            return self.filesystem.open(str(self), mode, **options)

    def read_bytes(self) -> bytes:
        with self._reaching("read"):
            return self.filesystem.cat_file(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> int:
        with self._reaching("write"):
            self.filesystem.pipe_file(str(self), content)
        return len(content)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, file: pathlib.Path) -> None:
        """Take a local file's content; the object is the old one until all of it is there."""
        with self._reaching("write"):
            self.filesystem.put_file(str(file), str(self))
        if (size := self.size()) != file.stat().st_size:
            raise OSError(f"{self} has {size} bytes after {file.stat().st_size} were sent")

    def download(self, file: pathlib.Path) -> None:
        with self._reaching("read"):
            self.filesystem.get_file(str(self), str(file))

    def copy_to(self, other: RemotePath) -> None:
        """A copy inside the store; the content does not pass through this machine."""
        with self._reaching("copy"):
            self.filesystem.cp_file(str(self), str(other))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory is there when an object is in it."""

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            with self._reaching("remove"):
                self.filesystem.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    # ------------------------------------------------------------ the driver

    @property
    def filesystem(self) -> Any:
        return _filesystem(self.protocol)

    def _of(self, name: str) -> RemotePath:
        return dataclasses.replace(self, key=name.strip("/"))

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Errors of the driver as OSError, with the path in it; DcodError where there is none."""
        _filesystem(self.protocol)
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: no such object") from error
        except _driver_errors(self.protocol) as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise OSError(f"cannot {what} {self}: {text}") from error


Path: TypeAlias = pathlib.Path | RemotePath
Location: TypeAlias = str | os.PathLike[str] | RemotePath  # what as_path makes a Path of


def as_path(path: Location) -> Path:
    """The path of a text: remote where it has a scheme ("gs://bucket/run"), else local.

    Raises DcodError for a scheme without a name behind it ("gs://").
    """
    if isinstance(path, (pathlib.Path, RemotePath)):
        return path
    text = os.fspath(path)
    protocol, mark, key = text.partition("://")
    if not mark:
        return pathlib.Path(text)
    if not protocol.isalnum() or not key.strip("/"):
        raise DcodError(
            f"{text}: expected a local path or scheme://bucket/name, such as gs://b/run"
        )
    protocol = "gs" if protocol == "gcs" else protocol
    if protocol == "file":
        return pathlib.Path(key)
    return RemotePath(protocol, "/".join(part for part in key.split("/") if part))


@functools.cache
def _filesystem(protocol: str) -> Any:
    import fsspec

    try:
        # Other processes write too: a listing must be of now.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = "the extra gcs: pip install 'dcod_jax[gcs]'" if protocol == "gs" else "its driver"
        raise DcodError(f"{protocol}:// paths need {extra} ({error})") from error


@functools.cache
def _driver_errors(protocol: str) -> tuple[type[BaseException], ...]:
    if protocol != "gs":
        return (OSError,)
    import aiohttp
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, TimeoutError, HttpError, aiohttp.ClientError, GoogleAuthError)


def rename(path: Path, name: Path) -> None:
    """Give a file another name in the same place; in a store by a copy, which appears whole."""
    if isinstance(path, RemotePath) and isinstance(name, RemotePath):
        path.copy_to(name)
        path.unlink()
    elif isinstance(path, pathlib.Path) and isinstance(name, pathlib.Path):
        os.replace(path, name)
    else:
        raise DcodError(f"{path} and {name} must be in one place")


def find(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, in the order of their names."""
    if "://" not in pattern:
        found = map(pathlib.Path, glob.glob(pattern, recursive=True))
        return sorted((path for path in found if path.is_file()), key=str)
    protocol, _, key = pattern.partition("://")
    return sorted(RemotePath("gs" if protocol == "gcs" else protocol, "").glob(key))


def file_size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else path.size()


CACHE = "DCOD_CACHE_DIR"  # environment variable: where copies of remote files are kept
UPLOADING = ".dcod_jax-uploading"  # object in a directory whose publication has not ended

# ---------------------------------------------------------------- files that have to be local


def cache_directory() -> pathlib.Path:
    """$DCOD_CACHE_DIR, else ~/.cache/dcod_jax."""
    return pathlib.Path(os.environ.get(CACHE) or pathlib.Path.home() / ".cache" / "dcod_jax")


def local_copy(path: Path, *, sha256: str = "") -> pathlib.Path:
    """A local file with this content: the path itself, or its copy in the cache.

    The copy's place follows from sha256 where it is known, else from the object's version, so a
    changed object is copied again. With sha256 the copy is hashed each time, and one that is
    damaged is fetched anew. Raises DcodError when it cannot be fetched or has another hash.
    """
    if isinstance(path, pathlib.Path):
        return path
    try:
        key = sha256 or _digest(str(path), path.version())
        copy = cache_directory() / key[:32] / path.name
        if not copy.is_file() or (sha256 and _sha256(copy) != sha256):
            _fetch(path, copy)
            found = _sha256(copy) if sha256 else ""
            if found != sha256:
                copy.unlink()
                raise DcodError(
                    f"{path} is damaged: expected sha256 {sha256}, found {found}; restore it from "
                    "a good copy, or prepare (and score) the dataset again"
                )
    except OSError as error:
        raise DcodError(f"{path} cannot be copied to this machine: {error}; {_mend()}") from error
    return copy


def local_directory(
    path: Path, *, wanted: Callable[[str], bool] = lambda name: True
) -> pathlib.Path:
    """A local directory with the files of `path` whose names are wanted, or the path itself."""
    if isinstance(path, pathlib.Path):
        return path
    try:
        files = [file for file in path.rglob("*") if wanted(file.name)]
        copies = cache_directory() / _digest(str(path), *(f"{f} {f.version()}" for f in files))[:32]
        for file in files:
            copy = copies / file.key.removeprefix(path.key).strip("/")
            if not copy.is_file():
                _fetch(file, copy)
    except OSError as error:
        raise DcodError(f"{path} cannot be copied to this machine: {error}; {_mend()}") from error
    return copies


def _mend() -> str:
    return f"see that it can be read and that {cache_directory()} (set {CACHE}) has room"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(path: RemotePath, copy: pathlib.Path) -> None:
    """Several processes may fetch the same file: each under a name of its own, then renamed."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        path.download(temporary)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[pathlib.Path]:
    """A local file to write what will become `path`: beside it, or on this machine's disk.

    It is removed at the end unless it was given its name before.
    """
    if isinstance(path, pathlib.Path):
        temporary = path.with_name(path.name + ".tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="dcod_jax-") as directory:
        yield pathlib.Path(directory) / path.name


@contextlib.contextmanager
def filling(directory: Path) -> Iterator[pathlib.Path]:
    """A local directory whose files are in `directory` at the end."""
    if isinstance(directory, pathlib.Path):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dcod_jax-") as name:
        local = pathlib.Path(name)
        yield local
        for file in sorted(file for file in local.rglob("*") if file.is_file()):
            (directory / file.relative_to(local).as_posix()).upload(file)


# ---------------------------------------------------------------- directories that appear whole


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if isinstance(path, pathlib.Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    for file in list(path.rglob("*")):
        file.unlink(missing_ok=True)


def publish(temporary: Path, final: Path, *, last: str) -> None:
    """Give a finished directory its name, in place of what has it now.

    Local: renames. In a store: what makes the old directory valid, the file `last`, goes first,
    then the other files are replaced, and the new `last` is written when all of them are there.
    An interruption leaves a directory that `unfinished` knows and that the next publish replaces.
    """
    if isinstance(temporary, RemotePath) and isinstance(final, RemotePath):
        _publish_remote(temporary, final, last)
        return
    if isinstance(temporary, RemotePath) or isinstance(final, RemotePath):
        raise DcodError(f"{temporary} and {final} must be in one place")
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def _publish_remote(temporary: RemotePath, final: RemotePath, last: str) -> None:
    (final / UPLOADING).write_bytes(b"")
    (final / last).unlink(missing_ok=True)
    names = [file.key.removeprefix(temporary.key).strip("/") for file in temporary.rglob("*")]
    for file in list(final.rglob("*")):
        if file.name != UPLOADING and file.key.removeprefix(final.key).strip("/") not in names:
            file.unlink(missing_ok=True)
    for name in sorted(set(names) - {last}):
        (temporary / name).copy_to(final / name)
    (temporary / last).copy_to(final / last)
    (final / UPLOADING).unlink(missing_ok=True)
    remove_tree(temporary)


def unfinished(path: Path, *, last: str) -> bool:
    """Whether an interrupted publication left this directory, free to be replaced."""
    if isinstance(path, pathlib.Path):
        return False
    return (path / UPLOADING).is_file() and not (path / last).is_file()


# ---------------------------------------------------------------- files that grow


class Mirror:
    """A local directory whose files are sent to a place in a store whenever asked for.

    For a local path it is the directory itself and nothing is sent. Files of the store that are
    named in `fetch` are there from the start; one that is gone from the directory at a later send
    is removed from the store as well.
    """

    def __init__(self, path: Path, *, fetch: tuple[str, ...] = ()):
        self.path = path
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._sent: dict[pathlib.Path, tuple[int, int]] = {}
        if isinstance(path, pathlib.Path):
            self.directory = path
            return
        self._spool = tempfile.TemporaryDirectory(prefix="dcod_jax-")
        self.directory = pathlib.Path(self._spool.name)
        for name in fetch:
            if (path / name).is_file():
                (path / name).download(self.directory / name)
                self._sent[self.directory / name] = self._state(self.directory / name)

    def send(self) -> None:
        """Upload every file that changed since the last time; an object is replaced whole."""
        if isinstance(self.path, pathlib.Path):
            return
        present = sorted(path for path in self.directory.rglob("*") if path.is_file())
        for file in present:
            if self._sent.get(file) != (state := self._state(file)):
                self._remote(self.path, file).upload(file)
                self._sent[file] = state
        for file in sorted(self._sent.keys() - set(present)):
            self._remote(self.path, file).unlink(missing_ok=True)
            del self._sent[file]

    def _remote(self, path: RemotePath, file: pathlib.Path) -> RemotePath:
        return path / file.relative_to(self.directory).as_posix()

    @staticmethod
    def _state(file: pathlib.Path) -> tuple[int, int]:
        return file.stat().st_size, file.stat().st_mtime_ns

    def close(self) -> None:
        """Send the rest and remove the local directory of a remote one."""
        self.send()
        if self._spool is not None:
            self._spool.cleanup()


# ---------------------------------------------------------------- files that appear whole


def file_sha256(path: Location) -> str:
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_file(temporary: pathlib.Path, final: Path) -> None:
    """Give a finished file its name; after a crash there is the old content or the new, whole.

    temporary: `scratch(final)`, on this machine's disk where final is in a store.
    """
    if isinstance(final, RemotePath):
        final.upload(temporary)
        return
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically; on a DcodError the old content is still there."""
    try:
        with scratch(path) as temporary:
            temporary.write_bytes(content)
            commit_file(temporary, path)
    except OSError as error:
        raise DcodError(f"cannot write {path}: {error}; free space and run it again") from error


def to_json(value: Any) -> bytes:
    """Canonical JSON bytes; raises DcodError for what JSON cannot hold."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DcodError(f"the manifest can only hold JSON values: {error}") from error
    return text.encode() + b"\n"


def file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": file_size(path), "sha256": file_sha256(path)}
