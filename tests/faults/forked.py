"""Verbs in forks of one process that has imported everything and run nothing, and their faults.

A fork pays for no import. A point of a fault is the number of a file operation among those of its
kind, as Python's audit events count them, or a number of bytes: the same point in every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from host_runs import ROOT, of_xla

from dcod_jax import cli

VERBS = ("generate_traces", "prepare", "score", "train", "export", "evaluate", "drift")
for _name in (*[f"dcod_jax.{verb}.command" for verb in VERBS], "tensorboardX.event_file_writer"):
    importlib.import_module(_name)

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("open", "os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.truncate", "os.link")
_END = "\n--- changes of files:\n"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What befalls a process.

    operation: kill -9 before the at-th change of this kind (kind_of); bytes: killed by the kernel,
    whatever writes, where a file would get longer than `at`; slow: every change takes `at` seconds
    more; descriptors: `at` files can be open beyond those that are. With `clock` the time of day
    jumps by so many seconds twice a second.
    """

    kind: str = ""
    at: float = 0
    clock: float = 0
    change: str = ""


NONE = Fault()


def kind_of(change: str) -> str:
    """A change without the numbers, hashes and random letters in its names.

    How many files a checkpoint has depends on the moment, so a number among all changes is no point
    that each run has.
    """
    return re.sub(r"partial-[^/]+|[0-9a-f]{8,}|\d+", "#", change)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a verb ended: exit code, or minus the signal; what it printed; its changes of files."""

    code: int | None
    text: str
    changes: list[str]  # such as "os.rename dataset/train/manifest.json.tmp"


# ---------------------------------------------------------------- in the fork


def perform(verb: str, words: list[str], output: Connection, home: str, fault: Fault) -> None:
    """The verb's command line, as the process's own."""
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    changes: list[str] = []
    logging.getLogger().handlers.clear()  # of what was imported before the verb's own
    _arm(fault, home, changes)
    try:
        cli.run(verb, words)
    finally:
        print(_END + "\n".join(changes), flush=True)


def _arm(fault: Fault, home: str, changes: list[str]) -> None:
    left = fault.at  # changes of its kind up to the one before which it is killed

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        name = _changed(event, arguments, home) if event in _CHANGES else ""
        if name:
            changes.append(f"{event} {name}")
            if fault.kind == "slow":
                time.sleep(fault.at)
            elif fault.kind == "operation" and kind_of(changes[-1]) == fault.change:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if fault.kind == "bytes":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
    elif fault.kind == "descriptors":
        most = len(os.listdir("/proc/self/fd")) + int(fault.at)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if fault.clock:
        real, steps = time.time, (0, 1, 0, -1)
        time.time = lambda: real() + fault.clock * steps[int(2 * time.monotonic()) % 4]


def _changed(event: str, arguments: tuple[Any, ...], home: str) -> str:
    """What an audited call is about to change below home, or ""."""
    path = arguments[0]
    if event == "open" and not arguments[2] & _WRITING:
        return ""
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if name.startswith(home):
        return name.removeprefix(home)
    # shutil.rmtree names files beside the descriptor of their directory.
    return name if event != "open" and not os.path.isabs(name) and arguments[-1] >= 0 else ""


# ---------------------------------------------------------------- in the test's process


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """While the body runs, there is a process to fork; it has one device and no torch."""
    paths = [
        os.environ["PYTHONPATH"],
        *(str(ROOT / name) for name in ("", "tests", "tests/faults")),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in of_xla(1).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forkserver.ensure_running()
    try:
        yield
    finally:
        forkserver._forkserver._stop()


def run(
    verb: str,
    words: Sequence[str],
    *,
    home: Path,
    fault: Fault = NONE,
    meanwhile: Callable[[BaseProcess], object] = lambda process: None,
    timeout: float = 120,
) -> Ended:
    """The verb in a process of its own, which the fault befalls; `meanwhile` is called again and
    again."""
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)  # all that is printed has room
    arguments = (verb, list(words), writer, str(home), fault)
    process = context.Process(target=perform, args=arguments, daemon=True)
    process.start()
    writer.close()
    deadline = time.monotonic() + timeout
    try:
        while process.is_alive():
            assert time.monotonic() < deadline, f"{verb} hangs: {_printed(reader)}"
            meanwhile(process)
            process.join(0.02)
    finally:
        process.kill()
        process.join()
    text = _printed(reader)
    reader.close()
    said, _, changes = text.partition(_END)
    return Ended(process.exitcode, said, changes.splitlines())


def _printed(reader: Connection) -> str:
    os.set_blocking(reader.fileno(), False)
    parts = []
    with contextlib.suppress(BlockingIOError):  # another process may hold the pipe, too
        while part := os.read(reader.fileno(), 1 << 16):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
