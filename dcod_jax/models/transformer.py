"""The decoder-only transformer as pure functions of (config, params).

The nnx modules of models/layers.py give structure and attribute paths; they are split once and
params is the plain nested dict of their arrays, each layer array stacked on a leading L axis:
{"embed_tokens": {"embedding"}, "layers": {"self_attn": {"q_proj": {"kernel", ...}}}, "norm", ...}.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax.models import attention, blocks, layer_kinds, layers
from dcod_jax.models import remat as remats
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.layer_kinds import LayerKind
from dcod_jax.models.linear import Declaration, Linear
from dcod_jax.models.rope import Rope
from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes
from dcod_jax.parallel.collectives import WeightDtypes
from dcod_jax.types import Params

# Logical dimensions of what a block passes on.
_TOKENS = ("batch", "length", None)
_HEADS = ("batch", "heads", "length", None)
_KV_HEADS = ("batch", "kv_heads", "length", None)
_MLP = ("gate_proj", "up_proj", "down_proj")


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module))


@functools.cache
def graphs(config: ModelConfig, *, transposed: bool = False) -> tuple[Any, Any]:
    """Graph definitions of (Decoder, Block): the modules without their arrays."""
    decoder = nnx.eval_shape(lambda: blocks.Decoder(config, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: blocks.Block(config, rngs=nnx.Rngs(0)))
    for _, module in nnx.iter_graph(block):
        if isinstance(module, Linear):
            module.transposed = transposed
    return nnx.split(decoder)[0], nnx.split(block)[0]


def init_params(config: ModelConfig, key: Array, *, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters: normal(initializer_range) matrices, zero biases, unit norms; jittable."""
    outer_key, layer_key = jax.random.split(key)
    params = _pure(blocks.Decoder(config, rngs=nnx.Rngs(outer_key)))
    keys = jax.random.split(layer_key, config.num_layers)
    params["layers"] = jax.vmap(lambda k: _pure(blocks.Block(config, rngs=nnx.Rngs(k))))(keys)
    return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.cache
def param_shapes(config: ModelConfig) -> Params:
    """ShapeDtypeStructs (float32) in the structure of params."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def declarations(config: ModelConfig) -> Params:
    """linear.Declaration of every parameter, in the structure of params, layers stacked."""

    def of(make: Callable[..., nnx.Module]) -> Iterator[tuple[Any, Declaration]]:
        module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
        for path, param in nnx.to_flat_state(nnx.state(module)):
            yield path, param.get_metadata("declaration")

    flat = dict(of(blocks.Decoder))
    for path, one in of(blocks.Block):
        flat["layers", *path] = dataclasses.replace(
            one,
            axes=("layers", *one.axes),
            hf=f"model.layers.{{layer}}.{one.hf}",
            gguf=f"blk.{{layer}}.{one.gguf}",
            stacked=one.stacked and f"model.layers.{{layer}}.{one.stacked}",
        )
    return traverse_util.unflatten_dict(flat)


def logical_axes(config: ModelConfig) -> Params:
    """Logical axis names of every dimension, in the structure of params (see mesh.RULES)."""
    return jax.tree.map(lambda one: one.axes, declarations(config))


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh that cannot split this model evenly, naming the config key."""
    sizes = {
        "num_attention_heads": ("heads", config.num_heads),
        "num_key_value_heads": ("kv_heads", config.num_kv_heads),
        "intermediate_size": ("mlp", config.mlp_width),
        "vocab_size": ("vocab", config.vocab_size),
        "hidden_size": ("embed", config.hidden_size),
    }
    if config.mixture is not None:
        sizes["num_experts"] = ("experts", config.mixture.experts)
    meshes.check_divides(mesh, sizes)


def gather_layer(layer: Params, axes: Params, *, dtypes: WeightDtypes, mesh: Mesh | None) -> Params:
    """One layer's matrices and biases, rounded to dtypes.compute, whole along the FSDP axis.

    Called inside the rematerialised block: the weights are gathered once per layer and pass, in
    the narrow dtype, instead of every matmul turning into a loop over shards. The tensor axis
    stays split. Norm scales keep their dtype; norms compute in float32.
    """

    def gather(names: tuple[str, ...], weight: Array) -> Array:
        if names[-1] == "norm":
            return weight
        return collectives.whole_weight(weight, mesh, names[1:], dtypes)

    return jax.tree.map(gather, axes, layer, is_leaf=meshes.is_names)


def _with_weights(
    function: Callable[..., Any],
    layer: Params,
    axes: Params,
    used: tuple[str, ...],
    arrays: tuple[tuple[tuple[str | None, ...], Array], ...],
    output: tuple[Any, ...],
    *,
    dtypes: WeightDtypes,
    mesh: Mesh | None,
    placed: bool,
    own: bool = False,
) -> Any:
    """function(layer, *arrays), the matrices of the modules `used` as `gather_layer` has them.

    Every device runs it on its own tokens, so that the gradient of a matrix is a partial sum on
    each, which one reduce-scatter adds up and splits; the partitioner would all-reduce it. With a
    tensor axis or without `placed` the partitioner does it all, but for a function that has
    collectives of its `own`.
    """
    partitioned = not own and (meshes.parts(mesh, "heads") > 1 or not placed)
    if mesh is None or mesh.size == 1 or partitioned:
        layer = gather_layer(layer, axes, dtypes=dtypes, mesh=mesh)
        return function(layer, *(x for _, x in arrays))

    def gather(path: tuple[Any, ...], names: tuple[str, ...], weight: Array) -> Array:
        if names[-1] == "norm" or path[-2].key not in used:
            return weight
        if not {*collectives.SPLIT_ANEW} & {*names}:
            return weight.astype(dtypes.gradient)
        return collectives.gather_weight(weight, mesh, names[1:], dtypes)

    def on_shard(layer: Params, *arrays: Array) -> Any:
        whole = jax.tree_util.tree_map_with_path(gather, axes, layer, is_leaf=meshes.is_names)
        return function(whole, *arrays)

    specs = jax.tree.map(lambda names: meshes.spec(names[1:]), axes, is_leaf=meshes.is_names)
    run = collectives.per_shard(on_shard, mesh, (specs, *(names for names, _ in arrays)), output)
    return run(layer, *(x for _, x in arrays))


def embed(
    params: Params,
    tokens: Array,
    *,
    scale: float = 1.0,
    compute_dtype: DTypeLike,
    mesh: Mesh | None,
    length: str | None = None,
) -> Array:
    """Embedded tokens [B, T, D] in compute_dtype, times scale."""
    # Every device looks up all tokens of its replica in the columns that it holds; what it found
    # is exchanged for its own rows. The table is never whole on a device, nor is its gradient.
    # Rows are taken before the cast, so that the gradients of a frequent token add up in the
    # parameters' dtype.
    tokens = meshes.constrain(tokens, mesh, "replica", None)
    x = jnp.take(params["embed_tokens"]["embedding"], tokens, axis=0, mode="clip")
    x = meshes.constrain(x, mesh, "replica", None, "embed").astype(compute_dtype)
    if scale != 1:
        x = x * scale  # rounded to compute_dtype first, as HF does
    # One mesh axis after the other: at once the partitioner makes x whole on every device.
    x = meshes.constrain(x, mesh, "replica", length, "embed")
    return meshes.constrain(x, mesh, "batch", length, None)


def apply_experts(
    graph: Any, mesh: Mesh | None, layer: Params, x: Array, real: Array
) -> tuple[Array, Array]:
    """A layer's blocks.Block.apply_experts, on each device's own tokens."""
    return nnx.merge(graph, layer).apply_experts(x, real, mesh=mesh)


def scan_groups(
    kinds: Sequence[LayerKind],
    block: Callable[[LayerKind, Any, Any], tuple[Any, Any]],
    carry: Any,
    layers: Any,
) -> tuple[Any, Any]:
    """carry, out = block(kind, carry, layer) for layers of these kinds; both stack on axis 0."""
    groups = layer_kinds.groups(kinds)

    def of_group(x: Array, start: int, periods: int, size: int) -> Array:
        x = x if len(groups) == 1 else x[start : start + size * periods]
        return x if size == 1 else x.reshape(periods, size, *x.shape[1:])

    start, outs = 0, []
    for some, periods in groups:
        sizes = {"start": start, "periods": periods, "size": len(some)}
        group = jax.tree.map(functools.partial(of_group, **sizes), layers)

        def period(carry: Any, layer: Any, kinds: tuple[LayerKind, ...] = some) -> Any:
            if len(kinds) == 1:
                return block(kinds[0], carry, layer)
            found = []
            for index, kind in enumerate(kinds):
                carry, out = block(kind, carry, jax.tree.map(lambda x, i=index: x[i], layer))
                found.append(out)
            return carry, jax.tree.map(lambda *x: jnp.stack(x), *found)

        carry, out = jax.lax.scan(period, carry, group)
        if len(some) > 1:
            out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        outs.append(out)
        start += len(some) * periods
    return carry, _joined(outs)


def _joined(stacks: list[Any]) -> Any:
    return stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)


def rope_tables(
    config: ModelConfig, positions: Array, segment_ids: Array | None = None
) -> dict[Rope | None, tuple[Array, Array] | None]:
    """Each rope of the model -> its tables for these positions [B, T]; no rope -> None.

    segment_ids tell which texts are longer than a longrope's switch; None: none is.
    """
    tables: dict[Rope | None, tuple[Array, Array] | None] = {None: None}
    for kind in config.layer_kinds:
        rope, beyond = kind.rope, None
        if rope is None or rope in tables:
            continue
        if rope.switches_at is not None and segment_ids is not None:
            last = functools.partial(jax.ops.segment_max, num_segments=positions.shape[1] + 1)
            ends = jax.vmap(last)(positions, segment_ids)  # by segment
            beyond = jnp.take_along_axis(ends, segment_ids, axis=1) >= rope.switches_at
        found = layers.rope_tables(rope, config.head_dim, positions, beyond=beyond)
        # Or a compiler would form the cosines anew in each layer of a scan.
        tables[rope] = jax.lax.optimization_barrier(found)
    return tables


def _block(
    kind: LayerKind,
    x: Array,
    layer: Params,
    *,
    config: ModelConfig,
    ropes: dict[Rope | None, Any],
    segment_ids: Array,
    run: Callable[..., Any],
    mesh: Mesh | None,
    kernel: str,
) -> tuple[Array, Array | None]:
    """A layer's output and its routing; run is _with_weights."""
    graph, axes, experts = graphs(config)[1], logical_axes(config)["layers"], config.mixture
    x = checkpoint_name(x, remats.BLOCK_INPUT)
    rope = ropes[kind.rope] or ()
    query, key, value = run(
        lambda layer, x, *rope: nnx.merge(graph, layer).project(x, rope or None),
        layer,
        axes,
        ("q_proj", "k_proj", "v_proj"),
        tuple((_TOKENS, value) for value in (x, *rope)),
        (_HEADS, _KV_HEADS, _KV_HEADS),
    )
    scores = {"scale": config.score_scale, "softcap": config.attention_softcap}
    where = {"window": kind.window, "mesh": mesh, "kind": kernel}
    mixed = attention.attention(query, key, value, segment_ids, **scores, **where)
    half = "finish" if experts is None else "add_attention"
    x = run(
        lambda layer, x, mixed: getattr(nnx.merge(graph, layer), half)(x, mixed),
        layer,
        axes,
        ("o_proj", *(_MLP if experts is None else ())),
        ((_TOKENS, x), (_HEADS, mixed)),
        _TOKENS,
    )
    routing = None
    if experts is not None:
        x, routing = run(
            functools.partial(apply_experts, graph, mesh),
            layer,
            axes,
            ("router", *_MLP),
            ((_TOKENS, x), (_TOKENS[:2], segment_ids > 0)),
            (_TOKENS, _TOKENS),
            own=True,
        )
    return meshes.constrain(x, mesh, "batch", "length", None), routing


def hidden_states(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], **options: Any
) -> Float[Array, "B T D"]:
    """The hidden states of `forward`, whose options it takes."""
    return forward(config, params, tokens, **options)[0]


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    gradient_dtype: DTypeLike | None = None,
    remat: str = "none",
    mesh: Mesh | None = None,
    kernel: str = "auto",
    placed: bool = True,
) -> tuple[Float[Array, "B T D"], Float[Array, "B L R"] | None]:
    """Final normed hidden states (over logits_scale), in compute_dtype; attention is causal within
    a segment. Beside them each row's routing (losses/routing.py); None without experts.

    kernel: of attention.KINDS. placed: whether devices exchange weights and sums of gradients by
    collectives placed by hand, or as the partitioner does it.

    The gradients of the layers' matrices and biases are formed and summed over devices in
    gradient_dtype (None: in compute_dtype), those of all other parameters in float32. Positions
    default to 0..T-1, segments to one; segment 0 is padding, whose finite values nothing else sees.
    Raises DcodError for a mesh that cannot split the model, or an unknown remat.
    """
    pieces = remats.pieces(remat, config.num_layers)
    if mesh is not None:
        check_mesh(config, mesh)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    length, inputs = tokens.shape[1], (tokens, segment_ids, positions)
    tokens, segment_ids, positions = (attention.to_pieces(x, mesh, kind=kernel) for x in inputs)
    ropes = rope_tables(config, positions, segment_ids)
    dtypes = WeightDtypes(jnp.dtype(compute_dtype), jnp.dtype(gradient_dtype or compute_dtype))
    run = functools.partial(_with_weights, dtypes=dtypes, mesh=mesh, placed=placed)
    shared = {"config": config, "ropes": ropes, "segment_ids": segment_ids, "kernel": kernel}
    block = functools.partial(_block, run=run, mesh=mesh, **shared)
    where = {"mesh": mesh, "length": "length"}
    x = embed(params, tokens, scale=config.embedding_scale, compute_dtype=compute_dtype, **where)
    start, stacked, routed = 0, params["layers"], []
    for mode, count in pieces:
        here = slice(start, start + count)
        some = stacked if len(pieces) == 1 else jax.tree.map(lambda x, at=here: x[at], stacked)
        x, out = scan_groups(config.kinds[here], remats.rematerialised(block, mode), x, some)
        routed.append(out)
        start += count
    outer = {name: value for name, value in params.items() if name != "layers"}
    hidden = attention.from_pieces(nnx.merge(graphs(config)[0], outer).final(x), mesh, length)
    if config.mixture is None:
        return hidden, None
    return hidden, jnp.swapaxes(_joined(routed).sum(2), 0, 1)


def head_weight(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The vocabulary head, one row per vocabulary entry (the embedding when tied)."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return params[name]["embedding"]


def logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    compute_dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> Float[Array, "B T V"]:
    """All logits at once, float32, with the options of `forward`: for parity checks and tiny
    models; training never forms them.
    """
    hidden = hidden_states(config, params, tokens, compute_dtype=compute_dtype, **options)
    weight = head_weight(config, params).astype(compute_dtype)
    products = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
    return layers.capped(products, config.final_softcap)
