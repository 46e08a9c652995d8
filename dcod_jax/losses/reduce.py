"""The only place that averages: sums over the global batch, divided once.

The gradient is taken of the sum, micro-batches are added, and the division by the global
divisor comes last; so packing, padding, micro-batching and devices change the result by rounding
only. All sums here are float32. Between devices gradients are summed in train.gradient_dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Per-token values that the loss yields on the way; they carry no gradient."""

    student_logprobs: Float[Array, "*N"]  # log q(y)
    teacher_logprobs: Float[Array, "*N"]  # log p(y); 0 where no teacher was asked
    weights: Float[Array, "*N"]  # final, before the batch normalisation
    divergence: Float[Array, "*N"]  # unweighted, without the nll share of loss.alpha
    loss: Float[Array, "*N"]  # w·d, as it is summed
    extra: Float[Array, "*N"] | None = None  # what else the weights read (weights.Tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over completion tokens (m is the loss mask, w the weight, d the per-token loss)."""

    loss: Float[Array, ""]  # Σ w·d·m
    nll: Float[Array, ""]  # Σ nll·m
    divergence: Float[Array, ""]  # Σ divergence·m, unweighted
    weight: Float[Array, ""]  # Σ w·m
    read: Float[Array, ""]  # of all that weights read; finite where each of it is
    count: Int[Array, ""]  # Σ m
    tokens: Int[Array, ""]  # of the rows, without padding


_BASE = 1024  # whole numbers are summed as two float32 digits: exact for 16,384 rows


def token_sums(
    stats: TokenStats, loss_mask: Bool[Array, "B C"], segment_ids: Int[Array, "B T"]
) -> Sums:
    """Sums of one batch from the head's per-token values; the segments are of the whole rows.

    A row's sums are added to the other rows' as one vector, on several devices by one collective.
    """
    counts = loss_mask.sum(-1, dtype=jnp.int32), (segment_ids > 0).sum(-1, dtype=jnp.int32)
    read = stats.student_logprobs + stats.teacher_logprobs
    read = read if stats.extra is None else read + stats.extra
    values = (stats.loss, -stats.student_logprobs, stats.divergence, stats.weights, read)
    rows = [jnp.where(loss_mask, value, 0.0).sum(-1) for value in values]
    rows += [digit.astype(jnp.float32) for n in counts for digit in (n // _BASE, n % _BASE)]
    *sums, high, low, all_high, all_low = jnp.stack(rows).sum(-1)

    def whole(high: Array, low: Array) -> Array:
        return high.astype(jnp.int32) * _BASE + low.astype(jnp.int32)

    return Sums(*sums, count=whole(high, low), tokens=whole(all_high, all_low))


def zero() -> Sums:
    """The neutral element of `add`."""
    nothing = jnp.zeros((), jnp.float32)
    none = jnp.zeros((), jnp.int32)
    return Sums(*[nothing] * 5, count=none, tokens=none)


def add(left: Sums, right: Sums) -> Sums:
    """Sums of two batches taken together."""
    return jax.tree.map(jnp.add, left, right)


def divisor(sums: Sums, normalize: str) -> Float[Array, ""]:
    """Σ w·m for normalize "mean" (self-normalised importance sampling), else Σ m."""
    return sums.weight if normalize == "mean" else sums.count.astype(jnp.float32)


def inverse_divisor(sums: Sums, normalize: str) -> Float[Array, ""]:
    """1 / divisor.

    0 where the divisor is 0 (no completion token in the batch, or every weight underflowed):
    then the loss and its gradient are 0, and the step changes nothing but the moments.
    """
    total = divisor(sums, normalize)
    usable = total > jnp.finfo(jnp.float32).tiny  # the inverse of a denormal overflows
    return jnp.where(usable, 1.0 / jnp.where(usable, total, 1.0), 0.0)


def finish(sums: Sums, normalize: str) -> Float[Array, ""]:
    """The loss: the weighted sum over the divisor of `normalize`; 0 where the divisor is 0."""
    return sums.loss * inverse_divisor(sums, normalize)


def mean_nll(sums: Sums) -> Float[Array, ""]:
    """Unweighted negative log-likelihood per completion token; NaN (absent) without any."""
    return sums.nll / sums.count.astype(jnp.float32)


def mean_gradients(gradients: Any, sums: Sums, normalize: str) -> Any:
    """Gradient of `finish` from the gradient of the sum (the divisor carries no gradient)."""
    scale = inverse_divisor(sums, normalize)
    return jax.tree.map(lambda gradient: gradient * scale, gradients)
