"""The modules of the transformer: linear maps, norms, rotary positions, attention, MLP, block.

Each parameter is declared here, once: its shape, logical axes, initial value and names in HF and
GGUF files (`Declaration`). Parameters are kernels [in, out], biases, scales (of norms) and
embeddings [V, D]. The modules hold one layer; models/transformer.py stacks and scans them.
Dimensions beside the legend: P rotary pairs (H/2), R query heads per kv head, S queries, M keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.models.config import Lora, ModelConfig, rope_frequencies

# Finite, so that a row that may see nothing has a uniform softmax instead of NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)
MANY_ROWS = 512  # beyond, a CPU multiplies x @ w as fast as w @ x


def transposed_matmul(x: Float[Array, "*B I"], weight: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """x @ weight.T in float32; a few rows of x are computed as (weight @ x.T).T.

    The matmuls of XLA's CPU backend pack their right-hand side anew at every call. That should be x
    and not the weight; with many rows it does not matter. XLA would fold the transposition away
    again; the barrier keeps it.
    """
    if math.prod(x.shape[:-1]) > MANY_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
    y = jnp.einsum("oi,...i->o...", weight, x, preferred_element_type=jnp.float32)
    return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)


@jax.custom_vjp
def affine(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None
) -> Float[Array, "*B O"]:
    """x @ kernel (+ bias) in the dtype of x; their gradients are formed in the weights' own dtype.

    A float32 weight is rounded to the dtype of x for the product, and its gradient, a sum over all
    tokens, is not: so are the sums over devices that the partitioner makes of it.
    """
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def _affine_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(
    residuals: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals
    in_x = jnp.einsum("...o,io->...i", gradient, kernel.astype(x.dtype))
    in_kernel = jnp.einsum("...i,...o->io", x, gradient, preferred_element_type=kernel.dtype)
    if kernel.dtype != x.dtype:
        # A transposition behind it must not become part of the product: XLA's CPU backend has no
        # kernel for bfloat16 operands in that order.
        in_kernel = jax.lax.optimization_barrier(in_kernel)
    if bias is None:
        return in_x, in_kernel, None
    return in_x, in_kernel, gradient.sum(range(gradient.ndim - 1), dtype=bias.dtype)


affine.defvjp(_affine_forward, _affine_backward)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What the mesh and the files know a parameter by; nnx metadata of the parameter."""

    axes: tuple[str, ...]  # a logical axis for each dimension (parallel/mesh.RULES)
    hf: str  # name in HF files; "{layer}" where L tensors are stacked on axis 0
    gguf: str
    transposed: bool = False  # files hold [out, in]
    rope_heads: int = 0  # heads of rotated rows, which the llama GGUF files interleave


def _declare(value: Array, axes: tuple[str, ...], hf: str, gguf: str, **more: Any) -> nnx.Param:
    return nnx.Param(value, declaration=Declaration(axes, hf, gguf, **more))


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), in the dtype of x; a transposed one has its kernel as [out, in].

    With an adapter (config.Lora): y + scale·(x @ lora_a) @ lora_b, without ever forming A·B.
    """

    def __init__(
        self,
        width: tuple[int, int],
        axes: tuple[str, str],
        hf: str,
        gguf: str,
        *,
        std: float,
        rngs: nnx.Rngs,
        bias: bool = False,
        rope_heads: int = 0,
        lora: Lora | None = None,
    ):
        value = std * jax.random.normal(rngs.params(), width)
        names, more = (f"{hf}.weight", f"{gguf}.weight"), {"rope_heads": rope_heads}
        self.kernel = _declare(value, axes, *names, transposed=True, **more)
        if bias:
            value = jnp.zeros(width[1])
            self.bias = _declare(value, axes[1:], f"{hf}.bias", f"{gguf}.bias", **more)
        self.has_bias = bias
        self.transposed = False
        self.lora_scale = lora.scale if lora is not None and lora.adapts(hf) else None
        if lora is not None and self.lora_scale is not None:
            # PEFT's start: the first product is 0, and the gradient of B is not.
            bound = 1.0 / math.sqrt(width[0])
            value = jax.random.uniform(rngs.params(), (width[0], lora.rank), minval=-1.0)
            names, ends = [(f"{hf}.lora_{x}.weight", "") for x in "AB"], (axes[0], "rank", axes[1])
            self.lora_a = _declare(value * bound, ends[:2], *names[0], transposed=True)
            value = jnp.zeros((lora.rank, width[1]))
            self.lora_b = _declare(value, ends[1:], *names[1], transposed=True)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        bias = self.bias[...] if self.has_bias else None
        if not self.transposed:
            y = affine(x, self.kernel[...], bias)
        else:
            y = transposed_matmul(x, self.kernel[...].astype(x.dtype)).astype(x.dtype)
            y = y if bias is None else y + bias.astype(x.dtype)
        if self.lora_scale is None:
            return y
        low = affine(x, self.lora_a[...], None)
        return y + self.lora_scale * affine(low, self.lora_b[...], None)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32."""

    def __init__(self, width: int, hf: str, gguf: str, *, eps: float):
        self.scale = _declare(jnp.ones(width), ("norm",), f"{hf}.weight", f"{gguf}.weight")
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table with one row per vocabulary entry; also an untied lm_head."""

    def __init__(self, config: ModelConfig, hf: str, gguf: str, *, rngs: nnx.Rngs):
        width = (config.vocab_size, config.hidden_size)
        value = config.initializer_range * jax.random.normal(rngs.params(), width)
        self.embedding = _declare(value, ("vocab", "embed"), f"{hf}.weight", f"{gguf}.weight")


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosine and sine of position · frequency, float32."""
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) in float32, HF's layout; returns the dtype of x.

    Differentiable in x only: the transpose is the rotation back.
    """
    # The halves change places in a product with a permutation, which is exact: a TPU would take
    # the lanes apart in memory, and that took longer than all other work on the positions.
    H = x.shape[-1]
    swap = jnp.roll(jnp.eye(H, dtype=x.dtype), H // 2, axis=1)
    swapped = jnp.einsum(
        "btnh,hk->btnk",
        x,
        swap,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos = jnp.concatenate([cos, cos], axis=-1)[:, :, None]
    sin = jnp.concatenate([-sin, sin], axis=-1)[:, :, None]
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _apply_rope_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return apply_rope(x, cos, sin), (cos, sin)


def _apply_rope_backward(rope: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    cos, sin = rope
    return apply_rope(gradient, cos, -sin), None, None


apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)


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
    read: Callable[[Array], tuple[Array, Array]],
    positions: Int[Array, "B S"],
    chunks: Int[Array, ""] | int,
) -> Float[Array, "B S N H"]:
    """Attention of S new queries over the first chunks of a cache, whose slot j holds position j.

    read(i) -> keys [B, G, H, C] and values [B, G, C, H] of chunk i; a query sees the slots up to
    its position. The softmax is accumulated chunk by chunk (Milakov and Gimelshein, arXiv
    1805.02867), so the work follows what is written and not the cache's size, and a chunk that a
    row does not see leaves its result as it is, bit for bit. Scores, softmax and sums are float32.
    """
    B, S, N, H = query.shape
    shapes = jax.eval_shape(read, jnp.int32(0))
    G, C = shapes[1].shape[1:3]
    queries = query.reshape(B, S, G, N // G, H).transpose(0, 2, 3, 1, 4)  # [B,G,R,S,H]
    folded = queries.reshape(B, G, -1, H)  # the R heads beside the queries, as in attend

    def add(index: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = sums
        key, value = (x.astype(query.dtype) for x in read(index))
        scores = jnp.einsum("bgxh,bghc->bgxc", folded, key, preferred_element_type=jnp.float32)
        visible = index * C + jnp.arange(C) <= positions[..., None]
        scores = scores.reshape(B, G, -1, S, C) * (1.0 / math.sqrt(H))
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(B, G, -1, C)
        peak = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        scale, probs = jnp.exp(highest - peak), jnp.exp(scores - peak)
        more = jnp.einsum(
            "bgxc,bgch->bgxh", probs.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        total = total * scale + probs.sum(axis=-1, keepdims=True)
        return peak, total, mixed * scale + more

    zeros = jnp.zeros((*folded.shape[:-1], 1), jnp.float32)
    sums = (zeros + MASKED, zeros, jnp.zeros(folded.shape, jnp.float32))
    _, total, mixed = jax.lax.fori_loop(0, chunks, add, sums)
    mixed = (mixed / total).astype(query.dtype).reshape(B, G, -1, S, H)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


class Attention(nnx.Module):
    """Projections, optional per-head q/k norms and rotary positions around grouped attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, G, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        common = {"std": config.initializer_range, "rngs": rngs, "lora": config.lora}
        linear = functools.partial(Linear, **common)
        inward = functools.partial(linear, bias=config.qkv_bias)
        q_axes, kv_axes = ("embed", "heads"), ("embed", "kv_heads")
        self.q_proj = inward((D, N * H), q_axes, "self_attn.q_proj", "attn_q", rope_heads=N)
        self.k_proj = inward((D, G * H), kv_axes, "self_attn.k_proj", "attn_k", rope_heads=G)
        self.v_proj = inward((D, G * H), kv_axes, "self_attn.v_proj", "attn_v")
        self.o_proj = linear(
            (N * H, D), ("heads", "embed"), "self_attn.o_proj", "attn_output", bias=config.o_bias
        )
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = RMSNorm(H, "self_attn.q_norm", "attn_q_norm", eps=eps)
            self.k_norm = RMSNorm(H, "self_attn.k_norm", "attn_k_norm", eps=eps)
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
        D, F = config.hidden_size, config.intermediate_size
        common = {"std": config.initializer_range, "rngs": rngs, "lora": config.lora}
        linear = functools.partial(Linear, **common)
        self.gate_proj = linear((D, F), ("embed", "mlp"), "mlp.gate_proj", "ffn_gate")
        self.up_proj = linear((D, F), ("embed", "mlp"), "mlp.up_proj", "ffn_up")
        self.down_proj = linear((F, D), ("mlp", "embed"), "mlp.down_proj", "ffn_down")

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm decoder layer, in two halves: before attention and after it.

    Names in files are those within the layer.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = norm("input_layernorm", "attn_norm")
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = norm("post_attention_layernorm", "ffn_norm")
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
    """Everything outside the layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, "model.embed_tokens", "token_embd", rngs=rngs)
        self.norm = RMSNorm(
            config.hidden_size, "model.norm", "output_norm", eps=config.rms_norm_eps
        )
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config, "lm_head", "output", rngs=rngs)
