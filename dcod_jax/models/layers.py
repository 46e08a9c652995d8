"""The modules of the transformer: linear maps, norms, rotary positions, attention, MLP, block.

Attribute paths are those of the HF models (self_attn.q_proj, mlp.gate_proj, ...). Leaves are named
by what they are: kernel [in, out] (HF's weight, transposed), bias, scale (a norm's weight),
embedding [V, D]. The modules hold one layer; models/transformer.py stacks and scans them.
Dimensions beside the legend: P rotary pairs (H/2), R query heads per kv head, S queries, M keys.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.models.config import ModelConfig, rope_frequencies

# Finite, so that a row that may see nothing has a uniform softmax instead of NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), in the dtype of x."""

    def __init__(self, width: tuple[int, int], *, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), width))
        if bias:
            self.bias = nnx.Param(jnp.zeros(width[1]))
        self.has_bias = bias

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table with one row per vocabulary entry, as HF lays it out; also an untied lm_head."""

    def __init__(self, width: tuple[int, int], *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), width))


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosine and sine of position · frequency, float32."""
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) in float32, HF's layout; returns the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    query: Float[Array, "B G R S H"],
    key: Float[Array, "B G M H"],
    value: Float[Array, "B G M H"],
    visible: Bool[Array, "B S M"],
) -> Float[Array, "B G R S H"]:
    """Softmax attention of R query heads per kv head; scores and softmax are float32.

    The R heads are folded into the query axis, so keys and values are never repeated.
    """
    B, G, R, S, H = query.shape
    folded = query.reshape(B, G, R * S, H)
    scores = jnp.einsum("bgxh,bgmh->bgxm", folded, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, G, R, S, -1) * (1.0 / math.sqrt(H))
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgxm,bgmh->bgxh", probs.reshape(B, G, R * S, -1), value)
    return mixed.reshape(B, G, R, S, H)


def cached_attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B G M H"],
    value: Float[Array, "B G M H"],
    visible: Bool[Array, "B S M"],
) -> Float[Array, "B S N H"]:
    """Attention of S new queries over M cache slots."""
    B, S, N, H = query.shape
    G = key.shape[1]
    queries = query.reshape(B, S, G, N // G, H).transpose(0, 2, 3, 1, 4)
    mixed = attend(queries, key.astype(query.dtype), value.astype(query.dtype), visible)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


class Attention(nnx.Module):
    """Projections, optional per-head q/k norms and rotary positions around grouped attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, H = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * H, config.num_kv_heads * H
        std = config.initializer_range
        self.q_proj = Linear((width, heads), bias=config.qkv_bias, std=std, rngs=rngs)
        self.k_proj = Linear((width, kv_heads), bias=config.qkv_bias, std=std, rngs=rngs)
        self.v_proj = Linear((width, kv_heads), bias=config.qkv_bias, std=std, rngs=rngs)
        self.o_proj = Linear((heads, width), bias=config.o_bias, std=std, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(H, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.head_dim = H

    def project(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T P"], Float[Array, "B T P"]],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
        """Query, key (both rotated) and value heads."""
        B, T, _ = x.shape
        query = self.q_proj(x).reshape(B, T, -1, self.head_dim)
        key = self.k_proj(x).reshape(B, T, -1, self.head_dim)
        value = self.v_proj(x).reshape(B, T, -1, self.head_dim)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return apply_rope(query, *rope), apply_rope(key, *rope), value

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        B, T, N, H = mixed.shape
        return self.o_proj(mixed.reshape(B, T, N * H))


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear((width, inner), bias=False, std=std, rngs=rngs)
        self.up_proj = Linear((width, inner), bias=False, std=std, rngs=rngs)
        self.down_proj = Linear((inner, width), bias=False, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm decoder layer, split where attention needs its keys from elsewhere."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def project(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T P"], Float[Array, "B T P"]],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        x = x + self.self_attn.output(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Everything outside the layers; attribute names as in HF."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        table, std = (config.vocab_size, config.hidden_size), config.initializer_range
        self.embed_tokens = Embedding(table, std=std, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(table, std=std, rngs=rngs)
