"""Teacher and student as aligned log-distributions: decided here once, for every divergence.

A full teacher (live) and the student are compared over the vocabulary. A cached teacher knows K
ids and the mass of all others: both sides are compared over K + 1 events, the last one being "any
other token". The student's tail counts too: renormalised over the K alone it would be free.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dcod_jax.losses.events import MASKED_LOGIT, Layout, event_logits


def mask_padding(logits: Float[Array, "*N V"], valid_vocab: int | None) -> Float[Array, "*N V"]:
    """Logits with probability 0 on rows of the vocabulary that the tokenizer does not have."""
    if valid_vocab is None or valid_vocab >= logits.shape[-1]:
        return logits
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(vocabulary < valid_vocab, logits, MASKED_LOGIT)


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
    ids: Int[Array, "*N K"],
    logprobs: Float[Array, "*N K"],
    tail: Float[Array, "*N"],
    student_logits: Float[Array, "*N V"],
) -> tuple[Float[Array, "*N E"], Float[Array, "*N E"]]:
    """(log p, log q) over the K ids and the tail, E = K + 1.

    The teacher's K + 1 numbers are normalised (stored as bfloat16 they miss 1 by a little). The
    student's tail is summed over the other logits, not taken as 1 − Σ, which would lose it where
    Σ is near 1; its log-softmax over the K + 1 is then its distribution over the events.
    """
    return buckets_and_target(ids, logprobs, tail, student_logits, ids[..., 0], Layout())[:2]


def buckets_and_target(
    ids: Int[Array, "*N K"],
    logprobs: Float[Array, "*N K"],
    tail: Float[Array, "*N"],
    student_logits: Float[Array, "*N V"],
    targets: Int[Array, "*N"],
    layout: Layout,
) -> tuple[Float[Array, "*N E"], Float[Array, "*N E"], Float[Array, "*N"]]:
    """`buckets`, and log q of the targets, which no pass of its own over the logits is needed for.

    student_logits: not masked; layout.valid_vocab says what of them is padding.
    """
    known = jnp.concatenate([logprobs.astype(jnp.float32), tail[..., None]], axis=-1)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(known, axis=-1))
    logits, target_logits = event_logits(student_logits, ids, targets, layout)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return log_p, logits - total, target_logits - total[..., 0]
