"""Mesh, logical-to-mesh rules and shardings; the only file that names mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dcod_jax.types import DcodError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a model or batch -> mesh axes it is split over. One table, read by everything.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}  # every other name (layers, length, head_dim, norm) is replicated


def make_mesh(
    data: int = -1, fsdp: int = 1, *, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh of axes (data, fsdp, tensor); one of the sizes may be -1 and fills what is left.

    Raises DcodError with the arithmetic when the sizes do not multiply to the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
    if bad or len(free) > 1:
        raise DcodError(f"mesh sizes {sizes}: each must be >= 1, and at most one may be -1 (fill)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    total = math.prod(sizes.values())
    if total != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise DcodError(
            f"mesh.{product} = {total}, but there are {len(devices)} devices; "
            f"set mesh.{free[0] if free else 'data'} or the other axes so that the product matches"
        )
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(logical: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names.

    spec(("batch", None)) -> P(("data", "fsdp"), None). A mesh axis is used once; when two
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


def tree_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Shardings of a pytree of logical-axis tuples (see models/transformer.py:logical_axes)."""
    return jax.tree.map(
        lambda axes: sharding(mesh, axes), logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def shards(mesh: Mesh | None, logical: str) -> int:
    """Number of pieces a dimension of this logical name is split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES[logical])


def batch_shards(mesh: Mesh | None) -> int:
    """Number of pieces the batch dimension is split into."""
    return shards(mesh, "batch")


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """Pin x to the rules' sharding inside jit; without a mesh it is the identity."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, logical))


def check_divides(mesh: Mesh, dimensions: dict[str, tuple[str, int]]) -> None:
    """Refuse sizes that the mesh cannot split: {"config key": (logical axis, size)}.

    Raises DcodError naming the key, the size and the product of the mesh axes.
    """
    for key, (logical, size) in dimensions.items():
        axes = RULES.get(logical, ())
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise DcodError(
                f"{key}={size} must be a multiple of {parts} "
                f"(mesh axes {' * '.join(f'{a}={mesh.shape[a]}' for a in axes)}); "
                f"change {key} or mesh.{axes[0]}"
            )
