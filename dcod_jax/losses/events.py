"""The student's logits of K + 1 events: the K ids that a cache knows of the teacher, and the rest.

The rest is summed over the other V - K logits. Which those are is told by bits, not by a second
array of V: the vocabulary is cut into at most 8 planes of W entries, and bit b of word w stands
for the entry b·W + w. A plane is a slice of the logits beside the same W words. So a pass over the
logits costs what it costs without a mask, and the gradient is the only other array of their size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes

MASKED_LOGIT = -1e30  # of entries that do not count: probability 0, and finite so that 0 * it is 0
PLANES = 8  # as many bits of a word; more would save little memory and cost compile time
LANES = 128  # a plane begins where a tile of a TPU does


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static under jit.

    mesh: the logits are [S, rows, Tc, V], split over it as in the head; None: they are whole.
    gradient_dtype: what the logits' gradient is rounded to, as the head does with it anyway.
    """

    valid_vocab: int | None = None  # entries from here on belong to no event
    mesh: Mesh | None = None
    gradient_dtype: Any = jnp.float32

    def on_each_device(self, function: Any, *inputs: tuple[Array, bool], wide: bool = False) -> Any:
        """The function on a device's own piece; inputs are (array, whether it is as wide as V)."""
        arrays = [array for array, _ in inputs]
        if self.mesh is None or self.mesh.size == 1:
            return function(*arrays)
        names = {True: ("shards", None, None, "vocab"), False: ("shards", None, None, None)}
        specs = [names[as_wide][: array.ndim] for array, as_wide in inputs]
        return collectives.per_shard(function, self.mesh, specs, names[wide])(*arrays)

    def piece(self, vocab: int) -> tuple[Array | int, Array | int]:
        """(first entry of this device's piece of the vocabulary, entries of it that count)."""
        whole = vocab * meshes.parts(self.mesh, "vocab")
        first = collectives.place(self.mesh, "vocab") * vocab
        return first, (whole if self.valid_vocab is None else self.valid_vocab) - first


def _at(ids: Int[Array, "*N K"]) -> tuple[Array, ...]:
    """Index of these places in the last dimension of an array [*N, ...]."""
    return (*jnp.indices(ids.shape, sparse=True)[:-1], ids)


def _local(ids: Array, first: Array | int, vocab: int) -> Array:
    """Ids counted from a piece's first entry; `vocab` for those of other pieces."""
    inside = (ids >= first) & (ids < first + vocab)
    return jnp.where(inside, ids - first, vocab)


def _planes(
    ids: Int[Array, "*N K"], vocab: int, valid: Array | int
) -> Iterator[tuple[slice, Bool[Array, "*N W"]]]:
    """(slice of the vocabulary, which of its entries belong to the rest), plane after plane.

    ids: distinct, except where they are `vocab`, which is none.
    """
    width = -(-vocab // (PLANES * LANES)) * LANES
    bits = jnp.where(ids < vocab, jnp.int32(1) << (ids // width), 0)
    words = jnp.zeros((*ids.shape[:-1], width), jnp.int32).at[_at(ids % width)].add(bits)
    for plane in range(-(-vocab // width)):
        here = slice(plane * width, min((plane + 1) * width, vocab))
        free = (words[..., : here.stop - here.start] >> plane) & 1 == 0
        entry = jax.lax.broadcasted_iota(jnp.int32, free.shape, free.ndim - 1)
        yield here, free & (entry < valid - here.start)


def _forward_piece(layout: Layout, logits: Array, ids: Array, targets: Array) -> Array:
    """[*N, K + 2]: the logits of the ids, of the rest and of the target."""
    vocab = logits.shape[-1]
    first, valid = layout.piece(vocab)
    total = functools.partial(collectives.across, mesh=layout.mesh, logical="vocab")
    asked = _local(jnp.concatenate([ids, targets[..., None]], -1), first, vocab)
    chosen = total(logits.at[_at(asked)].get(mode="fill", fill_value=0.0))
    planes = list(_planes(asked[..., :-1], vocab, valid))
    rest = [jnp.where(free, logits[..., here], MASKED_LOGIT) for here, free in planes]
    highest = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in rest])
    highest = total(highest, largest=True)
    summed: Any = sum(jnp.exp(part - highest).sum(-1, keepdims=True) for part in rest)
    rest_logit = highest + jnp.log(total(summed))
    return jnp.concatenate([chosen[..., :-1], rest_logit, chosen[..., -1:]], -1)


def _backward_piece(
    layout: Layout, logits: Array, ids: Array, targets: Array, rest: Array, cotangents: Array
) -> Array:
    """[*N, V]: each entry of the rest has its share of the rest's cotangent."""
    vocab = logits.shape[-1]
    first, valid = layout.piece(vocab)
    asked = _local(jnp.concatenate([ids, targets[..., None]], -1), first, vocab)
    of_ids, of_rest, of_target = jnp.split(cotangents, [ids.shape[-1], ids.shape[-1] + 1], -1)
    gradient = jnp.concatenate(
        [
            jnp.where(free, jnp.exp(logits[..., here] - rest) * of_rest, 0.0)
            for here, free in _planes(asked[..., :-1], vocab, valid)
        ],
        -1,
    ).astype(layout.gradient_dtype)
    own = jnp.concatenate([of_ids, of_target], -1).astype(layout.gradient_dtype)
    return gradient.at[_at(asked)].add(own, mode="drop").astype(logits.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _events(layout: Layout, logits: Array, ids: Array, targets: Array) -> Array:
    piece = functools.partial(_forward_piece, layout)
    return layout.on_each_device(piece, (logits, True), (ids, False), (targets, False))


def _events_forward(
    layout: Layout, logits: Array, ids: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    found: Any = _events(layout, logits, ids, targets)
    return found, (logits, ids, targets, found[..., -2:-1])


def _events_backward(
    layout: Layout, residuals: tuple[Array, ...], cotangents: Array
) -> tuple[Array, None, None]:
    piece = functools.partial(_backward_piece, layout)
    logits, *narrow = residuals
    inputs = ((logits, True), *((array, False) for array in (*narrow, cotangents)))
    return layout.on_each_device(piece, *inputs, wide=True), None, None


_events.defvjp(_events_forward, _events_backward)


def event_logits(
    logits: Float[Array, "*N V"],
    ids: Int[Array, "*N K"],
    targets: Int[Array, "*N"],
    layout: Layout,
) -> tuple[Float[Array, "*N E"], Float[Array, "*N"]]:
    """(logits of the K ids and of the rest, E = K + 1; logits of the targets), float32.

    logits: of the whole vocabulary, padded entries as they come (layout.valid_vocab tells them).
    The ids of a token are distinct. logsumexp of the first result is that of the vocabulary.
    Differentiable in logits.
    """
    found: Any = _events(layout, logits.astype(jnp.float32), ids, targets)
    return found[..., :-1], found[..., -1]
