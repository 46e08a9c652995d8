"""Checkpoints on each process's own disk, for a restart that finds its machines as they were.

Every train.local_every steps each process saves the shards it holds, without the others, to
train.local_dir/<run>/process-<i>/<id>/checkpoints/<step>. The newest two are kept, because a
process may be killed while it writes the step that the others have finished.

run_dir/checkpoints/local.txt names the local checkpoints that belong to the run: the id, the number
of processes, and the layout (which process holds which part of every array). A start that goes on
from local checkpoints keeps this file; one that goes on from anything else writes a new id, and
one without train.local_dir removes it. So local checkpoints that a start did not use, and those of
a deleted run, are never restored into another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Sequence

import jax

from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, forget_unfinished, remove_tree, replace_file
from dcod_jax.parallel import hosts
from dcod_jax.parallel.monitor import HOST
from dcod_jax.train.checkpointer import Checkpointer, Snapshot, finished, step_of
from dcod_jax.types import TrainState

log = logging.getLogger(__name__)
IDENTITY = "local.txt"  # in one line: id, number of processes, layout
KEEP = 2
_ID = re.compile("[0-9a-f]{32}")


class LocalCheckpoints:
    """Local checkpoints of a run beside its shared ones; without `directory` there are none."""

    def __init__(self, shared: Checkpointer, *, directory: str, every: int):
        self.shared, self.every = shared, every
        self.identity = shared.directory / IDENTITY
        self.enabled = bool(directory)
        run_dir = shared.directory.parent
        name = f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
        self.home = as_path(directory).resolve() / name / f"process-{jax.process_index()}"
        self.own: Checkpointer | None = None  # also None after the disk refused a save
        self.newest = 0

    def restore(self, like: TrainState, *, before: int) -> Snapshot | None:
        """The run at the newest step that all processes have, if newer than the shared ones.

        None where there is no such step below `before`; a line says why checkpoints that one
        process has are not used. All processes call it once, before the first save.
        """
        if not self.enabled:
            self._forget()
            return None
        own = [uuid.uuid4().hex, str(jax.process_count()), layout(like)]
        shared = max(self.shared.steps(), default=0)
        known = hosts.first() and self.identity.is_file()
        then = self.identity.read_bytes().decode(errors="replace").split() if known else []
        then, own[0], shared = hosts.exchange("local checkpoints", [then, own[0], shared])[0]
        found = None
        if len(then) == 3 and _ID.fullmatch(then[0]):  # the id becomes a directory's name
            if then[1] != own[1]:
                text = "local checkpoints are of %s processes, these are %s; not used"
                log.info(text, then[1], own[1])
            elif then[2] != own[2]:
                log.info("local checkpoints are of another mesh or model; not used")
            else:
                found = self._read_newest(then[0], like, after=shared, before=before)
        if found is None and hosts.first():
            replace_file(self.identity, (" ".join(own) + "\n").encode())
        self.newest = found.step if found else 0
        name = then[0] if found else own[0]
        try:
            self._tidy(name)
            self.own = self._checkpointer(name)
        except (DcodError, OSError) as error:
            self._give_up(error)
        return found

    def _read_newest(
        self, name: str, like: TrainState, *, after: int, before: int
    ) -> Snapshot | None:
        """Agree on a step and read it, until one was read by all or none is left."""
        while True:
            own: list[int] = []
            with contextlib.suppress(OSError):  # a failing disk has none
                own = finished(self.home / name / "checkpoints")
            everyone = hosts.exchange("local steps", [HOST, own])
            names = [f"process {i} ({host})" for i, (host, _) in enumerate(everyone)]
            held = [have for _, have in everyone]
            step, newest, lacking = newest_common(held, after=after, before=before)
            if step is None:
                who = ", ".join(names[i] for i in lacking)
                if lacking:
                    log.info("local checkpoints: %s has none of step %d; not used", who, newest)
                return None
            found, problem = None, ""
            try:
                found = self._checkpointer(name).restore(like, step=step)
            except (DcodError, OSError) as error:
                problem = str(error)
            problems = hosts.exchange("reading local checkpoints", problem)
            if not any(problems):
                return found
            texts = [f"{who}: {text}" for who, text in zip(names, problems, strict=True) if text]
            log.info("local checkpoints of step %d are not used. %s", step, "; ".join(texts))
            found, before = None, step  # frees the arrays before the older step is read

    def _checkpointer(self, name: str) -> Checkpointer:
        return Checkpointer(self.home / name, keep=KEEP, local=True)

    def _tidy(self, name: str) -> None:
        """Remove other ids, and of this id what is half-written or newer than the run."""
        for other in list(self.home.iterdir()) if self.home.is_dir() else []:
            if other.name != name:
                remove_tree(other)
        place = self.home / name / "checkpoints"
        for path in list(place.iterdir()) if place.is_dir() else []:
            step = step_of(path.name)
            if step is None or step > self.newest:
                remove_tree(path)

    def due(self, step: int) -> bool:
        """Whether a step is to be saved; the same on all processes, whatever their disks."""
        return self.enabled and step != self.newest and step % self.every == 0 < step

    def save(self, snapshot: Snapshot) -> None:
        """As Checkpointer.save; a disk that refuses ends this process's local checkpoints only."""
        self.newest = snapshot.step
        if self.own is not None:
            try:
                self.own.save(snapshot)
            except DcodError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self.own is not None:  # free the space for others on that disk
            with contextlib.suppress(OSError):
                self._tidy(self.own.directory.parent.name)
        self.own = None
        log.warning(
            "process %d (%s): %s. No more local checkpoints of it until the next start; those in "
            "%s go on",
            jax.process_index(),
            HOST,
            error,
            self.shared.directory,
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
            with contextlib.suppress(OSError):  # another process of this host has not finished
                os.rmdir(str(self.home.parent))
        self._forget()

    def _forget(self) -> None:
        if hosts.first():
            forget_unfinished(self.identity)
            self.identity.unlink(missing_ok=True)


def newest_common(
    held: Sequence[Sequence[int]], *, after: int, before: int
) -> tuple[int | None, int, list[int]]:
    """(newest step that all processes have, or None; newest that one has; who lacks that one).

    Only steps between after and before count, both excluded; the newest is 0 where there is none.
    [[12, 14], [10, 12]] after 10 -> (12, 14, [1]); [[14], []] after 10 -> (None, 14, [1]).
    """
    usable = [{step for step in own if after < step < before} for own in held]
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
