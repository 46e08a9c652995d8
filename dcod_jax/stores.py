"""Paths in a store (gs://bucket/name), with the part of pathlib.Path's interface that is used."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dcod_jax.errors import DcodError


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """protocol://key, with the part of pathlib.Path's interface that the package uses.

    Every error of the store is raised as OSError (FileNotFoundError for a missing object) with the
    path in its message. It is no os.PathLike: a library that wants a local file refuses it. Why it
    is not `etils.epath`: docs/decisions.md.
    """

    protocol: str
    key: str  # bucket/name, without slashes at its ends

    def __str__(self) -> str:
        return f"{self.protocol}://{self.key}"

    def __truediv__(self, name: str) -> RemotePath:
        return self._of("/".join(p for p in f"{self.key}/{name}".split("/") if p not in ("", ".")))

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return pathlib.PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.key).suffix

    @property
    def parent(self) -> RemotePath:
        return self._of(self.key.rpartition("/")[0] or self.key)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return self._run("look at", lambda store, path: store.exists(path))

    def is_file(self) -> bool:
        return self._run("look at", lambda store, path: store.isfile(path))

    def is_dir(self) -> bool:
        return self._run("look at", lambda store, path: store.isdir(path))

    def size(self) -> int:
        return int(self._run("look at", lambda store, path: store.info(path)["size"]))

    def version(self) -> str:
        """A text that changes when the object does."""
        return str(self._run("look at", lambda store, path: store.ukey(path)))

    def iterdir(self) -> Iterator[RemotePath]:
        found = self._run("list", lambda store, path: store.ls(path, detail=False))
        yield from sorted(path for path in map(self._of, found) if path != self)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Objects below this directory whose name matches; a store has no directories."""
        found = sorted(map(self._of, self._run("list", lambda store, path: store.find(path))))
        yield from (path for path in found if fnmatch.fnmatchcase(path.name, pattern))

    def checksums(self) -> dict[str, list[int | str]]:
        """{name below this directory: [bytes, the store's own checksums]} of the objects."""
        found = self._run("list", lambda store, path: store.find(path, detail=True))
        kinds = ("crc32c", "md5Hash")  # a file that ends with its own CRC has that of any other
        return {
            self._of(key).relative_to(self): [
                int(info["size"]),
                " ".join(info[kind] for kind in kinds if kind in info),
            ]
            for key, info in found.items()
        }

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        yield from sorted(map(self._of, (self / pattern)._run("list", lambda s, p: s.glob(p))))

    def open(self, mode: str = "r", **options: Any) -> Any:
        file = self._run("open", lambda store, path: store.open(path, mode, **options))
        return io.BufferedReader(file) if mode == "rb" else file  # fsspec's takes no readline(size)

    def read_bytes(self) -> bytes:
        return self._run("read", lambda store, path: store.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> int:
        self._run("write", lambda store, path: store.pipe_file(path, content))
        return len(content)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, file: pathlib.Path) -> None:
        """Take a local file's content; the object is the old one until all of it is there."""
        self._run("write", lambda store, path: store.put_file(str(file), path))
        if (size := self.size()) != file.stat().st_size:
            raise OSError(f"{self} has {size} bytes after {file.stat().st_size} were sent")

    def download(self, file: pathlib.Path) -> None:
        self._run("read", lambda store, path: store.get_file(path, str(file)))

    def copy_to(self, other: RemotePath) -> None:
        """Copy inside the store; the content does not pass through this machine."""
        self._run("copy", lambda store, path: store.cp_file(path, str(other)))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a directory exists when an object is in it."""

    def unlink(self, *, missing_ok: bool = False) -> None:
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._run("remove", lambda store, path: store.rm_file(path))

    @property
    def filesystem(self) -> Any:
        return _filesystem(self.protocol)

    def _of(self, key: str) -> RemotePath:
        return dataclasses.replace(self, key=key.strip("/"))

    def relative_to(self, directory: RemotePath) -> str:
        return self.key.removeprefix(directory.key).strip("/")

    def _run(self, verb: str, function: Callable[[Any, str], Any]) -> Any:
        """function(driver, own path); the driver's errors become OSErrors that name the path."""
        store = self.filesystem
        try:
            return function(store, str(self))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: no such object") from error
        except _driver_errors(self.protocol) as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise OSError(f"cannot {verb} {self}: {text}") from error


@functools.cache
def _filesystem(protocol: str) -> Any:
    import fsspec

    try:
        # Other processes write too: a listing must be of now.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = (
            "the extra gcs: pip install '.[gcs]' in the checkout"
            if protocol == "gs"
            else "its driver"
        )
        raise DcodError(f"{protocol}:// paths need {extra} ({error})") from error


@functools.cache
def _driver_errors(protocol: str) -> tuple[type[BaseException], ...]:
    if protocol != "gs":
        return (OSError,)
    import aiohttp
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, TimeoutError, HttpError, aiohttp.ClientError, GoogleAuthError)
