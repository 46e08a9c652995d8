"""Checkpoints on each process's own disk, for a restart that finds its machines as they were.

Every train.local_every steps each process saves what it holds, without the others, to
train.local_dir/<run>/process-<i>/<id>/checkpoints/<step>. The newest two are kept: a process may
be killed while it writes the step that the others have already.

run_dir/checkpoints/local.json says which of them belong to the run as it stands: the id, the number
of processes, and the layout, that is, which process holds which part of every array. A start that
goes on from local checkpoints keeps this record, one that goes on from anything else writes a new
id, and one without train.local_dir removes it. So what a start has passed over, and what was left
of a run whose directory is gone, is never restored into another run or another course of this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import jax

from dcod_jax import hosts
from dcod_jax.checkpoint import Checkpointer, Restored, finished
from dcod_jax.data.manifest import replace_file, to_json
from dcod_jax.storage import remove_tree
from dcod_jax.types import DcodError, TrainState
from dcod_jax.watch import HOST

RECORD = "local.json"
KEEP = 2


class LocalCheckpoints:
    """Local checkpoints of a run beside its shared ones; without `directory` there are none."""

    def __init__(self, shared: Checkpointer, *, directory: str, every: int):
        self.shared, self.every = shared, every
        self.record = shared.directory / RECORD
        self.enabled = bool(directory)
        run_dir = shared.directory.parent
        name = f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
        self.home = pathlib.Path(directory).resolve() / name / f"process-{jax.process_index()}"
        self.own: Checkpointer | None = None  # none either after the disk refused one
        self.newest = 0

    # ---------------------------------------------------------------- at the start

    def restore(self, like: TrainState, *, before: int) -> tuple[TrainState, Restored] | None:
        """State at the newest step that all processes have whole, if it is newer than the shared.

        None where there is no such step below `before`. All processes call it once, before the
        first save; says in a line why checkpoints that one of them has are not used.
        """
        if not self.enabled:
            self._forget()
            return None
        own = {"id": uuid.uuid4().hex, "processes": jax.process_count(), "layout": layout(like)}
        shared = max(self.shared.steps(), default=0)
        known = hosts.first() and self.record.is_file()
        record = json.loads(self.record.read_bytes()) if known else None
        told = json.dumps([record, own["id"], shared])
        record, own["id"], shared = json.loads(hosts.exchange("local checkpoints", told)[0])
        found = None
        if record and (difference := _difference(record, own)):
            print(f"local checkpoints are of {difference}; going on without them")
        elif record:
            found = self._newest(record["id"], like, after=shared, before=before)
        if found is None and hosts.first():
            replace_file(self.record, to_json(own))
        self.newest = found[1].step if found else 0
        self._open(record["id"] if found else own["id"])
        return found

    def _newest(
        self, name: str, like: TrainState, *, after: int, before: int
    ) -> tuple[TrainState, Restored] | None:
        """Agree on a step and read it, until one was read by all or none is left."""
        while True:
            own = json.dumps([HOST, finished(self.home / name / "checkpoints")])
            everyone = [json.loads(text) for text in hosts.exchange("local steps", own)]
            names = [f"process {i} ({host})" for i, (host, _) in enumerate(everyone)]
            steps = [steps for _, steps in everyone]
            step, newest, lacking = agree(steps, after=after, before=before)
            if step is None:
                if lacking:
                    print(
                        f"local checkpoints: {', '.join(names[i] for i in lacking)} has none of "
                        f"step {newest}; going on from {self.shared.directory}"
                    )
                return None
            found, problem = self._attempt(name, step, like)
            problems = hosts.exchange("reading local checkpoints", problem)
            if not any(problems):
                return found
            told = [f"{who}: {text}" for who, text in zip(names, problems, strict=True) if text]
            print(f"local checkpoints of step {step} are not used. {'; '.join(told)}")
            del found  # room for the next
            before = step

    def _attempt(
        self, name: str, step: int, like: TrainState
    ) -> tuple[tuple[TrainState, Restored] | None, str]:
        """(what was read, "") or (None, what is wrong with it)."""
        try:
            reader = Checkpointer(self.home / name, keep=KEEP, alone=True)
            found = reader.restore(like, step=step)
            reader.close()
        except DcodError as error:
            return None, str(error)
        return found, ""

    def _open(self, name: str) -> None:
        """Be ready to save under this id; all else that this process has of the run is removed."""
        for other in list(self.home.iterdir()) if self.home.is_dir() else []:
            if other.name != name:
                remove_tree(other)
        for step in finished(self.home / name / "checkpoints"):
            if step > self.newest:
                remove_tree(self.home / name / "checkpoints" / str(step))
        try:
            self.own = Checkpointer(self.home / name, keep=KEEP, alone=True)
        except DcodError as error:
            self._give_up(error)

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

    def _give_up(self, error: DcodError) -> None:
        if self.own is not None:  # room for what else is on that disk
            with contextlib.suppress(OSError):
                for path in list(self.own.directory.iterdir()):
                    if not path.name.isdigit():
                        remove_tree(path)
        self.own = None
        print(
            f"warning: process {jax.process_index()} ({HOST}): {error}. No more local checkpoints "
            f"of it until the next start; those in {self.shared.directory} go on",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Remove them; the shared checkpoint of the last step must be whole."""
        if not self.enabled:
            return
        if self.own is not None:
            try:
                self.own.close()
            except DcodError as error:
                self._give_up(error)
        remove_tree(self.home)
        with contextlib.suppress(OSError):  # the other processes of this host are not ready
            self.home.parent.rmdir()
        self._forget()

    def _forget(self) -> None:
        if hosts.first():
            self.record.unlink(missing_ok=True)


# ---------------------------------------------------------------- agreement


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


def _difference(record: dict[str, Any], own: dict[str, Any]) -> str:
    if record["processes"] != own["processes"]:
        return f"{record['processes']} processes, these are {own['processes']}"
    return "another mesh or model" if record["layout"] != own["layout"] else ""
