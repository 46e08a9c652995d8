"""Starting several processes of one run on this machine, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from forks import Started
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


EMITTERS = "xla_cpu_use_fusion_emitters"  # which jax 0.12 has no switch for


def faster_compiling() -> bool:
    """Whether XLA can do without its emitters of fusions, which take half of its time."""
    return Version(version("jaxlib")) < Version("0.11")


def of_xla(devices: int) -> dict[str, str]:
    """The suite's environment of XLA in a process of so many fake devices.

    A device that waits for the others holds a thread of a pool of NPROC, or of `devices` where
    those are more: with few of them a kernel finds none, and all devices wait for ever. On a
    machine with other work a device may come later than XLA waits for it by default (40 s).
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=400"
    if faster_compiling():
        flags += f" --{EMITTERS}=false"
    return {"XLA_FLAGS": flags, "NPROC": str(64 if devices > 1 else os.cpu_count())}


def launch(count, command, *, devices=1, own=()):
    """`count` forks of one run on CPU, joined over gloo, as Python runs `command`."""
    address = f"127.0.0.1:{free_port()}"
    paths = os.pathsep.join((os.environ["PYTHONPATH"], str(ROOT), str(ROOT / "tests")))
    environment = os.environ | of_xla(devices) | {"PYTHONPATH": paths}
    where = [f"--config.hosts.coordinator={address}", f"--config.hosts.processes={count}"]
    return [
        Started(
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
