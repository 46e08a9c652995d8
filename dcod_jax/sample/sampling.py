"""Choosing the next token: greedy, or drawn at a temperature from the top-k, top-p, min-p tokens.

The filters are those of transformers' logits processors and apply in its order: temperature, top-k,
top-p, min-p, each to what the one before it left. All three keep the tokens above a threshold of
their logits, which is found by bisection instead of by sorting the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dcod_jax.errors import DcodError

MASKED = -1e30  # logit of a row of the vocabulary that the tokenizer does not have


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How tokens are chosen. `mode` is compiled in, the numbers are not."""

    temperature: Any
    top_k: Any  # 0: off
    top_p: Any  # 1: off
    min_p: Any  # 0: off
    mode: str = dataclasses.field(metadata={"static": True})  # greedy, plain (no filter), filtered


def make_settings(
    *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Settings:
    """Checked settings; temperature 0 is greedy, which no filter changes: the likeliest stays."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise DcodError(f"temperature={temperature} must be >= 0 and finite (0: greedy)")
    if not 0 < top_p <= 1:
        raise DcodError(f"top_p={top_p} must be above 0 and at most 1 (1: off)")
    if not 0 <= min_p <= 1:
        raise DcodError(f"min_p={min_p} must be from 0 to 1 (0: off)")
    if top_k < 0:
        raise DcodError(f"top_k={top_k} must be >= 0 (0: off)")
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    return Settings(
        temperature=np.float32(temperature or 1.0),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        mode="greedy" if temperature == 0 else "filtered" if filtered else "plain",
    )


def choose(
    logits: Float[Array, "B V"], keys: Shaped[Array, " B"], settings: Settings, *, valid_vocab: int
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Next tokens, each with its row's own key, and their log-probabilities at temperature 1."""
    if valid_vocab < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < valid_vocab, logits, MASKED)
    if settings.mode == "greedy":
        tokens = _argmax(logits)
    else:
        scaled = logits / settings.temperature
        if settings.mode == "filtered":
            scaled = keep_likely(scaled, settings)
        # As jax.random.categorical draws, with a faster argmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[-1:]))(keys)
        tokens = _argmax(noise + scaled)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    # Rounding may leave a certain token a hair above 0, which is no log-probability.
    logprobs = jnp.minimum(chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    return tokens.astype(jnp.int32), logprobs


def _argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """First place of the largest value; two plain reductions, which compile to vector code."""
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    highest = x.max(axis=-1, keepdims=True)
    # A NaN equals nothing; the last place is then as good as any.
    return jnp.where(x == highest, places, x.shape[-1] - 1).min(axis=-1)


def keep_likely(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Logits with -inf where top_k, top_p or min_p, in this order, drop a token.

    top_k keeps the k largest (and what equals the k-th); top_p keeps a token while the mass of the
    likelier ones is below top_p; min_p keeps p >= min_p * max(p). The likeliest always stays.
    """
    highest = logits.max(axis=-1, keepdims=True)
    count = jnp.where(settings.top_k > 0, settings.top_k, logits.shape[-1])
    kth = _threshold(logits, jnp.ones_like(logits), count.astype(jnp.float32))
    logits = jnp.where(logits >= kth, logits, -jnp.inf)
    mass = jnp.exp(logits - highest)
    edge = _threshold(logits, mass, settings.top_p * mass.sum(axis=-1, keepdims=True))
    keep = (settings.top_p >= 1) | (logits >= edge)
    keep &= mass >= settings.min_p
    return jnp.where(keep | (logits == highest), logits, -jnp.inf)


def _threshold(
    values: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, ...]
) -> Float[Array, "B 1"]:
    """The largest float32 t for which the weights where values >= t add up to at least target.

    The 32 bits of t are found one by one, in the order-preserving integer form of a float.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    # Negative floats order the other way round; the sign bit becomes the top bit of an unsigned.
    order = jax.lax.bitcast_convert_type(
        jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32
    )

    def step(index: Array, low: Array) -> Array:
        candidate = low | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        reached = jnp.where(order >= candidate, weights, 0.0).sum(axis=-1, keepdims=True) >= target
        return jnp.where(reached, candidate, low)

    low = jnp.zeros((*values.shape[:-1], 1), jnp.uint32)
    low = jax.lax.fori_loop(0, 32, step, low)
    kept = jnp.where(order >= low, values, jnp.inf)
    return kept.min(axis=-1, keepdims=True)
