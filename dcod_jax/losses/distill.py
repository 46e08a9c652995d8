"""The distillation loss: divergence x weights on the chunked head, as sums over the batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dcod_jax.losses import reduce, weights
from dcod_jax.losses.divergences import DIVERGENCES, target_logprobs
from dcod_jax.losses.head import TokenLoss, TokenStats, head_loss, token_logprobs
from dcod_jax.losses.reduce import Sums
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.types import Batch, DcodError


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """loss.* of the configuration; defaults and meanings are in configs/base.py."""

    divergence: str
    head_chunk: int
    weights: WeightConfig


def config_errors(cfg: LossConfig) -> list[DcodError]:
    """What is wrong with the configuration, one error for each key; empty when it is fine."""
    errors = []
    if cfg.divergence not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        errors.append(
            DcodError(f"loss.divergence={cfg.divergence!r} is not known; choose one of {known}")
        )
    if cfg.head_chunk < 1:
        errors.append(DcodError(f"loss.head_chunk={cfg.head_chunk} must be >= 1"))
    return errors + weights.config_errors(cfg.weights)


def _token_loss(cfg: LossConfig, *, weighed: bool) -> TokenLoss:
    """w·d per token. Weights are read from aux where a pass before has weighed the tokens; else
    they are formed from the piece's own log q, which costs nothing more than the loss.
    """
    divergence = DIVERGENCES[cfg.divergence]

    def token_loss(
        logits: Array, targets: Array, aux: dict[str, Array], step: Array
    ) -> tuple[Array, TokenStats]:
        logprobs = target_logprobs(logits, targets)
        loss = divergence(logprobs, logits, aux)
        if weighed:
            weight = aux["weights"]
        else:
            raw = weights.token_weights(cfg.weights, logprobs, aux["teacher_logprobs"])
            weight = weights.warm(cfg.weights, raw, step)
        return weight * loss, TokenStats(student_logprobs=logprobs, weights=weight)

    return token_loss


def distill_loss(
    cfg: LossConfig,
    hidden: Float[Array, "B T D"],
    head_weight: Float[Array, "V D"],
    batch: Batch,
    *,
    step: Int[Array, ""] | int,
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
) -> tuple[Sums, TokenStats]:
    """Sums over the batch, of which `loss` is differentiable, and the per-token statistics.

    Weights are 0 outside the loss mask. Prefix and sequence scopes and the sequence
    normalisation need log q of other tokens first: one more pass over the logits, values
    only. Token weights do not pay for it.
    """
    options: dict[str, Any] = {"chunk": cfg.head_chunk, "mesh": mesh, "valid_vocab": valid_vocab}
    aux = {"teacher_logprobs": batch.teacher_logprobs}
    weighed = weights.needs_logprob_pass(cfg.weights)
    if weighed:
        logprobs = token_logprobs(hidden, head_weight, batch.targets, **options)
        aux["weights"] = weights.weigh(
            cfg.weights, logprobs, batch.teacher_logprobs, batch.loss_mask, batch.segment_ids, step
        )
    total, stats = head_loss(
        hidden,
        head_weight,
        batch.targets,
        batch.loss_mask,
        aux,
        _token_loss(cfg, weighed=weighed),
        shared=jnp.asarray(step, jnp.int32),
        **options,
    )
    final = jnp.where(batch.loss_mask, stats.weights, 0.0)
    sums = reduce.token_sums(total, stats.student_logprobs, final, batch.loss_mask)
    return sums, TokenStats(student_logprobs=stats.student_logprobs, weights=final)
