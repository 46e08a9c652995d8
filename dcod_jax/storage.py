"""Files that have to be local, files and directories that must appear whole, files that grow.

Libraries that read local files only (ArrayRecord, safetensors, GGUF, tokenizers) are given a copy
of what is in a store: `local_copy`, kept in a cache directory under its content's hash or the
object's version. For local paths every function here is the plain file operation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from dcod_jax.paths import Path, RemotePath
from dcod_jax.types import DcodError

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
