"""Mixtures of experts: the router, and the MLP of each expert for the tokens that are given to it.

No token is dropped: the tokens are sorted by expert, and the products are over groups of rows of
any size. Dimensions beside the legend: E experts, K experts of a token, M = tokens · K rows, I and
O the channels of a linear map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.models.config import ModelConfig
from dcod_jax.models.layers import ACTIVATIONS
from dcod_jax.models.linear import Linear, declare
from dcod_jax.models.remat import EXPERT_PRODUCT
from dcod_jax.parallel import collectives
from dcod_jax.parallel.mesh import parts

_FEWEST, _MOST = 8, 512  # rows of a block on a CPU
_SMALL = 1 << 25  # products of all rows with all kernels that a CPU takes a millisecond for


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M I"], kernels: Float[Array, "E I O"], sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Rows of group e times kernels[e], in the dtype of x; what is behind the groups is undefined.

    As in linear.affine the gradient of the kernels is formed in their own dtype.
    """
    return _product(x, kernels, sizes)


def _product(x: Array, kernels: Array, sizes: Array, *, transposed: bool = False) -> Array:
    """grouped_matmul with kernels or their transposes."""
    of = x, kernels.astype(x.dtype), sizes
    forms: dict[str, Any] = {"cpu": _product_in_blocks, "default": jax.lax.ragged_dot}
    if transposed:
        forms = {at: functools.partial(_with_transposes, form) for at, form in forms.items()}
        forms["tpu"] = _transposed_tiled
    if len(x) * kernels.size < _SMALL:
        return forms["default"](*of)
    return jax.lax.platform_dependent(*of, **forms)


def _with_transposes(form: Callable[..., Array], x: Array, kernels: Array, sizes: Array) -> Array:
    return form(x, jnp.swapaxes(kernels, 1, 2), sizes)


def _ragged_outer(x: Array, gradient: Array, sizes: Array, *, dtype: Any) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        x, gradient, sizes, numbers, preferred_element_type=jnp.dtype(dtype)
    )


# On a TPU XLA has a kernel for ragged_dot; it would be given a transposed copy of the kernels, and
# for the sum over the rows of each group XLA multiplies every row for each group. The kernels for
# both are megablox's, in tiles of 128 rows, as XLA's.


def _tile(size: int, most: int) -> int:
    """The largest tile that pads a dimension the least, in lanes of 128; small ones are whole."""
    return size if size <= most else 128 * -(-size // (128 * -(-size // most)))


def _padded_to_tiles(x: Array) -> Array:
    return jnp.pad(x, ((0, -len(x) % 128), (0, 0)))


def _transposed_tiled(x: Array, kernels: Array, sizes: Array, *, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiles = (128, _tile(kernels.shape[2], 512), _tile(kernels.shape[1], 1024))
    of = _padded_to_tiles(x), kernels, sizes.astype(jnp.int32)
    y: Any = gmm(*of, x.dtype, tiles, transpose_rhs=True, interpret=interpret)
    return y[: len(x)]


def _outer_in_tiles(
    x: Array, gradient: Array, sizes: Array, *, dtype: Any, interpret: bool = False
) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = (128, _tile(x.shape[1], 512), _tile(gradient.shape[1], 1024))
    of = _padded_to_tiles(x).T, _padded_to_tiles(gradient), sizes.astype(jnp.int32)
    y: Any = tgmm(*of, jnp.dtype(dtype), tiles, interpret=interpret)
    return y


# On a CPU jax.lax.ragged_dot multiplies every row by every kernel. There, unless that is little,
# blocks of rows of one group are multiplied, as large as the group allows.


def _blocks(rows: int, groups: int) -> list[int]:
    """Rows of the blocks that a group is cut into, the largest first."""
    mean = max(rows // groups, 1)
    largest = min(max(1 << (mean.bit_length() - 1), _FEWEST), _MOST)
    return [block for block in (largest, largest // 8) if block >= _FEWEST]


def _padded(x: Array, groups: int) -> Array:
    """x with rows behind it that the last block of the last group may reach into."""
    return jnp.pad(x, ((0, _blocks(len(x), groups)[-1]), (0, 0)))


def _in_blocks(
    sizes: Array,
    rows: int,
    of_group: Callable[[Array], Any],
    add: Callable[..., Array],
    carry: Array,
) -> Array:
    """carry = add(carry, of_group(g), g, start, end of group g, block) block by block.

    Blocks are in the order of the rows; the last one of a group may reach beyond its end.
    """
    ends, used = jnp.cumsum(sizes), jnp.argsort(sizes == 0, stable=True)
    blocks = _blocks(rows, len(sizes))

    def group(index: Array, carry: Array) -> Array:
        at = used[index]
        own, end, start = of_group(at), ends[at], ends[at] - sizes[at]
        for block in blocks:
            left = jnp.maximum(end - start, 0)
            count = -(-left // block) if block == blocks[-1] else left // block

            def one(i: Array, carry: Array, start: Array = start, block: int = block) -> Array:
                return add(carry, own, at, start + i * block, end, block)

            carry = jax.lax.fori_loop(0, count, one, carry)
            start += count * block
        return carry

    return jax.lax.fori_loop(0, (sizes > 0).sum(), group, carry)


def _rows(x: Array, start: Array, block: int, end: Array) -> Array:
    """A block of rows, 0 from the group's end on."""
    rows = jax.lax.dynamic_slice_in_dim(x, start, block)
    return jnp.where((start + jnp.arange(block) < end)[:, None], rows, 0)


def _product_in_blocks(x: Array, kernels: Array, sizes: Array) -> Array:
    padded = _padded(x, len(sizes))

    def add(out: Array, kernel: Array, _: Array, start: Array, end: Array, block: int) -> Array:
        y = _rows(padded, start, block, end) @ kernel
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

    out = jnp.zeros((len(padded), kernels.shape[2]), x.dtype)
    return _in_blocks(sizes, len(x), lambda group: kernels[group], add, out)[: len(x)]


def _outer_in_blocks(x: Array, gradient: Array, sizes: Array, *, dtype: Any) -> Array:
    x_padded, g_padded = (_padded(of, len(sizes)) for of in (x, gradient))

    def add(out: Array, _: None, group: Array, start: Array, end: Array, block: int) -> Array:
        rows = _rows(x_padded, start, block, end)
        gradients = jax.lax.dynamic_slice_in_dim(g_padded, start, block)
        more = jnp.einsum("mi,mo->io", rows, gradients, preferred_element_type=dtype)
        return out.at[group].add(more)

    out = jnp.zeros((len(sizes), x.shape[1], gradient.shape[1]), dtype)
    return _in_blocks(sizes, len(x), lambda group: None, add, out)


def _grouped_forward(
    x: Array, kernels: Array, sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    product = checkpoint_name(_product(x, kernels, sizes), EXPERT_PRODUCT)
    return product, (x, kernels, sizes)


def _grouped_backward(
    residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, np.ndarray]:
    x, kernels, sizes = residuals
    in_x = _product(gradient, kernels, sizes, transposed=True)
    forms: dict[str, Any] = {"cpu": _outer_in_blocks, "tpu": _outer_in_tiles}
    forms["default"] = _ragged_outer
    forms = {at: functools.partial(form, dtype=kernels.dtype) for at, form in forms.items()}
    if len(x) * kernels.size < _SMALL:
        in_kernels = forms["default"](x, gradient, sizes)
    else:
        in_kernels = jax.lax.platform_dependent(x, gradient, sizes, **forms)
    return in_x, in_kernels, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
def _take(
    x: Float[Array, "N D"],
    order: Int[Array, " M"],
    inverse: Int[Array, " M"],
    used: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """Row order[m] of x with each of its rows M / N times; inverse is that of the permutation.

    Its transpose is a permutation and a sum, where that of indexing would be a scatter; the sum is
    over the copies that are used.
    """
    return x[order // (len(order) // len(x))]


def _take_backward(
    residuals: tuple[Array, Array, int], gradient: Array
) -> tuple[Array, None, None, None]:
    inverse, used, rows = residuals
    copies = gradient[inverse].reshape(rows, -1, gradient.shape[1])
    copies = jnp.where(used.reshape(rows, -1, 1), copies, 0)
    summed = copies.sum(1, dtype=jnp.float32).astype(gradient.dtype)
    return summed, None, None, None


_take.defvjp(
    lambda x, order, inverse, used: (_take(x, order, inverse, used), (inverse, used, len(x))),
    _take_backward,
)


class ExpertMap(nnx.Module):
    """One linear map of every expert. stacked: (name, rows) in files that stack the experts."""

    def __init__(
        self,
        kernels: Array,
        axes: tuple[str, str],
        hf: str,
        gguf: str,
        *,
        stacked: tuple[str, tuple[int, int] | None],
    ):
        more = {"stacked": stacked[0], "stacked_rows": stacked[1]}
        names = (f"{hf}.weight", f"{gguf}.weight")
        self.experts = declare(kernels, ("experts", *axes), *names, transposed=True, **more)

    def __call__(self, x: Float[Array, "M I"], sizes: Int[Array, " E"]) -> Float[Array, "M O"]:
        return grouped_matmul(x, self.experts[...], sizes)


class Experts(nnx.Module):
    """Σ_k weight_k · MLP_k(x) over the K experts that the router gives a token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.mixture is not None
        mixture, D, F = config.mixture, config.hidden_size, config.mlp_width
        sparse = mixture.block_sparse
        room = "block_sparse_moe" if sparse else "mlp"
        std = config.initializer_range
        gate, up, down = ("w1", "w3", "w2") if sparse else ("gate_proj", "up_proj", "down_proj")
        self.router = Linear(
            (D, mixture.experts),
            ("embed", "router"),
            f"{room}.gate",
            "ffn_gate_inp",
            std=std,
            rngs=rngs,
            stacked="mlp.gate.weight",
        )

        def every(
            width: tuple[int, int], axes: tuple[str, str], hf: str, gguf: str, *stacked: Any
        ) -> ExpertMap:
            value = std * jax.random.normal(rngs.params(), (mixture.experts, *width))
            hf = f"{room}.experts.{{expert}}.{hf}"
            return ExpertMap(value, axes, hf, f"ffn_{gguf}_exps", stacked=stacked)

        inward, outward = ("expert_embed", "mlp"), ("mlp", "expert_embed")
        both = "mlp.experts.gate_up_proj"
        self.gate_proj = every((D, F), inward, gate, "gate", both, (0, 2 * F))
        self.up_proj = every((D, F), inward, up, "up", both, (F, 2 * F))
        self.down_proj = every((F, D), outward, down, "down", "mlp.experts.down_proj", None)
        self.activation, self.mixture = config.activation, mixture

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], *, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 R"]]:
        """What the experts add, and the routing of each row (`Routing`).

        real: tokens that are no padding; the others do not count in the routing. With a mesh it
        runs inside per_shard.
        """
        B, T, D = x.shape
        probs = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, ids = jax.lax.top_k(probs, self.mixture.per_token)
        chosen = (ids[..., None] == jnp.arange(self.mixture.experts)).any(-2)
        entropy = -jax.scipy.special.xlogy(probs, probs).sum(-1, keepdims=True)
        routing = jnp.concatenate([chosen, probs, jax.lax.stop_gradient(entropy)], axis=-1)
        routing = jnp.where(real[..., None], routing, 0.0).sum(1, keepdims=True)
        if self.mixture.normalized:
            weights /= weights.sum(-1, keepdims=True)
        inputs = x.reshape(B * T, D), weights.reshape(B * T, -1), ids.reshape(B * T, -1)
        return self._mixed(*inputs, mesh=mesh).reshape(B, T, D), routing

    def _mixed(
        self,
        x: Float[Array, "N D"],
        weights: Float[Array, "N K"],
        ids: Int[Array, "N K"],
        *,
        mesh: Mesh | None,
    ) -> Float[Array, "N D"]:
        """Devices that split the experts exchange their tokens, and sums over their own experts."""
        dtype, split = x.dtype, parts(mesh, "experts") > 1
        if split:
            gathered = (collectives.gather(y, "experts", dimension=0) for y in (x, weights, ids))
            x, weights, ids = gathered
        count = self.gate_proj.experts.shape[0]
        own = ids.reshape(-1) - collectives.place(mesh, "experts") * count
        used = (own >= 0) & (own < count)
        own = jnp.where(used, own, count)  # others come last, and add nothing
        order = jnp.argsort(own, stable=True)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
        sizes = jnp.bincount(own, length=count)
        rows = _take(x, order, inverse, used)
        inner = ACTIVATIONS[self.activation](self.gate_proj(rows, sizes))
        inner *= self.up_proj(rows, sizes)
        every = jnp.ones_like(used)
        each = _take(self.down_proj(inner, sizes), inverse, order, every).reshape(*ids.shape, -1)
        each = jnp.where(used.reshape(*ids.shape, 1), each, 0)
        y = jnp.einsum("nkd,nk->nd", each, weights, preferred_element_type=jnp.float32)
        y = collectives.across(y, mesh=mesh, logical="mlp")
        y = collectives.scatter(y, "experts", dimension=0) if split else y
        return y.astype(dtype)
