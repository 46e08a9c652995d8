"""Copies of a store's files on this machine: cached for reading, mirrored for writing."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from tokenize import TokenError  # of numpy, which reads a header as Python text
from typing import Any

from dcod_jax.bounds import check, text
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, file_sha256, read_json, scratch, to_json
from dcod_jax.stores import RemotePath

log = logging.getLogger(__name__)

CACHE = "DCOD_CACHE_DIR"  # environment variable: where copies of remote files are kept


def local_copy(path: Path, *, sha256: str = "") -> pathlib.Path:
    """A local file with this content: the path itself, or its copy in the cache.

    The copy is found by sha256 where that is known, else by the object's version, so that a
    changed object is copied again. With sha256 the copy is hashed each time, and a damaged one is
    fetched anew. Raises DcodError when it cannot be fetched or has another hash.
    """
    if isinstance(path, pathlib.Path):
        return path
    with _copying(path):
        copy = _cached(sha256 or f"{path}\n{path.version()}") / path.name
        if not copy.is_file() or (sha256 and _digest(copy, _state(copy)) != sha256):
            _put(copy, path.download)
            if sha256 and (found := _digest(copy, _state(copy))) != sha256:
                copy.unlink()
                raise DcodError(
                    f"{path} is damaged: expected sha256 {sha256}, found {found}; restore it from "
                    "a good copy, or prepare (and score) the dataset again"
                )
    return copy


def content_sha256(path: Path) -> str:
    """sha256 of a file's content. The cache remembers it, so that it is read once by this machine.

    What is remembered counts as long as the file's inode, size and both times are those of then,
    or a store's object is of the same version.
    """
    state = _state(path)
    if (noted := _read_note(path)) and noted["state"] == state:
        return noted["sha256"]
    local = local_copy(path)
    found = _digest(local, _state(local))
    # A change right after another may leave the times as they are: such a file is read again.
    if path is not local or time.time() - local.stat().st_ctime > _SETTLED:
        _write_note(path, {"state": state, "sha256": found})
    return found


def changed_since_hashed(path: pathlib.Path) -> bool:
    """Whether a file is not the one whose hash this machine remembers; no content is read."""
    noted = _read_note(path)
    return noted is not None and noted["state"] != _state(path)


_SETTLED = 3.0  # seconds; the coarsest times of the file systems in use are of 2
_NOTE = {"state": text(400), "sha256": text(64)}


def _state(path: Path) -> str:
    if not isinstance(path, pathlib.Path):
        return path.version()
    now = path.stat()
    return f"{now.st_ino} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"


@functools.lru_cache(maxsize=4096)
def _digest(file: pathlib.Path, state: str) -> str:
    """The hash of a file, read once by a process as long as its state is `state`."""
    return file_sha256(file)


def _note(path: Path) -> pathlib.Path:
    where = path.resolve() if isinstance(path, pathlib.Path) else path
    return _cached(f"sha256 of {where}").with_suffix(".json")


def _read_note(path: Path) -> dict[str, str] | None:
    if not _note(path).is_file():
        return None
    noted = read_json(_note(path))
    check(noted, _NOTE, source=_note(path))
    return noted


def _write_note(path: Path, noted: dict[str, str]) -> None:
    try:
        _put(_note(path), lambda temporary: temporary.write_bytes(to_json(noted)))
    except OSError as error:
        log.info("%s: its hash is not kept in %s (%s)", path, _note(path).parent, error)


def local_directory(
    path: Path, *, wanted: Callable[[str], bool] = lambda name: True
) -> pathlib.Path:
    """A local directory with the files of `path` whose names are wanted, or the path itself."""
    if isinstance(path, pathlib.Path):
        return path
    with _copying(path):
        files = [file for file in path.rglob("*") if wanted(file.name)]
        copies = _cached("\n".join([str(path), *(f"{f} {f.version()}" for f in files)]))
        for file in files:
            copy = copies / file.relative_to(path)
            if not copy.is_file():
                _put(copy, file.download)
    return copies


def read_arrays(path: Path, *, mend: str) -> dict[str, Any]:
    """{name: array} of an .npz file; a DcodError for what is none ends in `mend`."""
    import numpy as np  # which a verb's --help does not load

    of_header = (SyntaxError, TokenError, TypeError, ValueError, MemoryError, UserWarning)
    of_zip = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    strict = warnings.catch_warnings(action="error", category=UserWarning)  # a header of Python 2
    try:
        with strict, local_copy(path).open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (*of_header, *of_zip) as error:
        raise DcodError(f"{path}: not whole, or no file of arrays ({error}); {mend}") from error


@contextlib.contextmanager
def _copying(path: RemotePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DcodError(
            f"{path} cannot be copied to this machine: {error}; see that it can be read and that "
            f"{_cached('').parent} (set {CACHE}) has room"
        ) from error


def _cached(content: str) -> pathlib.Path:
    """The directory of what this text names, in $DCOD_CACHE_DIR, else in ~/.cache/dcod_jax."""
    home = os.environ.get(CACHE) or pathlib.Path.home() / ".cache" / "dcod_jax"
    return pathlib.Path(home) / hashlib.sha256(content.encode()).hexdigest()[:32]


def _put(file: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write a file of the cache under a name of this process: others may write it as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with scratch(_cached("").parent) as directory:
        write(directory / file.name)
        os.replace(directory / file.name, file)


class Mirror:
    """A local directory whose files `send` copies to a place in a store.

    For a local path it is the directory itself and nothing is sent. It begins with those files of
    the store that `fetch` names; a file that was sent and is gone from the directory is removed
    from the store. As a context manager it sends at the end, unless the body raised.
    """

    def __init__(self, path: Path, *, fetch: tuple[str, ...] = ()):
        self.path, self._opened = path, contextlib.ExitStack()
        self._sent: dict[str, tuple[int, int]] = {}
        if isinstance(path, pathlib.Path):
            self.directory = path
            return
        self.directory = self._opened.enter_context(scratch())
        for name in fetch:
            if (path / name).is_file():
                (path / name).download(self.directory / name)
        self._sent = self._present()

    def _present(self) -> dict[str, tuple[int, int]]:
        return {
            path.relative_to(self.directory).as_posix(): (now.st_size, now.st_mtime_ns)
            for path in self.directory.rglob("*")
            if path.is_file() and (now := path.stat())
        }

    def send(self) -> None:
        """Upload every file that changed since the last time; an object is replaced whole."""
        if isinstance(self.path, pathlib.Path):
            return
        present = self._present()
        for name in sorted(present.keys() | self._sent.keys()):
            if name not in present:
                (self.path / name).unlink(missing_ok=True)
            elif present[name] != self._sent.get(name):
                (self.path / name).upload(self.directory / name)
        self._sent = present

    def close(self) -> None:
        """Send the rest and remove the local directory of a remote one."""
        self.send()
        self._opened.close()

    def __enter__(self) -> pathlib.Path:
        return self.directory

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.send()
        self._opened.close()
