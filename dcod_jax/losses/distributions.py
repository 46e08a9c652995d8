"""Teacher and student as aligned log-distributions: decided here once, for every divergence.

A full teacher (live) and the student are compared over the vocabulary. A cached teacher knows K
ids and the mass of all others: both sides are compared over K + 1 events, the last one being the
tail bucket, "any other token". The student's tail counts too: renormalised over the K alone it
would be free.

The tail is summed over the other V - K logits. Bits say which those are, not a second array of V:
the vocabulary is cut into at most 8 planes of W entries, and bit b of word w stands for the entry
b·W + w. A plane is a slice of the logits beside the same W words. So a pass over the logits costs
as much as one without a mask, and the gradient is the only other array of their size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.losses.head import MASKED_LOGIT, VocabHead
from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes

PLANES = 8  # as many bits of a word; more would save little memory and cost compile time
LANES = 128  # a plane begins where a tile of a TPU does


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


# ---------------------------------------------------------------- the logits of K + 1 events


def _on_each_device(head: VocabHead, function: Any, *inputs: Array, wide: bool = False) -> Any:
    """The function on each device's piece; its first input, and a `wide` result, have V."""
    if head.mesh is None or head.mesh.size == 1:
        return function(*inputs)
    names = ("shards", None, None, "vocab"), ("shards", None, None, None)
    specs = [names[0], *(names[1][: array.ndim] for array in inputs[1:])]
    return collectives.per_shard(function, head.mesh, specs, names[0 if wide else 1])(*inputs)


def _at(ids: Int[Array, "*N K"]) -> tuple[Array, ...]:
    """Index of these places in the last dimension of an array [*N, ...]."""
    return (*jnp.indices(ids.shape, sparse=True)[:-1], ids)


def _local(
    head: VocabHead, vocab: int, ids: Int[Array, "*N K"], targets: Int[Array, "*N"]
) -> tuple[Array, Array | int]:
    """Ids and targets [*N, K + 1] counted from this device's first entry; entries that count.

    vocab: the width of this device's piece. An id of another piece is `vocab`.
    """
    first = collectives.place(head.mesh, "vocab") * vocab
    ids = jnp.concatenate([ids, targets[..., None]], -1)
    inside = (ids >= first) & (ids < first + vocab)
    whole = vocab * meshes.parts(head.mesh, "vocab")
    valid = whole if head.valid_vocab is None else head.valid_vocab
    return jnp.where(inside, ids - first, vocab), valid - first


def _planes(
    ids: Int[Array, "*N K"], vocab: int, valid: Array | int
) -> Iterator[tuple[slice, Bool[Array, "*N W"]]]:
    """(slice of the vocabulary, which of its entries belong to the rest), plane after plane."""
    width = -(-vocab // (PLANES * LANES)) * LANES
    bits = jnp.where(ids < vocab, jnp.int32(1) << (ids // width), 0)
    words = jnp.zeros((*ids.shape[:-1], width), jnp.int32).at[_at(ids % width)].add(bits)
    for plane in range(-(-vocab // width)):
        here = slice(plane * width, min((plane + 1) * width, vocab))
        free = (words[..., : here.stop - here.start] >> plane) & 1 == 0
        entry = jax.lax.broadcasted_iota(jnp.int32, free.shape, free.ndim - 1)
        yield here, free & (entry < valid - here.start)


def _forward_piece(head: VocabHead, logits: Array, ids: Array, targets: Array) -> Array:
    """[*N, K + 2]: the logits of the ids, of the rest and of the target."""
    vocab = logits.shape[-1]
    asked, valid = _local(head, vocab, ids, targets)
    total = functools.partial(collectives.across, mesh=head.mesh, logical="vocab")
    chosen = total(logits.at[_at(asked)].get(mode="fill", fill_value=0.0))
    planes = list(_planes(asked[..., :-1], vocab, valid))
    rest = [jnp.where(free, logits[..., here], MASKED_LOGIT) for here, free in planes]
    highest = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in rest])
    highest = total(highest, largest=True)
    summed: Any = sum(jnp.exp(part - highest).sum(-1, keepdims=True) for part in rest)
    rest_logit = highest + jnp.log(total(summed))
    return jnp.concatenate([chosen[..., :-1], rest_logit, chosen[..., -1:]], -1)


def _backward_piece(
    head: VocabHead,
    dtype: DTypeLike,
    logits: Array,
    ids: Array,
    targets: Array,
    rest: Array,
    cotangents: Array,
) -> Array:
    """[*N, V]: each entry of the rest has its share of the rest's cotangent."""
    vocab = logits.shape[-1]
    asked, valid = _local(head, vocab, ids, targets)
    of_ids, of_rest, of_target = jnp.split(cotangents, [ids.shape[-1], ids.shape[-1] + 1], -1)
    planes = [
        jnp.where(free, jnp.exp(logits[..., here] - rest) * of_rest, 0.0)
        for here, free in _planes(asked[..., :-1], vocab, valid)
    ]
    gradient = jnp.concatenate(planes, -1).astype(dtype)
    own = jnp.concatenate([of_ids, of_target], -1).astype(dtype)
    return gradient.at[_at(asked)].add(own, mode="drop").astype(logits.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _events(head: VocabHead, dtype: DTypeLike, logits: Array, ids: Array, targets: Array) -> Array:
    return _on_each_device(head, functools.partial(_forward_piece, head), logits, ids, targets)


def _events_forward(
    head: VocabHead, dtype: DTypeLike, logits: Array, ids: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    found: Any = _events(head, dtype, logits, ids, targets)
    return found, (logits, ids, targets, found[..., -2:-1])


def _events_backward(
    head: VocabHead, dtype: DTypeLike, residuals: tuple[Array, ...], cotangents: Array
) -> tuple[Array, None, None]:
    piece = functools.partial(_backward_piece, head, dtype)
    return _on_each_device(head, piece, *residuals, cotangents, wide=True), None, None


_events.defvjp(_events_forward, _events_backward)


def event_logits(
    logits: Float[Array, "*N V"],
    ids: Int[Array, "*N K"],
    targets: Int[Array, "*N"],
    head: VocabHead,
    *,
    gradient_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*N E"], Float[Array, "*N"]]:
    """(logits of the K ids and of the rest, E = K + 1; logits of the targets), float32.

    logits: of the whole vocabulary; those of padding rows, which head.valid_vocab bounds, belong to
    no event. The ids of a token are distinct. logsumexp of the first result is that of the
    vocabulary. Differentiable in logits; the gradient is rounded to gradient_dtype, as the head
    rounds it anyway.
    """
    dtype = jnp.dtype(gradient_dtype)
    found: Any = _events(head, dtype, logits.astype(jnp.float32), ids, targets)
    return found[..., :-1], found[..., -1]
