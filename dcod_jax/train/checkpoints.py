"""When a run saves, and what it goes on from where a checkpoint is damaged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from dcod_jax.files import Path, as_path
from dcod_jax.train import checksums
from dcod_jax.train.checkpointer import Checkpointer, Snapshot, finished
from dcod_jax.train.checksums import DamagedCheckpointError
from dcod_jax.types import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, by train.save_every and train.on_damaged_checkpoint."""

    def __init__(self, config: Any, *, best_metric: str):
        """best_metric: the held-out metric whose best checkpoint is kept; "" keeps the newest."""
        settings = config.train
        self.every = settings.save_every
        self.previous = settings.on_damaged_checkpoint == "previous"
        home = as_path(config.run_dir).resolve() / "checkpoints"
        for step in finished(home) if best_metric else []:  # which Orbax reads as it opens them
            with self._damage_allowed(home, steps := finished(home), step):
                checksums.verify(home, step, ("metrics",), steps=steps)
        self.kept = Checkpointer(config.run_dir, keep=settings.keep, best_metric=best_metric)

    def restore(self, like: TrainState) -> Snapshot | None:
        """The run at its newest checkpoint, or None."""
        while steps := self.kept.steps():
            with self._damage_allowed(self.kept.directory, steps, steps[-1]):
                return self.kept.restore(like)
            self.kept.manager.reload()  # something else changed the directory
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

    def due(self, step: int, *, stop: bool) -> bool:
        """Whether to save at this step; `stop`: the loop ends here."""
        wanted = stop or (self.every and step > 0 and step % self.every == 0)
        return bool(wanted) and step not in self.kept.steps()
