"""Linear maps, and how a parameter is declared: once, with shape, axes, initial value and names.

A map reads or writes heads where attention does (`Form`). Parameters are kernels [in, out] and
biases; those of norms and embeddings are in models/layers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dcod_jax.models.config import Lora

MANY_ROWS = 512  # beyond, a CPU multiplies x @ w as fast as w @ x


def split_heads(x: Float[Array, "B T D"], head_dim: int) -> Float[Array, "B N T H"]:
    """[B, T, N·H] -> [B, N, T, H]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, head_dim), 1, 2)


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

    @property
    def reads_heads(self) -> bool:
        """Whether x is [B, N, T, H]."""
        return self.x == "bnth"

    @property
    def writes_heads(self) -> bool:
        """Whether y is [B, N, T, H]."""
        return self.y == "bnth"

    def split(self, kernel: Array) -> Array:
        """A kernel [I, O] with the heads in a dimension of their own."""
        if self.writes_heads:
            return kernel.reshape(len(kernel), -1, self.head_dim)
        if self.reads_heads:
            return kernel.reshape(-1, self.head_dim, kernel.shape[1])
        return kernel


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
    return y + (bias.reshape(-1, 1, form.head_dim) if form.writes_heads else bias)


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
    tokens = (0, 2) if form.writes_heads else range(gradient.ndim - 1)
    return in_x, in_kernel, gradient.sum(tokens, dtype=bias.dtype).reshape(bias.shape)


# Not `affine`: rematerialisation saves products (remat.py), and would see a call of it instead.
affine.defvjp(
    lambda x, kernel, bias, form: (_product(x, kernel, bias, form), (x, kernel, bias)),
    _affine_backward,
)


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
    """A parameter with its Declaration; `more` are the fields behind the names."""
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
            y: Any = affine(x, self.kernel[...], bias, form)
        else:
            flat = jnp.swapaxes(x, 1, 2).reshape(len(x), x.shape[2], -1) if form.reads_heads else x
            y = transposed_matmul(flat, self.kernel[...].astype(x.dtype)).astype(x.dtype)
            y = y if bias is None else y + bias.astype(x.dtype)
            y = split_heads(y, form.head_dim) if form.writes_heads else y
        if self.lora_scale is None:
            return y
        inward, outward = (form, PLAIN) if form.reads_heads else (PLAIN, form)
        low: Any = affine(x, self.lora_a[...], None, inward)
        more: Any = affine(low, self.lora_b[...], None, outward)
        return y + self.lora_scale * more
