"""The vocabulary head without a [B,T,V] array: logits exist for one chunk of tokens at a time.

Layout. The tokens are cut into the S shards of the mesh (rows, and T where the mesh splits it), T
then into n chunks of Tc positions, so a scan runs over n pieces [S, rows, Tc, D]: every device
works on its own tokens in every piece.

Gradient. A custom VJP whose forward pass already forms dhidden and dW piece by piece (the loss is
a sum, so its cotangent is a single number that scales both in the backward pass). That needs one
pass over the logits where recomputation needs two. dW is carried as per-shard partial sums
[S,D,V], float32, and scattered over the devices once, at the end. Without differentiation only
values are computed.

The head is transposed here, [D,V]: the dimension that FSDP splits comes first in memory, so neither
the gather of W nor the scatter of dW needs a second copy of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.losses.distributions import mask_padding
from dcod_jax.losses.divergences import target_logprobs
from dcod_jax.parallel.collectives import sum_shards
from dcod_jax.parallel.mesh import batch_shards, constrain, parts

# (logits [..., V] float32, targets [...], aux, shared) -> (loss [...], statistics of [...]).
# It is differentiated in logits only.
TokenLoss = Callable[[Array, Array, Any, Any], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static under jit."""

    token_loss: TokenLoss
    mesh: Mesh | None
    shards: int  # S
    pieces: int  # of T; S = batch shards * pieces
    chunk: int  # Tc
    chunks: int  # n
    valid_vocab: int | None


def _plan(
    shape: tuple[int, ...],
    token_loss: TokenLoss,
    chunk: int,
    mesh: Mesh | None,
    valid_vocab: int | None,
) -> _Plan:
    batch, length = shape
    shards = batch_shards(mesh)
    if batch % shards:
        raise DcodError(f"a batch of {batch} rows must be a multiple of the {shards} batch shards")
    if chunk < 1:
        raise DcodError(f"loss.head_chunk={chunk} must be >= 1")
    pieces = parts(mesh, "length")
    length = -(-length // pieces)
    positions = max(1, chunk // (batch // shards))  # chunk counts the tokens of one shard
    chunks = -(-length // positions)
    chunk = -(-length // chunks)
    chunk = min(chunk + -chunk % 8, positions)  # a TPU's tiles have eight rows
    return _Plan(token_loss, mesh, shards * pieces, pieces, chunk, chunks, valid_vocab)


def _split(plan: _Plan, x: Array) -> Array:
    """[B, T, ...] -> [n, S, rows, Tc, ...], T padded with zeros; rows = B / batch shards."""
    padding = plan.pieces * plan.chunks * plan.chunk - x.shape[1]
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    cut = (plan.shards // plan.pieces, -1, plan.pieces, plan.chunks, plan.chunk)
    x = jnp.moveaxis(x.reshape(*cut, *x.shape[2:]), (3, 2), (0, 2))  # [n, shards, pieces, rows, Tc]
    x = x.reshape(plan.chunks, plan.shards, *x.shape[3:])
    return constrain(x, plan.mesh, None, "shards")


def _join(plan: _Plan, x: Array, length: int) -> Array:
    """[n, S, rows, Tc, ...] -> [B, T, ...]; the inverse of _split."""
    x = x.reshape(plan.chunks, plan.shards // plan.pieces, plan.pieces, *x.shape[2:])
    x = jnp.moveaxis(x, (0, 2), (3, 2))  # [shards, rows, pieces, n, Tc]
    x = x.reshape(x.shape[0] * x.shape[1], plan.pieces * plan.chunks * plan.chunk, *x.shape[5:])
    return constrain(x[:, :length], plan.mesh, "batch")


def _pin_partial(plan: _Plan, x: Array) -> Array:
    """[S, D, V], each shard's own sum on its device."""
    return constrain(x, plan.mesh, "shards", None, "vocab")


def gather_head(head_weight: Array, dtype: Any, mesh: Mesh | None) -> Array:
    """[V,D] -> [D,V] in the compute dtype, gathered over "embed" once, before the scan."""
    pieces = constrain(head_weight.astype(dtype).T, mesh, "embed", "vocab")
    return constrain(pieces, mesh, None, "vocab")


def piece_logits(hidden: Array, weight: Array, mesh: Mesh | None) -> Array:
    """[S, rows, Tc, D], [D, V] -> float32 [S, rows, Tc, V], V sharded."""
    logits = jnp.einsum("sbtd,dv->sbtv", hidden, weight, preferred_element_type=jnp.float32)
    return constrain(logits, mesh, "shards", None, None, "vocab")


def _piece_loss(
    plan: _Plan, logits: Array, targets: Array, mask: Array, aux: Any, shared: Any
) -> tuple[Array, Any]:
    """Sum of the per-token loss inside the mask, and the per-token statistics."""
    logits = mask_padding(logits, plan.valid_vocab)
    loss, stats = plan.token_loss(logits, targets, aux, shared)
    return jnp.where(mask, loss, 0.0).sum(), stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(
    plan: _Plan, hidden: Array, head_weight: Array, inputs: tuple[Array, Array, Any], shared: Any
) -> tuple[Array, Any]:
    """(loss sum, statistics [n, S, rows, Tc]); hidden and inputs are already split."""
    weight = gather_head(head_weight, hidden.dtype, plan.mesh)

    def piece(total: Array, xs: tuple[Array, tuple[Array, Array, Any]]) -> tuple[Array, Any]:
        hidden, (targets, mask, aux) = xs
        logits = piece_logits(hidden, weight, plan.mesh)
        loss, stats = _piece_loss(plan, logits, targets, mask, aux, shared)
        return total + loss, stats

    return jax.lax.scan(piece, jnp.zeros((), jnp.float32), (hidden, inputs))


def _head_forward(
    plan: _Plan, hidden: Array, head_weight: Array, inputs: tuple[Array, Array, Any], shared: Any
) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
    """As _head, and as residuals the gradient of the loss sum in hidden and head_weight."""
    weight = gather_head(head_weight, hidden.dtype, plan.mesh)

    def piece(carry: tuple[Array, Array], xs: Any) -> tuple[Any, Any]:
        total, weight_gradient = carry
        hidden, (targets, mask, aux) = xs
        logits = piece_logits(hidden, weight, plan.mesh)
        loss_of = functools.partial(_piece_loss, plan)
        (loss, stats), logits_gradient = jax.value_and_grad(loss_of, has_aux=True)(
            logits, targets, mask, aux, shared
        )
        # Outside the mask the cotangent is 0, but 0 · NaN (of whatever stands there) is NaN.
        logits_gradient = jnp.where(mask[..., None], logits_gradient, 0.0).astype(hidden.dtype)
        logits_gradient = constrain(logits_gradient, plan.mesh, "shards", None, None, "vocab")
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient = product("sbtv,dv->sbtd", logits_gradient, weight).astype(hidden.dtype)
        hidden_gradient = constrain(hidden_gradient, plan.mesh, "shards")
        partial_sum = product("sbtd,sbtv->sdv", hidden, logits_gradient)
        return (total + loss, pin(weight_gradient + partial_sum)), (hidden_gradient, stats)

    pin = functools.partial(_pin_partial, plan)
    partial_sums = jnp.zeros((plan.shards, *weight.shape), jnp.float32)
    start = (jnp.zeros((), jnp.float32), pin(partial_sums))
    carry, (hidden_gradient, stats) = jax.lax.scan(piece, start, (hidden, inputs))
    total, partial_sums = carry
    weight_gradient = sum_shards(partial_sums, plan.mesh, "embed", "vocab").T
    # The layers' backward pass waits for it: else it is put off, and every device keeps a whole
    # partial sum until the end.
    hidden_gradient, weight_gradient = jax.lax.optimization_barrier(
        (hidden_gradient, weight_gradient)
    )
    return (total, stats), (hidden_gradient, weight_gradient.astype(head_weight.dtype))


def _head_backward(
    plan: _Plan, residuals: tuple[Array, Array], cotangents: tuple[Array, Any]
) -> tuple[Array, Array, None, None]:
    hidden_gradient, weight_gradient = residuals
    scale = cotangents[0]  # of the loss sum; the statistics carry no gradient
    scaled = (scale * hidden_gradient).astype(hidden_gradient.dtype)
    return scaled, (scale * weight_gradient).astype(weight_gradient.dtype), None, None


_head.defvjp(_head_forward, _head_backward)


def head_loss(
    hidden: Float[Array, "B T D"],
    head_weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    aux: Any,
    token_loss: TokenLoss,
    *,
    chunk: int,
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
    shared: Any = None,
) -> tuple[Float[Array, ""], Any]:
    """Sum of token_loss inside loss_mask, differentiable in hidden and head_weight.

    aux is a pytree of [B,T,...] that token_loss gets piece by piece; shared goes to it whole
    (a pytree: scalars, a teacher's head). Matrix products take operands in hidden's dtype and
    accumulate in float32; softmax and loss are float32. Returns the sum and token_loss's
    statistics as [B,T,...]. chunk is the number of tokens of one batch shard whose logits
    exist at one time (at least one position of each row). Rows of head_weight from
    valid_vocab on have probability 0.
    """
    plan = _plan(targets.shape, token_loss, chunk, mesh, valid_vocab)
    split = functools.partial(_split, plan)
    inputs = jax.tree.map(split, (targets, loss_mask, aux))
    result: Any = _head(plan, split(hidden), head_weight, inputs, shared)
    total, stats = result
    join = functools.partial(_join, plan, length=targets.shape[1])
    return total, jax.lax.stop_gradient(jax.tree.map(join, stats))


def _logprob_only(logits: Array, targets: Array, aux: Any, shared: Any) -> tuple[Array, Array]:
    logprobs = target_logprobs(logits, targets)
    return jnp.zeros_like(logprobs), logprobs


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head_weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
) -> Float[Array, "B T"]:
    """log q(targets[t]) at every position, float32, without gradient."""
    hidden, head_weight = jax.lax.stop_gradient((hidden, head_weight))
    everywhere = jnp.ones(targets.shape, bool)
    options = {"chunk": chunk, "mesh": mesh, "valid_vocab": valid_vocab}
    return head_loss(hidden, head_weight, targets, everywhere, (), _logprob_only, **options)[1]
