"""What a batch's tokens were routed to, and the load-balance loss of a mixture of experts.

A model's routing is [B, L, 2E+1]: of each row and layer, over the tokens that are no padding, how
many chose each expert, the sums of the router's probabilities, and that of its entropies (nats).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dcod_jax.losses.reduce import Sums, divisor


def _parts(routing: Array) -> tuple[Array, Array, Array]:
    """(tokens of each expert, probabilities, entropy)."""
    experts = routing.shape[-1] // 2
    return routing[..., :experts], routing[..., experts : 2 * experts], routing[..., -1]


def pressure(routing: Float[Array, "L R"], tokens: Int[Array, ""]) -> Float[Array, " E"]:
    """[E]: what a probability that a token gave an expert adds to the load-balance loss.

    The loss is E · Σ_e f_e · P_e, f_e the mean number of a token's choices that are e, P_e its mean
    probability, both over all layers and tokens of the global batch (Fedus, arXiv 2101.03961; sums
    as transformers' load_balancing_loss_func). f has no gradient, so the loss is linear in the
    probabilities, and micro-batches add up to it.
    """
    counts, _, _ = _parts(routing)
    used = jnp.maximum(tokens.astype(jnp.float32) * len(routing), 1.0)
    return jax.lax.stop_gradient(counts.sum(0) * counts.shape[-1] / jnp.square(used))


def balance_sum(
    routing: Float[Array, "B L R"], whole: Float[Array, "L R"], sums: Sums, normalize: str
) -> Float[Array, ""]:
    """The share of some rows in the batch's load-balance loss, times the batch's divisor.

    whole and sums are of the global batch, so that the sum of the shares, divided as the loss is
    (reduce.mean_gradients), is the load-balance loss.
    """
    _, probs, _ = _parts(routing.sum((0, 1)))
    scale = jax.lax.stop_gradient(divisor(sums, normalize))
    return scale * (pressure(whole, sums.tokens) * probs).sum()


def statistics(routing: Float[Array, "L R"], tokens: Int[Array, ""]) -> dict[str, Array]:
    """Metrics of a global batch's routing.

    balance is the load-balance loss (K where all experts are used alike), entropy that of the
    router's probabilities, a mean over tokens and layers in nats; largest and smallest are the
    shares of a layer's tokens that choose its most and its least used expert, over all layers.
    """
    counts, probs, entropy = _parts(routing)
    tokens_used = tokens.astype(jnp.float32)
    shares = counts / tokens_used
    measured = {
        "balance": (pressure(routing, tokens) * probs.sum(0)).sum(),
        "entropy": entropy.sum() / (tokens_used * len(routing)),
        "largest": shares.max(),
        "smallest": shares.min(),
    }
    return {f"router/{name}": value for name, value in measured.items()}
