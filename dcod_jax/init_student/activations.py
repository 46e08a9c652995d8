"""What the heads and MLP channels of a model put out on the traces of a dataset."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dcod_jax.data.dataset import TraceDataset, check_fingerprints
from dcod_jax.data.tokenizer import Tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.files import Location
from dcod_jax.models import attention, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.layer_kinds import LayerKind
from dcod_jax.sample.sampler import bucket_length
from dcod_jax.types import Params

ROWS = 4  # traces of a batch
Scores = tuple[np.ndarray, np.ndarray]  # float64: of heads [L, N], of MLP channels [L, F]


def texts_of(
    place: Location, count: int, config: ModelConfig, tokenizer: Tokenizer
) -> list[np.ndarray]:
    """The token ids of `count` traces of a dataset, evenly spread over it."""
    if config.mixture is not None:
        raise DcodError(
            f"--choose activations: model_type={config.model_type!r} has experts, which each see "
            "some tokens only; take --choose weights"
        )
    dataset = TraceDataset(place)
    check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(tokenizer))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round())
    texts = [trace.token_ids for trace in dataset.read(chosen.astype(int))]
    longest = max(map(len, texts))
    if longest > config.max_position_embeddings:
        raise DcodError(
            f"{place}: a trace has {longest} tokens, the model's max_position_embeddings is "
            f"{config.max_position_embeddings}; give a dataset of shorter traces"
        )
    return texts


def mean_activations(config: ModelConfig, params: Params, texts: Sequence[np.ndarray]) -> Scores:
    """Mean absolute outputs over all tokens of the texts, of prompts and of completions.

    Of a head: of attention's weighted sum of values, before o_proj, also averaged over its H
    dimensions. Of a channel: of activation(gate) · up, before down_proj. In float32.
    """
    heads = np.zeros((config.num_layers, config.num_heads))
    channels = np.zeros((config.num_layers, config.intermediate_size))
    for start in range(0, len(texts), ROWS):
        tokens = np.zeros((ROWS, bucket_length(max(map(len, texts)))), np.int32)
        mask = np.zeros_like(tokens)
        for row, text in enumerate(texts[start : start + ROWS]):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        x = transformer.embed(
            params,
            jnp.asarray(tokens),
            scale=config.embedding_scale,
            compute_dtype=jnp.float32,
            mesh=None,
        )
        for layer, kind in enumerate(config.kinds):
            x, *sums = _layer(config, kind, params["layers"], layer, x, jnp.asarray(mask))
            heads[layer] += np.asarray(sums[0], np.float64)
            channels[layer] += np.asarray(sums[1], np.float64)
    count = sum(map(len, texts))
    return heads / (count * config.head_dim), channels / count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    config: ModelConfig, kind: LayerKind, layers: Params, layer: int | Array, x: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """(x behind the layer, sums of absolute outputs of its heads, of its channels)."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), mask.shape)
    own = jax.tree.map(lambda leaf: leaf[layer], layers)
    block = nnx.merge(transformer.graphs(config)[1], own)
    rope = transformer.rope_tables(config, positions, mask)[kind.rope]
    query, key, value = block.project(x, rope)
    mixed = attention.attention(
        query,
        key,
        value,
        mask,
        scale=config.score_scale,
        softcap=config.attention_softcap,
        window=kind.window,
        mesh=None,
        kind="auto",
    )
    seen, down_proj = [], block.mlp.down_proj

    def noted(x: Array) -> Array:
        seen.append(x)
        return down_proj(x)

    block.mlp.down_proj = noted
    x = block.finish(x, mixed)
    [channels] = seen
    return (
        x,
        (jnp.abs(mixed) * mask[..., None, None]).sum((0, 1, 3)),
        (jnp.abs(channels) * mask[..., None]).sum((0, 1)),
    )
