"""The decoder-only transformer as pure functions of (config, params).

The nnx modules of models/layers.py give structure and attribute paths; they are split once and
params is the plain nested dict of their arrays, each layer array stacked on a leading L axis:
{"embed_tokens": {"embedding"}, "layers": {"self_attn": {"q_proj": {"kernel", ...}}}, "norm", ...}.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax import mesh as meshes
from dcod_jax.models import attention, layers
from dcod_jax.models.config import ModelConfig
from dcod_jax.types import DcodError, Params

# What the backward pass finds saved of each layer, beside the layer's input.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Module name -> logical axes of its kernel [in, out]; a bias has the last one.
_KERNEL_AXES: dict[str, tuple[str, str]] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of M slots per row; slot j holds position j once it is written."""

    keys: Any  # [L, B, G, M, H]; as a pytree it also holds shapes and shardings
    values: Any  # [L, B, G, M, H]
    written: Any  # bool [B, M]


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module))


@functools.cache
def _graphs(config: ModelConfig) -> tuple[Any, Any]:
    """Graph definitions of (Decoder, Block): the modules without their arrays."""
    decoder = nnx.eval_shape(lambda: layers.Decoder(config, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: layers.Block(config, rngs=nnx.Rngs(0)))
    return nnx.split(decoder)[0], nnx.split(block)[0]


def init_params(config: ModelConfig, key: Array, *, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters: normal(initializer_range) matrices, zero biases, unit norms; jittable."""
    outer_key, layer_key = jax.random.split(key)
    params = _pure(layers.Decoder(config, rngs=nnx.Rngs(outer_key)))
    keys = jax.random.split(layer_key, config.num_layers)
    params["layers"] = jax.vmap(lambda k: _pure(layers.Block(config, rngs=nnx.Rngs(k))))(keys)
    return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.cache
def param_shapes(config: ModelConfig) -> Params:
    """ShapeDtypeStructs (float32) in the structure of params."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """Logical axis names of every dimension, in the structure of params (see mesh.RULES)."""

    def axes(path: tuple[Any, ...], _: Any) -> tuple[str, ...]:
        names = [entry.key for entry in path]
        stacked = ("layers",) if names[0] == "layers" else ()
        module, leaf = names[-2:]
        if leaf == "embedding":
            return (*stacked, "vocab", "embed")
        if leaf == "scale":
            return (*stacked, "norm")
        kernel = _KERNEL_AXES[module]
        return (*stacked, *(kernel if leaf == "kernel" else kernel[1:]))

    return jax.tree_util.tree_map_with_path(axes, param_shapes(config))


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh that cannot split this model evenly, naming the config key."""
    sizes = {
        "num_attention_heads": ("heads", config.num_heads),
        "num_key_value_heads": ("kv_heads", config.num_kv_heads),
        "intermediate_size": ("mlp", config.intermediate_size),
        "vocab_size": ("vocab", config.vocab_size),
        "hidden_size": ("embed", config.hidden_size),
    }
    meshes.check_divides(mesh, sizes)


def _gather_layer(
    layer: Params, axes: Params, *, compute_dtype: DTypeLike, mesh: Mesh | None
) -> Params:
    """One layer's matrices and biases in compute dtype, whole along the FSDP axis.

    Called inside the rematerialised block: the weights are gathered once per layer and pass, in
    the narrow dtype, instead of every matmul turning into a loop over shards. The tensor axis
    stays split. Norm scales keep their dtype; norms compute in float32.
    """

    def gather(names: tuple[str, ...], weight: Array) -> Array:
        if names[-1] == "norm":
            return weight
        whole = tuple(None if name == "embed" else name for name in names[1:])
        return meshes.constrain(weight.astype(compute_dtype), mesh, *whole)

    return jax.tree.map(gather, axes, layer, is_leaf=lambda x: isinstance(x, tuple))


def _embed(
    params: Params,
    tokens: Array,
    *,
    compute_dtype: DTypeLike,
    mesh: Mesh | None,
    length: str | None = None,
) -> Array:
    # Whole along the FSDP axis first: a lookup in a table split on D would come out split on D and
    # replicated over the batch. Rows are taken before the cast, so that the gradients of a
    # frequent token add up in the parameters' dtype.
    table = meshes.constrain(params["embed_tokens"]["embedding"], mesh, "vocab", None)
    x = jnp.take(table, tokens, axis=0, mode="clip")
    return meshes.constrain(x.astype(compute_dtype), mesh, "batch", length, None)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Final normed hidden states, in compute_dtype; attention is causal within a segment.

    Positions default to 0..T-1 and segments to one; rows of segment 0 (padding) hold finite
    values that nothing else sees. Raises DcodError for a mesh that cannot split the model.
    """
    if remat not in ("none", *REMAT_POLICIES):
        raise DcodError(f"remat={remat!r} must be none, {' or '.join(REMAT_POLICIES)}")
    if mesh is not None:
        check_mesh(config, mesh)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    length = tokens.shape[1]
    tokens, segment_ids, positions = (
        attention.to_pieces(x, mesh) for x in (tokens, segment_ids, positions)
    )
    decoder_graph, block_graph = _graphs(config)
    layer_axes = logical_axes(config)["layers"]
    rope = layers.rope_tables(config, positions)
    attend = functools.partial(attention.attention, mesh=mesh)

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        layer = _gather_layer(layer, layer_axes, compute_dtype=compute_dtype, mesh=mesh)
        module = nnx.merge(block_graph, layer)
        query, key, value = module.project(x, rope)
        x = module.finish(x, attend(query, key, value, segment_ids))
        return meshes.constrain(x, mesh, "batch", "length", None), None

    if remat != "none":
        # Inside a scan nothing can be merged across the two passes: prevent_cse only costs.
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x = _embed(params, tokens, compute_dtype=compute_dtype, mesh=mesh, length="length")
    x, _ = jax.lax.scan(block, x, params["layers"])
    outer = {name: value for name, value in params.items() if name != "layers"}
    return attention.from_pieces(nnx.merge(decoder_graph, outer).norm(x), mesh, length)


def head_weight(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The vocabulary head, one row per vocabulary entry (the embedding when tied)."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return params[name]["embedding"]


def logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Float[Array, "B T V"]:
    """All logits at once, float32: for parity checks and tiny models; training never forms them."""
    hidden = hidden_states(
        config,
        params,
        tokens,
        segment_ids=segment_ids,
        positions=positions,
        compute_dtype=compute_dtype,
        mesh=mesh,
    )
    weight = head_weight(config, params).astype(compute_dtype)
    return jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)


def init_cache(config: ModelConfig, batch_size: int, max_len: int, dtype: DTypeLike) -> Cache:
    """An empty cache of max_len positions per row."""
    shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        written=jnp.zeros((batch_size, max_len), bool),
    )


def forward_with_cache(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    *,
    positions: Int[Array, "B S"],
    cache: Cache,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B S D"], Cache]:
    """Hidden states of S new tokens per row (prefill or decode) and the cache that holds them.

    positions are absolute and name the slot each token is written to. A query at position i sees
    slot j iff j <= i and j was written; padding behind a prompt is therefore never seen as long as
    its slots are overwritten before decoding reaches them. A position outside 0..M-1 is not
    written (its own output is finite and meaningless).
    """
    decoder_graph, block_graph = _graphs(config)
    layer_axes = logical_axes(config)["layers"]
    rope = layers.rope_tables(config, positions)
    slots_total = cache.written.shape[1]
    # Out of range goes to M, which mode="drop" drops; a negative index would wrap round instead.
    inside = (positions >= 0) & (positions < slots_total)
    slots = jnp.where(inside, positions, slots_total)
    rows = jnp.arange(tokens.shape[0])[:, None]
    written = cache.written.at[rows, slots].set(True, mode="drop")
    visible = (jnp.arange(slots_total) <= positions[..., None]) & written[:, None]

    def block(carry: tuple[Array, Array, Array], xs: tuple[Params, Array]) -> tuple[Any, None]:
        (x, keys, values), (layer, index) = carry, xs
        layer = _gather_layer(layer, layer_axes, compute_dtype=compute_dtype, mesh=mesh)
        module = nnx.merge(block_graph, layer)
        query, key, value = module.project(x, rope)
        # The whole cache is carried and written in place: stacking it anew would copy it.
        keys = keys.at[index, rows, :, slots].set(key.astype(keys.dtype), mode="drop")
        values = values.at[index, rows, :, slots].set(value.astype(values.dtype), mode="drop")
        mixed = layers.cached_attention(query, keys[index], values[index], visible)
        return (module.finish(x, mixed), keys, values), None

    x = _embed(params, tokens, compute_dtype=compute_dtype, mesh=mesh)
    indices = jnp.arange(config.num_layers)
    carry = (x, cache.keys, cache.values)
    (x, keys, values), _ = jax.lax.scan(block, carry, (params["layers"], indices))
    outer = {name: value for name, value in params.items() if name != "layers"}
    hidden = nnx.merge(decoder_graph, outer).norm(x)
    return hidden, Cache(keys=keys, values=values, written=written)
