"""Teacher and student as aligned log-distributions: decided here once, for every divergence.

A full teacher (live) and the student are compared over the vocabulary. A cached teacher knows K
ids and the mass of all others: both sides are compared over K + 1 events, the last one being the
tail bucket, "any other token". The student's tail counts too: renormalised over the K alone it
would be free.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax.losses.events import event_logits
from dcod_jax.losses.head import VocabHead


class TopK(NamedTuple):
    """What a cache holds of the teacher's distribution."""

    ids: Int[Array, "*N K"]
    logprobs: Float[Array, "*N K"]
    tail: Float[Array, "*N"]  # log of the mass of all other tokens


def dense(
    teacher_logits: Float[Array, "*N V"],
    student_logits: Float[Array, "*N V"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "*N V"], Float[Array, "*N V"]]:
    """(log p, log q) over the vocabulary; the logits of both are divided by temperature."""
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_p = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    return log_p, jax.nn.log_softmax(student_logits / temperature, axis=-1)


def buckets(
    teacher: TopK,
    student_logits: Float[Array, "*N V"],
    targets: Int[Array, "*N"],
    head: VocabHead,
    *,
    gradient_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*N E"], Float[Array, "*N E"], Float[Array, "*N"]]:
    """(log p, log q) over the K ids and the tail bucket, E = K + 1, and log q of the targets.

    The teacher's K + 1 numbers are normalised (stored as bfloat16 they miss 1 by a little). The
    student's tail is summed over the other logits, not taken as 1 − Σ, which would lose it where
    Σ is near 1. student_logits are not masked: head.valid_vocab bounds the padding.
    """
    known = jnp.concatenate([teacher.logprobs.astype(jnp.float32), teacher.tail[..., None]], -1)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(known, axis=-1))
    logits, target_logits = event_logits(
        student_logits, teacher.ids, targets, head, gradient_dtype=gradient_dtype
    )
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return log_p, logits - total, target_logits - total[..., 0]
