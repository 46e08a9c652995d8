"""Starting several processes of one run on this machine, for tests."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def faster_compiling():
    """Options of XLA that halve the time of compiling: for one device, or what is not executed.

    The fake devices of one process can wait for each other for ever with them, and jax 0.12 does
    not know them.
    """
    known = Version(version("jaxlib")) < Version("0.11")
    return {"xla_cpu_use_fusion_emitters": False} if known else {}


def xla_flags(devices):
    """The suite's own flags, for another number of fake devices."""
    flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    more = faster_compiling().items() if devices == 1 else ()
    return " ".join([flags, *(f"--{name}={str(value).lower()}" for name, value in more)])


def launch(count, command, *, devices=1, own=()):
    """`count` processes of one run on CPU, joined over gloo; returns them."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": os.pathsep.join((os.environ["PYTHONPATH"], str(ROOT), str(ROOT / "tests"))),
    }
    where = [f"--config.hosts.coordinator={address}", f"--config.hosts.processes={count}"]
    return [
        subprocess.Popen(
            [*command, *where, f"--config.hosts.process_id={i}", *(own[i] if own else ())],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(run, *, timeout=240):
    """[(exit code, stdout, stderr)] of all processes; none may hang."""
    try:
        ends = [process.communicate(timeout=timeout) for process in run]
    finally:
        for process in run:
            process.kill()
    return [(process.returncode, *end) for process, end in zip(run, ends, strict=True)]


def succeed(run, code=0):
    ends = finish(run)
    assert [end[0] for end in ends] == [code] * len(ends), ends
    return ends


def said(end):
    """Everything that one process of finish() printed."""
    return end[1] + end[2]
