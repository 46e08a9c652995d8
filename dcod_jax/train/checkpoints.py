"""The checkpoints of a run behind one interface: shared ones, and those on each host's own disk."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from dcod_jax.files import Path, as_path
from dcod_jax.train import checksums
from dcod_jax.train.checkpointer import Checkpointer, Snapshot, finished
from dcod_jax.train.checksums import DamagedCheckpointError
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.types import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """When a run saves, where it saves, and what it restores."""

    def __init__(self, config: Any, *, best_metric: str):
        """best_metric: the held-out metric whose best checkpoint is kept; "" keeps the newest."""
        settings = config.train
        self.every = settings.save_every
        self.previous = settings.on_damaged_checkpoint == "previous"
        home = as_path(config.run_dir).resolve() / "checkpoints"
        for step in finished(home) if best_metric else []:  # which Orbax reads as it opens them
            with self._damage_allowed(home, steps := finished(home), step):
                checksums.verify(home, step, ("metrics",), steps=steps)
        self.shared = Checkpointer(
            config.run_dir,
            keep=settings.keep,
            best_metric=best_metric,
            beside_local=bool(settings.local_dir),
        )
        self.local = LocalCheckpoints(
            self.shared, directory=settings.local_dir, every=settings.local_every
        )

    def restore(self, like: TrainState, *, before: int) -> Snapshot | None:
        """The run at its newest checkpoint, or None; a local one's step must be below `before`."""
        if found := self.local.restore(like, before=before):
            return found
        while steps := self.shared.steps():
            with self._damage_allowed(self.shared.directory, steps, steps[-1]):
                return self.shared.restore(like)
            self.shared.manager.reload()  # something else changed the directory
        return None

    @contextlib.contextmanager
    def _damage_allowed(self, home: Path, steps: list[int], step: int) -> Iterator[None]:
        """Set a damaged checkpoint aside, if the config says so and it is not the only one."""
        try:
            yield
        except DamagedCheckpointError as error:
            if not self.previous or len(steps) == 1:
                raise
            log.warning("%s; set aside", error)
            checksums.set_aside(home, step)

    def due(self, step: int, *, stop: bool) -> Checkpointer | LocalCheckpoints | None:
        """Where to save at this step, if at all; `stop`: the loop ends here."""
        if stop or (self.every and step > 0 and step % self.every == 0):
            return None if step in self.shared.steps() else self.shared
        return self.local if self.local.due(step) else None

    def close(self) -> None:
        """Wait until the last shared checkpoint is whole; only then remove the local ones."""
        self.shared.close()
        self.local.close()
