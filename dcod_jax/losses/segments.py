"""Sums over the segments of packed rows; nothing crosses the border of a segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segment_cumsum(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Running sum that restarts where the segment id changes.

    values [1 1 1 1], segment_ids [1 1 2 2] -> [1 2 1 2]. A segmented scan, not a difference
    of cumulative sums: the values of another segment cannot even change the rounding.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(combine, (starts, values), axis=1)[1]


def segment_total(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sum over the whole segment, the same number at each of its positions."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)

    def combine(later: tuple[Array, Array], here: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] | here[0], jnp.where(here[0], here[1], later[1])

    running = segment_cumsum(values, segment_ids)
    return jax.lax.associative_scan(combine, (ends, running), axis=1, reverse=True)[1]
