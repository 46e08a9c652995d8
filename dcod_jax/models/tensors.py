"""How the tensors of a file become params and back; shared by HF and GGUF files."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from dcod_jax.errors import DcodError
from dcod_jax.models import lora
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.transformer import check_mesh, declarations, logical_axes, param_shapes
from dcod_jax.parallel import mesh as meshes
from dcod_jax.types import Params

# peft: the adapters alone; the others hold all else; stacked: HF with the experts in one tensor
FileForm = Literal["hf", "stacked", "gguf", "peft"]
PEFT = "base_model.model."  # what names in PEFT files begin with
Part = tuple[slice, ...]  # one slice a dimension, each with a start and a stop
Bounds = tuple[tuple[int, int], ...]  # of a piece: (start, stop) of each dimension
STAGED = 1 << 24  # bytes that the host holds of a device's piece, unless one layer has more


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a file, and where it lives in params: a leaf and its place there."""

    name: str
    path: str  # dotted: "layers.mlp.up_proj.kernel"
    index: tuple[int, ...]  # of a stacked leaf: (layer,) or (layer, expert)
    shape: tuple[int, ...]  # as the file has it
    transposed: bool
    rope_heads: int
    rows: tuple[int, int] | None = None  # (first, all) of a file's tensor that holds several slots
    expert: tuple[int, int] | None = None  # (index, all) of a tensor that stacks experts

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of the file's whole tensor."""
        shape = self.shape if self.rows is None else (self.rows[1], *self.shape[1:])
        return shape if self.expert is None else (self.expert[1], *shape)

    def within(self, part: Part) -> Part:
        """A part of the slot as a part of the file's tensor."""
        first = 0 if self.rows is None else self.rows[0]
        part = (slice(part[0].start + first, part[0].stop + first), *part[1:])
        return part if self.expert is None else (slice(self.expert[0], self.expert[0] + 1), *part)

    def num_bytes(self, dtype: DTypeLike) -> int:
        """Bytes of the slot in a file."""
        return math.prod(self.shape) * jnp.dtype(dtype).itemsize


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {"layers.mlp.up_proj.kernel": leaf}."""
    return traverse_util.flatten_dict(params, sep=".")


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of flatten."""
    return traverse_util.unflatten_dict(flat, sep=".")


def _leaves(config: ModelConfig, form: FileForm) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a file of this form holds."""
    shapes = param_shapes(config)
    return flatten((lora.trained if form == "peft" else lora.frozen)(config, shapes) or shapes)


def slots(config: ModelConfig, form: FileForm) -> list[Slot]:
    """Every tensor that the model has in a file of this form."""
    declared, found = flatten(declarations(config)), []
    for path, leaf in _leaves(config, form).items():
        one = declared[path]
        depth = sum(axis in ("layers", "experts") for axis in one.axes)
        shape = leaf.shape[depth:]
        shape = shape[::-1] if one.transposed else shape
        name, rows = (one.gguf if form == "gguf" else one.hf), one.rows
        if form == "stacked" and one.stacked:
            name, rows = one.stacked, one.stacked_rows
        name = PEFT + name if form == "peft" else name
        for index in np.ndindex(*leaf.shape[:depth]):
            layer, expert = (*index, None, None)[:2]
            full = name.format(layer=layer, expert=expert)
            place = None
            if form in ("stacked", "gguf") and expert is not None:
                place = (expert, leaf.shape[1])
            more = (one.transposed, one.rope_heads, rows, place)
            found.append(Slot(full, path, index, shape, *more))
    return found


def shardings_of(config: ModelConfig, mesh: Mesh | None) -> Params | None:
    """Of all parameters over the mesh; DcodError where it cannot split them."""
    if mesh is None:
        return None
    check_mesh(config, mesh)
    return meshes.tree_shardings(mesh, logical_axes(config))


def assemble(
    config: ModelConfig,
    form: FileForm,
    read: Callable[[Slot, Part], np.ndarray],
    *,
    dtype: DTypeLike,
    shardings: Params | None = None,
) -> Params:
    """Params read tensor by tensor, each device's piece straight from the file.

    read gives a part of a file's tensor in the file's layout. The host holds one block of one
    device's piece at a time (STAGED), and a process reads no byte that only other processes need.
    """
    targets = flatten(shardings) if shardings is not None else {}
    piece = _piece_reader(config, form, read, dtype=dtype)
    return unflatten(
        {
            path: _place(leaf.shape, dtype, targets.get(path), functools.partial(piece, path))
            for path, leaf in _leaves(config, form).items()
        }
    )


def differing(
    config: ModelConfig,
    form: FileForm,
    read: Callable[[Slot, Part], np.ndarray],
    params: Params,
    *,
    dtype: DTypeLike,
) -> str | None:
    """The first leaf of params that, cast to dtype, is not what read gives, bit for bit; or None.

    A process compares the pieces on its own devices, block by block.
    """
    piece = _piece_reader(config, form, read, dtype=dtype)
    for path, leaf in flatten(params).items():
        for shard in jnp.asarray(leaf).addressable_shards:
            bounds = _bounds(shard.index, leaf.shape)
            for part in blocks(bounds, leaf.dtype) if shard.replica_id == 0 else ():
                found, rows = piece(path, part), shard.data
                if len(found) < len(rows):
                    rows = _rows_program(None)(rows, part[0].start - bounds[0][0], len(found))
                if np.asarray(rows).astype(found.dtype).tobytes() != found.tobytes():
                    return path
    return None


def _piece_reader(
    config: ModelConfig,
    form: FileForm,
    read: Callable[[Slot, Part], np.ndarray],
    *,
    dtype: DTypeLike,
) -> Callable[[str, Part], np.ndarray]:
    """(path of a leaf, part of it) -> that part on the host, read from the file's tensors."""
    by_path: dict[str, list[Slot]] = {}
    for slot in slots(config, form):
        by_path.setdefault(slot.path, []).append(slot)

    def piece(path: str, index: Part) -> np.ndarray:
        depth = len(by_path[path][0].index)
        part = index[depth:]
        host = np.empty([at.stop - at.start for at in index], jnp.dtype(dtype))
        starts = [at.start for at in index[:depth]]
        for slot in by_path[path]:
            if any(not at.start <= i < at.stop for at, i in zip(index, slot.index, strict=False)):
                continue
            tensor = read(slot, slot.within(part[::-1] if slot.transposed else part))
            check_finite(slot.name, tensor)
            tensor = tensor if slot.expert is None else tensor[0]
            place = tuple(i - start for i, start in zip(slot.index, starts, strict=True))
            host[place] = tensor.T if slot.transposed else tensor
        return host

    return piece


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Raise DcodError for a tensor with a value that is no finite number."""
    if tensor.dtype == jnp.bfloat16:  # by its bits, many times faster than numpy's own loop
        exponent = tensor.view(np.uint16) & 0x7F80
        odd = int(np.count_nonzero(exponent == 0x7F80))
    else:
        odd = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
    if odd:
        raise DcodError(
            f"{name}: {odd} of {tensor.size} values are not finite numbers; the file is damaged or "
            "of a training that diverged: use another one"
        )


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    return tuple(at.indices(size)[:2] for at, size in zip(index or (), shape, strict=True))


def blocks(bounds: Bounds, dtype: DTypeLike) -> Iterator[Part]:
    """The piece in blocks of whole rows (layers, where they are stacked) of at most STAGED bytes,
    or of one row.
    """
    (start, stop), *rest = bounds
    row = math.prod(b - a for a, b in rest) * jnp.dtype(dtype).itemsize
    step = max(STAGED // max(row, 1), 1)
    for at in range(start, stop, step):
        yield (slice(at, min(at + step, stop)), *(slice(*bound) for bound in rest))


def _place(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Sharding | None,
    piece: Callable[[Part], np.ndarray],
) -> jax.Array:
    """The array of this sharding; each block is made once, also where several devices hold it."""
    sharding = sharding or SingleDeviceSharding(jnp.zeros(()).device)
    devices: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_bounds(index, shape), []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        parts = list(blocks(bounds, dtype))
        if len(parts) == 1:
            host = piece(parts[0])
            arrays += [jax.device_put(host, device) for device in holders]
            continue
        size = [stop - start for start, stop in bounds]
        made = [jnp.zeros(size, dtype, device=device) for device in holders]
        for part in parts:
            host, first = piece(part), part[0].start - bounds[0][0]
            made = [_with_rows(x, jax.device_put(host, x.device), first) for x in made]
            jax.block_until_ready(made)  # before the next block is read
        arrays += made
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _with_rows(array: jax.Array, rows: jax.Array, first: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, first, axis=0)


@functools.cache
def _rows_program(layout: Sharding | None) -> Callable[..., jax.Array]:
    """(array, first, count, expert) -> so many rows, placed so; the array keeps no host copy.

    expert: index in the second dimension of an array that stacks them.
    """

    def rows(
        array: jax.Array, first: int | jax.Array, count: int, *expert: int | jax.Array
    ) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(array, first, count, axis=0)
        for index in expert:
            part = jax.lax.dynamic_index_in_dim(part, index, axis=1, keepdims=False)
        return part

    return jax.jit(rows, static_argnums=2, out_shardings=layout)


def tensor_of(flat: dict[str, Any], *parts: Slot, dtype: DTypeLike) -> np.ndarray | None:
    """One tensor as the file has it, of all slots that it holds; None on other processes.

    Every process must call it: they gather the blocks of an array of several processes' devices
    together, and the first one alone copies them to its host.
    """
    shape = parts[0].file_shape if jax.process_index() == 0 else (0,) * len(parts[0].shape)
    host = np.empty(shape, jnp.dtype(dtype))
    for slot in parts:
        rows = host[slot.within(tuple(slice(0, size) for size in slot.shape))]
        _copy(flat[slot.path], slot, rows.reshape(rows.shape[-len(slot.shape) :]))
    return host if jax.process_index() == 0 else None


def _copy(leaf: Any, slot: Slot, host: np.ndarray) -> None:
    """The slot of a leaf into rows of its tensor, block by block; on the first process alone."""
    keeps, layout = jax.process_index() == 0, None
    apart = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if apart:
        layout = meshes.sharding(cast(Any, leaf.sharding).mesh, ())
    elif not keeps:
        return
    first, count = (slot.index[0], 1) if slot.index else (0, len(leaf))
    view = host.T if slot.transposed else host
    view = view[None] if slot.index else view
    rest = leaf.shape[max(len(slot.index), 1) :]
    bounds = ((first, first + count), *((0, size) for size in rest))
    for part in blocks(bounds, leaf.dtype):
        start, stop = part[0].start, part[0].stop
        rows = _rows_program(layout)(leaf, start, stop - start, *slot.index[1:])
        if keeps:
            view[start - first : stop - first] = rows.addressable_data(0) if apart else rows


def check_structure(config: ModelConfig, params: Params, form: FileForm) -> None:
    """Refuse params that are not this config's, naming the first leaf that differs."""
    expected = {path: leaf.shape for path, leaf in _leaves(config, form).items()}
    got = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    for path in sorted(expected.keys() | got.keys()):
        if expected.get(path) != got.get(path):
            raise DcodError(
                f"params do not fit the config: {path} should be {expected.get(path, 'absent')}, "
                f"is {got.get(path, 'absent')}"
            )
