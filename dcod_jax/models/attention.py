"""Attention over packed rows: one interface, and the kernel that the mesh's devices have.

    splash    TPU: the Pallas kernel of jax; scores never leave the chip (other devices interpret
              it: exact and very slow)
    cudnn     GPU: cuDNN's flash attention (cudnn.py), where it takes the dtype, heads and chip
    scanned   other GPUs, dtypes and heads: one small block of queries at a time against all keys
    blocked   CPU, or no mesh: blocks of queries, each against the keys up to its end; half the
              work of a full square, less with a window

All of them are causal within a segment, take N/G query heads per kv head, and sum and normalise in
float32. A segment is contiguous. None holds the scores of all queries at once.

Sequence parallelism. Where the mesh splits "length" into c pieces, a row is cut into 2c chunks and
piece i holds chunks i and 2c-1-i (`to_pieces`): of a causal square every piece then has the same
work. Queries stay, keys and values are gathered over the pieces (their gradients are scattered
back); everything outside attention is local to a position.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.models import cudnn
from dcod_jax.models.layers import capped
from dcod_jax.models.remat import ATTENTION
from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes

MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: a query that sees nothing gets no NaN
KINDS = ("auto", "splash", "cudnn", "scanned", "blocked")
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64
SCANNED_QUERIES = 128  # of a block of "scanned"
LANES = 128  # the TPU kernel's tiles are multiples of it
SPLASH_BLOCKS = (1024, 512, 256, LANES)

_HEADS = ("batch", "heads", "length", None)
_KV_HEADS = ("batch", "kv_heads", "length", None)
_IDS = ("batch", "length")


def choose(kind: str, mesh: Mesh | None) -> str:
    """The kernel for the mesh's devices (not the host's: a program may be compiled for others)."""
    if kind not in KINDS:
        raise DcodError(f"attention={kind!r} must be one of {', '.join(KINDS)}")
    if kind != "auto":
        return kind
    where = "cpu" if mesh is None else meshes.platform(mesh)
    return {"tpu": "splash", "cpu": "blocked"}.get(where, "cudnn")


def attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mesh: Mesh | None = None,
    kind: str = "auto",
) -> Float[Array, "B N T H"]:
    """Causal attention inside each segment; padding (segment 0) sees only padding.

    Position i of a row sees position j of its segment iff 0 <= i - j (< window). Scores are the
    products times scale (None: 1/sqrt(H)), then softcap · tanh(scores / softcap). Where the mesh
    splits "length" the arguments are in the order of `to_pieces`, and so is the result. Raises
    DcodError for a window below 1, a length that cannot be cut so, or a kernel that was asked for
    and cannot take the arguments.
    """
    asked, kind = kind, choose(kind, mesh)
    if window is not None and window < 1:
        raise DcodError(f"a sliding window of {window} positions must be at least 1")
    length = query.shape[2]
    if mesh is not None and length % length_multiple(mesh, kind):
        raise DcodError(
            f"a row of {length} positions must be a multiple of {length_multiple(mesh, kind)} "
            f"to be split over mesh.{meshes.describe(mesh, 'length')}"
        )
    scores = _Scores(
        1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        softcap,
        None if window is not None and window >= length else window,  # nothing is out of sight
    )
    if kind == "splash":
        return _splash(query, key, value, segment_ids, scores, mesh=mesh)
    if kind == "cudnn" and (why := cudnn.refusal(query.shape, query.dtype, mesh, softcap=softcap)):
        if asked == "cudnn":
            raise DcodError(f"attention=cudnn: {why}, or take attention=auto")
        kind = "scanned"
    if kind == "scanned" and query.dtype != jnp.float32 and choose("auto", mesh) == "blocked":
        raise DcodError(f"attention=scanned takes float32 on CPU, not {query.dtype}; take blocked")
    mixed = _in_arrays(query, key, value, segment_ids, scores, mesh=mesh, kind=kind)
    return checkpoint_name(mixed, ATTENTION)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """How scores follow from products, and which count."""

    scale: float
    softcap: float | None
    window: int | None


# ---------------------------------------------------------------- rows in pieces


def length_multiple(mesh: Mesh | None, kind: str = "auto") -> int:
    """What the length of a row must be a multiple of; `to_pieces` pads to it."""
    pieces = meshes.parts(mesh, "length")
    if pieces == 1:
        return 1
    return 2 * pieces * (LANES if choose(kind, mesh) == "splash" else 1)


def _shuffle(x: Array, pieces: int) -> Array:
    """[B, T, ...] in the row's order -> the order of pieces.

    Two pieces: [0 1 2 3 4 5 6 7] -> [0 1 6 7 | 2 3 4 5].
    """
    halves = x.reshape(x.shape[0], 2, pieces, -1, *x.shape[2:])
    return jnp.stack([halves[:, 0], jnp.flip(halves[:, 1], 1)], 2).reshape(x.shape)


def _natural(x: Array, pieces: int, axis: int = 1) -> Array:
    """The inverse of _shuffle, along an axis."""
    pairs = x.reshape(*x.shape[:axis], pieces, 2, -1, *x.shape[axis + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return jnp.concatenate([first, jnp.flip(second, axis)], axis).reshape(x.shape)


def to_pieces(x: Int[Array, "B T"], mesh: Mesh | None, *, kind: str = "auto") -> Int[Array, "B T2"]:
    """Row order -> the order of pieces, padded with 0 and split over "length"; else x itself."""
    pieces = meshes.parts(mesh, "length")
    if pieces == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length_multiple(mesh, kind))))
    return meshes.constrain(_shuffle(x, pieces), mesh, *_IDS)


def from_pieces(x: Float[Array, "B T2 D"], mesh: Mesh | None, length: int) -> Array:
    """The inverse of to_pieces, whole on every device: [B, length, D]."""
    pieces = meshes.parts(mesh, "length")
    if pieces == 1:
        return x
    return _natural(meshes.constrain(x, mesh, "batch", None, None), pieces)[:, :length]


def _order(length: int, pieces: int) -> np.ndarray:
    """Position in the row at each place: int32 [T]."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * pieces, -1)
    return np.concatenate([np.append(chunks[i], chunks[-1 - i]) for i in range(pieces)])


def _whole(x: Array, pieces: int) -> Array:
    """Inside per_shard: the piece [B, T/c] or [B, G, T/c, H] -> the row in its own order."""
    axis = 1 if x.ndim == 2 else 2
    whole = collectives.gather(x, "length", dimension=axis) if pieces > 1 else x
    return _natural(whole, pieces, axis) if pieces > 1 else x


# ---------------------------------------------------------------- CPU and GPU


def _visible(
    queries: Int[Array, " S"],
    keys: Int[Array, " M"],
    query_segments: Int[Array, "B S"],
    key_segments: Int[Array, "B M"],
    window: int | None,
) -> Bool[Array, "B S M"]:
    """Which keys each query sees, from the positions in the row and the segments of both."""
    order = queries[:, None] >= keys[None, :]
    if window is not None:
        order &= queries[:, None] - keys[None, :] < window
    return order & (query_segments[:, :, None] == key_segments[:, None, :])


def attend(
    query: Float[Array, "B G R S H"],
    key: Float[Array, "B G M H"],
    value: Float[Array, "B G M H"],
    visible: Bool[Array, "B S M"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B G R S H"]:
    """Softmax attention of R query heads per kv head; scores and softmax are float32.

    The R heads are folded into the query axis, so keys and values are never repeated.
    """
    B, G, R, S, H = query.shape
    folded = query.reshape(B, G, R * S, H)
    scores = jnp.einsum("bgxh,bgmh->bgxm", folded, key, preferred_element_type=jnp.float32)
    scores = capped(scores.reshape(B, G, R, S, -1) * scale, softcap)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgxm,bgmh->bgxh", probs.reshape(B, G, R * S, -1), value)
    return mixed.reshape(B, G, R, S, H)


def _blocked(
    query: Array,
    key: Array,
    value: Array,
    places: tuple[Array, Array],
    segments: tuple[Array, Array],
    scores: _Scores,
    *,
    ordered: bool,
) -> Array:
    """At most eight blocks of queries; one block's scores at a time, recomputed in the backward.

    places and segments are those of (queries [S] or [B, S], keys [M] or [B, M]). ordered: queries
    and keys are the same row in its order, so that a block needs no key outside its window.
    """
    (B, N, S, H), G = query.shape, key.shape[1]
    block = max(MIN_QUERY_BLOCK, -(-S // MAX_QUERY_BLOCKS))
    sizes = [min(block, S - start) for start in range(0, S, block)]
    # Not slices: their gradient would be a sum of as many whole arrays, padded with zeros.
    queries = jax.lax.split(query.reshape(B, G, N // G, S, H), sizes, axis=3)
    mix = functools.partial(attend, scale=scores.scale, softcap=scores.softcap)
    window, outputs = scores.window, []
    for start, asking in zip(range(0, S, block), queries, strict=True):
        here = slice(start, start + asking.shape[3])
        first = 0 if window is None else max(0, start - window + 1)
        seen = slice(first, here.stop) if ordered else slice(None)
        visible = _visible(
            places[0][here], places[1][seen], segments[0][:, here], segments[1][:, seen], window
        )
        of = asking, key[:, :, seen], value[:, :, seen], visible
        outputs.append(jax.checkpoint(mix)(*of))
    return jnp.concatenate(outputs, axis=3).reshape(B, N, S, H)


def _scanned(
    query: Array,
    key: Array,
    value: Array,
    places: tuple[Array, Array],
    segments: tuple[Array, Array],
    scores: _Scores,
) -> Array:
    """The same, one block of SCANNED_QUERIES queries after the other, against all keys."""
    B, N, S, H = query.shape
    G, block = key.shape[1], min(SCANNED_QUERIES, S)
    padding = -S % block

    @jax.checkpoint
    def one(inputs: tuple[Array, Array, Array]) -> Array:
        queries, order, ids = inputs
        visible = _visible(order, places[1], ids, segments[1], scores.window)
        options = {"scale": scores.scale, "softcap": scores.softcap}
        return attend(queries, key, value, visible, **options)

    def cut(x: Array, axis: int) -> Array:
        """The axis of positions, padded, as blocks on a new first axis."""
        widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    queries = query.reshape(B, G, N // G, S, H)
    blocks = (cut(queries, 3), cut(places[0], 0), cut(segments[0], 1))
    mixed = jnp.moveaxis(jax.lax.map(one, blocks), 0, 3)  # [B,G,R,blocks,block,H]
    return mixed.reshape(B, N, -1, H)[:, :, :S]


def _in_arrays(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scores: _Scores,
    *,
    mesh: Mesh | None,
    kind: str,
) -> Array:
    """`attention` by cuDNN, or in array operations ("scanned", "blocked")."""
    pieces, length = meshes.parts(mesh, "length"), query.shape[2]

    def piece(query: Array, key: Array, value: Array, segments: Array, order: Array) -> Array:
        key, value, all_segments = (_whole(x, pieces) for x in (key, value, segments))
        places, ids = (order, jnp.arange(length)), (segments, all_segments)
        if kind == "cudnn":
            options = {"scale": scores.scale, "window": scores.window}
            return cudnn.attention(query, key, value, segments, **options, otherwise=scanned)
        if kind == "scanned":
            return _scanned(query, key, value, places, ids, scores)
        return _blocked(query, key, value, places, ids, scores, ordered=pieces == 1)

    def scanned(query: Array, key: Array, value: Array, segments: Array) -> Array:
        at = jnp.arange(length)
        return _scanned(query, key, value, (at, at), (segments, segments), scores)

    alone = mesh is None or (mesh.size == 1 if kind == "cudnn" else pieces == 1)
    if mesh is None or alone:
        return piece(query, key, value, segment_ids, jnp.arange(length))
    inputs = (_HEADS, _KV_HEADS, _KV_HEADS, _IDS, ("length",))
    order = jnp.asarray(_order(length, pieces))
    return collectives.per_shard(piece, mesh, inputs, _HEADS)(query, key, value, segment_ids, order)


# ---------------------------------------------------------------- TPU


def splash_block(length: int, *, exact: bool = False) -> int:
    """The largest tile for which padding the length to a multiple costs at most an eighth.

    4096 -> 1024, 1500 -> 512 (1536), 300 -> 128 (384). exact: without any padding.
    """
    for block in SPLASH_BLOCKS:
        if -(-length // block) * block <= (1.0 if exact else 1.125) * length:
            return block
    return SPLASH_BLOCKS[-1]


@functools.lru_cache(maxsize=32)
def _splash_kernel(
    heads: int,
    length: int,
    pieces: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Any:
    """The kernel of one shape; its mask tables are NumPy arrays, so that no trace owns them."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask: Any = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    mask.q_sequence = _order(length, pieces)
    # A tile of queries does not reach over the seam between the two chunks of a piece.
    chunk = length if pieces == 1 else length // (2 * pieces)
    rows, columns = (splash_block(n, exact=True) for n in (chunk, length))
    sizes: dict[str, Any] = {
        f"block_{name}": rows if name.startswith("q") else columns
        # The unfused backward pass: the fused one writes dq once per key block and adds them up.
        for name in "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    }
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=pieces,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scores: _Scores,
    *,
    mesh: Mesh | None,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, N, T, _ = query.shape
    pieces = meshes.parts(mesh, "length")
    padding = -T % splash_block(T) if pieces == 1 else 0
    if padding:  # a segment 0 behind the row: it sees itself only, and is cut off again
        widths = ((0, 0), (0, 0), (0, padding), (0, 0))
        query, key, value = (jnp.pad(x, widths) for x in (query, key, value))
        segment_ids = jnp.pad(segment_ids, widths[1:3])
    interpret = mesh is None or meshes.platform(mesh) != "tpu"
    heads = N // meshes.parts(mesh, "heads")
    kernel = _splash_kernel(heads, T + padding, pieces, scores.window, scores.softcap, interpret)

    def rows(query: Array, key: Array, value: Array, ids: Array, kernel: Any) -> Any:
        key, value, all_ids = (_whole(x, pieces) for x in (key, value, ids))
        query = (query.astype(jnp.float32) * scores.scale).astype(query.dtype)
        return jax.vmap(kernel)(query, key, value, SegmentIds(ids, all_ids))

    run = rows
    if mesh is not None and mesh.size > 1:
        tables = kernel.manual_sharding_spec(meshes.sharding(mesh, (None, "length")))
        inputs = (_HEADS, _KV_HEADS, _KV_HEADS, _IDS, tables)
        run = collectives.per_shard(rows, mesh, inputs, _HEADS)
    return run(query, key, value, segment_ids, kernel)[:, :, :T]
