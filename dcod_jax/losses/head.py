"""The vocabulary head without a [B,T,V] array: logits exist for one chunk of tokens at a time.

Layout. The tokens are cut into the S shards of the mesh (rows, and T where the mesh splits it), T
then into n chunks of Tc positions. A scan runs over n pieces [S, rows, Tc, D], and every device
works on its own tokens in every piece.

Gradient. A custom VJP forms dhidden and dW piece by piece in the forward pass: the loss is a sum,
so its cotangent is one number, which scales both in the backward pass. That needs one pass over
the logits; recomputation would need two. dW is carried as per-shard partial sums [S,D,V], float32,
and scattered over the devices once, at the end. Without differentiation only values are computed.

The matrix is transposed here, [D,V]: the dimension that FSDP splits comes first in memory, so
neither the gather of W nor the scatter of dW needs a second copy of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.parallel.collectives import sum_shards
from dcod_jax.parallel.mesh import batch_shards, constrain, parts

MASKED_LOGIT = -1e30  # of entries that do not count: probability 0, and finite so that 0 * it is 0

# (logits [..., V] float32, targets [...], aux, shared) -> (loss [...], statistics of [...]).
# It is differentiated in logits only.
TokenLoss = Callable[[Array, Array, Any, Any], tuple[Array, Any]]


def target_logprobs(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """log q(y) = logits[y] - logsumexp(logits), float32.

    The target's logit is read by comparing with an iota instead of a gather: the transpose is a
    select, which fuses into the backward softmax (a scatter over V would not), and it stays local
    where V is sharded.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.where(vocabulary == targets[..., None], logits, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "*N V"], top: int = 0) -> Float[Array, "*N"]:
    """−Σ q log q in nats, float32, without gradient; with `top` of that many most probable tokens,
    their probabilities divided by their sum.
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    if top:
        logits = jax.lax.top_k(logits, min(top, logits.shape[-1]))[0]
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -(jnp.exp(logprobs) * logprobs).sum(axis=-1)


def capped(logits: Float[Array, "*N V"], softcap: float | None) -> Float[Array, "*N V"]:
    """softcap · tanh(logits / softcap), or the logits where there is none (Gemma 2)."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@dataclasses.dataclass(frozen=True)
class VocabHead:
    """How hidden states become logits; static under jit. The matrix [V,D] comes with each call.

    chunk: tokens of one batch shard whose logits exist at one time (at least one of each row).
    valid_vocab: rows of the matrix from here on are padding; None: all rows are tokens.
    placed: see collectives.sum_shards.
    softcap: logits are softcap · tanh(products / softcap).
    """

    chunk: int
    valid_vocab: int | None = None
    mesh: Mesh | None = None
    placed: bool = True
    softcap: float | None = None

    def masked(self, logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        """The logits with probability 0 on padding rows of the vocabulary."""
        if self.valid_vocab is None or self.valid_vocab >= logits.shape[-1]:
            return logits
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(vocabulary < self.valid_vocab, logits, MASKED_LOGIT)

    def transposed(self, matrix: Float[Array, "V D"], dtype: DTypeLike) -> Float[Array, "D V"]:
        """The matrix in the compute dtype, gathered over "embed" once, before the scan."""
        pieces = constrain(matrix.astype(dtype).T, self.mesh, "embed", "vocab")
        return constrain(pieces, self.mesh, None, "vocab")

    def logits(
        self, hidden: Float[Array, "S R C D"], transposed: Float[Array, "D V"]
    ) -> Float[Array, "S R C V"]:
        """float32 products of one piece, V sharded, padding not masked, no cap."""
        logits = jnp.einsum("sbtd,dv->sbtv", hidden, transposed, preferred_element_type=jnp.float32)
        return constrain(logits, self.mesh, "shards", None, None, "vocab")

    def loss(
        self,
        hidden: Float[Array, "B T D"],
        matrix: Float[Array, "V D"],
        targets: Int[Array, "B T"],
        loss_mask: Bool[Array, "B T"],
        token_loss: TokenLoss,
        *,
        aux: Any = (),
        shared: Any = None,
    ) -> tuple[Float[Array, ""], Any]:
        """(sum of token_loss inside loss_mask, its statistics as [B,T,...]).

        Differentiable in hidden and matrix. aux is a pytree of [B,T,...] that token_loss gets piece
        by piece; shared goes to it whole. The logits that it gets are not masked (see `masked`).
        Products take operands in hidden's dtype and accumulate in float32.
        """
        pieces = _cut(self, targets.shape, token_loss)
        inputs = jax.tree.map(pieces.split, (targets, loss_mask, aux))
        result: Any = _head(pieces, pieces.split(hidden), matrix, inputs, shared)
        join = functools.partial(pieces.join, length=targets.shape[1])
        return result[0], jax.lax.stop_gradient(jax.tree.map(join, result[1]))

    def observe(
        self,
        hidden: Float[Array, "B T D"],
        matrix: Float[Array, "V D"],
        targets: Int[Array, "B T"],
        statistics: Callable[[Array, Array, Any, Any], Any],
        *,
        aux: Any = (),
        shared: Any = None,
    ) -> Any:
        """statistics(logits, targets, aux, shared) at every position, without gradient."""

        def no_loss(logits: Array, targets: Array, aux: Any, shared: Any) -> tuple[Array, Any]:
            return jnp.zeros(targets.shape, jnp.float32), statistics(logits, targets, aux, shared)

        hidden, matrix = jax.lax.stop_gradient((hidden, matrix))
        everywhere = jnp.ones(targets.shape, bool)
        return self.loss(hidden, matrix, targets, everywhere, no_loss, aux=aux, shared=shared)[1]


# ---------------------------------------------------------------- pieces of a batch


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """How a batch is cut; static under jit."""

    head: VocabHead
    token_loss: TokenLoss
    shards: int  # S = batch shards * lengths
    lengths: int  # parts that the mesh splits T into
    chunks: int  # n
    chunk: int  # Tc

    def split(self, x: Array) -> Array:
        """[B, T, ...] -> [n, S, rows, Tc, ...], T padded with zeros; rows = B / batch shards."""
        padding = self.lengths * self.chunks * self.chunk - x.shape[1]
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        cut = (self.shards // self.lengths, -1, self.lengths, self.chunks, self.chunk)
        x = jnp.moveaxis(x.reshape(*cut, *x.shape[2:]), (3, 2), (0, 2))
        x = x.reshape(self.chunks, self.shards, *x.shape[3:])  # from [n, shards, lengths, rows, Tc]
        return constrain(x, self.head.mesh, None, "shards")

    def join(self, x: Array, length: int) -> Array:
        """[n, S, rows, Tc, ...] -> [B, T, ...]; the inverse of split."""
        x = x.reshape(self.chunks, self.shards // self.lengths, self.lengths, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 2), (3, 2))  # [shards, rows, lengths, n, Tc]
        whole = self.lengths * self.chunks * self.chunk
        x = x.reshape(x.shape[0] * x.shape[1], whole, *x.shape[5:])
        return constrain(x[:, :length], self.head.mesh, "batch")

    def loss(
        self, logits: Array, targets: Array, mask: Array, aux: Any, shared: Any
    ) -> tuple[Array, Any]:
        """Sum of the per-token loss inside the mask, and the per-token statistics."""
        logits = capped(logits, self.head.softcap)
        loss, stats = self.token_loss(logits, targets, aux, shared)
        return jnp.where(mask, loss, 0.0).sum(), stats


def _cut(head: VocabHead, shape: tuple[int, ...], token_loss: TokenLoss) -> _Pieces:
    batch, length = shape
    shards = batch_shards(head.mesh)
    if batch % shards:
        raise DcodError(f"a batch of {batch} rows must be a multiple of the {shards} batch shards")
    if head.chunk < 1:
        raise DcodError(f"loss.head_chunk={head.chunk} must be >= 1")
    lengths = parts(head.mesh, "length")
    length = -(-length // lengths)
    positions = max(1, head.chunk // (batch // shards))
    chunks = -(-length // positions)
    chunk = -(-length // chunks)
    chunk = min(chunk + -chunk % 8, positions)  # a TPU's tiles have eight rows
    return _Pieces(head, token_loss, shards * lengths, lengths, chunks, chunk)


# ---------------------------------------------------------------- values and gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(
    pieces: _Pieces, hidden: Array, matrix: Array, inputs: tuple[Array, Array, Any], shared: Any
) -> tuple[Array, Any]:
    """(loss sum, statistics [n, S, rows, Tc]); hidden and inputs are already split."""
    transposed = pieces.head.transposed(matrix, hidden.dtype)

    def piece(total: Array, xs: tuple[Array, tuple[Array, Array, Any]]) -> tuple[Array, Any]:
        hidden, inputs = xs
        loss, stats = pieces.loss(pieces.head.logits(hidden, transposed), *inputs, shared)
        return total + loss, stats

    return jax.lax.scan(piece, jnp.zeros((), jnp.float32), (hidden, inputs))


def _head_forward(
    pieces: _Pieces, hidden: Array, matrix: Array, inputs: tuple[Array, Array, Any], shared: Any
) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
    """As _head, and as residuals the gradient of the loss sum in hidden and matrix."""
    mesh = pieces.head.mesh
    transposed = pieces.head.transposed(matrix, hidden.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def on_own_device(partial_sums: Array) -> Array:
        return constrain(partial_sums, mesh, "shards", None, "vocab")

    def piece(carry: tuple[Array, Array], xs: Any) -> tuple[Any, Any]:
        total, partial_sums = carry
        hidden, inputs = xs
        loss_of = jax.value_and_grad(pieces.loss, has_aux=True)
        (loss, stats), slope = loss_of(pieces.head.logits(hidden, transposed), *inputs, shared)
        # Outside the mask the cotangent is 0, but 0 · NaN (of any value there) is NaN.
        slope = jnp.where(inputs[1][..., None], slope, 0.0).astype(hidden.dtype)
        slope = constrain(slope, mesh, "shards", None, None, "vocab")
        hidden_gradient = product("sbtv,dv->sbtd", slope, transposed).astype(hidden.dtype)
        hidden_gradient = constrain(hidden_gradient, mesh, "shards")
        partial_sums = on_own_device(partial_sums + product("sbtd,sbtv->sdv", hidden, slope))
        return (total + loss, partial_sums), (hidden_gradient, stats)

    partial_sums = on_own_device(jnp.zeros((pieces.shards, *transposed.shape), jnp.float32))
    start = (jnp.zeros((), jnp.float32), partial_sums)
    carry, (hidden_gradient, stats) = jax.lax.scan(piece, start, (hidden, inputs))
    # Of one piece the transposition would join the product: XLA's CPU backend has none of bfloat16.
    total, partial_sums = jax.lax.optimization_barrier(carry)
    gradient = sum_shards(partial_sums, mesh, "embed", "vocab", placed=pieces.head.placed).T
    # The layers' backward pass waits for it: else it is put off, and every device keeps a whole
    # partial sum until the end.
    hidden_gradient, gradient = jax.lax.optimization_barrier((hidden_gradient, gradient))
    return (total, stats), (hidden_gradient, gradient.astype(matrix.dtype))


def _head_backward(
    pieces: _Pieces, residuals: tuple[Array, Array], cotangents: tuple[Array, Any]
) -> tuple[Array, Array, None, None]:
    scale = cotangents[0]  # of the loss sum; the statistics carry no gradient
    in_hidden, in_matrix = ((scale * gradient).astype(gradient.dtype) for gradient in residuals)
    return in_hidden, in_matrix, None, None


_head.defvjp(_head_forward, _head_backward)
