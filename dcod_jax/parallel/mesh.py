"""Mesh, logical-to-mesh rules and shardings; the only file that names mesh axes.

Axes, the slowest network first: `slices` replicates over the data-centre network and carries one
gradient all-reduce a step, nothing else; `data` replicates inside a slice; `fsdp` splits parameters
and batch; `context` splits the positions of a row (and the parameters, like fsdp); `tensor` splits
heads, mlp and vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dcod_jax.errors import DcodError

AXES = ("slices", "data", "fsdp", "context", "tensor")

# Logical axis of a model or batch -> mesh axes it is split over. One table, read by everything.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slices", "data", "fsdp"),
    "replica": ("slices", "data"),  # of "batch", what does not split parameters
    "length": ("context",),
    "shards": ("slices", "data", "fsdp", "context"),  # batch and length folded into one dimension
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}  # every other name (layers, head_dim, norm) is replicated


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    *,
    tensor: int = 1,
    context: int = 1,
    slices: int = -1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Mesh of AXES; one of data, fsdp, context and tensor may be -1 and fills what is left.

    slices: TPU slices joined by the data-centre network, -1 for as many as the devices report;
    devices that report none (CPU, GPU) are taken as equal contiguous groups. Raises DcodError with
    the arithmetic when the sizes do not multiply to the device count, or slices is not theirs.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
    free = [name for name, size in sizes.items() if size == -1]
    if bad or len(free) > 1:
        raise DcodError(f"mesh sizes {sizes}: each must be >= 1, and at most one may be -1 (fill)")
    sizes = {"slices": _count_slices(slices, devices), **sizes}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    total = math.prod(sizes.values())
    if total != len(devices):
        hidden = () if sizes["slices"] > 1 else ("slices",)
        product = " * ".join(f"{name}={sizes[name]}" for name in AXES if name not in hidden)
        raise DcodError(
            f"mesh.{product} = {total}, but there are {len(devices)} devices; "
            f"set mesh.{free[0] if free else 'data'} or the other axes so that the product matches"
        )
    shape = tuple(sizes[name] for name in AXES)
    return Mesh(_arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _reported(devices: Sequence[Any]) -> int:
    """Slices that TPU devices know of; those of a single slice may not say so."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _count_slices(slices: int, devices: Sequence[Any]) -> int:
    reported = _reported(devices)
    if slices == -1:
        return reported
    if slices < 1 or (reported != slices and devices[0].platform == "tpu"):
        raise DcodError(
            f"mesh.slices={slices}, but the {len(devices)} devices are in {reported} TPU slice(s); "
            f"set mesh.slices={reported}, or -1 to take what the devices report"
        )
    return slices


def _arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the mesh's shape: neighbours on the inner axes are neighbours on the wires."""
    if devices[0].platform != "tpu":
        # Contiguous groups of the given order are the slices where the devices know of none.
        return mesh_utils.create_device_mesh(shape, devices)
    slices = shape[0] if _reported(devices) > 1 else 1
    if slices > 1:
        inner, outer = (1, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
        laid_out = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if max(shape[1:]) * slices < len(devices):
        return laid_out
    # One axis is the whole slice: row by row, not in a ring, so that `_scatter` finds its lines.
    rows = [sorted(part, key=lambda chip: chip.coords) for part in laid_out.reshape(slices, -1)]
    return np.array(rows, dtype=object).reshape(shape)


def spec(logical: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names.

    spec(("batch", None)) -> P(("slices", "data", "fsdp"), None). A mesh axis is used once; when two
    dimensions ask for it the first one gets it.
    """
    used: set[str] = set()
    parts: list[Any] = []
    for name in logical:
        axes = tuple(axis for axis in RULES.get(name or "", ()) if axis not in used)
        used.update(axes)
        parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, logical: Sequence[str | None]) -> NamedSharding:
    """NamedSharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, spec(logical))


def put(x: Any, layout: Any) -> jax.Array:
    """A value that every process has, on devices some of which may be other processes'.

    layout: a Sharding, or None for the default device. Every process must call it.
    """
    if layout is None or layout.is_fully_addressable:
        return jax.device_put(x, layout)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), layout))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])


def tree_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Shardings of a pytree of logical-axis tuples (see models/transformer.py:logical_axes)."""
    return jax.tree.map(lambda axes: sharding(mesh, axes), logical_axes, is_leaf=is_names)


def parts(mesh: Mesh | None, logical: str) -> int:
    """Number of pieces a dimension of this logical name is split into; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES.get(logical, ()))


def in_host_memory(layout: NamedSharding) -> NamedSharding:
    """The same split, in the memory of each device's host."""
    return layout.with_memory_kind("pinned_host")


def batch_shards(mesh: Mesh | None) -> int:
    """Number of pieces the batch dimension is split into."""
    return parts(mesh, "batch")


def describe(mesh: Mesh, logical: str) -> str:
    """The mesh axes that a logical axis is split over: "slices=2 * data=4 * fsdp=4"."""
    return " * ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[logical])


def is_names(x: Any) -> bool:
    """Whether x is the logical names of one array: a leaf of a tree of them, for jax.tree.map."""
    return isinstance(x, tuple)


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are (tpu, gpu, cpu), which need not be the host's own backend."""
    return mesh.devices.flat[0].platform


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """Pin x to the rules' sharding inside jit; without a mesh it is the identity."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, logical))


def per_shard(
    function: Callable[..., Any],
    mesh: Mesh,
    inputs: Sequence[Any],
    output: Sequence[Any],
) -> Callable[..., Any]:
    """The function on each device's own piece of arrays with these logical dimensions.

    An input may be a pytree of PartitionSpecs instead; the names of several outputs are a tuple of
    tuples. Kernels that the partitioner cannot split run this way.
    """
    specs = tuple(spec(x) if isinstance(x, tuple) else x for x in inputs)
    several = isinstance(output[0], tuple)
    results: Any = tuple(spec(names) for names in output) if several else spec(output)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)


def gather(x: jax.Array, logical: str, *, dimension: int) -> jax.Array:
    """Inside per_shard: a dimension of this logical name whole again; its gradient is scattered."""
    return jax.lax.all_gather(x, RULES[logical], axis=dimension, tiled=True)


def place(mesh: Mesh | None, logical: str) -> jax.Array | int:
    """Inside per_shard: which piece of a dimension of this logical name the device has, from 0."""
    return 0 if parts(mesh, logical) == 1 else jax.lax.axis_index(RULES[logical])


def across(x: jax.Array, *, mesh: Mesh | None, logical: str, largest: bool = False) -> jax.Array:
    """Inside per_shard: the sum (or the largest) of x over the pieces of this logical name."""
    if parts(mesh, logical) == 1:
        return x
    return (jax.lax.pmax if largest else jax.lax.psum)(x, RULES[logical])


def torus_stages(places: np.ndarray) -> list[list[list[int]]]:
    """Groups of positions for a reduce-scatter along one dimension of a torus after the other.

    places: coordinates [n, dimensions] of the positions 0..n-1, whose runs of consecutive ones go
    through the same line. [[0,0],[0,1],[1,1],[1,0]] -> [[[0,3],[1,2]], [[0,1],[2,3]]]; places on
    one line, or in no such order, are one group.
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
    """Inside a shard_map: the sum over mesh axes, of which a device keeps its own piece.

    libtpu makes an all-reduce of the whole where a reduce-scatter runs along two dimensions of a
    torus at once, or splits what does not lie first in memory.
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
    # Else whoever uses the result may have the whole laid out anew before it is added up.
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jnp.moveaxis(x, 0, dimension)


def _scatter_parts(x: jax.Array, mesh: Mesh, axes: Sequence[str], *, dimension: int) -> jax.Array:
    """`_scatter` of a part of every device's piece at a time: the result of libtpu's all-reduce of
    a large array would be as large again.
    """
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(x: jax.Array, mesh: Mesh, logical: str, dimension: int) -> jax.Array:
    """As `gather`; its gradient is scattered along one dimension of the torus after the other."""
    return gather(x, logical, dimension=dimension)


def _gather_weight_forward(
    x: jax.Array, mesh: Mesh, logical: str, dimension: int
) -> tuple[jax.Array, None]:
    return gather(x, logical, dimension=dimension), None


def _gather_weight_backward(
    mesh: Mesh, logical: str, dimension: int, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (_scatter(gradient, mesh, RULES[logical], dimension=dimension),)


gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def sum_shards(partials: jax.Array, mesh: Mesh | None, *logical: str) -> jax.Array:
    """[S, ...], a partial sum of each of the "shards" -> their sum [...], split as `logical` says.

    An explicit reduce-scatter: the partitioner would make an all-reduce of it and put that off,
    with a whole partial sum kept on every device until then.
    """
    if mesh is None or mesh.size == 1:
        return partials.sum(axis=0)
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


def check_divides(mesh: Mesh, dimensions: dict[str, tuple[str, int]]) -> None:
    """Refuse sizes that the mesh cannot split: {"config key": (logical axis, size)}.

    Raises DcodError naming the key, the size and the product of the mesh axes.
    """
    for key, (logical, size) in dimensions.items():
        pieces = parts(mesh, logical)
        if size % pieces:
            single = len(RULES[logical]) == 1
            raise DcodError(
                f"{key}={size} must be a multiple of {'' if single else f'{pieces} = '}"
                f"mesh.{describe(mesh, logical)}; change {key} or mesh.{RULES[logical][0]}"
            )
