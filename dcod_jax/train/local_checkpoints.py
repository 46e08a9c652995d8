"""Checkpoints on each process's own disk, for a restart that finds its machines as they were.

Every train.local_every steps each process saves what it holds, without the others, to
train.local_dir/<run>/process-<i>/<id>/checkpoints/<step>. The newest two are kept: a process may
be killed while it writes the step that the others have already.

run_dir/checkpoints/local.txt says which of them belong to the run as it stands: the id, the number
of processes, and the layout, that is, which process holds which part of every array. A start that
goes on from local checkpoints keeps this record, one that goes on from anything else writes a new
id, and one without train.local_dir removes it. So what a start has passed over, and what was left
of a run whose directory is gone, is never restored into another run or another course of this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import jax

from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, remove_tree, replace_file
from dcod_jax.parallel import hosts
from dcod_jax.parallel.monitor import HOST
from dcod_jax.train.checkpoint import Checkpointer, Restored, finished
from dcod_jax.types import TrainState

RECORD = "local.txt"  # in one line: id, number of processes, layout
KEEP = 2


class LocalCheckpoints:
    """Local checkpoints of a run beside its shared ones; without `directory` there are none."""

    def __init__(self, shared: Checkpointer, *, directory: str, every: int):
        self.shared, self.every = shared, every
        self.record = shared.directory / RECORD
        self.enabled = bool(directory)
        run_dir = shared.directory.parent
        name = f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
        self.home = as_path(directory).resolve() / name / f"process-{jax.process_index()}"
        self.own: Checkpointer | None = None  # none either after the disk refused one
        self.newest = 0

    def restore(self, like: TrainState, *, before: int) -> tuple[TrainState, Restored] | None:
        """State at the newest step that all processes have whole, if it is newer than the shared.

        None where there is no such step below `before`. All processes call it once, before the
        first save; a line says why checkpoints that one of them has are not used.
        """
        if not self.enabled:
            self._forget()
            return None
        own = [uuid.uuid4().hex, str(jax.process_count()), layout(like)]
        shared = max(self.shared.steps(), default=0)
        known = hosts.first() and self.record.is_file()
        then = self.record.read_bytes().decode(errors="replace").split() if known else []
        told = json.dumps([then, own[0], shared])
        then, own[0], shared = json.loads(hosts.exchange("local checkpoints", told)[0])
        found = None
        if len(then) == 3 and then[1] != own[1]:
            print(f"local checkpoints are of {then[1]} processes, these are {own[1]}; not used")
        elif len(then) == 3 and then[2] != own[2]:
            print("local checkpoints are of another mesh or model; not used")
        elif len(then) == 3:
            found = self._newest(then[0], like, after=shared, before=before)
        if found is None and hosts.first():
            replace_file(self.record, (" ".join(own) + "\n").encode())
        self.newest = found[1].step if found else 0
        self._open(then[0] if found else own[0])
        return found

    def _newest(
        self, name: str, like: TrainState, *, after: int, before: int
    ) -> tuple[TrainState, Restored] | None:
        """Agree on a step and read it, until one was read by all or none is left."""
        while True:
            own: list[int] = []
            with contextlib.suppress(OSError):  # a disk in trouble has none
                own = finished(self.home / name / "checkpoints")
            told = hosts.exchange("local steps", json.dumps([HOST, own]))
            everyone = [json.loads(text) for text in told]
            names = [f"process {i} ({host})" for i, (host, _) in enumerate(everyone)]
            steps = [have for _, have in everyone]
            step, newest, lacking = agree(steps, after=after, before=before)
            if step is None:
                who = ", ".join(names[i] for i in lacking)
                if lacking:
                    print(f"local checkpoints: {who} has none of step {newest}; not used")
                return None
            found, problem = None, ""
            try:
                found = self._checkpointer(name).restore(like, step=step)
            except DcodError as error:
                problem = str(error)
            problems = hosts.exchange("reading local checkpoints", problem)
            if not any(problems):
                return found
            told = [f"{who}: {text}" for who, text in zip(names, problems, strict=True) if text]
            print(f"local checkpoints of step {step} are not used. {'; '.join(told)}")
            found, before = None, step  # room for the next, which is older

    def _checkpointer(self, name: str) -> Checkpointer:
        return Checkpointer(self.home / name, keep=KEEP, alone=True)

    def _open(self, name: str) -> None:
        """Be ready to save under this id; all else that this process has of the run is removed."""
        try:
            self._tidy(name)
            self.own = self._checkpointer(name)
        except (DcodError, OSError) as error:
            self._give_up(error)

    def _tidy(self, name: str) -> None:
        """Leave the whole checkpoints of this id that are no newer than the run is."""
        for other in list(self.home.iterdir()) if self.home.is_dir() else []:
            if other.name != name:
                remove_tree(other)
        place = self.home / name / "checkpoints"
        for path in list(place.iterdir()) if place.is_dir() else []:
            if not path.name.isdigit() or int(path.name) > self.newest:
                remove_tree(path)

    # ---------------------------------------------------------------- as the run goes

    def due(self, step: int) -> bool:
        """Whether step is one to be saved; the same on all processes, whatever their disks."""
        return self.enabled and step != self.newest and step % self.every == 0 < step

    def save(self, state: TrainState, *, step: int, **values: Any) -> None:
        """As Checkpointer.save; a disk that refuses ends this process's local checkpoints only."""
        self.newest = step
        if self.own is not None:
            try:
                self.own.save(state, step=step, **values)
            except DcodError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self.own is not None:  # room for what else is on that disk
            with contextlib.suppress(OSError):
                self._tidy(self.own.directory.parent.name)
        self.own = None
        print(
            f"warning: process {jax.process_index()} ({HOST}): {error}. No more local checkpoints "
            f"of it until the next start; those in {self.shared.directory} go on",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Remove them; the shared checkpoint of the last step must be whole."""
        if self.own is not None:
            try:
                self.own.close()
            except DcodError as error:
                self._give_up(error)
        if self.enabled:
            remove_tree(self.home)
            with contextlib.suppress(OSError):  # another process of this host is not ready
                os.rmdir(str(self.home.parent))
        self._forget()

    def _forget(self) -> None:
        if hosts.first():
            self.record.unlink(missing_ok=True)


def agree(
    steps: Sequence[Sequence[int]], *, after: int, before: int
) -> tuple[int | None, int, list[int]]:
    """(newest step that all processes have, or None; newest that one has; who lacks that one).

    Of the steps between after and before, both excluded; the newest is 0 where there is none.
    [[12, 14], [10, 12]] after 10 -> (12, 14, [1]); [[14], []] after 10 -> (None, 14, [1]).
    """
    usable = [{step for step in own if after < step < before} for own in steps]
    newest = max(set.union(*usable), default=0)
    lacking = [i for i, own in enumerate(usable) if newest and newest not in own]
    return max(set.intersection(*usable), default=None), newest, lacking


def layout(like: TrainState) -> str:
    """Hash of the arrays of a state and of which process holds which part of each."""
    described = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        places = leaf.sharding.devices_indices_map(leaf.shape)
        held = {
            (device.process_index, *(s.indices(n) for s, n in zip(index, leaf.shape, strict=True)))
            for device, index in places.items()
        }
        described.append([jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sorted(held)])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
