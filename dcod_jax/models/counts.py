"""Parameters of a model, and operations of a training step."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from dcod_jax.models.config import ModelConfig
from dcod_jax.models.transformer import param_shapes


def num_params(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters, adapters included; a tied head is counted once. active: that a token uses."""
    flat = jax.tree_util.tree_leaves_with_path(param_shapes(config))
    share = functools.partial(_used_share, config) if active else lambda path: 1
    return round(sum(math.prod(leaf.shape) * share(path) for path, leaf in flat))


def _used_share(config: ModelConfig, path: tuple[Any, ...]) -> float:
    """The share of a parameter that a token uses."""
    if config.mixture is None or path[-1].key != "experts":
        return 1.0
    return config.mixture.per_token / config.mixture.experts


def flops_per_row(config: ModelConfig, seq_len: int, head_tokens: int) -> float:
    """Floating point operations of training on one row: 3 x forward, frozen matrices 2 x.

    Per token forward: 2 per matmul parameter of the layers that the token uses, and 4 * N * H per
    visible position and layer, (seq_len + 1) / 2 of them on average, for causal attention scores
    and their weighted sum; fewer with a window. The head is counted at the head_tokens positions
    that it is compiled for. Recomputation (remat) is not counted.
    """
    frozen = config.lora is not None  # then a matrix without adapter has no gradient of its own
    matmul = sum(
        math.prod(leaf.shape)
        * _used_share(config, path)
        * (2 if frozen and path[-1].key in ("kernel", "experts") else 3)
        for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)["layers"])
        if leaf.ndim > 2
    )
    seen = 0.0  # positions that a token sees, over all layers
    for kind in config.kinds:
        window = min(kind.window or seq_len, seq_len)
        seen += window - window * (window - 1) / (2 * seq_len)
    attention = 4 * config.num_heads * config.head_dim * seen
    head = 2 * config.vocab_size * config.hidden_size
    head *= 2 if frozen else 3
    return 1.0 * seq_len * (2 * matmul + 3 * attention) + head_tokens * head
