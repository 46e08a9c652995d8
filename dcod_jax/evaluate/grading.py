r"""Completions graded: their final answers compared by math-verify in worker processes.

math-verify needs the main thread of a process (`signal.alarm`) and runs sympy on what a model
wrote, which may take forever, eat the memory or crash. So comparisons run in child processes
that hold nothing else: started fresh (never forked from a process that runs jax), bounded in
memory, given one time limit per answer, killed and replaced when stuck. This file is also the
child's program, so at import it needs the standard library only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from dcod_jax.evaluate.answers import (
    MAX_ANSWER_CHARS,
    Extraction,
    compare_plain,
    extract_answer,
    reference_answer,
)

REASONS = ("correct", "wrong", "no_answer", "timeout", "error")
REJECTED_AS = {  # why a trace with that verdict is dropped
    "wrong": "wrong_answer",
    "no_answer": "no_answer",
    "timeout": "grading_timeout",
    "error": "grading_error",
}
MEMORY_LIMIT = 2 << 30  # bytes of address space of one worker
QUEUE_DEPTH = 8  # requests sent ahead to one worker: together below a pipe's 64 KiB, never blocking
START_SECONDS = 60.0  # a worker imports sympy first
GRACE_SECONDS = 1.0  # between the worker's own alarm and the kill
ORPHAN_SECONDS = 30.0  # after its time limit a worker ends even if nobody kills it


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one completion; `reason` is one of REASONS."""

    correct: bool
    reason: str
    extracted: str | None = None
    rule: str | None = None


def _compare_algebra(predicted: str, reference: str, *, parse: Callable, verify: Callable) -> bool:
    """Whether math-verify holds the two for equal; raises what sympy raises."""

    def parsed(text: str) -> list[Any]:
        text = re.sub(r"(?<!\\)\$", "", text).strip()
        return parse(f"$\\boxed{{{text}}}$", parsing_timeout=None)

    return verify(parsed(reference), parsed(predicted), timeout_seconds=None)


# --------------------------------------------------------------------------- worker process


class _OutOfTimeError(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


def _on_alarm(signum: int, frame: Any) -> None:
    raise _OutOfTimeError


def _answer_request(request: dict[str, Any], *, parse: Callable, verify: Callable) -> str:
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    # Ends this process from a C thread, should the parent that would kill it be gone.
    faulthandler.dump_traceback_later(request["timeout"] + ORPHAN_SECONDS, exit=True)
    try:
        equal = _compare_algebra(
            request["predicted"], request["reference"], parse=parse, verify=verify
        )
        return "correct" if equal else "wrong"
    except _OutOfTimeError:
        return "timeout"
    # Whatever sympy raises on untrusted input is a verdict on that one input, not on the run.
    except (Exception, RecursionError, MemoryError):
        return "error"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _worker_main() -> None:
    """Read one JSON request a line, write one JSON verdict a line, until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what sympy prints must not be read as a reply
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    signal.signal(signal.SIGALRM, _on_alarm)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        verdict = _answer_request(json.loads(line), parse=parse, verify=verify)
        print(verdict, file=replies, flush=True)


@dataclasses.dataclass
class _Item:
    """One comparison on its way; `verdict` is set when it is known."""

    payload: Any
    extraction: Extraction | None = None
    reference: str = ""
    graded: bool = True
    verdict: str | None = None
    crashes: int = 0

    def grade(self) -> Grade | None:
        if not self.graded or self.verdict is None:
            return None
        found = self.extraction
        return Grade(
            self.verdict == "correct",
            self.verdict,
            found.answer if found else None,
            found.rule if found else None,
        )


class _Worker:
    """One child process: its pipes and the requests it has not answered, oldest first."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "from dcod_jax.evaluate.grading import _worker_main; _worker_main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self.pending: collections.deque[_Item] = collections.deque()
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self.buffer = b""

    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """(its input, its output)."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a grading worker was started without pipes")
        return stdin, stdout

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in self.pipes():
            pipe.close()


class Grader:
    """Worker processes that stay alive between answers; a context manager."""

    def __init__(self, *, timeout: int | float, workers: int = 0) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout={timeout} must be above 0 seconds")
        self.timeout = timeout
        self.count = workers or os.cpu_count() or 1
        self.workers: list[_Worker] = []  # started when the first answer needs one
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []
        self.selector.close()

    def stream(self, items: Iterable[tuple[Any, str, str | None]]) -> Iterator[tuple[Any, Any]]:
        """(payload, completion, answer) -> (payload, Grade), in order, lazily.

        An item whose answer is None passes with None in place of a grade.
        """
        window: collections.deque[_Item] = collections.deque()
        waiting: collections.deque[_Item] = collections.deque()  # in the window, not yet sent
        source = iter(items)
        limit = self.count * QUEUE_DEPTH * 4
        ended = False
        while window or not ended:
            while not ended and len(window) < limit:
                entry = next(source, None)
                if entry is None:
                    ended = True
                    break
                item = _prejudge(*entry)
                window.append(item)
                if item.graded and item.verdict is None:
                    waiting.append(item)
                    self._turn(waiting, block=False)
            while window and (not window[0].graded or window[0].verdict is not None):
                done = window.popleft()
                yield done.payload, done.grade()
            if window and (ended or len(window) >= limit):
                self._turn(waiting, block=True)

    def _turn(self, waiting: collections.deque[_Item], *, block: bool) -> None:
        """Send what can be sent, read what has come, replace who is stuck or gone."""
        while len(self.workers) < self.count and waiting:
            self._start()
            if len(self.workers) * QUEUE_DEPTH >= len(waiting):
                break
        for worker in sorted(self.workers, key=lambda w: len(w.pending)):
            while waiting and worker.ready and len(worker.pending) < QUEUE_DEPTH:
                self._send(worker, waiting.popleft())
        busy = [w for w in self.workers if w.pending or not w.ready]
        if not busy:
            return
        wait = max(0.0, min(w.deadline for w in busy) - time.monotonic()) if block else 0.0
        for key, _ in self.selector.select(wait):
            self._receive(key.data, waiting)
        now = time.monotonic()
        for worker in [w for w in self.workers if (w.pending or not w.ready) and w.deadline < now]:
            if worker.pending:
                worker.pending.popleft().verdict = "timeout"
            self._replace(worker, waiting)

    def _start(self) -> None:
        worker = _Worker()
        self.workers.append(worker)
        self.selector.register(worker.pipes()[1], selectors.EVENT_READ, worker)

    def _send(self, worker: _Worker, item: _Item) -> None:
        found = item.extraction
        request = {
            "predicted": found.answer if found else "",
            "reference": item.reference,
            "timeout": self.timeout,
        }
        # At most 4 bytes a character; what is no Unicode becomes "?".
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if not worker.pending:
            worker.deadline = time.monotonic() + self.timeout + GRACE_SECONDS
        worker.pending.append(item)
        with contextlib.suppress(BrokenPipeError):  # gone: its output ends too, _receive sees it
            worker.pipes()[0].write(line)

    def _receive(self, worker: _Worker, waiting: collections.deque[_Item]) -> None:
        data = os.read(worker.pipes()[1].fileno(), 1 << 16)
        if not data:
            if worker.pending:  # the head was at work when it died: once more, then it is to blame
                worker.pending[0].crashes += 1
                if worker.pending[0].crashes > 1:
                    worker.pending.popleft().verdict = "error"
            self._replace(worker, waiting)
            return
        *lines, worker.buffer = (worker.buffer + data).split(b"\n")
        for line in lines:
            if not worker.ready:
                worker.ready = line == b"ready"
                continue
            worker.pending.popleft().verdict = line.decode()
        worker.deadline = time.monotonic() + self.timeout + GRACE_SECONDS

    def _replace(self, worker: _Worker, waiting: collections.deque[_Item]) -> None:
        """End a worker; what it had not begun goes to the front of the queue."""
        if not worker.ready:
            raise RuntimeError(
                "a grading worker did not start: `python -c 'import math_verify'` shows why"
            )
        self.selector.unregister(worker.pipes()[1])
        self.workers.remove(worker)
        worker.close()
        waiting.extendleft(reversed(worker.pending))


def _prejudge(payload: Any, completion: str, answer: str | None) -> _Item:
    """What can be decided without algebra is decided here."""
    if answer is None:
        return _Item(payload, graded=False)
    extraction, reference = extract_answer(completion), reference_answer(answer)
    item = _Item(payload, extraction, reference)
    if extraction is None:
        item.verdict = "no_answer"
        return item
    plain = compare_plain(extraction.answer, reference)
    if plain is not None:
        item.verdict = "correct" if plain else "wrong"
    elif max(len(extraction.answer), len(reference)) > MAX_ANSWER_CHARS:
        item.verdict = "wrong"
    return item


def grade(
    pairs: Iterable[tuple[str, str]], *, timeout: int | float = 5.0, workers: int = 0
) -> list[Grade]:
    """The grade of each (completion, reference answer), in order; `timeout` seconds each."""
    with Grader(timeout=timeout, workers=workers) as grader:
        return [g for _, g in grader.stream((None, text, answer) for text, answer in pairs)]
