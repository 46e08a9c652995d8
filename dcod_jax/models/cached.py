"""The transformer with a cache of keys and values: the sampler's prefill and decode steps.

Decoding keeps the layers stacked, for a scan, or split, one tree a layer; on a CPU it keeps the
kernels transposed, [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.models.attention import MASKED
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.layer_kinds import LayerKind
from dcod_jax.models.layers import capped
from dcod_jax.models.transformer import (
    embed,
    gather_layer,
    graphs,
    logical_axes,
    rope_tables,
    scan_groups,
)
from dcod_jax.parallel.collectives import WeightDtypes, per_shard, whole
from dcod_jax.parallel.mesh import is_names, parts, spec
from dcod_jax.types import Params

# One layer: (its kind, (x, keys, values), (its weights, its index)) -> (x, keys, values).
CachedBlock = Callable[[LayerKind, Any, tuple[Params, Any]], tuple[Any, None]]
CACHE_CHUNK = 256  # cache slots that attention reads at a time: a chunk of several is copied out
MAX_CACHE_CHUNKS = 16  # a longer cache is read in larger chunks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of M slots per row; slot j is that of position j.

    Keys are [L, B, G, H, M] and values [L, B, G, M, H], as the products with them read them. Each
    is a tuple of one such array for all layers, which a scan needs, or of an array with L = 1 for
    each, which is read without copying it out of the whole.
    """

    keys: Any  # as a pytree it also holds shapes and shardings
    values: Any


def _cache_chunk(capacity: int) -> int:
    """Slots that attention reads at a time: 40 -> 40, 320 -> 160, 1000 -> 256, 6000 -> 384."""
    count = min(-(-capacity // CACHE_CHUNK), MAX_CACHE_CHUNKS)
    return capacity if count == 1 else 32 * -(-capacity // (32 * count))


def check_length(config: ModelConfig, length: int) -> None:
    """Raise DcodError where longrope would change the keys of a text that grows to this length."""
    for kind in config.layer_kinds:
        most = kind.rope.switches_at if kind.rope else None
        if most is not None and length > most:
            raise DcodError(
                f"a text of {length} tokens cannot be generated: beyond {most} tokens "
                f"(original_max_position_embeddings) longrope changes the keys of all before; make "
                f"the prompts or max_new_tokens shorter"
            )


def init_cache(
    config: ModelConfig, batch_size: int, max_len: int, dtype: DTypeLike, *, split: bool = False
) -> Cache:
    """An empty cache of at least max_len positions per row, a whole number of chunks."""
    max_len += -max_len % _cache_chunk(max_len)
    count, depth = (config.num_layers, 1) if split else (1, config.num_layers)
    head, slots = (depth, batch_size, config.num_kv_heads), (max_len, config.head_dim)
    keys = tuple(jnp.zeros((*head, *slots[::-1]), dtype) for _ in range(count))
    values = tuple(jnp.zeros((*head, *slots), dtype) for _ in range(count))
    return Cache(keys=keys, values=values)


def transpose_kernels(params: Params) -> Params:
    """The same parameters with the layers' kernels as [out, in], for linear.transposed_matmul."""

    def transpose(path: tuple[Any, ...], x: Array) -> Array:
        return jnp.swapaxes(x, -1, -2) if path[-1].key == "kernel" else x

    return {**params, "layers": jax.tree_util.tree_map_with_path(transpose, params["layers"])}


def split_layers(params: Params) -> Params:
    """The same parameters with "layers" as a tuple, one tree a layer, instead of stacked.

    A scan over stacked layers copies each weight out of its stack at every step; where a step is
    short (decoding on CPU) that costs as much as the step itself.
    """
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers_ = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))
    return {**params, "layers": layers_}


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Where a cache of `capacity` slots has the new tokens of its rows, and which chunks they see.

    A token outside is at `capacity`, which mode="drop" drops; a negative index would wrap round.
    """

    at: Array  # [B, S]
    rows: Array | None
    capacity: int
    end: Array | int  # chunks up to the last one that is seen

    @property
    def chunk(self) -> int:
        return _cache_chunk(self.capacity)

    @property
    def places(self) -> Array:
        return (jnp.arange(len(self.at)) if self.rows is None else self.rows)[:, None]

    def first(self, window: int | None) -> Array | int:
        """The first chunk that one of the rows sees."""
        if window is None or self.chunk == self.capacity:
            return 0
        first = jnp.maximum(jnp.min(self.at) - window + 1, 0) // self.chunk
        return jnp.minimum(first, self.end - 1)  # where no row is inside, too

    def part(self, x: Array, index: Any, number: Array, axis: int) -> Array:
        """One chunk of a layer."""
        layer = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        part = jax.lax.dynamic_slice_in_dim(layer, number * self.chunk, self.chunk, axis)
        return part if self.rows is None else jnp.take(part, self.rows, axis=0, mode="clip")


def _slots(positions: Array, capacity: int, rows: Array | None) -> _Slots:
    inside, chunk = (positions >= 0) & (positions < capacity), _cache_chunk(capacity)
    end = 1 if chunk == capacity else jnp.max(jnp.where(inside, positions, 0)) // chunk + 1
    return _Slots(jnp.where(inside, positions, capacity), rows, capacity, end)


def _layer_axes(config: ModelConfig, transposed: bool) -> Params:
    """Logical axes of the layers; transposed: a kernel's are (layers, out, in)."""

    def of(path: tuple[Any, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        return (names[0], *names[:0:-1]) if transposed and path[-1].key == "kernel" else names

    axes = logical_axes(config)["layers"]
    return jax.tree_util.tree_map_with_path(of, axes, is_leaf=is_names)


def forward_with_cache(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    *,
    positions: Int[Array, "B S"],
    cache: Cache,
    rows: Int[Array, " B"] | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    transposed: bool = False,
) -> tuple[Float[Array, "B S D"], Cache]:
    """Hidden states of S new tokens per row (prefill or decode) and the cache that holds them.

    A token is written to the slot of its position and sees the slots up to it, so a row's positions
    must have been written in order from 0. A position outside 0..M-1 is not written; its output is
    finite and meaningless. `rows`: the cache rows of the tokens' rows (default: all, in order); one
    out of range is not written. Layers are stacked or split; transposed: kernels are [out, in].
    """
    decoder_graph, block_graph = graphs(config, transposed=transposed)
    layer_axes, ropes = _layer_axes(config, transposed), rope_tables(config, positions)
    slots = _slots(positions, cache.values[0].shape[3], rows)
    dtypes = WeightDtypes(jnp.dtype(compute_dtype), jnp.dtype(compute_dtype))
    scores = {"scale": config.score_scale, "softcap": config.attention_softcap}

    def block(kind: LayerKind, carry: tuple[Array, Array, Array], xs: tuple[Params, Any]) -> Any:
        (x, keys, values), (layer, index) = carry, xs
        layer = gather_layer(layer, layer_axes, dtypes=dtypes, mesh=mesh)
        module = nnx.merge(block_graph, layer)
        query, key, value = module.project(x, ropes[kind.rope])
        # The whole cache is carried and written in place: stacking it anew would copy it.
        places, at = slots.places, slots.at
        new_keys, new_values = (jnp.swapaxes(new, 1, 2) for new in (key, value))
        keys = keys.at[index, places, :, :, at].set(new_keys.astype(keys.dtype), mode="drop")
        values = values.at[index, places, :, at].set(new_values.astype(values.dtype), mode="drop")

        def read(number: Array) -> tuple[Array, Array]:
            return slots.part(keys, index, number, 3), slots.part(values, index, number, 2)

        chunks = slots.first(kind.window), slots.end
        mixed = cached_attention(query, read, positions, chunks, **scores, window=kind.window)
        if config.mixture is None:
            return (module.finish(x, mixed), keys, values), None
        x = module.add_attention(x, mixed)
        return (_apply_experts(block_graph, layer, layer_axes, x, mesh), keys, values), None

    scale = config.embedding_scale
    x = embed(params, tokens, scale=scale, compute_dtype=compute_dtype, mesh=mesh)
    x, cache = _through_layers(config, block, x, params["layers"], cache)
    outer = {name: value for name, value in params.items() if name != "layers"}
    return nnx.merge(decoder_graph, outer).final(x), cache


def _apply_experts(graph: Any, layer: Params, axes: Params, x: Array, mesh: Mesh | None) -> Array:
    """x after the experts of a layer, whose matrices are whole along what the mesh splits anew."""

    def apply(layer: Params, x: Array) -> Array:
        real = jnp.ones(x.shape[:2], bool)
        return nnx.merge(graph, layer).apply_experts(x, real, mesh=mesh)[0]

    if mesh is None or mesh.size == 1:
        return apply(layer, x)
    tokens, count = ("batch", None, None), len(x)
    specs = jax.tree.map(lambda names: spec(whole(names[1:])), axes, is_leaf=is_names)
    x = jnp.pad(x, ((0, -count % parts(mesh, "batch")), (0, 0), (0, 0)))
    return per_shard(apply, mesh, (specs, tokens), tokens)(layer, x)[:count]


def _through_layers(
    config: ModelConfig, block: CachedBlock, x: Array, layers: Any, cache: Cache
) -> tuple[Array, Cache]:
    """x after all layers, one by one (a tuple of layers) or in scans (stacked ones)."""
    if isinstance(layers, tuple):
        kept = []
        for kind, layer, keys, values in zip(
            config.kinds, layers, cache.keys, cache.values, strict=True
        ):
            (x, *both), _ = block(kind, (x, keys, values), (layer, 0))
            kept.append(both)
        keys, values = zip(*kept, strict=True)
    else:
        indices = jnp.arange(cache.keys[0].shape[0])
        carry = (x, *cache.keys, *cache.values)
        (x, *both), _ = scan_groups(config.kinds, block, carry, (layers, indices))
        keys, values = ((stacked,) for stacked in both)
    return x, Cache(keys=keys, values=values)


def cached_attention(
    query: Float[Array, "B N S H"],
    read: Callable[[Array], tuple[Array, Array]],
    positions: Int[Array, "B S"],
    chunks: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B N S H"]:
    """Attention of S new queries over chunks (first, end) of a cache; slot j holds position j.

    read(i) -> keys [B, G, H, C] and values [B, G, C, H] of chunk i; a query sees the slots up to
    its position, the last `window` of them. The softmax is accumulated chunk by chunk (Milakov and
    Gimelshein, arXiv 1805.02867), so the work follows what is written and not the cache's size, and
    a chunk that a row does not see leaves its result as it is, bit for bit. Scores, softmax and
    sums are float32.
    """
    B, N, S, H = query.shape
    shapes = jax.eval_shape(read, jnp.int32(0))
    G, C = shapes[1].shape[1:3]
    folded = query.reshape(B, G, -1, H)  # the R heads beside the queries, as in attend

    def add(index: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = sums
        key, value = (x.astype(query.dtype) for x in read(index))
        scores = jnp.einsum("bgxh,bghc->bgxc", folded, key, preferred_element_type=jnp.float32)
        slots = index * C + jnp.arange(C)
        visible = slots <= positions[..., None]
        if window is not None:
            visible &= slots > positions[..., None] - window
        scores = capped(scores.reshape(B, G, -1, S, C) * scale, softcap)
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(B, G, -1, C)
        peak = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        shrink, probs = jnp.exp(highest - peak), jnp.exp(scores - peak)
        more = jnp.einsum(
            "bgxc,bgch->bgxh", probs.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        total = total * shrink + probs.sum(axis=-1, keepdims=True)
        return peak, total, mixed * shrink + more

    zeros = jnp.zeros((*folded.shape[:-1], 1), jnp.float32)
    sums = (zeros + MASKED, zeros, jnp.zeros(folded.shape, jnp.float32))
    _, total, mixed = jax.lax.fori_loop(*chunks, add, sums)
    return (mixed / total).astype(query.dtype).reshape(B, N, S, H)
