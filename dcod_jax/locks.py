"""Locks on what one process writes: a second one refuses at once, and a crash leaves none behind.

A lock is `flock` on a file, which the kernel frees however its holder ends. The file stays; its
lines name who holds or held it. Of several processes of one run the first one holds the lock. A
store has no locks: there the file is this machine's, and beside it an object names the last holder
of any machine. Who comes later takes it over, and `check_held` stops the earlier one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.files import Path, from_json
from dcod_jax.parallel import hosts
from dcod_jax.parallel.monitor import HOST
from dcod_jax.stores import RemotePath

log = logging.getLogger(__name__)
_WHO = "process {process} on {host} since {since}"


@contextlib.contextmanager
def locked(path: Path, *, what: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock of this file while the body runs.

    shared: others may hold it so, too, as readers of what nobody may write meanwhile; nothing is
    locked where the file cannot be made. Raises DcodError, which begins with `what` and names the
    holders, where another process has it.
    """
    held: list[int] = []

    def drop() -> None:
        while held:
            os.close(held.pop())

    # A forked child would hold the lock for as long as it outlives this process.
    os.register_at_fork(after_in_child=drop)
    try:
        if hosts.first():
            _acquire(_local(path), held, what=what, shared=shared)
            if isinstance(path, RemotePath) and not shared:
                _take_over(path, what)
        yield
    finally:
        if held and isinstance(path, RemotePath) and not shared and _is(_holder(path)):
            path.unlink(missing_ok=True)
        drop()


def check_held(path: Path, *, what: str) -> None:
    """Raise DcodError where another machine took the lock in a store over."""
    if isinstance(path, RemotePath) and hosts.first():
        holder = _holder(path)
        if holder and not _is(holder):
            raise DcodError(
                f"{what} was taken over by {_WHO.format(**holder)}; this process ends and leaves "
                "it to that one"
            )


def _holder(path: RemotePath) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return None


def _is(holder: dict[str, Any] | None) -> bool:
    """Whether this process is the holder."""
    return holder is not None and (holder["host"], holder["process"]) == (HOST, os.getpid())


def _take_over(path: RemotePath, what: str) -> None:
    holder = _holder(path)
    if holder and holder["host"] != HOST:  # one of this machine would have the file's lock
        log.warning(
            "%s: %s did not end in order; if it is still at work it will end at its next save",
            what,
            _WHO.format(**holder),
        )
    path.write_bytes(_line())


def _line() -> bytes:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = {"host": HOST, "process": os.getpid(), "since": now}
    return json.dumps(holder).encode() + b"\n"


def _local(path: Path) -> pathlib.Path:
    if isinstance(path, pathlib.Path):
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir()) / f"dcod_jax-{os.getuid()}-{name}.lock"


def _acquire(path: pathlib.Path, held: list[int], *, what: str, shared: bool) -> None:
    try:
        if not shared:
            path.parent.mkdir(parents=True, exist_ok=True)
        held.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if shared:
            return
        raise DcodError(f"{what}: cannot make the lock {path} ({error})") from error
    try:
        alone = _flock(held[0], fcntl.LOCK_EX)
        if alone:
            os.ftruncate(held[0], 0)  # those who held it are gone
        if not (_flock(held[0], fcntl.LOCK_SH) if shared else alone):
            raise DcodError(
                f"{what} is in use by {_holders(path) or 'another process'}; wait until it ends, "
                "or end it"
            )
        os.write(held[0], _line())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the lock is held, and names no holder
            return
        log.warning("%s: this file system has no locks (%s); start one process alone", path, error)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holders(path: pathlib.Path) -> str:
    """The processes that the file names, without those of this host that have ended."""
    found = list(filter(None, map(_parsed, path.read_bytes().splitlines())))
    found = [one for one in found if one["host"] != HOST or _runs(one["process"])]
    return ", ".join(_WHO.format(**one) for one in found)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line that a holder wrote, or None for what is none."""
    try:
        holder = from_json(line)
        return {"host": holder["host"], "process": int(holder["process"]), "since": holder["since"]}
    except (ValueError, KeyError, TypeError):
        return None


def _runs(process: int) -> bool:
    try:
        with contextlib.suppress(PermissionError):  # it is another user's
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
