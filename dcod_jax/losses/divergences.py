"""Per-token losses from the student's logits; nothing here sums over tokens or knows weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def target_logprobs(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """log q(y) = logits[y] - logsumexp(logits), float32.

    The target's logit is read by comparing with an iota instead of a gather: its transpose is
    then a select that fuses into the softmax of the backward pass (a scatter over V would
    not), and it stays local where V is sharded.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.where(vocabulary == targets[..., None], logits, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def nll(student_logprobs: Float[Array, "*N"], logits: Float[Array, "*N V"], aux: Any) -> Array:
    """-log q(y): supervised fine-tuning."""
    return -student_logprobs


# name -> per-token loss of (log q(y) [*N], student logits [*N V], teacher data of the tokens)
DIVERGENCES: dict[str, Callable[[Array, Array, Any], Array]] = {"nll": nll}
