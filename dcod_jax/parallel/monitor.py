"""Heartbeats between the processes of a run; a process whose peer is lost or stuck ends itself.

A collective that waits for a lost peer cannot be interrupted, so threads beside it end the process
(os._exit) after a message that names the peer. JAX's own heartbeat has a longer
limit: its abort names neither the host nor what the peer was doing, and a peer that is alive but
stuck never causes it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dcod_jax.errors import DcodError

EXIT_PEER = 76  # another process was lost or stuck: start the same command on all again
EXIT_REPORT = Path(__file__).with_name("exit_report.py")
HOST = socket.gethostname()
FOLDER = "dcod_jax/heartbeat/"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process as its last heartbeat described it; times are of the reader's clock."""

    host: str = "host unknown"
    state: str = "starting"  # what it is doing
    waiting: bool = False  # for the others, in a collective or at a barrier
    count: int = 0  # how often it made progress
    beat: int = -1  # number of its heartbeat
    ended: str = ""  # "" while it runs; else why it ended
    judged: bool = False  # whether its end is a verdict about another process
    code: int = 0  # its exit code then
    heard: float = 0.0  # when its heartbeat last changed
    moved: float = 0.0  # when its count last changed


def verdict(
    peers: Mapping[int, Peer], *, own: int, now: float, heartbeat: float, timeout: float
) -> tuple[str, int] | None:
    """(message, exit code) when the run cannot go on, or None.

    In this order: a process that ended; one without a heartbeat for `heartbeat` seconds; no
    progress anywhere for `timeout` seconds, which is blamed on the processes that do not wait.
    """
    for i, peer in peers.items():
        if peer.ended and i != own:
            return f"{'' if peer.judged else _who(i, peer) + ' ended: '}{peer.ended}", peer.code
    lost = [
        f"{_who(i, peer)} sent no heartbeat for {now - peer.heard:.0f} s, last: {peer.state}"
        for i, peer in peers.items()
        if i != own and now - peer.heard > heartbeat
    ]
    if lost:
        return f"lost: {'; '.join(lost)}", EXIT_PEER
    if now - max(peer.moved for peer in peers.values()) <= timeout:
        return None
    least = min(peer.count for peer in peers.values())
    behind = [i for i, peer in peers.items() if not peer.waiting]
    behind = behind or [i for i, peer in peers.items() if peer.count == least]
    table = "".join(
        f"\n  {_who(i, peer)}: {'waits for ' if peer.waiting else ''}{peer.state}, for "
        f"{now - peer.moved:.0f} s"
        for i, peer in sorted(peers.items())
    )
    names = ", ".join(_who(i, peers[i]) for i in behind)
    return f"stuck: nothing moved for hosts.timeout={timeout:g} s, by {names}:{table}", EXIT_PEER


def _who(process: int, peer: Peer) -> str:
    return f"process {process} ({peer.host})"


def _message(error: BaseException) -> str:
    """What to print of an error: a DcodError's message is the whole report."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        what = "told to stop (SIGTERM)" if isinstance(error, SystemExit) else "interrupted"
        return f"{what}; the same command goes on"
    own = isinstance(error, DcodError)
    return str(error) if own else "".join(traceback.format_exception(error)).rstrip()


class ExitReporter:
    """exit_report.py beside this process, from before it joins until `close`."""

    def __init__(self):
        self.running = subprocess.Popen(
            [sys.executable, "-I", "-S", str(EXIT_REPORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def update(
        self, process: int, state: str, coordinator: str, *, first: Peer, joining: bool = False
    ) -> None:
        """What to report if nothing comes after this; first: process 0."""
        who = _who(process, Peer(HOST))
        lost = f"{who} stops: lost: {_who(0, first)}, the coordinator at {coordinator}, last: "
        reason = (
            f"{who} was killed or aborted (out of memory? see above and the kernel's log), "
            f"last: {state}"
        )
        if joining:
            reason = (
                f"{who} stops: {state}: not all did; start the same command on every host, each "
                "with its own number"
            )
        asked = coordinator if process else ""  # process 0 is the coordinator itself
        self._write({"coordinator": asked, "lost": lost + first.state, "ended": reason})

    def close(self) -> None:
        """Nothing is to be reported."""
        self._write({"closed": True})

    def _write(self, line: dict[str, Any]) -> None:
        if self.running.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # without a reporter the process works on
                self.running.stdin.write(json.dumps(line) + "\n")
                self.running.stdin.flush()


class Monitor:
    """This process's membership in a run of several, from joining to leaving."""

    def __init__(
        self,
        client: Any,  # of the key-value store, which has no public type
        *,
        process: int,
        processes: int,
        coordinator: str,
        reporter: ExitReporter,
        heartbeat: float,
        timeout: float,
    ):
        self.client, self.process = client, process
        self.coordinator, self.reporter = coordinator, reporter
        self.heartbeat, self.timeout = heartbeat, timeout
        self.interval = min(heartbeat / 5, 2.0)
        self.agreed = False  # whether all processes decided to end before the work is done
        now = time.monotonic()
        self.own, self.beats = Peer(HOST), 0
        self.end: dict[str, Any] = {}  # fields of Peer, once this process ends
        self.peers = dict.fromkeys(range(processes), Peer(heard=now, moved=now))
        self.contact = now
        self.numbers = collections.Counter[str]()  # how often a name was used: ids must be new
        self.closing = threading.Event()
        self.ending = threading.RLock()  # the first to end the process finishes its message
        self.beat()
        # Two threads, and one more at the end: a request to a frozen coordinator does not return.
        self.threads = [
            threading.Thread(target=run, daemon=True, name=f"dcod-{run.__name__}")
            for run in (self._keep_beating, self._keep_judging)
        ]
        for thread in self.threads:
            thread.start()

    # ---- what the process itself reports

    def doing(self, what: str, *, waiting: bool) -> None:
        """What this process does from now on, and whether it waits for the others."""
        self.own = dataclasses.replace(self.own, state=what, waiting=waiting)
        self.moved()

    def moved(self) -> None:  # called, as doing is, by the main thread alone
        """Count a piece of progress."""
        self.own = dataclasses.replace(self.own, count=self.own.count + 1)

    def barrier(self, name: str) -> None:
        """Wait until every process has called it with this name."""
        before = self.own.state
        self.doing(name, waiting=True)
        # Longer than the verdict takes, which knows who is missing.
        patience = int(1000 * (2 * self.timeout + self.heartbeat + 60))
        self.numbers[name] += 1
        self.client.wait_at_barrier(f"dcod_jax {name} {self.numbers[name]}", patience)
        self.doing(before, waiting=False)

    def exchange(self, name: str, text: str) -> list[str]:
        """The texts of all processes, in their order."""
        folder = f"dcod_jax/exchange/{name}/{self.numbers[name] + 1}/"
        self.client.key_value_set(f"{folder}{self.process:06d}", text)
        self.barrier(name)
        return [text for _, text in sorted(self.client.key_value_dir_get(folder))]

    def read(self, key: str) -> str:
        """Value of a key, "" where it is not set."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return ""

    # ---- heartbeats and verdicts

    def beat(self) -> None:
        """Write this process's heartbeat and read the others'."""
        self._publish()
        found = self.client.key_value_dir_get(FOLDER)
        self.contact = now = time.monotonic()
        for key, text in found:
            process, said = int(key.removeprefix(FOLDER)), json.loads(text)
            old = self.peers[process]
            heard = now if said["beat"] != old.beat else old.heard
            moved = now if said["count"] != old.count else old.moved
            self.peers[process] = Peer(**said | {"heard": heard, "moved": moved})
        self._report()  # with process 0's state, before a heartbeat that may not come
        self._judge()

    def _publish(self) -> None:
        self.beats += 1
        self._report()
        text = json.dumps(dataclasses.asdict(self.own) | {"beat": self.beats} | self.end)
        self.client.key_value_set(f"{FOLDER}{self.process}", text, allow_overwrite=True)

    def _report(self) -> None:
        first = self.peers[0]
        self.reporter.update(self.process, self.own.state, self.coordinator, first=first)

    def _judge(self) -> None:
        now = time.monotonic()
        silence = now - self.contact
        # Peers' heartbeats are old only because the coordinator is: then it is the one to name.
        if silence > self.heartbeat:
            first = self.peers[0]
            self._stop(
                f"lost: process 0 ({first.host}), the coordinator, did not answer for "
                f"{silence:.0f} s, last: {first.state}",
                EXIT_PEER,
            )
        limits = {"heartbeat": self.heartbeat, "timeout": self.timeout}
        if silence <= 2 * self.interval and (
            found := verdict(dict(self.peers), own=self.process, now=now, **limits)
        ):
            self._stop(*found)

    def _keep_beating(self) -> None:
        while not self.closing.wait(self.interval):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # _judge sees the silence
                self.beat()

    def _keep_judging(self) -> None:
        while not self.closing.wait(self.interval):
            self._judge()

    # ---- the end

    def _stop(self, message: str, code: int) -> None:
        """End this process because of another one."""
        with self.ending:
            again = "start the same command on every host again"
            self._print(
                f" stops: {message}\n"
                f"dcod_jax: {again}; it goes on from the last checkpoint or finished shard"
            )
            self._exit(code, message, judged=True)

    def fail(self, error: BaseException, *, code: int) -> None:
        """End this process because of an error of its own, or because a lost peer caused it."""
        if _may_be_a_peers(error):
            self.doing(f"stopped by {type(error).__name__}", waiting=True)
            time.sleep(self.heartbeat + 4 * self.interval)  # by then a verdict names the peer
        with self.ending:
            message = _message(error)
            self._print(f": error: {message}")
            lines = message.strip().splitlines()
            line = (lines[0] if isinstance(error, DcodError) else lines[-1])[:300]
            self._exit(code, line, judged=False)

    def _print(self, text: str) -> None:
        print(f"dcod_jax: process {self.process} ({HOST}){text}", file=sys.stderr, flush=True)

    def _exit(self, code: int, ended: str, *, judged: bool) -> None:
        self.end = {"ended": ended, "code": code, "judged": judged}
        if self.process == 0 or not judged:  # with process 0 goes the store, and all reasons in it
            telling = threading.Thread(target=self._tell_end, daemon=True)
            telling.start()
            telling.join(self.heartbeat + 3 * self.interval)
        sys.stdout.flush()
        self.reporter.close()
        os._exit(code)

    def _tell_end(self) -> None:
        try:
            self._publish()
        except jax.errors.JaxRuntimeError as error:
            self._print(f": the others could not be told: {error}")
        else:
            time.sleep(3 * self.interval if self.process == 0 else 0)

    def close(self) -> None:
        """Stop the threads; a barrier before this said that all processes are at the end."""
        self.closing.set()
        for thread in self.threads:
            thread.join()
        self.reporter.close()


def _may_be_a_peers(error: BaseException | None) -> bool:
    """Whether an error may be no more than the sign that another process is gone."""
    while error is not None:
        text = str(error)
        if "Gloo" in text or (
            isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
        ):
            return True
        error = error.__cause__
    return False
