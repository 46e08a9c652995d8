"""The modules of a transformer's layer: linear maps, norms, rotary positions, attention, MLP.

Each parameter is declared here, once: its shape, logical axes, initial value and names in HF and
GGUF files (`Declaration`). Parameters are kernels [in, out], biases, scales (of norms) and
embeddings [V, D]. The modules hold one layer; models/blocks.py joins them.
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

from dcod_jax.models.config import Lora, ModelConfig
from dcod_jax.models.rope import Rope, frequencies

MANY_ROWS = 512  # beyond, a CPU multiplies x @ w as fast as w @ x
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


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


@dataclasses.dataclass(frozen=True)
class Form:
    """How a linear map reads x and writes y: the terms of einsum for x, kernel and y.

    Heads come before positions: a TPU writes a product in that order as fast as in the other, and
    its attention kernel takes no other; to change the order between them is a copy in memory.
    """

    x: str
    kernel: str
    y: str
    head_dim: int = 0

    def split(self, kernel: Array) -> Array:
        """A kernel [I, O] with the heads in a dimension of their own."""
        if self.kernel == "inh":
            return kernel.reshape(len(kernel), -1, self.head_dim)
        return (
            kernel.reshape(-1, self.head_dim, kernel.shape[1]) if self.kernel == "nho" else kernel
        )


PLAIN = Form("...i", "io", "...o")


def to_heads(head_dim: int) -> Form:
    """[B, T, D] -> [B, N, T, H]."""
    return Form("bti", "inh", "bnth", head_dim)


def from_heads(head_dim: int) -> Form:
    """[B, N, T, H] -> [B, T, D]."""
    return Form("bnth", "nho", "bto", head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Array, kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None, form: Form
) -> Array:
    """x @ kernel (+ bias) in the dtype of x; their gradients are formed in the weights' own dtype.

    A float32 weight is rounded to the dtype of x for the product, and its gradient, a sum over all
    tokens, is not: so are the sums over devices that the partitioner makes of it.
    """
    return _product(x, kernel, bias, form)


def _product(x: Array, kernel: Array, bias: Array | None, form: Form) -> Array:
    y = jnp.einsum(f"{form.x},{form.kernel}->{form.y}", x, form.split(kernel.astype(x.dtype)))
    if bias is None:
        return y
    bias = bias.astype(x.dtype)
    return y + (bias.reshape(-1, 1, form.head_dim) if form.kernel == "inh" else bias)


def _affine_forward(
    x: Array, kernel: Array, bias: Array | None, form: Form
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # Not `affine`: rematerialisation saves products (remat.py), and would see a call of it instead.
    return _product(x, kernel, bias, form), (x, kernel, bias)


def _affine_backward(
    form: Form, residuals: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals
    weight = form.split(kernel.astype(x.dtype))
    in_x = jnp.einsum(f"{form.y},{form.kernel}->{form.x}", gradient, weight)
    in_kernel = jnp.einsum(
        f"{form.x},{form.y}->{form.kernel}", x, gradient, preferred_element_type=kernel.dtype
    )
    if kernel.dtype != x.dtype:
        # A transposition must not join it: XLA's CPU backend has no such product of bfloat16.
        in_kernel = jax.lax.optimization_barrier(in_kernel)
    in_kernel = in_kernel.reshape(kernel.shape)
    if bias is None:
        return in_x, in_kernel, None
    tokens = (0, 2) if form.kernel == "inh" else range(gradient.ndim - 1)
    return in_x, in_kernel, gradient.sum(tokens, dtype=bias.dtype).reshape(bias.shape)


affine.defvjp(_affine_forward, _affine_backward)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What the mesh and the files know a parameter by; nnx metadata of the parameter."""

    axes: tuple[str, ...]  # a logical axis for each dimension (parallel/mesh.RULES)
    hf: str  # name in HF files; "{layer}" where L tensors are stacked on axis 0, then "{expert}"
    gguf: str
    transposed: bool = False  # files hold [out, in]
    rope_heads: int = 0  # heads of rotated rows, which the llama GGUF files interleave
    rows: tuple[int, int] | None = None  # (first, all) of a file's tensor that holds several
    stacked: str = ""  # name, if another, in HF files with one tensor for all experts of a layer
    stacked_rows: tuple[int, int] | None = None  # rows of it, within each expert


def declare(value: Array, axes: tuple[str, ...], hf: str, gguf: str, **more: Any) -> nnx.Param:
    return nnx.Param(value, declaration=Declaration(axes, hf, gguf, **more))


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), in the dtype of x; a transposed one has its kernel as [out, in].

    With an adapter (config.Lora): y + scale·(x @ lora_a) @ lora_b, without ever forming A·B. name:
    what adapters know it by, where files hold it as rows of a tensor of another name.
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
        rows: tuple[int, int] | None = None,
        lora: Lora | None = None,
        name: str | None = None,
        stacked: str = "",
    ):
        value = std * jax.random.normal(rngs.params(), width)
        names, more = (f"{hf}.weight", f"{gguf}.weight"), {"rope_heads": rope_heads, "rows": rows}
        self.kernel = declare(value, axes, *names, transposed=True, stacked=stacked, **more)
        if bias:
            value = jnp.zeros(width[1])
            self.bias = declare(value, axes[1:], f"{hf}.bias", f"{gguf}.bias", **more)
        self.has_bias = bias
        self.transposed = False
        name = name or hf
        self.lora_scale = lora.scale if lora is not None and lora.adapts(name) else None
        if lora is not None and self.lora_scale is not None:
            # PEFT's start: the first product is 0, and the gradient of B is not.
            bound = 1.0 / math.sqrt(width[0])
            value = jax.random.uniform(rngs.params(), (width[0], lora.rank), minval=-1.0)
            names = [(f"{name}.lora_{x}.weight", "") for x in "AB"]
            ends = (axes[0], "rank", axes[1])
            self.lora_a = declare(value * bound, ends[:2], *names[0], transposed=True)
            value = jnp.zeros((lora.rank, width[1]))
            self.lora_b = declare(value, ends[1:], *names[1], transposed=True)

    def __call__(self, x: Array, form: Form = PLAIN) -> Array:
        bias = self.bias[...] if self.has_bias else None
        if not self.transposed:
            y = affine(x, self.kernel[...], bias, form)
        else:
            flat = x if form.x != "bnth" else jnp.swapaxes(x, 1, 2).reshape(len(x), x.shape[2], -1)
            y = transposed_matmul(flat, self.kernel[...].astype(x.dtype)).astype(x.dtype)
            y = y if bias is None else y + bias.astype(x.dtype)
            y = y if form.y != "bnth" else split_heads(y, form.head_dim)
        if self.lora_scale is None:
            return y
        inward, outward = (form, PLAIN) if form.kernel == "nho" else (PLAIN, form)
        low = affine(x, self.lora_a[...], None, inward)
        return y + self.lora_scale * affine(low, self.lora_b[...], None, outward)


def split_heads(x: Float[Array, "B T D"], head_dim: int) -> Float[Array, "B N T H"]:
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, head_dim), 1, 2)


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


def _apply_rope_forward(
    x: Array, cos: Array, sin: Array, pairs: str
) -> tuple[Array, tuple[Array, Array]]:
    return apply_rope(x, cos, sin, pairs), (cos, sin)


def _apply_rope_backward(
    pairs: str, rope: tuple[Array, Array], gradient: Array
) -> tuple[Array, None, None]:
    cos, sin = rope
    return apply_rope(gradient, cos, -sin, pairs), None, None


apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)


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
