"""The sampler: jitted prefill, then a decode loop over a static KV cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.mesh import batch_shards, constrain, put, sharding
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.transformer import (
    Cache,
    forward_with_cache,
    head_weight,
    init_cache,
    logical_axes,
)
from dcod_jax.types import DcodError, Params

MASKED = -1e30  # logit of a row of the vocabulary that the tokenizer does not have


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation; the stop token is its last token when it finished."""

    token_ids: list[int]
    logprobs: list[float]  # log-probability of each token at temperature 1, nats
    finished: bool  # False: cut at max_new_tokens


def bucket_length(length: int) -> int:
    """Padded length: multiples of 32 to 256, then a quarter of the power of two below.

    33 -> 64, 257 -> 320, 1100 -> 1280: few distinct shapes to compile, at most 25 % padding.
    """
    step = 32
    while length > 8 * step:
        step *= 2
    return -(-length // step) * step


def sample(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    eos_ids: Sequence[int],
    valid_vocab: int,
    compute_dtype: Any,
    indices: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Continue every prompt; temperature 0 is greedy. Output in the order of the prompts.

    The randomness of a token follows from (seed, index of its sequence, step) alone and a row's
    padded length from its own prompt, so a sample does not depend on what else is decoded.
    `indices` names the sequences where their place in `prompts` does not. `on_batch(sequences,
    tokens)` is called after each batch. Raises DcodError for an empty prompt or one that leaves no
    room for max_new_tokens in the model's positions.
    """
    _check(config, prompts, max_new_tokens=max_new_tokens, temperature=temperature)
    if batch_size < 1:
        raise DcodError(f"batch_size={batch_size} must be at least 1")
    names = np.arange(len(prompts)) if indices is None else np.asarray(indices, np.int64)
    if len(names) != len(prompts):
        raise DcodError(f"{len(names)} indices for {len(prompts)} prompts")
    rows = min(batch_size, 1 << max(len(prompts) - 1, 0).bit_length())
    rows += -rows % batch_shards(mesh)
    params = jax.device_put(params) if mesh is None else params
    key = jax.random.key(seed)
    samples: list[Sample | None] = [None] * len(prompts)
    for members, length in _batches([len(p) for p in prompts], rows):
        tokens, lengths = _pad([prompts[i] for i in members], rows=rows, length=length)
        row_names = np.zeros(rows, np.uint32)
        row_names[: len(members)] = names[members] & 0xFFFFFFFF
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_names)
        out = _decode(
            config,
            params,
            *_place(mesh, tokens, lengths, row_keys),
            jnp.float32(temperature or 1.0),
            jnp.array(sorted(set(eos_ids)), jnp.int32),
            greedy=temperature == 0,
            max_new_tokens=max_new_tokens,
            valid_vocab=valid_vocab,
            compute_dtype=jnp.dtype(compute_dtype),
            mesh=mesh,
        )
        drawn, logprobs, counts, finished = jax.device_get(out)
        for row, i in enumerate(members):
            count = int(counts[row])
            samples[i] = Sample(
                drawn[row, :count].tolist(), logprobs[row, :count].tolist(), bool(finished[row])
            )
        if on_batch is not None:
            on_batch(len(members), int(counts[: len(members)].sum()))
    return [s for s in samples if s is not None]


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> None:
    if max_new_tokens < 1 or temperature < 0:
        raise DcodError(
            f"max_new_tokens={max_new_tokens} must be >= 1 and temperature={temperature} >= 0"
        )
    room = config.max_position_embeddings - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise DcodError(
                f"prompt {i} has {len(prompt)} tokens; expected 1 to {room} "
                f"(max_position_embeddings={config.max_position_embeddings} of the model less "
                f"max_new_tokens={max_new_tokens}); shorten the prompt or lower max_new_tokens"
            )


def _batches(lengths: Sequence[int], rows: int) -> list[tuple[list[int], int]]:
    """Groups of at most `rows` sequences of one padded length, longest first.

    Sorted within a padded length too: longer questions tend to have longer answers, and a batch
    decodes until its last row has finished.
    """
    buckets: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        buckets.setdefault(bucket_length(lengths[i]), []).append(i)
    return [
        (members[start : start + rows], length)
        for length, members in buckets.items()
        for start in range(0, len(members), rows)
    ]


def _pad(
    prompts: Sequence[Sequence[int]], *, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [rows, length] and lengths; a row past the last prompt has length 0."""
    tokens = np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts] + [0] * (rows - len(prompts)), np.int32)
    return tokens, lengths


def _place(mesh: Mesh | None, *arrays: Any) -> list[Any]:
    """Batch-major arrays, split over the mesh's batch axes."""
    if mesh is None:
        return [jnp.asarray(x) for x in arrays]
    return [put(x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1))) for x in arrays]


def choose(
    logits: Float[Array, "B V"],
    keys: Any,
    temperature: Float[Array, ""],
    *,
    greedy: bool,
    valid_vocab: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Next tokens, each with its row's own key, and their log-probabilities at temperature 1."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < valid_vocab, logits, MASKED)
    if greedy:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, logits / temperature)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    # Rounding may leave a certain token a hair above 0, which is no log-probability.
    logprobs = jnp.minimum(chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    return tokens.astype(jnp.int32), logprobs


def _compute_params(config: ModelConfig, params: Params, compute_dtype: Any) -> Params:
    """The matrices in the compute dtype; norm scales keep theirs, as in the model itself."""
    return jax.tree.map(
        lambda names, x: x if names[-1] == "norm" else x.astype(compute_dtype),
        logical_axes(config),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _pin(cache: Cache, mesh: Mesh | None) -> Cache:
    """Cache split over the batch and the kv heads."""
    heads = (None, "batch", "kv_heads", None, None)
    return Cache(
        keys=constrain(cache.keys, mesh, *heads),
        values=constrain(cache.values, mesh, *heads),
        written=constrain(cache.written, mesh, "batch", None),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "greedy",
        "max_new_tokens",
        "valid_vocab",
        "compute_dtype",
        "mesh",
    ),
)
def _decode(
    config: ModelConfig,
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Any,
    temperature: Float[Array, ""],
    stops: Int[Array, " S"],
    *,
    greedy: bool,
    max_new_tokens: int,
    valid_vocab: int,
    compute_dtype: Any,
    mesh: Mesh | None,
) -> tuple[Int[Array, "B new"], Float[Array, "B new"], Int[Array, " B"], Bool[Array, " B"]]:
    """Tokens, log-probs, their count in each row, and whether the row reached a stop token."""
    rows, length = prompts.shape
    params = _compute_params(config, params, compute_dtype)  # once, not at every step
    head = head_weight(config, params)

    def next_token(hidden: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return choose(logits, step_keys, temperature, greedy=greedy, valid_vocab=valid_vocab)

    def stopped(tokens: jax.Array) -> jax.Array:
        return (tokens[:, None] == stops).any(axis=1)

    # Padding writes to the slots from `length` on; each is overwritten before a query may see it.
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    cache = _pin(init_cache(config, rows, length + max_new_tokens, compute_dtype), mesh)
    forward = functools.partial(
        forward_with_cache, config, params, compute_dtype=compute_dtype, mesh=mesh
    )
    hidden, cache = forward(prompts, positions=positions, cache=cache)
    last = jnp.maximum(lengths - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    tokens, logprobs = next_token(hidden, 0)
    drawn = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(tokens)
    scores = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprobs)
    alive = (lengths > 0) & ~stopped(tokens)
    counts = (lengths > 0).astype(jnp.int32)

    def unfinished(state: Any) -> Any:
        step, _, alive, *_ = state
        return (step < max_new_tokens) & alive.any()

    def advance(state: Any) -> Any:
        step, tokens, alive, counts, drawn, scores, cache = state
        hidden, cache = forward(tokens[:, None], positions=(last + step)[:, None], cache=cache)
        tokens, logprobs = next_token(hidden[:, 0], step)
        drawn = drawn.at[:, step].set(tokens)
        scores = scores.at[:, step].set(logprobs)
        counts = counts + alive
        return step + 1, tokens, alive & ~stopped(tokens), counts, drawn, scores, cache

    state = (jnp.int32(1), tokens, alive, counts, drawn, scores, cache)
    _, _, alive, counts, drawn, scores, _ = jax.lax.while_loop(unfinished, advance, state)
    out = (drawn, scores, counts, ~alive)
    return jax.tree.map(lambda x: constrain(x, mesh, *(None,) * x.ndim), out)
