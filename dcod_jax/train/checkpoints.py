"""The checkpoints of a run behind one interface: shared ones, and those on each host's own disk."""

from __future__ import annotations

from typing import Any

from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.types import TrainState


class Checkpoints:
    """When a run saves, where it saves, and what it restores."""

    def __init__(self, config: Any, *, best_metric: str):
        """best_metric: the held-out metric whose lowest checkpoint is kept; "" keeps the newest."""
        settings = config.train
        self.every = settings.save_every
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
        return self.shared.restore(like) if self.shared.steps() else None

    def due(self, step: int, *, stop: bool) -> bool:
        """Whether to save at this step; `stop`: the loop ends here."""
        if self._shared_due(step, stop=stop):
            return step not in self.shared.steps()
        return self.local.due(step)

    def save(self, snapshot: Snapshot, *, stop: bool) -> None:
        """Start writing the checkpoint that is due."""
        shared = self._shared_due(snapshot.step, stop=stop)
        (self.shared if shared else self.local).save(snapshot)

    def _shared_due(self, step: int, *, stop: bool) -> bool:
        return stop or bool(self.every and step > 0 and step % self.every == 0)

    def close(self) -> None:
        """Wait until the last shared checkpoint is whole; only then remove the local ones."""
        self.shared.close()
        self.local.close()
