r"""Completions graded: their final answers are found, and compared in worker processes.

A comparison that needs algebra runs sympy on what a model wrote, which may take forever, eat the
memory or crash. So it runs in child processes that hold nothing else: started fresh (never forked
from a process that runs jax), bounded in processor time and memory, replaced when they end. This
file is also the child's program, so at import it needs the standard library only.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.evaluate.algebra import load_algebra
from dcod_jax.evaluate.answers import Extraction, extract_answer, reference_answer
from dcod_jax.evaluate.equality import Algebra, equal

log = logging.getLogger(__name__)

RULES = 3  # raised when verdicts change: older evaluations are not gone on with
REJECTED_AS = {  # why a trace with that verdict is dropped
    "wrong": "wrong_answer",
    "no_answer": "no_answer",
    "timeout": "grading_timeout",
    "stalled": "grading_stalled",
    "error": "grading_error",
}
REASONS = ("correct", *REJECTED_AS)
MEMORY_LIMIT = 2 << 30  # bytes of address space of one worker
START_SECONDS = 60.0  # a worker imports sympy first
# A worker that is silent for this long got no processor: the verdict depends on the machine's load.
STALL_SECONDS = 120.0
STALL_FACTOR = 20.0  # and this many times its limit of processor time
AHEAD = 32  # completions read ahead for each worker


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one completion; `reason` is one of REASONS."""

    correct: bool
    reason: str
    extracted: str | None = None
    rule: str | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """The reference answer with how far a number may be off, and whether a completion was cut."""

    answer: str
    tolerance: float = 0.0
    complete: bool = True  # False: the last number of the completion is no answer


# --------------------------------------------------------------------------- worker process


class _OutOfTimeError(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


def _out_of_time(signum: int, frame: Any) -> None:
    raise _OutOfTimeError


def _verdict(request: dict[str, Any], algebra: Algebra) -> str:
    """The verdict on one request; processor time is limited, so load does not change it."""
    seconds = request["seconds"]
    # Kills this process where sympy is in a long operation of C and hears no signal.
    limit, hard = int(time.process_time() + seconds) + 2, resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        found = equal(
            request["predicted"],
            request["reference"],
            tolerance=request["tolerance"],
            algebra=algebra,
        )
        return "correct" if found else "wrong"
    except _OutOfTimeError:
        return "timeout"
    except MemoryError:
        os._exit(1)  # decided by the parent, which tries once more in a fresh process
    # Whatever sympy raises on untrusted input is a verdict on that one input, not on the run.
    except Exception:
        return "error"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(load: Callable[[], Algebra] = load_algebra) -> None:
    """Read one JSON request a line, write one verdict a line, until the input ends.

    A worker that ran out of time ends: what it left in sympy's caches is unknown.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what sympy prints must not be read as a reply
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    logging.disable(logging.CRITICAL)
    algebra = load()
    signal.signal(signal.SIGPROF, _out_of_time)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        verdict = _verdict(json.loads(line), algebra)
        print(verdict, file=replies, flush=True)
        if verdict == "timeout":
            return


# --------------------------------------------------------------------------- parent


class _Worker:
    """One child process, asked one thing at a time."""

    def __init__(self) -> None:
        program = "from dcod_jax.evaluate.grading import serve; serve()"
        paths = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # sympy's order of terms follows hashes; with a fixed seed equal inputs take equal ways.
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},
        )
        if self._reply(START_SECONDS) != "ready":
            self.close()
            raise DcodError(
                "a grading worker did not start: `python -c 'import math_verify'` shows why"
            )

    def _reply(self, seconds: float) -> str:
        """The next line; "" where the process ended or said nothing in this time."""
        output = self.process.stdout
        if output is None or not select.select([output], [], [], seconds)[0]:
            return ""
        return output.readline().decode().strip()

    def ask(self, request: dict[str, Any]) -> str:
        """The verdict, or "crashed" where the process ended for another reason than its time."""
        # What is no Unicode becomes "?".
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        wall = max(STALL_SECONDS, STALL_FACTOR * request["seconds"])
        with contextlib.suppress(BrokenPipeError):  # gone: its output ends, too
            if self.process.stdin is not None:
                self.process.stdin.write(line)
        if reply := self._reply(wall):
            return reply
        if self.process.poll() is None and not self._ends():
            log.warning(
                "grading: no verdict in %.0f s on %.60r, which may take %g s of processor time; it "
                "is dropped as grading_stalled, and a less loaded machine may decide otherwise",
                wall,
                request["predicted"],
                request["seconds"],
            )
            return "stalled"
        return "timeout" if self.process.returncode == -signal.SIGXCPU else "crashed"

    def _ends(self) -> bool:
        """Whether the process ends by itself; its output ends a moment earlier."""
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Grader:
    """Worker processes that stay alive between answers; a context manager.

    `timeout` is in seconds of processor time for one comparison.
    """

    def __init__(self, *, timeout: int | float, workers: int = 0) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout={timeout} must be above 0 seconds")
        self.timeout = timeout
        self.count = workers or os.cpu_count() or 1
        self.workers: list[_Worker] = []  # alive and idle; started when an answer needs one
        self.threads = concurrent.futures.ThreadPoolExecutor(self.count, "grading")

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        while self.workers:
            self.workers.pop().close()

    def stream(
        self, items: Iterable[tuple[Any, str, str | Expected | None]]
    ) -> Iterator[tuple[Any, Any]]:
        """(payload, completion, answer) -> (payload, Grade), in order, lazily.

        An item whose answer is None passes with None in place of a grade.
        """
        window: collections.deque[tuple[Any, concurrent.futures.Future[Grade] | Grade | None]]
        window = collections.deque()
        for payload, completion, answer in items:
            window.append((payload, self._begin(completion, answer)))
            while window and (len(window) > AHEAD * self.count or _is_known(window[0][1])):
                yield _finished(*window.popleft())
        while window:
            yield _finished(*window.popleft())

    def _begin(
        self, completion: str, answer: str | Expected | None
    ) -> concurrent.futures.Future[Grade] | Grade | None:
        """What can be decided without algebra is decided here."""
        if answer is None:
            return None
        expected = Expected(answer) if isinstance(answer, str) else answer
        found = extract_answer(completion, complete=expected.complete)
        if found is None:
            return Grade(False, "no_answer")
        reference = reference_answer(expected.answer)
        plain = equal(found.answer, reference, tolerance=expected.tolerance)
        if plain is not None:
            return Grade(plain, "correct" if plain else "wrong", found.answer, found.rule)
        return self.threads.submit(self._compare, found, reference, expected.tolerance)

    def _compare(self, found: Extraction, reference: str, tolerance: float) -> Grade:
        request = {
            "predicted": found.answer,
            "reference": reference,
            "tolerance": tolerance,
            "seconds": self.timeout,
        }
        # Where a used worker crashes, a fresh one decides: what came before has no part in it.
        try:
            worker, fresh = self.workers.pop(), False
        except IndexError:
            worker, fresh = _Worker(), True
        verdict = worker.ask(request)
        if verdict == "crashed" and not fresh:
            worker.close()
            worker = _Worker()
            verdict = worker.ask(request)
        if verdict in ("correct", "wrong", "error"):
            self.workers.append(worker)
        else:
            worker.close()
        reason = "error" if verdict == "crashed" else verdict
        return Grade(reason == "correct", reason, found.answer, found.rule)


def _is_known(graded: concurrent.futures.Future[Grade] | Grade | None) -> bool:
    return not isinstance(graded, concurrent.futures.Future) or graded.done()


def _finished(
    payload: Any, graded: concurrent.futures.Future[Grade] | Grade | None
) -> tuple[Any, Grade | None]:
    waits = isinstance(graded, concurrent.futures.Future)
    return payload, graded.result() if waits else graded


def grade(
    pairs: Iterable[tuple[str, str | Expected]], *, timeout: int | float = 5.0, workers: int = 0
) -> list[Grade]:
    """The grade of each (completion, reference answer), in order; `timeout` seconds each."""
    with Grader(timeout=timeout, workers=workers) as grader:
        return [g for _, g in grader.stream((None, text, answer) for text, answer in pairs)]
