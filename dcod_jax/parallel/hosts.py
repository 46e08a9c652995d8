"""Many processes as one run: joining, agreement, and an end that names who is missing.

Every process of a run executes the same command. `session` joins them through `jax.distributed`
and starts a watch: each process writes a sign of life and what it is doing into the coordinator's
key-value store, reads the others', and ends itself with a message where one is lost, stuck or
ended, because a collective waits for a lost process for ever. Alone (one process), every function
here returns at once. docs/hosts.md describes it for the user.

What must be the same on all processes is agreed on without a device: `exchange` (every process's
text to every process), `barrier`, and for SIGTERM JAX's preemption service, which makes all
processes see the notice at the same step.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the key-value store's client has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcod_jax.errors import EXIT_INTERRUPTED, DcodError
from dcod_jax.files import Location, as_path
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.parallel.watch import Companion, Watch, unheard

log = logging.getLogger(__name__)

NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the preemption service's own key

# The membership of this process, which jax.distributed holds once for a process as well.
_joined: list[Watch] = []


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
    companion = Companion()
    _initialize(settings, companion, notices=notices)
    if jax.process_count() == 1:
        companion.farewell()
        yield
        return
    watch = Watch(
        distributed.global_state.client,
        process=jax.process_index(),
        processes=jax.process_count(),
        coordinator=distributed.global_state.coordinator_address or settings.coordinator,
        companion=companion,
        heartbeat=settings.heartbeat,
        timeout=settings.timeout,
    )
    _joined.append(watch)
    try:
        barrier("joining")
        watch.greet()
        with _quiet(), _terminable(notices=notices):
            yield
        _leave(watch)
    except SystemExit as error:
        if error.code != EXIT_INTERRUPTED or not watch.agreed:
            watch.fail(error, code=error.code if isinstance(error.code, int) else 1)
        _leave(watch)
        raise
    except BaseException as error:
        watch.fail(error, code=1)
    finally:
        _joined.remove(watch)


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
    return settings.cluster not in ("none", "auto") or (settings.cluster == "auto" and _on_tpu())


def _on_tpu() -> bool:
    """Whether this machine has TPU chips that JAX is going to use."""
    platforms = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "tpu" not in platforms:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _initialize(settings: Any, companion: Companion, *, notices: bool) -> None:
    jax.config.update("jax_cpu_collectives_implementation", settings.collectives)
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
    companion.tell(own, state, settings.coordinator, first=unheard(0.0), joining=True)
    try:
        jax.distributed.initialize(
            **places,
            initialization_timeout=int(settings.connect_timeout),
            # Later than the watch, whose message names the process and what it was doing.
            heartbeat_timeout_seconds=int(2 * settings.heartbeat) + 30,
            shutdown_timeout_seconds=int(settings.heartbeat),
        )
    except (RuntimeError, ValueError) as error:
        companion.farewell()
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


@contextlib.contextmanager
def _terminable(*, notices: bool) -> Iterator[None]:
    if notices:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(watch: Watch) -> None:
    barrier("the end of the run")
    watch.close()
    jax.distributed.shutdown()


# ---------------------------------------------------------------- who and what


def first() -> bool:
    """Whether this process writes the files and the log that the run has once."""
    return not _joined or _joined[0].process == 0


def process_index() -> int | None:
    """This process's number in a run of several; None where it is the only one."""
    return _joined[0].process if _joined else None


def check_joined() -> None:
    """Refuse to compute in a process that JAX knows to be one of several and that did not join."""
    if jax.process_count() > 1 and not _joined:
        raise DcodError(
            f"JAX sees {jax.process_count()} processes, but this one did not join them: set "
            "hosts.cluster=auto, or hosts.coordinator, hosts.processes and hosts.process_id"
        )


def doing(what: str, *, waiting: bool = False) -> None:
    """Tell the others what this process begins; `waiting`: for all processes, in a collective."""
    for watch in _joined:
        watch.doing(what, waiting=waiting)


def moved() -> None:
    """The work at hand got on: no stall, however long it takes altogether."""
    for watch in _joined:
        watch.moved()


def barrier(name: str) -> None:
    """Return when every process is here; a missing one is named after hosts.timeout."""
    for watch in _joined:
        watch.barrier(name)


def exchange(name: str, text: str) -> list[str]:
    """Every process's text, in the order of the processes; all must call it."""
    return _joined[0].exchange(name, text) if _joined else [text]


def agree(name: str, values: dict[str, Any]) -> None:
    """Refuse to go on where a process has other values; DcodError names it and the keys."""
    everyone = exchange(f"compare {name}", json.dumps(values, sort_keys=True))
    told = json.loads(everyone[0])
    for process, text in enumerate(everyone):
        other = json.loads(text)
        wrong = [
            f"{key}: {told.get(key)!r} on process 0, {other.get(key)!r} on process {process}"
            for key in sorted(told | other)
            if told.get(key) != other.get(key)
        ]
        if wrong:
            raise DcodError(
                f"process {process} was started with another {name}:\n  "
                + "\n  ".join(wrong)
                + "\nstart the same command on every host"
            )


def check_shared(directory: Location) -> None:
    """Refuse a directory that not every process sees: process 0 alone writes most files there."""
    if not _joined:
        return
    directory = as_path(directory)
    name = exchange("name the test file", f".seen-{uuid.uuid4().hex[:8]}")[0]
    if first():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("")
    barrier(f"writing to {directory}")
    seen = exchange("see the test file", str(int((directory / name).exists())))
    if first():
        (directory / name).unlink()
    blind = [str(process) for process, text in enumerate(seen) if text == "0"]
    if blind:
        raise DcodError(
            f"process {', '.join(blind)} does not see what process 0 writes to "
            f"{directory.resolve()}; put run_dir and data.dataset on storage that all hosts share "
            "(NFS, a mounted bucket)"
        )


def share(config: Any) -> tuple[Mesh, int, int]:
    """(mesh, i, n): work on this mesh on every n-th piece from i on.

    Where a model of mesh.fsdp * mesh.context * mesh.tensor pieces fits on one host's devices, each
    process works alone on its share; otherwise all work on everything together, as process 0 of 1.
    """
    check_joined()
    sizes = config.mesh.to_dict()
    pieces = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
    if not _joined or pieces < 1 or jax.local_device_count() % pieces:
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
        with _forwarded():
            yield _notice_reached
        return
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.info("%s: saving after this step", signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _forwarded() -> Iterator[None]:
    """Ctrl-C becomes the SIGTERM that the preemption service listens to."""
    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _notice_reached(step: int) -> bool:
    # Orbax asks the service with the same number when it saves, so it must be the train step.
    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached:
        _joined[0].agreed = True
        log.info("step %d: a process was told to stop; all save and end here", step)
    return reached


def stop_if_noticed() -> None:
    """Between two pieces of work: end (75) where a notice came too late for the last loop."""
    for watch in _joined:
        if exchange("look for a notice", watch.read(NOTICE) if first() else "")[0]:
            watch.agreed = True
            log.info("a process was told to stop; the same command goes on")
            raise SystemExit(EXIT_INTERRUPTED)
