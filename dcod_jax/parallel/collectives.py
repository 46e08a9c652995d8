"""Collectives by logical axis, for code that runs on each device's own piece of an array.

`per_shard` runs such code; `gather`, `place` and `across` are for use inside it. The sums of
gradients (`gather_weight`, `sum_shards`) are reduce-scatters in a form that libtpu keeps as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from dcod_jax.parallel.mesh import AXES, RULES, constrain, parts, platform, spec


def per_shard(
    function: Callable[..., Any], mesh: Mesh, inputs: Sequence[Any], output: Sequence[Any]
) -> Callable[..., Any]:
    """Run a function on each device's own piece of arrays with these logical dimensions.

    An input may be a pytree of PartitionSpecs instead; the names of several outputs are a tuple of
    tuples. Kernels that the partitioner cannot split run this way.
    """
    specs = tuple(spec(x) if isinstance(x, tuple) else x for x in inputs)
    several = isinstance(output[0], tuple)
    results: Any = tuple(spec(names) for names in output) if several else spec(output)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)


def gather(x: jax.Array, logical: str, *, dimension: int) -> jax.Array:
    """Inside per_shard: gather a dimension of this logical name; its gradient is scattered."""
    return jax.lax.all_gather(x, RULES[logical], axis=dimension, tiled=True)


def scatter(x: jax.Array, logical: str, *, dimension: int) -> jax.Array:
    """Inside per_shard: the sum over the pieces of this name, of which each keeps its part."""
    return jax.lax.psum_scatter(x, RULES[logical], scatter_dimension=dimension, tiled=True)


def place(mesh: Mesh | None, logical: str) -> jax.Array | int:
    """Inside per_shard: index of the device's piece of a dimension of this logical name."""
    return 0 if parts(mesh, logical) == 1 else jax.lax.axis_index(RULES[logical])


def across(x: jax.Array, *, mesh: Mesh | None, logical: str, largest: bool = False) -> jax.Array:
    """Inside per_shard: the sum (or the largest) of x over the pieces of this logical name."""
    if parts(mesh, logical) == 1:
        return x
    return (jax.lax.pmax if largest else jax.lax.psum)(x, RULES[logical])


def torus_stages(places: np.ndarray) -> list[list[list[int]]]:
    """Groups of positions for a reduce-scatter along the dimensions of a torus, one after another.

    places: coordinates [n, dimensions] of the positions 0..n-1; consecutive positions share a line.
    [[0,0],[0,1],[1,1],[1,0]] -> [[[0,3],[1,2]], [[0,1],[2,3]]]. Places on one line, or in another
    order, are one group.
    """
    for inner in range(2, len(places)):
        if len(places) % inner:
            continue
        rows = places.reshape(-1, inner, places.shape[1])
        fast = (rows != rows[:, :1]).any((0, 1))
        order = np.stack([np.lexsort(row[:, fast].T) for row in rows])
        aligned = np.take_along_axis(rows, order[..., None], axis=1)[..., fast]
        if (aligned == aligned[0]).all():
            positions = np.arange(len(places)).reshape(-1, inner)
            lines = np.take_along_axis(positions, order, axis=1).T
            slow = torus_stages(rows[:, 0, ~fast])
            outer = [[line[g].tolist() for line in lines for g in groups] for groups in slow]
            return [*outer, positions.tolist()]
    return [[list(range(len(places)))]]


def _scatter(x: jax.Array, mesh: Mesh, axes: Sequence[str], *, dimension: int) -> jax.Array:
    """Inside a shard_map: reduce-scatter over mesh axes.

    libtpu turns a reduce-scatter into an all-reduce where it runs along two dimensions of a torus
    at once, or splits another than the major dimension.
    """
    x = jnp.moveaxis(x, dimension, 0)
    for axis in axes:
        if mesh.shape[axis] == 1:
            continue
        line = np.moveaxis(mesh.devices, AXES.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
        stages = [[list(range(len(line)))]]  # all of the axis at once
        if platform(mesh) == "tpu":
            stages = torus_stages(np.array([device.coords for device in line]))
        for groups in stages:
            x = jax.lax.psum_scatter(x, axis, axis_index_groups=groups, tiled=True)
    # Without it the user of the result may have the whole laid out anew before the sum.
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jnp.moveaxis(x, 0, dimension)


def _scatter_parts(x: jax.Array, mesh: Mesh, axes: Sequence[str], *, dimension: int) -> jax.Array:
    """`_scatter` by parts, because libtpu's all-reduce of a large array needs its size again."""
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if devices == 1:
        return x
    x = jnp.moveaxis(x, dimension, 0)
    rows, rest = x.shape[0] // devices, x.shape[1:]
    count = next(n for n in (8, 4, 2, 1) if rows % (8 * n) == 0 or n == 1)  # tiles have 8 rows
    x = x.reshape(devices, count, rows // count, *rest)

    def part(index: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        return _scatter(one.reshape(-1, *rest), mesh, axes, dimension=0)

    done = jax.lax.map(part, jnp.arange(count)).reshape(rows, *rest)
    return jnp.moveaxis(done, 0, dimension)


SPLIT_ANEW = ("embed", "expert_embed")  # dimensions of a weight that are gathered for its use


def whole(names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The logical names of a weight that is gathered for its use."""
    return tuple(None if name in SPLIT_ANEW else name for name in names)


def _split_anew(names: tuple[str, ...]) -> tuple[str, int]:
    """(name, dimension) of the one that is gathered."""
    return next((name, at) for at, name in enumerate(names) if name in SPLIT_ANEW)


class WeightDtypes(NamedTuple):
    """In which dtypes a float32 weight is used: hashable, static under jit."""

    compute: Any  # operand of matrix products; it is gathered in this one
    gradient: Any  # the weight's gradient, and its sum over devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(
    x: jax.Array, mesh: Mesh, names: tuple[str, ...], dtypes: WeightDtypes
) -> jax.Array:
    """Inside per_shard: a weight rounded to dtypes.compute, whole along SPLIT_ANEW.

    The result has dtypes.gradient, in which its gradient arrives and is summed: scattered along one
    dimension of the torus after another.
    """
    rounded, (name, dimension) = x.astype(dtypes.compute), _split_anew(names)
    return gather(rounded, name, dimension=dimension).astype(dtypes.gradient)


def _gather_weight_backward(
    mesh: Mesh, names: tuple[str, ...], dtypes: WeightDtypes, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    name, dimension = _split_anew(names)
    return (_scatter(gradient, mesh, RULES[name], dimension=dimension).astype(jnp.float32),)


gather_weight.defvjp(
    lambda x, mesh, names, dtypes: (gather_weight(x, mesh, names, dtypes), None),
    _gather_weight_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def whole_weight(
    x: jax.Array, mesh: Mesh | None, names: tuple[str, ...], dtypes: WeightDtypes
) -> jax.Array:
    """As `gather_weight`, outside of per_shard: the partitioner gathers and sums."""
    return constrain(x.astype(dtypes.compute), mesh, *whole(names)).astype(dtypes.gradient)


whole_weight.defvjp(
    lambda x, mesh, names, dtypes: (whole_weight(x, mesh, names, dtypes), None),
    lambda mesh, names, dtypes, _, gradient: (
        constrain(gradient, mesh, *names).astype(jnp.float32),
    ),
)


def sum_shards(
    partials: jax.Array, mesh: Mesh | None, *logical: str, placed: bool = True
) -> jax.Array:
    """[S, ...], a partial sum of each of the "shards" -> their sum [...], split as `logical` says.

    An explicit reduce-scatter: the partitioner would all-reduce later, and keep a whole partial sum
    on every device until then (which not placed leaves it to).
    """
    if mesh is None or mesh.size == 1 or not placed:
        return constrain(partials.sum(axis=0), mesh, *logical)
    shards = RULES["shards"]
    own = [tuple(axis for axis in RULES.get(name, ()) if axis in shards) for name in logical]
    kept = [tuple(axis for axis in RULES.get(name, ()) if axis not in shards) for name in logical]
    rest = tuple(axis for axis in shards if not any(axis in axes for axes in own))

    def add(x: jax.Array) -> jax.Array:
        x = x.sum(axis=0)
        for dimension, axes in enumerate(own):
            if axes:
                x = _scatter_parts(x, mesh, axes, dimension=dimension)
        return jax.lax.psum(x, rest)

    inputs = PartitionSpec(shards, *(axes or None for axes in kept))
    split = spec(logical)
    return jax.shard_map(add, mesh=mesh, in_specs=inputs, out_specs=split, check_vma=False)(
        partials
    )
