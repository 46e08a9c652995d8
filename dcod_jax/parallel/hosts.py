"""Several processes as one run: joining, agreement, and stopping together.

Every process executes the same command. `session` joins them through `jax.distributed` and starts
a monitor, which ends a process whose peer is lost, stuck or ended. With one process every function
here returns at once. `exchange` and `barrier` use the coordinator's key-value store, not a device;
JAX's preemption service makes all processes see a SIGTERM at the same step. See docs/hosts.md.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import glob
import importlib.util
import json
import logging
import math
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax._src import distributed  # the key-value store's client has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcod_jax.errors import EXIT_INTERRUPTED, DcodError
from dcod_jax.files import Location, as_path
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.parallel.monitor import ExitReporter, Monitor, Peer

log = logging.getLogger(__name__)

NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the preemption service's own key

# This process's membership; jax.distributed, too, has one for each process.
_joined: list[Monitor] = []
_alone = contextvars.ContextVar("alone", default=False)


# ---------------------------------------------------------------- joining and leaving


@contextlib.contextmanager
def session(settings: Any, *, notices: bool) -> Iterator[None]:
    """Be one process of the run that config.hosts describes while the body runs.

    With `notices` SIGTERM goes to JAX's preemption service, and the body must ask `interruption`;
    otherwise it ends this process with EXIT_INTERRUPTED, and the others follow. An error in the
    body ends the process here; the others are told. Raises DcodError when it cannot join.
    """
    if not _has_peers(settings):
        yield
        return
    reporter = ExitReporter()
    _initialize(settings, reporter, notices=notices)
    if jax.process_count() == 1:
        reporter.close()
        yield
        return
    monitor = Monitor(
        distributed.global_state.client,
        process=jax.process_index(),
        processes=jax.process_count(),
        coordinator=distributed.global_state.coordinator_address or settings.coordinator,
        reporter=reporter,
        heartbeat=settings.heartbeat,
        timeout=settings.timeout,
    )
    _joined.append(monitor)
    try:
        barrier("joining")
        monitor.beat()  # every process knows all hosts before one can be lost
        # Without the preemption service SIGTERM ends this process, and the others follow.
        handled = () if notices else (signal.SIGTERM,)
        with _quiet(), _handling(_terminate, *handled):
            yield
        _leave(monitor)
    except SystemExit as error:
        if error.code != EXIT_INTERRUPTED or not monitor.agreed:
            monitor.fail(error, code=error.code if isinstance(error.code, int) else 1)
        _leave(monitor)
        raise
    except BaseException as error:
        monitor.fail(error, code=1)
    finally:
        _joined.remove(monitor)


def refuse_peers(settings: Any, verb: str) -> None:
    """Raise DcodError where several processes are asked for in a verb that knows of one only."""
    if settings.coordinator and settings.processes > 1:
        raise DcodError(
            f"{verb} runs in one process, hosts.processes={settings.processes}; start it on one "
            f"host: python -m dcod_jax.{verb} --config ... --config.hosts.cluster=none"
        )


def _has_peers(settings: Any) -> bool:
    if settings.coordinator:
        return settings.processes > 1
    if settings.cluster != "auto":
        return settings.cluster != "none"
    # On a machine with TPU chips that JAX will use.
    platforms = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "tpu" not in platforms:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _initialize(settings: Any, reporter: ExitReporter, *, notices: bool) -> None:
    jax.config.update("jax_enable_preemption_service", notices)
    explicit = bool(settings.coordinator)
    places: dict[str, Any] = {"cluster_detection_method": "deactivate"}
    if explicit:
        places |= {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.processes,
            "process_id": settings.process_id,
        }
    else:
        # A TPU's own description is found without a name; the other clusters are asked for.
        found = settings.cluster if settings.cluster not in ("auto", "tpu") else None
        places["cluster_detection_method"] = found
    patience = f"hosts.connect_timeout={settings.connect_timeout:g} s"
    state = f"waiting {patience} for {settings.processes or 'all'} processes to join"
    own = max(settings.process_id, 0)
    reporter.update(own, state, settings.coordinator, first=Peer(), joining=True)
    try:
        jax.distributed.initialize(
            **places,
            initialization_timeout=int(settings.connect_timeout),
            # Later than the monitor's, whose message names the process and what it was doing.
            heartbeat_timeout_seconds=int(2 * settings.heartbeat) + 30,
            shutdown_timeout_seconds=int(settings.heartbeat),
        )
    except (RuntimeError, ValueError) as error:
        reporter.close()
        if not explicit and settings.cluster == "auto" and "coordinator_address" in str(error):
            return  # TPU chips, and nothing that knows of other hosts
        text = " ".join(str(error).split())[:600]
        raise DcodError(
            f"this process could not find or join the others ({text}): set hosts.coordinator, "
            "hosts.processes and hosts.process_id, and see that the port can be reached"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Process 0 speaks for all; errors of every process go to its own stderr."""
    if first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def _leave(monitor: Monitor) -> None:
    barrier("the end of the run")
    monitor.close()
    jax.distributed.shutdown()


# ---------------------------------------------------------------- who and what


def first() -> bool:
    """Whether this process writes the files and the log that the run has once."""
    return not _joined or _joined[0].process == 0


def process_index() -> int | None:
    """This process's number in a run of several; None where it is the only one."""
    return _joined[0].process if _joined else None


def count() -> int:
    """How many processes the run has."""
    return jax.process_count() if _joined else 1


def check_joined() -> None:
    """Raise DcodError where JAX knows several processes and this one did not join them."""
    if jax.process_count() > 1 and not _joined:
        raise DcodError(
            f"JAX sees {jax.process_count()} processes, but this one did not join them: set "
            "hosts.cluster=auto, or hosts.coordinator, hosts.processes and hosts.process_id"
        )


def doing(what: str, *, waiting: bool = False) -> None:
    """Report what this process begins; waiting: it waits for the others, in a collective."""
    for monitor in _joined:
        monitor.doing(what, waiting=waiting)


def moved() -> None:
    """Report progress; a run without any for hosts.timeout counts as stuck."""
    for monitor in _joined:
        monitor.moved()


def barrier(name: str) -> None:
    """Return when every process has called it; a missing one is named after hosts.timeout."""
    for monitor in _joined:
        monitor.barrier(name)


def exchange(name: str, value: Any) -> list[Any]:
    """Every process's JSON value, in the order of the processes; all must call it."""
    if not _joined:
        return [value]
    return [json.loads(text) for text in _joined[0].exchange(name, json.dumps(value))]


def from_first(name: str, find: Callable[[], Any]) -> Any:
    """What process 0 finds; it alone looks. All must call it, but within `alone`."""
    if not _joined or _alone.get():
        return find()
    return exchange(name, find() if first() else None)[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process looks for itself, because the others do something else."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def agree(name: str, values: dict[str, Any]) -> None:
    """Raise DcodError where a process has other values; it names the process and the keys."""
    everyone = exchange(f"compare {name}", values)
    for process, other in enumerate(everyone):
        wrong = [
            f"\n  {key}: {everyone[0].get(key)!r} on process 0, {other.get(key)!r} on process "
            f"{process}"
            for key in sorted(everyone[0] | other)
            if everyone[0].get(key) != other.get(key)
        ]
        if wrong:
            raise DcodError(
                f"process {process} was started with another {name}:{''.join(wrong)}\n"
                "start the same command on every host"
            )


def check_shared(directory: Location) -> None:
    """Raise DcodError for a directory that not every process sees: process 0 writes most files."""
    if not _joined:
        return
    directory = as_path(directory)
    name = exchange("name the test file", f".seen-{uuid.uuid4().hex[:8]}")[0]
    if first():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("")
    barrier(f"writing to {directory}")
    seen = exchange("see the test file", (directory / name).exists())
    if first():
        (directory / name).unlink()
    blind = [str(process) for process, found in enumerate(seen) if not found]
    if blind:
        raise DcodError(
            f"process {', '.join(blind)} does not see what process 0 writes to "
            f"{directory.resolve()}; put run_dir and data.dataset on storage that all hosts share "
            "(NFS, a mounted bucket)"
        )


def share(config: Any) -> tuple[Mesh, int, int]:
    """(mesh, i, n): work on this mesh on every n-th piece from i on.

    Where a model in the pieces of mesh.fsdp, expert, context and tensor fits on one host's devices,
    each process works alone on its share; otherwise all work on everything together, as process 0
    of 1.
    """
    check_joined()
    sizes = config.mesh.to_dict()
    split = [sizes[axis] for axis in ("fsdp", "expert", "context", "tensor")]
    pieces = math.prod(split)
    if not _joined or min(split) < 1 or jax.local_device_count() % pieces:
        return make_mesh(**sizes), 0, 1
    own = make_mesh(**sizes | {"data": -1, "slices": -1}, devices=jax.local_devices())
    return own, jax.process_index(), jax.process_count()


# ---------------------------------------------------------------- stopping together


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step that says whether a signal asks the run to save and end.

    One process: SIGTERM or SIGINT came; a second one ends at once. Many: a SIGTERM (a maintenance
    notice) or SIGINT that any of them got; the answer is yes on all of them at the same step.
    """
    if _joined:
        # Ctrl-C becomes the SIGTERM that the preemption service listens to.
        with _handling(lambda *_: os.kill(os.getpid(), signal.SIGTERM), signal.SIGINT):
            yield _notice_reached
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.info("%s: saving after this step", signal.Signals(number).name)

    with _handling(note, signal.SIGTERM, signal.SIGINT):
        yield lambda step: bool(received)


def _notice_reached(step: int) -> bool:
    # Orbax asks the service with the same number when it saves, so it must be the train step.
    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached:
        _joined[0].agreed = True
        log.info("step %d: a process was told to stop; all save and end here", step)
    return reached


def stop_if_noticed() -> None:
    """Exit with 75 between two pieces of work where a notice came too late for the last loop."""
    for monitor in _joined:
        if exchange("look for a notice", monitor.read(NOTICE) if first() else "")[0]:
            monitor.agreed = True
            log.info("a process was told to stop; the same command goes on")
            raise SystemExit(EXIT_INTERRUPTED)


def release_memory() -> None:
    """Return what this process has freed to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
