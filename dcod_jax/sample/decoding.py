"""The compiled half of the sampler: prefill of some rows and a block of decode steps for all.

Shapes are static: R rows, M cache slots, N places for drawn tokens. Every row carries its own
position, count and sequence name, so rows are independent and any of them may be given a new prompt
while the others are in the middle of theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax.models.cached import (
    Cache,
    forward_with_cache,
    init_cache,
    split_layers,
    transpose_kernels,
)
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.counts import num_params
from dcod_jax.models.layers import capped
from dcod_jax.models.linear import transposed_matmul
from dcod_jax.models.transformer import head_weight, logical_axes
from dcod_jax.parallel.mesh import constrain, is_names, memory, parts, platform, with_tensor
from dcod_jax.sample.sampling import Settings, choose
from dcod_jax.types import Params

log = logging.getLogger(__name__)

PREFILL_CHUNKS = (16, 64, 256)  # multiples of the first up to the second, then powers of two
WEIGHTS_SHARE = 0.4  # of a device's memory; the rest is for the cache and what else is there
MAX_SPLIT_LAYERS = 64  # deeper models are scanned in decoding too, to bound the program's size


@dataclasses.dataclass(frozen=True)
class DecodingForm:
    """What the two compiled functions are compiled for, beside the shapes and the mode."""

    config: ModelConfig
    valid_vocab: int
    compute_dtype: np.dtype
    mesh: Mesh | None
    split: bool  # layers are unrolled, each with its own weights and cache, instead of scanned
    transposed: bool  # kernels are [out, in] (linear.transposed_matmul)


def decoding_form(
    config: ModelConfig, *, valid_vocab: int, compute_dtype: DTypeLike, mesh: Mesh | None
) -> DecodingForm:
    """The form that suits the model's depth, the mesh and its platform.

    Weights that the mesh splits are laid out anew (`decoding_mesh`). A mesh of one device is left
    out: it splits nothing, and callers with and without one share what is compiled.
    """
    where = jax.default_backend() if mesh is None else platform(mesh)
    if mesh is not None and parts(mesh, "embed") > 1:
        mesh = decoding_mesh(config, mesh, np.dtype(compute_dtype), memory(mesh))
    return DecodingForm(
        config,
        valid_vocab,
        np.dtype(compute_dtype),
        None if mesh is None or mesh.size == 1 else mesh,
        # Weights that stay split are gathered layer by layer, inside the scan that frees them.
        split=config.num_layers <= MAX_SPLIT_LAYERS and parts(mesh, "embed") == 1,
        transposed=where == "cpu",
    )


@functools.cache
def decoding_mesh(config: ModelConfig, mesh: Mesh, dtype: np.dtype, limit: float) -> Mesh:
    """The mesh's devices for decoding, so that no step gathers weights of fsdp or context.

    Weights are whole on every device where they fit into WEIGHTS_SHARE of its memory (limit, in
    bytes), else in the fewest pieces of heads, mlp and vocabulary that do. Where none does, it is
    the mesh as it is: each layer is gathered for each token.
    """
    size = num_params(config) * dtype.itemsize
    cut = mesh.size // mesh.shape["slices"]
    own = parts(mesh, "heads")
    for tensor in (n for n in range(own, cut + 1, own) if cut % n == 0):
        sizes = (config.num_heads, config.num_kv_heads, config.mlp_width, config.vocab_size)
        if all(length % tensor == 0 for length in sizes) and size / tensor <= WEIGHTS_SHARE * limit:
            form = "whole on every device" if tensor == 1 else f"in {tensor} pieces (mesh.tensor)"
            log.info("decoding with the weights %s, %.2f GiB each", form, size / tensor / 2**30)
            return with_tensor(mesh, tensor)
    log.warning(
        "decoding gathers each layer for each token: %.2f GiB of weights, in pieces that divide "
        "the heads and the mesh, do not fit into %.2f GiB, %.0f %% of a device",
        *(size / 2**30, WEIGHTS_SHARE * limit / 2**30, 100 * WEIGHTS_SHARE),
    )
    return mesh


def prefill_chunk(longest: int) -> int:
    """Tokens of a row in one prefill step: 42 -> 48, 100 -> 64, 600 -> 128, 5000 -> 256."""
    step, small, most = PREFILL_CHUNKS
    if longest > small:
        return min(max(1 << ((longest - 1) // 8).bit_length(), small), most)
    return -(-longest // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of all rows between two calls; as a pytree it also holds shapes and shardings."""

    cache: Cache
    names: Any  # uint32 [R]: index of the row's sequence, which with the seed makes its randomness
    lengths: Any  # int32 [R]: tokens of the prompt
    tokens: Any  # int32 [R]: the last token drawn, not yet in the cache
    counts: Any  # int32 [R]: tokens drawn
    alive: Any  # bool [R]
    drawn: Any  # int32 [R, N]
    logprobs: Any  # float32 [R, N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is the same for all sequences of one call and not compiled in."""

    key: Any
    settings: Settings
    stop_ids: Any  # int32 [S]
    max_new_tokens: Any  # int32


@dataclasses.dataclass(frozen=True)
class DecodingParams:
    """A model's parameters in the form that decoding reads them in."""

    form: DecodingForm
    params: Params

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.form.config


@functools.partial(jax.jit, static_argnames=("form",))
def cast_params(params: Params, *, form: DecodingForm) -> Params:
    """The matrices in compute dtype and layout, once and not at every step; norms keep theirs."""

    def one(names: tuple[str, ...], x: Array) -> Array:
        # Where devices exchange it, it is narrow.
        x = x if names[-1] == "norm" else x.astype(form.compute_dtype)
        return constrain(x, form.mesh, *names)

    cast = jax.tree.map(one, logical_axes(form.config), params, is_leaf=is_names)
    cast = transpose_kernels(cast) if form.transposed else cast
    return split_layers(cast) if form.split else cast


@functools.partial(jax.jit, static_argnames=("form", "rows", "slots", "places"), keep_unused=True)
def empty_rows(beside: Array, *, form: DecodingForm, rows: int, slots: int, places: int) -> Rows:
    """Rows without a sequence, on the devices of the array `beside`.

    An array made from no argument is committed to no device, while the rows that prefill and decode
    return are: with both kinds prefill would be compiled twice.
    """
    integers = jnp.zeros(rows, jnp.int32)
    return _pin(
        Rows(
            cache=init_cache(form.config, rows, slots, form.compute_dtype, split=form.split),
            names=integers.astype(jnp.uint32),
            lengths=integers,
            tokens=integers,
            counts=integers,
            alive=integers.astype(bool),
            drawn=jnp.zeros((rows, places), jnp.int32),
            logprobs=jnp.zeros((rows, places), jnp.float32),
        ),
        form.mesh,
    )


def _pin(rows: Rows, mesh: Mesh | None) -> Rows:
    """Cache split over the batch and the kv heads; everything small is whole on every device."""

    def heads(x: Array) -> Array:
        return constrain(x, mesh, None, "batch", "kv_heads", None, None)

    whole = jax.tree.map(lambda x: constrain(x, mesh, *(None,) * x.ndim), rows)
    return dataclasses.replace(whole, cache=jax.tree.map(heads, rows.cache))


def _draw(
    form: DecodingForm,
    head: Float[Array, "V D"],
    hidden: Float[Array, "B D"],
    names: Array,
    steps: Int[Array, " B"],
    request: Request,
) -> tuple[Array, Array, Array]:
    """Tokens, log-probs, and whether a token ends its sequence; the key is (seed, name, step)'s."""
    if form.transposed:
        logits = transposed_matmul(hidden, head)
    else:
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
    logits = capped(logits, form.config.final_softcap)
    keys = jax.vmap(
        lambda name, step: jax.random.fold_in(jax.random.fold_in(request.key, name), step)
    )(names, steps)
    tokens, logprobs = choose(logits, keys, request.settings, valid_vocab=form.valid_vocab)
    ended = (tokens[:, None] == request.stop_ids).any(axis=1)
    return tokens, logprobs, ended | (steps + 1 >= request.max_new_tokens)


@functools.partial(jax.jit, static_argnames=("form", "chunk"), donate_argnames=("rows",))
def prefill(
    params: Params,
    rows: Rows,
    prompts: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    places: Int[Array, " P"],
    names: Array,
    request: Request,
    *,
    chunk: int,
    form: DecodingForm,
) -> Rows:
    """Put P prompts, T a multiple of `chunk`, into the rows `places`, if these are in range."""
    last = jnp.maximum(lengths - 1, 0)
    parts = last.max() // chunk + 1

    def add(index: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        found, cache = carry
        start = index * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        hidden, cache = forward_with_cache(
            form.config,
            params,
            tokens,
            positions=positions,
            cache=cache,
            rows=places,
            compute_dtype=form.compute_dtype,
            mesh=form.mesh,
            transposed=form.transposed,
        )
        here = jnp.clip(last - start, 0, chunk - 1)
        picked = jnp.take_along_axis(hidden, here[:, None, None], axis=1)[:, 0]
        return jnp.where((last // chunk == index)[:, None], picked, found), cache

    found = jnp.zeros((prompts.shape[0], form.config.hidden_size), form.compute_dtype)
    hidden, cache = jax.lax.fori_loop(0, parts, add, (found, rows.cache))
    head, steps = head_weight(form.config, params), jnp.zeros_like(lengths)
    tokens, logprobs, ended = _draw(form, head, hidden, names, steps, request)

    def put(x: Array, values: Any) -> Array:
        return x.at[places].set(values, mode="drop")

    return _pin(
        Rows(
            cache=cache,
            names=put(rows.names, names),
            lengths=put(rows.lengths, lengths),
            tokens=put(rows.tokens, tokens),
            counts=put(rows.counts, 1),
            alive=put(rows.alive, ~ended),
            drawn=rows.drawn.at[places, 0].set(tokens, mode="drop"),
            logprobs=rows.logprobs.at[places, 0].set(logprobs, mode="drop"),
        ),
        form.mesh,
    )


@functools.partial(jax.jit, static_argnames=("form",), donate_argnames=("rows",))
def decode(
    params: Params,
    rows: Rows,
    stopped: Array,
    request: Request,
    *,
    most_steps: Int[Array, ""],
    most_alive: Int[Array, ""],
    form: DecodingForm,
) -> Rows:
    """Decode until at most most_alive rows live, or most_steps steps; `stopped` rows are dead."""
    head = head_weight(form.config, params)
    everyone = jnp.arange(rows.tokens.shape[0])

    def unfinished(state: tuple[Array, Rows]) -> Array:
        step, rows = state
        return (step < most_steps) & (rows.alive.sum() > most_alive)

    def advance(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        step, rows = state
        # A dead row writes nothing and its position does not count.
        positions = jnp.where(rows.alive, rows.lengths + rows.counts - 1, -1)
        hidden, cache = forward_with_cache(
            form.config,
            params,
            rows.tokens[:, None],
            positions=positions[:, None],
            cache=rows.cache,
            compute_dtype=form.compute_dtype,
            mesh=form.mesh,
            transposed=form.transposed,
        )
        tokens, logprobs, ended = _draw(form, head, hidden[:, 0], rows.names, rows.counts, request)
        at = (everyone, jnp.where(rows.alive, rows.counts, rows.drawn.shape[1]))
        return step + 1, dataclasses.replace(
            rows,
            cache=cache,
            tokens=jnp.where(rows.alive, tokens, rows.tokens),
            counts=rows.counts + rows.alive,
            alive=rows.alive & ~ended,
            drawn=rows.drawn.at[at].set(tokens, mode="drop"),
            logprobs=rows.logprobs.at[at].set(logprobs, mode="drop"),
        )

    rows = dataclasses.replace(rows, alive=rows.alive & ~stopped)
    return _pin(jax.lax.while_loop(unfinished, advance, (jnp.int32(0), rows))[1], form.mesh)
