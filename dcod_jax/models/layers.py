"""The modules of a transformer's layer: norms, rotary positions, attention, MLP, embeddings.

Parameters are kernels and biases (models/linear.py), scales of norms and embeddings [V, D]. The
modules hold one layer; models/blocks.py joins them.
Dimensions beside the legend: P rotary pairs (H/2), R query heads per kv head, S queries, M keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.models.config import ModelConfig
from dcod_jax.models.linear import Linear, declare, from_heads, split_heads, to_heads
from dcod_jax.models.rope import Rope, frequencies

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · (offset + scale) over the last axis, in float32.

    The scale starts at 1 - offset.
    """

    def __init__(self, width: int, hf: str, gguf: str, *, eps: float, offset: float = 0.0):
        start = jnp.full(width, 1.0 - offset)
        self.scale = declare(start, ("norm",), f"{hf}.weight", f"{gguf}.weight")
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * (scale + self.offset if self.offset else scale)).astype(x.dtype)


def norm(config: ModelConfig, width: int, hf: str, gguf: str) -> RMSNorm:
    """The model's norm of this width, under these names in files."""
    return RMSNorm(width, hf, gguf, eps=config.rms_norm_eps, offset=config.norm_offset)


class Embedding(nnx.Module):
    """A table with one row per vocabulary entry; also an untied lm_head."""

    def __init__(self, config: ModelConfig, hf: str, gguf: str, *, rngs: nnx.Rngs):
        width = (config.vocab_size, config.hidden_size)
        value = config.initializer_range * jax.random.normal(rngs.params(), width)
        self.embedding = declare(value, ("vocab", "embed"), f"{hf}.weight", f"{gguf}.weight")


def rope_tables(
    rope: Rope,
    head_dim: int,
    positions: Int[Array, "B T"],
    *,
    beyond: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosine and sine of position · frequency, times rope.attention_factor, float32.

    beyond: tokens of a text longer than rope.switches_at; None where there are none.
    """
    inverse = jnp.asarray(frequencies(rope, head_dim), jnp.float32)
    if beyond is not None:
        other = jnp.asarray(frequencies(rope, head_dim, beyond=True), jnp.float32)
        inverse = jnp.where(beyond[..., None], other, inverse)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    tables = jnp.cos(angles), jnp.sin(angles)
    factor = rope.attention_factor
    return tables if factor == 1 else (tables[0] * factor, tables[1] * factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def apply_rope(
    x: Float[Array, "B N T H"],
    cos: Float[Array, "B T P"],
    sin: Float[Array, "B T P"],
    pairs: str = "halves",
) -> Float[Array, "B N T H"]:
    """Rotate the pairs (x[i], x[i + P]) in float32, HF's layout; returns the dtype of x.

    pairs="neighbours": the pairs (x[2i], x[2i + 1]). Dimensions from 2P on stay. Differentiable in
    x only: the transpose is the rotation back.
    """
    # The halves change places in a product with a permutation, which is exact: a TPU would take
    # the lanes apart in memory, and that took longer than all other work on the positions.
    rotated, rest = 2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    swap = jnp.roll(jnp.eye(rotated, dtype=x.dtype), rotated // 2, axis=1)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    if pairs == "neighbours":
        order = np.arange(rotated).reshape(2, -1).T.ravel()
        swap, cos, sin = swap[order][:, order], cos[..., order], sin[..., order]
    swap = jnp.pad(swap, (0, rest)) if rest else swap
    swapped = jnp.einsum(
        "bnth,hk->bntk",
        x,
        swap,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    stays = ((0, 0), (0, 0), (0, rest))
    cos = jnp.pad(cos, stays, constant_values=1.0)[:, None]
    sin = jnp.pad(sin, stays)[:, None]
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


apply_rope.defvjp(
    lambda x, cos, sin, pairs: (apply_rope(x, cos, sin, pairs), (cos, -sin)),
    lambda pairs, back, gradient: (apply_rope(gradient, *back, pairs), None, None),
)


def capped(x: Float[Array, "*N"], softcap: float | None) -> Float[Array, "*N"]:
    """softcap · tanh(x / softcap), or x where there is none."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


class Attention(nnx.Module):
    """Projections, optional q/k norms and rotary positions around grouped attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, G, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        common = {"std": config.initializer_range, "rngs": rngs, "lora": config.lora}
        linear = functools.partial(Linear, **common)

        def inward(name: str, gguf: str, axis: str, heads: int, first: int, **more: Any) -> Linear:
            name, rows = f"self_attn.{name}_proj", None
            names = (name, gguf)
            if "qkv" in config.fused:
                names, rows = ("self_attn.qkv_proj", "attn_qkv"), (first * H, (N + 2 * G) * H)
            more |= {"bias": config.qkv_bias, "rows": rows, "name": name}
            return linear((D, heads * H), ("embed", axis), *names, **more)

        self.q_proj = inward("q", "attn_q", "heads", N, 0, rope_heads=N)
        self.k_proj = inward("k", "attn_k", "kv_heads", G, N, rope_heads=G)
        self.v_proj = inward("v", "attn_v", "kv_heads", G, N + G)
        self.o_proj = linear(
            (N * H, D), ("heads", "embed"), "self_attn.o_proj", "attn_output", bias=config.o_bias
        )
        if config.qk_norm:
            q_width, k_width = (H, H) if config.qk_norm == "head" else (N * H, G * H)
            self.q_norm = norm(config, q_width, "self_attn.q_norm", "attn_q_norm")
            self.k_norm = norm(config, k_width, "self_attn.k_norm", "attn_k_norm")
        self.qk_norm, self.clip = config.qk_norm, config.qkv_clip
        self.head_dim, self.pairs = H, config.rope_pairs

    def project(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T P"], Float[Array, "B T P"]] | None,
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B G T H"], Float[Array, "B G T H"]]:
        """Query, key (both rotated, unless rope is None) and value heads."""
        form = to_heads(self.head_dim)
        if self.qk_norm == "projection":
            flat = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
            query, key = (split_heads(y, self.head_dim) for y in flat)
        else:
            query, key = self.q_proj(x, form), self.k_proj(x, form)
        value = self.v_proj(x, form)
        if self.clip is not None:
            query, key, value = (jnp.clip(y, -self.clip, self.clip) for y in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if rope is None:
            return query, key, value
        return apply_rope(query, *rope, self.pairs), apply_rope(key, *rope, self.pairs), value

    def output(self, mixed: Float[Array, "B N T H"]) -> Float[Array, "B T D"]:
        """What attention mixed, back in the width of the model."""
        return self.o_proj(mixed, from_heads(self.head_dim))


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        common = {"std": config.initializer_range, "rngs": rngs, "lora": config.lora}
        linear = functools.partial(Linear, **common, bias=config.mlp_bias)

        def inward(name: str, gguf: str, first: int) -> Linear:
            name, rows = f"mlp.{name}_proj", None
            names = (name, gguf)
            if "gate_up" in config.fused:
                names, rows = ("mlp.gate_up_proj", "ffn_up"), (first, 2 * F)
            return linear((D, F), ("embed", "mlp"), *names, rows=rows, name=name)

        self.gate_proj = inward("gate", "ffn_gate", 0)
        self.up_proj = inward("up", "ffn_up", F)
        self.down_proj = linear((F, D), ("mlp", "embed"), "mlp.down_proj", "ffn_down")
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))
