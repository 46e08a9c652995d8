"""Whether the other processes of a run live and get on; where not, who, and the end of this one.

A process cannot be called back from a collective that waits for a lost peer, so the watch runs in
threads beside it and ends the process itself (os._exit), after the message: one beats and reads,
one judges by the clock alone, because a request to a frozen coordinator does not return. For the
end that no thread survives there is epitaph.py.
"""

from __future__ import annotations

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
EPITAPH = Path(__file__).with_name("epitaph.py")
HOST = socket.gethostname()
FOLDER = "dcod_jax/watch/"
VERDICT = "verdict"  # process 0's, for the others: its own end would hide the reason


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is known of a process; times are of this process's clock."""

    host: str
    state: str  # what it said it does
    waiting: bool  # for the others, in a collective or at a barrier
    count: int  # how often it moved
    beat: int
    ended: str  # "" while it runs; why it ended otherwise
    code: int  # its exit code then
    heard: float  # when its beat last changed
    moved: float  # when its count last changed


def unheard(now: float) -> Peer:
    """A process that has said nothing yet."""
    return Peer("host unknown", "starting", False, 0, -1, "", 0, heard=now, moved=now)


def verdict(
    peers: Mapping[int, Peer], *, own: int, now: float, heartbeat: float, timeout: float
) -> tuple[str, int] | None:
    """(message, exit code) when the run cannot go on, or None.

    First a process that ended, then one without a sign of life for `heartbeat` seconds, then a
    stall: nobody moved for `timeout` seconds, and those that wait for nobody are to blame.
    """
    ended = {i: peer for i, peer in peers.items() if peer.ended and i != own}
    for i, peer in ended.items():
        return f"process {i} ({peer.host}) ended: {peer.ended}", peer.code
    lost = [i for i, peer in peers.items() if i != own and now - peer.heard > heartbeat]
    if lost:
        said = "; ".join(
            f"process {i} ({peers[i].host}) gave no sign of life for "
            f"{now - peers[i].heard:.0f} s, last: {peers[i].state}"
            for i in lost
        )
        return f"lost: {said}", EXIT_PEER
    if now - max(peer.moved for peer in peers.values()) <= timeout:
        return None
    behind = [i for i, peer in peers.items() if not peer.waiting]
    if not behind:
        least = min(peer.count for peer in peers.values())
        behind = [i for i, peer in peers.items() if peer.count == least]
    table = "".join(
        f"\n  process {i} ({peer.host}): {'waits for ' if peer.waiting else ''}{peer.state}, for "
        f"{now - peer.moved:.0f} s"
        for i, peer in sorted(peers.items())
    )
    names = ", ".join(f"process {i} ({peers[i].host})" for i in behind)
    return f"stuck: nothing moved for hosts.timeout={timeout:g} s, by {names}:{table}", EXIT_PEER


def last_words(error: BaseException) -> str:
    """What to print of an error: a DcodError's message is the whole report."""
    if isinstance(error, DcodError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on"
    if isinstance(error, SystemExit):
        return "told to stop (SIGTERM); the same command goes on"
    return "".join(traceback.format_exception(error)).rstrip()


class Companion:
    """epitaph.py beside this process, from before it joins until it leaves with a farewell."""

    def __init__(self):
        self.running = subprocess.Popen(
            [sys.executable, "-I", "-S", str(EPITAPH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def tell(
        self, process: int, state: str, coordinator: str, *, first: Peer, joining: bool = False
    ) -> None:
        """What to say if nothing comes after this."""
        self._write(
            {
                "process": process,
                "host": HOST,
                "state": state,
                "coordinator": coordinator,
                "first": {"host": first.host, "state": first.state},
                "joining": joining,
            }
        )

    def farewell(self) -> None:
        self._write({"farewell": True})

    def _write(self, line: dict[str, Any]) -> None:
        if self.running.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # without it the process works on
                self.running.stdin.write(json.dumps(line) + "\n")
                self.running.stdin.flush()


def _one_line(error: BaseException) -> str:
    lines = last_words(error).strip().splitlines()
    return (lines[0] if isinstance(error, DcodError) else lines[-1])[:300]


class Watch:
    """The membership of this process in a run of many, from joining to leaving."""

    def __init__(
        self,
        client: Any,
        *,
        process: int,
        processes: int,
        coordinator: str,
        companion: Companion,
        heartbeat: float,
        timeout: float,
    ):
        self.coordinator, self.companion = coordinator, companion
        self.client, self.process, self.processes = client, process, processes
        self.heartbeat, self.timeout = heartbeat, timeout
        self.interval = min(heartbeat / 5, 2.0)
        self.agreed = False  # whether all processes decided to end before the work is done
        self.host = HOST
        self.state, self.waiting, self.count, self.beats = "starting", False, 0, 0
        self.ended, self.code = "", 0
        now = time.monotonic()
        self.peers = dict.fromkeys(range(processes), unheard(now))
        self.contact = now
        self.numbers: dict[str, int] = {}
        self.closing = threading.Event()
        self.ending = threading.RLock()  # whoever ends the process first finishes its message
        self.threads = [
            threading.Thread(target=run, daemon=True, name=f"dcod-watch-{run.__name__}")
            for run in (self._beat_on, self._judge_on)
        ]
        self._beat()
        for thread in self.threads:
            thread.start()

    def greet(self) -> None:
        """Learn every process's host before one can be lost; call it after a barrier."""
        self._beat()

    # ---- what the process itself says

    def doing(self, what: str, *, waiting: bool) -> None:
        self.state, self.waiting, self.count = what, waiting, self.count + 1

    def moved(self) -> None:
        self.count += 1

    def barrier(self, name: str) -> None:
        before = self.state
        self.doing(name, waiting=True)
        # The judge speaks first: it knows who is missing.
        patience = int(1000 * (2 * self.timeout + self.heartbeat + 60))
        self.client.wait_at_barrier(f"dcod_jax {name} {self._number(name)}", patience)
        self.doing(before, waiting=False)

    def exchange(self, name: str, text: str) -> list[str]:
        folder = f"dcod_jax/exchange/{name}/{self._number(name)}/"
        self.client.key_value_set(f"{folder}{self.process:06d}", text)
        self.barrier(name)
        return [text for _, text in sorted(self.client.key_value_dir_get(folder))]

    def _number(self, name: str) -> int:
        """How often this name was used: a barrier's id must be new."""
        self.numbers[name] = self.numbers.get(name, 0) + 1
        return self.numbers[name]

    def read(self, key: str) -> str:
        """Value of a key, "" where it is not set."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return ""

    # ---- the threads

    def _beat_on(self) -> None:
        while not self.closing.wait(self.interval):
            try:
                self._beat()
            except jax.errors.JaxRuntimeError:
                continue  # the judge sees that there was no contact

    def _beat(self) -> None:
        """Write the own sign of life and read the others'."""
        self.beats += 1
        own = {
            "host": self.host,
            "state": self.state,
            "waiting": self.waiting,
            "count": self.count,
            "beat": self.beats,
            "ended": self.ended,
            "code": self.code,
        }
        key = f"{FOLDER}{self.process}"
        self._tell_companion()
        self.client.key_value_set(key, json.dumps(own), allow_overwrite=True)
        found = dict(self.client.key_value_dir_get(FOLDER))
        self.contact = now = time.monotonic()
        if told := found.pop(FOLDER + VERDICT, ""):
            message, code = json.loads(told)
            self._end(message, code)
        for key, text in found.items():
            process, said = int(key.removeprefix(FOLDER)), json.loads(text)
            old = self.peers[process]
            heard = now if said["beat"] != old.beat else old.heard
            moved = now if said["count"] != old.count else old.moved
            self.peers[process] = Peer(**said, heard=heard, moved=moved)
        self._tell_companion()  # process 0's last word, before the next beat that may not come

    def _tell_companion(self) -> None:
        self.companion.tell(self.process, self.state, self.coordinator, first=self.peers[0])

    def _judge_on(self) -> None:
        while not self.closing.wait(self.interval):
            now = time.monotonic()
            silence = now - self.contact
            # Peers' beats are old only because the coordinator is: then it is the one to name.
            if silence > self.heartbeat:
                peer = self.peers[0]
                self._end(
                    f"lost: process 0 ({peer.host}), the coordinator, did not answer for "
                    f"{silence:.0f} s, last: {peer.state}",
                    EXIT_PEER,
                )
            limits = {"heartbeat": self.heartbeat, "timeout": self.timeout}
            if silence <= 2 * self.interval and (
                found := verdict(dict(self.peers), own=self.process, now=now, **limits)
            ):
                self._end(*found)

    # ---- the end

    def _end(self, message: str, code: int) -> None:
        """Say it and stop; process 0 lets the others read the reason before the store goes away."""
        with self.ending:
            again = "start the same command on every host again"
            print(
                f"dcod_jax: process {self.process} ({self.host}) stops: {message}\n"
                f"dcod_jax: {again}; it goes on from the last checkpoint or finished shard",
                file=sys.stderr,
                flush=True,
            )
            if self.process == 0:
                self._tell(VERDICT, json.dumps([message, code]))
                time.sleep(3 * self.interval)
            sys.stdout.flush()
            self.companion.farewell()
            os._exit(code)

    def _tell(self, name: str, text: str) -> None:
        try:
            self.client.key_value_set(FOLDER + name, text, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as error:
            print(f"dcod_jax: the others could not be told: {error}", file=sys.stderr)

    def fail(self, error: BaseException, *, code: int) -> None:
        """End this process because of an error of its own, or because a lost peer caused it."""
        if _may_be_a_peers(error):
            self.doing(f"stopped by {type(error).__name__}", waiting=True)
            time.sleep(self.heartbeat + 4 * self.interval)  # the judge knows better by then
        with self.ending:
            where = f"dcod_jax: process {self.process} ({self.host})"
            print(f"{where}: error: {last_words(error)}", file=sys.stderr, flush=True)
            self.ended, self.code = _one_line(error), code
            try:
                self._beat()
            except jax.errors.JaxRuntimeError as lost:
                print(f"{where}: the others could not be told: {lost}", file=sys.stderr)
            else:
                time.sleep(3 * self.interval if self.process == 0 else 0)
            sys.stdout.flush()
            self.companion.farewell()
            os._exit(code)

    def close(self) -> None:
        """Stop watching; all processes are at the end, as a barrier before this said."""
        self.closing.set()
        for thread in self.threads:
            thread.join()
        self.companion.farewell()


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
