"""cuDNN's flash attention over packed rows: a segment is a sequence with an offset and a length.

Scores never leave the chip, and a segment costs the square of its own length only. cuDNN is
compiled for a most number of segments in a row, and its statistics take as many planes. The rows
say at run time which of a few sizes is called; a row with still more segments is computed by the
caller's own blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dcod_jax.parallel import mesh as meshes

MOST_SEGMENTS = (8, 64)  # of a row, the padding counted: a call is compiled for each
WIDEST_HEAD = 128  # cuDNN's backward pass takes wider heads on some chips only
OLDEST = 9.0  # compute capability (Hopper) from which cuDNN takes offsets

# (query, key, value, segment_ids) -> the mixed heads.
Kernel = Callable[[Array, Array, Array, Array], Array]


def refusal(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh | None, *, softcap: float | None = None
) -> str:
    """Why cuDNN cannot take queries [B, N, T, H] of this dtype on this mesh; "" where it can."""
    B, N, T, H = shape
    if softcap is not None:
        return f"it has no soft cap of scores (the model's is {softcap})"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}; set student.compute_dtype"
    if H % 8 or H > WIDEST_HEAD:
        return f"head_dim={H} must be a multiple of 8, at most {WIDEST_HEAD}"
    if meshes.parts(mesh, "length") > 1:
        return f"it takes whole rows; mesh.context={meshes.parts(mesh, 'length')} must be 1"
    size = B * T * N * H // (meshes.parts(mesh, "batch") * meshes.parts(mesh, "heads"))
    if size >= 2**31:
        return f"{size} numbers of a device's queries are beyond its int32 offsets; split the batch"
    if mesh is None or (device := device_of(mesh)).platform != "gpu":
        return "it needs an NVIDIA GPU"
    if float(device.compute_capability) < OLDEST:
        return f"packed rows need compute capability {OLDEST}, not {device.compute_capability}"
    return ""


def device_of(mesh: Mesh) -> Any:
    """A device of the mesh, which need not be of the host's own backend."""
    return mesh.devices.flat[0]


def runs(segment_ids: Int[Array, "B T"], most: int) -> tuple[Array, Array]:
    """(offsets [B, most + 1], lengths [B, most]) of the runs of equal ids, -1 where there is none.

    [[1, 1, 2, 0]], 4 -> ([[0, 2, 3, -1, -1]], [[2, 1, 1, -1]]).
    """
    length = segment_ids.shape[1]
    first = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    first = first.at[:, 0].set(True)
    find = functools.partial(jnp.nonzero, size=most, fill_value=length)
    starts = jax.vmap(lambda row: find(row)[0])(first).astype(jnp.int32)
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    there = starts < length
    offsets = jnp.where(there, starts, -1)
    offsets = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
    return offsets, jnp.where(there, ends - starts, -1)


def _count(segment_ids: Int[Array, "B T"]) -> Int[Array, ""]:
    """The largest number of runs in a row."""
    return 1 + (segment_ids[:, 1:] != segment_ids[:, :-1]).sum(axis=1).max()


def _call(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    most: int,
    scale: float,
    window: int | None,
) -> Array:
    """The kernel for rows of at most `most` segments."""
    # Not public yet: jax.nn.dot_product_attention takes no offsets (jax 0.10 to 0.12).
    from jax._src.cudnn import fused_attention_stablehlo as fused

    offsets, lengths = runs(segment_ids, most)
    # One kv head for each query head: with fewer, jax 0.10 counts the offsets of the keys in
    # query heads, and reads other tokens' keys (jax-ml/jax#39521).
    repeats = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    mixed: Any = fused.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),  # offsets need positions first
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    return jnp.swapaxes(mixed, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _switch(
    kernels: tuple[Kernel, ...], query: Array, key: Array, value: Array, segment_ids: Array
) -> Array:
    """The first of the kernels that takes the rows' segments; the last takes any."""
    index = (_count(segment_ids) > jnp.array(MOST_SEGMENTS)).sum()
    return jax.lax.switch(index, kernels, query, key, value, segment_ids)


def _switch_backward(
    kernels: tuple[Kernel, ...], arrays: tuple[Array, ...], gradient: Array
) -> tuple[Array | None, ...]:
    """Gradients of the kernel that was called; its forward pass is computed again.

    A switch that saved what each of its branches needs would write all of it, for every branch.
    """
    *heads, segment_ids = arrays

    def pull(kernel: Kernel, *inputs: Array) -> tuple[Array, ...]:
        *heads, gradient = inputs
        return jax.vjp(lambda q, k, v: kernel(q, k, v, segment_ids), *heads)[1](gradient)

    index = (_count(segment_ids) > jnp.array(MOST_SEGMENTS)).sum()
    branches = [functools.partial(pull, kernel) for kernel in kernels]
    return *jax.lax.switch(index, branches, *heads, gradient), None


_switch.defvjp(lambda kernels, *arrays: (_switch(kernels, *arrays), arrays), _switch_backward)


def attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    otherwise: Kernel,
) -> Float[Array, "B N T H"]:
    """Causal attention inside each run of equal segment ids, on one device's rows.

    otherwise: takes rows of more segments than MOST_SEGMENTS. Padding (0) is a run as well, so that
    every position is written.
    """
    options = {"scale": scale, "window": window}
    calls = [functools.partial(_call, most=most, **options) for most in MOST_SEGMENTS]
    return _switch((*calls, otherwise), query, key, value, segment_ids)
