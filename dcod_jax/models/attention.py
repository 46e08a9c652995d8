"""Attention over packed rows: one interface, and the kernel that the mesh's devices have.

    splash    TPU: the Pallas kernel (jax.experimental.pallas.ops.tpu.splash_attention), scores
              never leave the chip; on other devices it is interpreted, exact and very slow
    library   GPU: jax.nn.dot_product_attention with the mask as an array
    blocked   CPU, or no mesh: blocks of queries, each against the keys up to its end

All of them are causal within a segment, take R = N/G query heads per kv head without repeating keys,
and sum and normalise in float32.

Sequence parallelism. Where the mesh splits "length" into c pieces, a row is cut into 2c chunks and
device i holds chunks i and 2c-1-i (`to_shards`): of a causal square every device then has the same
work. Queries stay, keys and values are gathered over the pieces (their gradients are scattered
back); everything outside attention is local to a position.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dcod_jax import mesh as meshes
from dcod_jax.models.layers import attend
from dcod_jax.types import DcodError

KINDS = ("auto", "splash", "library", "blocked")
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64
SPLASH_BLOCKS = (1024, 512, 256, 128)  # the kernel's tiles are multiples of 128 lanes

_HEADS = ("batch", "length", "heads", None)
_KV_HEADS = ("batch", "length", "kv_heads", None)
_IDS = ("batch", "length")


def choose(kind: str, mesh: Mesh | None) -> str:
    """The kernel for the mesh's devices (not the host's: a program may be compiled for others)."""
    if kind not in KINDS:
        raise DcodError(f"attention={kind!r} must be one of {', '.join(KINDS)}")
    if kind != "auto":
        return kind
    where = "cpu" if mesh is None else meshes.platform(mesh)
    return {"tpu": "splash", "cpu": "blocked"}.get(where, "library")


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int | None = None,
    mesh: Mesh | None = None,
    kind: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention inside each segment; padding (segment 0) sees only padding.

    Position i sees position j of its segment iff 0 <= i - j (< window). Scores are scaled by
    1/sqrt(H). Where the mesh splits "length", rows are in the order of `to_shards`. Raises DcodError
    for sizes that the mesh or the kernel cannot split.
    """
    kind = choose(kind, mesh)
    if window is not None and window < 1:
        raise DcodError(f"sliding window {window} must be at least 1 position")
    if meshes.parts(mesh, "length") > 1:
        raise DcodError("not yet")
    if kind == "splash":
        return _splash(query, key, value, segment_ids, window=window, mesh=mesh)
    run = packed_attention if kind == "blocked" else library_attention
    return run(query, key, value, segment_ids, window=window)


# ---------------------------------------------------------------- CPU and GPU


def _visible(
    queries: Int[Array, " S"],
    keys: Int[Array, " M"],
    query_segments: Int[Array, "B S"],
    key_segments: Int[Array, "B M"],
    window: int | None,
) -> Bool[Array, "B S M"]:
    """Which keys each query sees, from the positions in the row and the segments of both."""
    order = queries[:, None] >= keys[None, :]
    if window is not None:
        order &= queries[:, None] - keys[None, :] < window
    return order & (query_segments[:, :, None] == key_segments[:, None, :])


def packed_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` in plain array operations, for any device.

    Queries go in at most eight blocks and each block sees only the keys up to its end: half the
    work of a full square, and one block's scores at a time (recomputed in the backward pass).
    """
    B, T, N, H = query.shape
    G = key.shape[2]
    queries = query.reshape(B, T, G, N // G, H).transpose(0, 2, 3, 1, 4)  # [B,G,R,T,H]
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B,G,T,H]
    block = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = 0 if window is None else max(0, start - window + 1)
        visible = _visible(
            jnp.arange(start, end),
            jnp.arange(first, end),
            segment_ids[:, start:end],
            segment_ids[:, first:end],
            window,
        )
        seen = keys[:, :, first:end], values[:, :, first:end]
        outputs.append(jax.checkpoint(attend)(queries[..., start:end, :], *seen, visible))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def library_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` by jax.nn.dot_product_attention."""
    order = jnp.arange(query.shape[1])
    visible = _visible(order, order, segment_ids, segment_ids, window)
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])


# ---------------------------------------------------------------- TPU


def splash_block(length: int) -> int:
    """The largest tile for which padding the length to a multiple costs at most an eighth.

    4096 -> 1024, 1500 -> 512 (1536), 300 -> 128 (384).
    """
    for block in SPLASH_BLOCKS:
        if -(-length // block) * block <= 1.125 * length:
            return block
    return SPLASH_BLOCKS[-1]


@functools.lru_cache(maxsize=32)
def _splash_kernel(
    heads: int, length: int, block: int, window: int | None, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel of one shape; its mask tables are NumPy arrays, so that no trace owns them."""
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    # The unfused backward pass: the fused one writes dq once per key block and sums afterwards.
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    window: int | None,
    mesh: Mesh | None,
) -> Array:
    B, T, N, H = query.shape
    block = splash_block(T)
    padding = -T % block
    if padding:  # a segment 0 behind the row: sees itself only, and is cut off again
        pad = functools.partial(jnp.pad, mode="constant")
        query, key, value = (
            pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value)
        )
        segment_ids = pad(segment_ids, ((0, 0), (0, padding)))
    interpret = mesh is None or meshes.platform(mesh) != "tpu"
    heads = N // meshes.parts(mesh, "heads")
    kernel = _splash_kernel(heads, T + padding, block, window, interpret)
    scale = 1.0 / math.sqrt(H)

    def rows(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        segments = splash.SegmentIds(segment_ids, segment_ids)
        return jax.vmap(kernel)(*heads_first, segments).transpose(0, 2, 1, 3)

    run = rows
    if mesh is not None and mesh.size > 1:
        run = meshes.per_shard(rows, mesh, (_HEADS, _KV_HEADS, _KV_HEADS, _IDS), _HEADS)
    return run(query, key, value, segment_ids)[:, :T]
