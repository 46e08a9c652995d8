"""How the tensors of a file become params and back; shared by HF and GGUF files."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jax.typing import DTypeLike

from dcod_jax.errors import DcodError
from dcod_jax.models import lora
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.transformer import declarations, param_shapes
from dcod_jax.types import Params

Form = Literal["hf", "gguf", "peft"]  # peft: the adapters alone; the others hold all else
PEFT = "base_model.model."  # what names in PEFT files begin with
Part = tuple[slice, ...]  # one slice a dimension, each with a start and a stop


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a file, and where it lives in params: a leaf and, if stacked, the layer."""

    name: str
    path: str  # dotted: "layers.mlp.up_proj.kernel"
    layer: int | None
    shape: tuple[int, ...]  # as the file has it
    transposed: bool
    rope_heads: int
    rows: tuple[int, int] | None = None  # (first, all) of a file's tensor that holds several slots

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of the file's whole tensor."""
        return self.shape if self.rows is None else (self.rows[1], *self.shape[1:])

    def within(self, part: Part) -> Part:
        """A part of the slot as a part of the file's tensor."""
        first = 0 if self.rows is None else self.rows[0]
        return (slice(part[0].start + first, part[0].stop + first), *part[1:])

    def num_bytes(self, dtype: DTypeLike) -> int:
        """Bytes of the slot in a file."""
        return math.prod(self.shape) * jnp.dtype(dtype).itemsize


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {"layers.mlp.up_proj.kernel": leaf}."""
    return traverse_util.flatten_dict(params, sep=".")


def _leaves(config: ModelConfig, form: Form) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a file of this form holds."""
    shapes = param_shapes(config)
    return flatten((lora.trained if form == "peft" else lora.frozen)(config, shapes) or shapes)


def slots(config: ModelConfig, form: Form) -> list[Slot]:
    """Every tensor that the model has in a file of this form."""
    declared, found = flatten(declarations(config)), []
    for path, leaf in _leaves(config, form).items():
        one = declared[path]
        stacked = one.axes[0] == "layers"
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if one.transposed else shape
        for layer in range(config.num_layers) if stacked else (None,):
            name = (one.gguf if form == "gguf" else one.hf).format(layer=layer)
            name = PEFT + name if form == "peft" else name
            more = (one.transposed, one.rope_heads, one.rows)
            found.append(Slot(name, path, layer, shape, *more))
    return found


def assemble(
    config: ModelConfig,
    form: Form,
    read: Callable[[Slot, Part], np.ndarray],
    *,
    dtype: DTypeLike,
    shardings: Params | None = None,
) -> Params:
    """Params read tensor by tensor, each device's piece straight from the file.

    read gives a part of a file's tensor in the file's layout. The host holds one piece of one leaf
    at a time, and a process reads no byte that only other processes need.
    """
    targets = flatten(shardings) if shardings is not None else {}
    by_path: dict[str, list[Slot]] = {}
    for slot in slots(config, form):
        by_path.setdefault(slot.path, []).append(slot)

    def piece(path: str, index: Part) -> np.ndarray:
        layers = by_path[path]
        stacked = layers[0].layer is not None
        part = index[1:] if stacked else index
        host = np.empty([at.stop - at.start for at in index], jnp.dtype(dtype))
        for place, slot in enumerate(layers[index[0]] if stacked else layers):
            tensor = read(slot, slot.within(part[::-1] if slot.transposed else part))
            check_finite(slot.name, tensor)
            host[place if stacked else ...] = tensor.T if slot.transposed else tensor
        return host

    return traverse_util.unflatten_dict(
        {
            path: _place(leaf.shape, targets.get(path), functools.partial(piece, path))
            for path, leaf in _leaves(config, form).items()
        },
        sep=".",
    )


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


def _place(
    shape: tuple[int, ...], sharding: Sharding | None, piece: Callable[[Part], np.ndarray]
) -> jax.Array:
    """The array of this sharding; each piece is made once, also where several devices hold it."""
    if sharding is None:
        return jnp.asarray(piece(tuple(slice(0, size) for size in shape)))
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(at.indices(size)[:2] for at, size in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        host = piece(tuple(slice(*bound) for bound in bounds))
        arrays += [jax.device_put(host, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@jax.jit
def _layer_of(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def tensor_of(flat: dict[str, jax.Array], slot: Slot, *, dtype: DTypeLike) -> np.ndarray:
    """One tensor as the file has it, gathered to the host; every process must call it."""
    leaf = flat[slot.path]
    leaf = leaf if slot.layer is None else _layer_of(leaf, slot.layer)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        host = multihost_utils.process_allgather(leaf, tiled=True)
    else:
        host = leaf
    host = np.asarray(host).astype(jnp.dtype(dtype))
    return np.ascontiguousarray(host.T if slot.transposed else host)


def check_structure(config: ModelConfig, params: Params, form: Form) -> None:
    """Refuse params that are not this config's, naming the first leaf that differs."""
    expected = {path: leaf.shape for path, leaf in _leaves(config, form).items()}
    got = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    for path in sorted(expected.keys() | got.keys()):
        if expected.get(path) != got.get(path):
            raise DcodError(
                f"params do not fit the config: {path} should be {expected.get(path, 'absent')}, "
                f"is {got.get(path, 'absent')}"
            )
