"""Where a path leads: a file of this machine, or an object in a store (gs://bucket/name).

Every path that a user gives goes through `as_path`. A local one is a pathlib.Path and behaves as
ever. One with a scheme is a RemotePath with the same methods, over fsspec: gs:// with the extra
`gcs`, memory:// for tests, and whatever else fsspec has a driver for. A store has no rename, no
append and no directories, so what must be whole is written so:

    an object appears, or is replaced, when the write of it ends;
    in a directory the file that makes it valid comes last (storage.publish);
    a growing file is kept on this machine and sent whole (storage.Mirror).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from dcod_jax.types import DcodError


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
