"""Student, live teacher and loss of one (micro-)batch: what a train and an eval step share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from dcod_jax.errors import DcodError
from dcod_jax.losses.distill import DistillLoss, LiveTeacher
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.losses.routing import balance_sum
from dcod_jax.losses.weights import Tokens
from dcod_jax.models import lora, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.train.settings import loss_config
from dcod_jax.types import Batch, LossState, Params


@dataclasses.dataclass(frozen=True)
class TeacherModel:
    """The live teacher of loss.teacher=live: its architecture; parameters go to each step."""

    config: ModelConfig
    compute_dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Forward:
    """Models and loss of a step: everything that is static under jit."""

    model: ModelConfig
    loss: DistillLoss
    compute_dtype: DTypeLike
    gradient_dtype: DTypeLike = jnp.float32  # in which devices sum the gradients of the layers
    remat: str = "none"
    teacher: TeacherModel | None = None
    kernel: str = "auto"  # of attention, the teacher's too

    def __post_init__(self) -> None:
        asked = self.loss.config.teacher
        if (asked == "live") != (self.teacher is not None):
            given = "not " if self.teacher is None else ""
            raise DcodError(f"loss.teacher={asked} but the step was {given}given a live teacher")
        if self.balances and self.model.mixture is None:
            raise DcodError(
                f"loss.router_balance={self.loss.config.router_balance} is for a student with "
                f"experts, and model_type={self.model.model_type!r} has none; set it to 0"
            )

    @property
    def balances(self) -> bool:
        """Whether the student's router is trained to use all experts."""
        return self.loss.config.router_balance > 0

    @property
    def mesh(self) -> Mesh:
        """The mesh that the head was made for."""
        assert self.loss.head.mesh is not None
        return self.loss.head.mesh

    def frozen_axes(self) -> tuple[Params, ...]:
        """Logical axes of the frozen parameters: a live teacher's, then the base of adapters."""
        axes = transformer.logical_axes
        teacher = () if self.teacher is None else (axes(self.teacher.config),)
        base = () if self.model.lora is None else (lora.frozen(self.model, axes(self.model)),)
        return teacher + base

    def _hidden(
        self, model: ModelConfig, params: Params, batch: Batch, **options: Any
    ) -> tuple[Array, Array, Array | None]:
        """(final hidden states [B,T,D], matrix of the head [V,D], routing) of a model."""
        options |= {"segment_ids": batch.segment_ids, "positions": batch.positions}
        options |= {"kernel": self.kernel, "placed": self.loss.head.placed}
        hidden, routing = transformer.forward(
            model, params, batch.tokens, mesh=self.mesh, **options
        )
        return hidden, transformer.head_weight(model, params), routing

    def _both(
        self, params: Params, batch: Batch, frozen: tuple[Params, ...]
    ) -> tuple[Array, Array, Array | None, LiveTeacher | None]:
        """The student's hidden states, head and routing, and what a live teacher has of them."""
        teacher = None
        if self.teacher is not None:
            dtype = self.teacher.compute_dtype
            known = self._hidden(self.teacher.config, frozen[0], batch, compute_dtype=dtype)
            teacher = LiveTeacher(*known[:2])
        if self.model.lora is not None:
            params = lora.join(params, frozen[-1])
        own = {key: getattr(self, key) for key in ("compute_dtype", "gradient_dtype", "remat")}
        return *self._hidden(self.model, params, batch, **own), teacher

    def __call__(
        self,
        params: Params,
        batch: Batch,
        step: Array,
        loss_state: LossState,
        frozen: tuple[Params, ...],
        whole: tuple[Array, Sums] | None = None,
    ) -> tuple[Array, tuple[Sums, TokenStats, Array | None]]:
        """The loss sum of one (micro-)batch, and its sums, per-token statistics and routing.

        whole: routing [L,R] and sums of the global batch; None: this is all of it.
        """
        hidden, head, routing, teacher = self._both(params, batch, frozen)
        state = {"step": step, "loss_state": loss_state}
        sums, stats = self.loss(hidden, head, batch, teacher=teacher, **state)
        total, config = sums.loss, self.loss.config
        if self.balances and routing is not None:
            counted, over = (routing.sum(0), sums) if whole is None else whole
            shares = balance_sum(routing, counted, over, config.weights.normalize)
            total += config.router_balance * shares
        return total, (sums, stats, routing)

    def observe(self, params: Params, batch: Batch, frozen: tuple[Params, ...]) -> Tokens:
        """What weights read at the head's positions, values only."""
        hidden, head, _, teacher = self._both(params, batch, frozen)
        return self.loss.observe(hidden, head, batch, teacher=teacher)


def make_forward(
    config: Any,
    model: ModelConfig,
    *,
    mesh: Mesh,
    valid_vocab: int | None,
    teacher: TeacherModel | None = None,
    remat: str = "",
) -> Forward:
    """The forward pass that a configuration asks for; remat replaces student.remat."""
    placed = config.train.gradient_sums == "placed"
    head = VocabHead(config.loss.head_chunk, valid_vocab, mesh, placed, model.final_softcap)
    loss = DistillLoss(loss_config(config), head, teacher and teacher.config.final_softcap)
    return Forward(
        model,
        loss,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        gradient_dtype=jnp.dtype(config.train.gradient_dtype),
        remat=remat or config.student.remat,
        teacher=teacher,
        kernel=config.student.attention,
    )
