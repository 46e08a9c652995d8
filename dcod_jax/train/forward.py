"""Student, live teacher and loss of one (micro-)batch: what a train and an eval step share."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from dcod_jax.losses import distill
from dcod_jax.losses.adaptive import LossState
from dcod_jax.losses.distill import LiveTeacher, LossConfig
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.models import transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import constrain
from dcod_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class TeacherModel:
    """The live teacher of loss.teacher=live: its architecture; parameters go to each step."""

    config: ModelConfig
    compute_dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Forward:
    """Model and loss of a step; everything that is static under jit."""

    model: ModelConfig
    loss: LossConfig
    mesh: Mesh
    compute_dtype: DTypeLike
    remat: str
    valid_vocab: int | None
    teacher: TeacherModel | None = None

    def hidden(self, params: Params, batch: Batch) -> Array:
        """The student's hidden states at the head's positions."""
        hidden = transformer.hidden_states(
            self.model,
            params,
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            mesh=self.mesh,
        )
        return self._compact(batch, hidden)

    def _compact(self, batch: Batch, hidden: Array) -> Array:
        return constrain(distill.compact_hidden(batch, hidden), self.mesh, "batch", None, None)

    def live(self, teacher_params: Params | None, batch: Batch) -> LiveTeacher | None:
        if self.teacher is None or teacher_params is None:
            return None
        hidden = transformer.hidden_states(
            self.teacher.config,
            teacher_params,
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            compute_dtype=self.teacher.compute_dtype,
            mesh=self.mesh,
        )
        head = transformer.head_weight(self.teacher.config, teacher_params)
        return jax.lax.stop_gradient(LiveTeacher(self._compact(batch, hidden), head))

    def __call__(
        self,
        params: Params,
        batch: Batch,
        step: Array,
        loss_state: LossState,
        teacher_params: Params | None,
    ) -> tuple[Array, tuple[Sums, TokenStats]]:
        """The loss sum of one (micro-)batch, and its sums and per-token statistics."""
        sums, stats = distill.distill_loss(
            self.loss,
            self.hidden(params, batch),
            transformer.head_weight(self.model, params),
            distill.compact(batch),
            step=step,
            loss_state=loss_state,
            teacher=self.live(teacher_params, batch),
            mesh=self.mesh,
            valid_vocab=self.valid_vocab,
        )
        return sums.loss, (sums, stats)

    def observe(
        self, params: Params, batch: Batch, teacher_params: Params | None
    ) -> tuple[Array, Array]:
        """(log q, log p) at the head's positions, values only."""
        return distill.observe_logprobs(
            self.loss,
            self.hidden(params, batch),
            transformer.head_weight(self.model, params),
            distill.compact(batch),
            teacher=self.live(teacher_params, batch),
            mesh=self.mesh,
            valid_vocab=self.valid_vocab,
        )
