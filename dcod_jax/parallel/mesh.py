"""Mesh, logical-to-mesh rules and shardings; the only file that names mesh axes.

Axes, the slowest network first: `slices` replicates over the data-centre network and carries one
gradient all-reduce a step, nothing else; `data` replicates inside a slice; `fsdp` splits parameters
and batch; `expert` splits the experts of a layer, and all else like fsdp; `context` splits the
positions of a row (and the parameters, like fsdp); `tensor` splits heads, mlp and vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from dcod_jax.errors import DcodError

AXES = ("slices", "data", "fsdp", "expert", "context", "tensor")

# Logical axis of a model or batch -> mesh axes it is split over. One table, read by everything.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slices", "data", "fsdp", "expert"),
    "replica": ("slices", "data"),  # of "batch", what does not split parameters
    "length": ("context",),
    "shards": ("slices", "data", "fsdp", "expert", "context"),  # batch and length in one dimension
    "embed": ("fsdp", "expert", "context"),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),  # of an expert's matrices
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
    expert: int = 1,
    context: int = 1,
    slices: int = -1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Mesh of AXES; one of data, fsdp, expert, context and tensor may be -1 and fills what is left.

    slices: TPU slices joined by the data-centre network, -1 for as many as the devices report;
    devices that report none (CPU, GPU) are taken as equal contiguous groups. Raises DcodError with
    the arithmetic when the sizes do not multiply to the device count, or slices is not theirs.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
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
        product = " * ".join(f"{name}={sizes[name]}" for name in _shown(sizes, AXES))
        raise DcodError(
            f"mesh.{product} = {total}, but there are {len(devices)} devices; "
            f"set mesh.{free[0] if free else 'data'} or the other axes so that the product matches"
        )
    shape = tuple(sizes[name] for name in AXES)
    return Mesh(_arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shown(sizes: Mapping[str, int], axes: Sequence[str]) -> list[str]:
    """The axes that a message names: most meshes split neither slices nor experts."""
    return [name for name in axes if sizes[name] > 1 or name not in ("slices", "expert")]


def _reported(devices: Sequence[Any]) -> int:
    """Number of TPU slices that the devices report; those of a single slice may report none."""
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
    """Devices in the mesh's shape; neighbours on the inner axes are linked directly."""
    if devices[0].platform != "tpu":
        # Such devices report no slices: contiguous groups in the given order are the slices.
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
    # One axis is the whole slice: row by row, not in a ring, for collectives.torus_stages.
    rows = [sorted(part, key=lambda chip: chip.coords) for part in laid_out.reshape(slices, -1)]
    return np.array(rows, dtype=object).reshape(shape)


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """The mesh's devices in their order with `tensor` pieces; all others become data."""
    shape = (mesh.shape["slices"], -1, 1, 1, 1, tensor)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def memory(mesh: Mesh) -> float:
    """Bytes of memory of a device of the mesh; infinite where it does not say (CPU)."""
    own = next(x for x in mesh.devices.flat if x.process_index == jax.process_index())
    return float((own.memory_stats() or {}).get("bytes_limit", math.inf))


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


def put(x: Any, layout: Sharding | None) -> jax.Array:
    """Place a value that every process has on devices, others' too; every process must call it."""
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


def batch_shards(mesh: Mesh | None) -> int:
    """Number of pieces the batch dimension is split into."""
    return parts(mesh, "batch")


def describe(mesh: Mesh, logical: str) -> str:
    """The mesh axes that a logical axis is split over: "slices=2 * data=4 * fsdp=4"."""
    axes = RULES[logical] if len(RULES[logical]) == 1 else _shown(mesh.shape, RULES[logical])
    return " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


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


def check_divides(mesh: Mesh, dimensions: dict[str, tuple[str, int]]) -> None:
    """Refuse sizes that the mesh cannot split: {"config key": (logical axis, size)}."""
    for key, (logical, size) in dimensions.items():
        pieces = parts(mesh, logical)
        if size % pieces:
            single = len(RULES[logical]) == 1
            raise DcodError(
                f"{key}={size} must be a multiple of {'' if single else f'{pieces} = '}"
                f"mesh.{describe(mesh, logical)}; change {key} or mesh.{RULES[logical][0]}"
            )
