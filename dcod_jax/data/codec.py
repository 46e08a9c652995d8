"""One trace as bytes and back: the record layout of the on-disk dataset.

A record, little endian, no padding (n tokens, C completion tokens, K of the top-k):

    header           version u8, flags u8 (1: log-probs, 2: top-k), id bytes u16,
                     n u32, C u32, K u32, meta bytes u32
    token_ids        int32 [n]
    logprobs         float32 [C]          with flag 1
    tail_logprobs    float32 [C]          with flag 2
    topk_ids         int32 [C, K]         with flag 2
    topk_logprobs    bfloat16 [C, K]      with flag 2
    completion_mask  bits [n], first token in the lowest bit, filled up to a whole byte
    id, meta         UTF-8, JSON

Traces are stored unshifted, so packing and sequence length stay load-time choices.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

RECORD_VERSION = 1
_HEADER = struct.Struct("<BBHIIII")
_LOGPROBS, _TOPK = 1, 2
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def bytes_per_token(top_k: int) -> int:
    """Bytes that scoring adds for one completion token: 4 without top-k, else 6 K + 8."""
    return 6 * top_k + 8 if top_k else 4


def score_kind(trace: Trace) -> tuple[bool, int]:
    """(has log-probs, K of its top-k or 0)."""
    return trace.logprobs is not None, 0 if trace.topk_ids is None else trace.topk_ids.shape[-1]


def _check(trace: Trace) -> tuple[int, int, int]:
    """(n, C, K) of a consistent trace; raises DcodError naming the field and both sizes."""
    tokens, mask = len(trace.token_ids), len(trace.completion_mask)
    if tokens != mask:
        raise DcodError(f"trace {trace.id!r}: {tokens} token_ids but {mask} completion_mask")
    completion = int(np.count_nonzero(trace.completion_mask))
    topk = (trace.topk_ids, trace.topk_logprobs, trace.tail_logprobs)
    given = [array for array in topk if array is not None]
    if len(given) not in (0, 3) or (given and trace.logprobs is None):
        raise DcodError(
            f"trace {trace.id!r}: logprobs, topk_ids, topk_logprobs and tail_logprobs go together"
        )
    width = 0 if trace.topk_ids is None else trace.topk_ids.shape[-1]
    expected = {
        "logprobs": (trace.logprobs, (completion,)),
        "topk_ids": (trace.topk_ids, (completion, width)),
        "topk_logprobs": (trace.topk_logprobs, (completion, width)),
        "tail_logprobs": (trace.tail_logprobs, (completion,)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise DcodError(
                f"trace {trace.id!r}: {name} has shape {array.shape}, expected {shape} "
                f"for its {completion} completion tokens"
            )
    if trace.logprobs is not None and not np.all(np.isfinite(trace.logprobs)):
        raise DcodError(f"trace {trace.id!r}: a teacher log-prob is NaN or infinite")
    return tokens, completion, width


def encode(trace: Trace) -> bytes:
    """One trace as a record; raises DcodError where its fields do not fit together."""
    tokens, completion, width = _check(trace)
    flags, body = 0, [np.asarray(trace.token_ids, "<i4").tobytes()]
    if trace.logprobs is not None:
        flags |= _LOGPROBS
        body.append(np.asarray(trace.logprobs, "<f4").tobytes())
    if trace.topk_ids is not None:
        flags |= _TOPK
        body.append(np.asarray(trace.tail_logprobs, "<f4").tobytes())
        body.append(np.asarray(trace.topk_ids, "<i4").tobytes())
        body.append(np.asarray(trace.topk_logprobs, _BFLOAT16).tobytes())
    mask = np.asarray(trace.completion_mask, bool)
    body.append(np.packbits(mask, bitorder="little").tobytes())
    name = trace.id.encode()
    try:
        meta = json.dumps(trace.meta, ensure_ascii=False).encode() if trace.meta else b""
    except (TypeError, ValueError) as error:
        raise DcodError(f"trace {trace.id!r}: meta must hold JSON values: {error}") from error
    if len(name) > 0xFFFF:
        raise DcodError(f"trace id of {len(name)} bytes, at most 65535 fit: {trace.id[:60]!r}...")
    header = _HEADER.pack(RECORD_VERSION, flags, len(name), tokens, completion, width, len(meta))
    return b"".join([header, *body, name, meta])


def _scores_size(flags: int, completion: int, width: int) -> int:
    size = 4 * completion if flags & _LOGPROBS else 0
    return size + (6 * width + 4) * completion if flags & _TOPK else size


def decode(record: bytes) -> Trace:
    """The trace in a record; the arrays are read-only views of it.

    Raises DcodError when the record has another version or its sizes do not add up.
    """
    if len(record) < _HEADER.size:
        raise DcodError(f"a record of {len(record)} bytes is shorter than its header")
    version, flags, name_size, n, C, K, meta_size = _HEADER.unpack_from(record)
    if version != RECORD_VERSION:
        raise DcodError(f"record version {version}, expected {RECORD_VERSION}")
    mask_size = -(-n // 8)
    size = _HEADER.size + 4 * n + _scores_size(flags, C, K) + mask_size + name_size + meta_size
    if size != len(record):
        raise DcodError(f"a record of {len(record)} bytes, expected {size} by its header")
    offset = _HEADER.size

    def take(dtype: DTypeLike, *shape: int) -> np.ndarray:
        nonlocal offset
        count = int(np.prod(shape))
        array = np.frombuffer(record, dtype, count, offset)
        offset += array.nbytes
        return array.reshape(shape)

    token_ids = take("<i4", n)
    fields: dict[str, Any] = {}
    if flags & _LOGPROBS:
        fields["logprobs"] = take("<f4", C)
    if flags & _TOPK:
        fields["tail_logprobs"] = take("<f4", C)
        fields["topk_ids"] = take("<i4", C, K)
        fields["topk_logprobs"] = take(_BFLOAT16, C, K)
    bits = np.unpackbits(take(np.uint8, mask_size), count=n, bitorder="little")
    name = record[offset : offset + name_size].decode()
    meta = json.loads(record[offset + name_size :]) if meta_size else {}
    return Trace(name, token_ids, bits.astype(bool), meta=meta, **fields)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The hot fields of several traces, end to end (S tokens of R traces), unshifted."""

    token_ids: Int[np.ndarray, " S"]
    completion_mask: Bool[np.ndarray, " S"]
    logprobs: Float[np.ndarray, " S"]  # of each completion token; 0 elsewhere and when unscored
    lengths: Int[np.ndarray, " R"]
    topk_ids: Int[np.ndarray, "C K"] | None = None  # of each completion token, traces end to end
    topk_logprobs: Float[np.ndarray, "C K"] | None = None  # bfloat16
    tail_logprobs: Float[np.ndarray, " C"] | None = None


def decode_columns(records: Sequence[bytes], *, top_k: int = 0) -> Columns:
    """What training reads of the records, without a Python object per trace.

    top_k: the K that all records hold, when it is wanted.
    """
    start = _HEADER.size
    tokens, masks, scores, lengths = [], [], [], []
    topk: list[list[bytes]] = [[], [], []]
    for record in records:
        _, flags, _, n, C, K, _ = _HEADER.unpack_from(record)
        after_tokens = start + 4 * n
        after_scores = after_tokens + _scores_size(flags, C, K)
        tokens.append(record[start:after_tokens])
        has_scores = flags & _LOGPROBS
        scores.append(record[after_tokens : after_tokens + 4 * C] if has_scores else bytes(4 * C))
        masks.append(record[after_scores : after_scores + (n + 7) // 8])
        if top_k:
            begin = after_tokens + 4 * C
            for part, size in zip(topk, (4 * C, 4 * C * K, 2 * C * K), strict=True):
                part.append(record[begin : begin + size])
                begin += size
        lengths.append(n)
    size = np.asarray(lengths, np.int64)
    bits = np.unpackbits(np.frombuffer(b"".join(masks), np.uint8), bitorder="little")
    bytes_before = np.cumsum((size + 7) // 8) - (size + 7) // 8
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    mask = bits[np.repeat(8 * bytes_before, size) + within].view(bool)
    logprobs = np.zeros(len(mask), np.float32)
    logprobs[mask] = np.frombuffer(b"".join(scores), "<f4")
    columns = Columns(np.frombuffer(b"".join(tokens), "<i4"), mask, logprobs, size)
    if not top_k:
        return columns
    tail, ids, values = (b"".join(part) for part in topk)
    return dataclasses.replace(
        columns,
        topk_ids=np.frombuffer(ids, "<i4").reshape(-1, top_k),
        topk_logprobs=np.frombuffer(values, _BFLOAT16).reshape(-1, top_k),
        tail_logprobs=np.frombuffer(tail, "<f4"),
    )
