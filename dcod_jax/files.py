"""Local paths and those of a store (gs://bucket/name), and writes that appear whole.

Every path that a user gives goes through `as_path`: a local one is a pathlib.Path, and one with a
scheme is a RemotePath with the same methods. Begin reading at `as_path` and `atomic_write`.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, TypeAlias

from dcod_jax.errors import DcodError
from dcod_jax.stores import RemotePath

LARGEST = 1 << 28  # bytes of a file that is read whole
_ENDS = 1 << 16  # bytes that are read of a file to see whose it is
# The system's refusal to read what may be whole.
REFUSED = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM)
UPLOADING = ".dcod_jax-uploading"  # object in a directory whose publication has not ended


Path: TypeAlias = pathlib.Path | RemotePath
Location: TypeAlias = str | os.PathLike[str] | RemotePath  # what as_path makes a Path of


def as_path(path: Location) -> Path:
    """The path of a text: remote where it has a scheme ("gs://bucket/run"), else local."""
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
    if protocol == "file":
        return pathlib.Path(key)
    return RemotePath("gs" if protocol == "gcs" else protocol, "") / key


# What a path of a user's own begins with, and an owner on the hub is not called.
_OWN = "runs data traces datasets outputs output configs models checkpoints tmp home".split()
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
NO_HUB_ID = "it is no hub id (owner/name)"


def why_no_hub_id(name: str) -> str:
    """Why a name that is not there is not to be looked up on the hub; "" where it is."""
    file = name.endswith((".parquet", ".arrow", ".gguf", ".safetensors", ".txt", ".zip"))
    if file or not _HUB_ID.fullmatch(name) or name.split("/")[0] in _OWN:
        return NO_HUB_ID
    if as_path(name).parent.exists():
        return NO_HUB_ID
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    return ""


def near(path: Path) -> str:
    """What is there in place of a file or directory that is not."""
    home = path.parent
    if not home.is_dir():
        return f"; the directory {home} is not there either"
    names = sorted(other.name for other in home.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; {home / close[0]} is there"
    return f"; {home} holds {', '.join(names[:8]) or 'nothing'}"


def find(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, sorted by name."""
    path = as_path(pattern)
    if isinstance(path, RemotePath):
        return sorted(RemotePath(path.protocol, "").glob(path.key))
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    return sorted((path for path in found if path.is_file()), key=str)


def file_size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else path.size()


def file_sha256(path: Location) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"file": path.name, "bytes": file_size(path), "sha256": file_sha256(path)}


def to_json(value: Any) -> bytes:
    """Canonical JSON; raises DcodError for what JSON cannot hold."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:  # half a surrogate pair included
        raise DcodError(f"the manifest can only hold JSON values: {error}") from error


def from_json(content: bytes | str) -> Any:
    """The value of a JSON text; ValueError for all that is none, too deep nesting included."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep to be read") from error


def read_whole(path: Path) -> bytes:
    """The bytes of a file that is held; DcodError for one of more than LARGEST."""
    if (size := file_size(path)) > LARGEST:
        raise DcodError(f"{path} has {size:,} bytes; at most {LARGEST:,} are read")
    return path.read_bytes()


def read_json(path: Path, *, mend: str = "write it again") -> dict[str, Any]:
    """The JSON object that a file holds; a DcodError for what is none ends in `mend`."""
    try:
        found = from_json(read_whole(path))
    except ValueError as error:
        raise DcodError(f"{path} is not valid JSON ({error}); {mend}") from error
    if not isinstance(found, dict):
        raise DcodError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def check_own(path: Path, *marks: str) -> Path:
    """The path, where nothing is there yet or a file whose two ends hold all marks."""
    if not (path.exists() or (isinstance(path, pathlib.Path) and path.is_symlink())):
        return path
    seen = b""
    if path.is_file():
        with path.open("rb") as file:
            seen = file.read(_ENDS)
            file.seek(max(file_size(path) - _ENDS, 0))
            seen += file.read(_ENDS)
        if not seen or all(mark.encode() in seen for mark in marks):
            return path
    raise DcodError(
        f"{path} exists and was not written by this program (it lacks {', '.join(marks)}); it is "
        "left as it is: move it away, or set the path to another place"
    )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[pathlib.Path]:
    """Yield a local file, which becomes `path` whole when the body ends without an error."""
    if isinstance(path, RemotePath):
        with scratch() as directory:
            yield directory / path.name
            path.upload(directory / path.name)
        return
    temporary = _temporary(path)
    try:
        with naming(path):
            yield temporary
            _commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """The system's refusal of a write names no file: that of the body names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".tmp")


def _commit(temporary: pathlib.Path, final: pathlib.Path) -> None:
    _fsync(temporary)
    os.replace(temporary, final)
    _fsync(final.parent)


def _fsync(path: pathlib.Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refusals(path: Location) -> Iterator[None]:
    """The system's refusal of a write as a DcodError that names this file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise DcodError(f"cannot write {path}: {why}; {room(error)} and run it again") from error


def room(error: Exception) -> str:
    """What lets a refused write succeed, as the error's text tells."""
    return "raise the limit (ulimit -n)" if "open files" in str(error) else "free space"


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically; on a DcodError the old content is still there."""
    with refusals(path), atomic_write(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def scratch(home: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Yield a new directory in `home`, or where the system has its own; removed at the end.

    Those that killed processes of this host left there are removed, too: each process holds the
    lock of its own, which ends however the process does. Where a file system has no locks they
    stay, and so do other hosts', whose locks a shared disk may not show.
    """
    home = home or pathlib.Path(tempfile.gettempdir())
    for other in home.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _directory_lock(other, fcntl.LOCK_NB):
            remove_tree(other)
    with contextlib.ExitStack() as held:
        while True:
            path = pathlib.Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=home))
            with contextlib.suppress(OSError):
                held.enter_context(_directory_lock(path))
            if path.is_dir():  # another process may have removed it before it was locked
                break
        try:
            yield path
        finally:
            remove_tree(path)


_SCRATCH = f".dcod_jax.partial-{platform.node()}-"


@contextlib.contextmanager
def _directory_lock(path: pathlib.Path, wait: int = 0) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
        yield
    finally:
        os.close(descriptor)


def forget_unfinished(path: Path) -> None:
    """Remove what a process left that was killed while it replaced this file."""
    if isinstance(path, pathlib.Path):
        _temporary(path).unlink(missing_ok=True)


def rename(path: Path, name: Path) -> None:
    """Rename a file in its place; in a store by a copy, which appears whole."""
    if isinstance(path, RemotePath) and isinstance(name, RemotePath):
        path.copy_to(name)
        path.unlink()
    elif isinstance(path, pathlib.Path) and isinstance(name, pathlib.Path):
        os.replace(path, name)
    else:
        raise DcodError(f"{path} and {name} must be in one place")


def move_tree(path: Path, name: Path) -> None:
    """Give a directory another name in its place; in a store object by object, the last one first.

    Where an object is last written as a marker that the directory is whole, it must not outlive
    the others.
    """
    if isinstance(path, pathlib.Path):
        name.parent.mkdir(parents=True, exist_ok=True)
        rename(path, name)
        return
    for file in sorted(path.rglob("*"), key=lambda file: file.name != "commit_success.txt"):
        rename(file, name / file.relative_to(path))


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if isinstance(path, pathlib.Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    for file in list(path.rglob("*")):
        file.unlink(missing_ok=True)


def publish(temporary: Path, final: Path, *, last: str) -> None:
    """Give a finished directory its name, in place of the directory that has it now.

    Local: the name is of one of the two at every moment; `recover` mends what an interruption
    leaves where the file system cannot exchange two names. In a store the file `last`, which makes
    a directory valid, is removed first and written last; an interruption leaves a directory that
    `unfinished` recognises and that the next publish replaces.
    """
    if isinstance(temporary, pathlib.Path) and isinstance(final, pathlib.Path):
        try:
            rename(temporary, final)  # where nothing or an empty directory has the name
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _exchange(temporary, final):
                remove_tree(_old(final))
                rename(final, _old(final))
                rename(temporary, final)
            remove_tree(_old(final))
            remove_tree(temporary)
        return
    if isinstance(temporary, pathlib.Path) or isinstance(final, pathlib.Path):
        raise DcodError(f"{temporary} and {final} must be in one place")
    (final / UPLOADING).write_bytes(b"")
    (final / last).unlink(missing_ok=True)
    names = [file.relative_to(temporary) for file in temporary.rglob("*")]
    for file in list(final.rglob("*")):
        if file.name != UPLOADING and file.relative_to(final) not in names:
            file.unlink(missing_ok=True)
    for name in [*sorted(set(names) - {last}), last]:
        (temporary / name).copy_to(final / name)
    (final / UPLOADING).unlink(missing_ok=True)
    remove_tree(temporary)


def _old(final: pathlib.Path) -> pathlib.Path:
    return final.with_name(f".{final.name}.old")


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot (NFS, macOS)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def recover(final: Path) -> None:
    """Give a directory its name back that a publish without exchange was interrupted at."""
    if isinstance(final, pathlib.Path) and not final.exists() and _old(final).is_dir():
        rename(_old(final), final)


def unfinished(path: Path, *, last: str) -> bool:
    """Whether an interrupted publication left this directory, free to be replaced."""
    if isinstance(path, pathlib.Path):
        return False
    return (path / UPLOADING).is_file() and not (path / last).is_file()
