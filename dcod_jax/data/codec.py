"""One trace as bytes and back: the record layout of the on-disk dataset.

A record, little endian, no padding (n tokens, C completion tokens, K of the top-k):

    header           version u8, flags u8 (1: log-probs, 2: top-k, 4: spans, 8: start),
                     id bytes u16, n u32, C u32, K u32, meta bytes u32
    token_ids        int32 [n]
    logprobs         float32 [C]          with flag 1
    tail_logprobs    float32 [C]          with flag 2
    topk_ids         int32 [C, K]         with flag 2
    topk_logprobs    bfloat16 [C, K]      with flag 2
    start_logprobs   float32 [C]          with flag 8
    completion_mask  bits [n], first token in the lowest bit, filled up to a whole byte
    span_starts      bits [C], likewise       with flag 4
    id, meta         UTF-8, JSON

Traces are stored unshifted, so packing and sequence length stay load-time choices.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from dcod_jax.data.teachers import TEACHER, WEIGHT
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

RECORD_VERSION = 1
_HEADER = struct.Struct("<BBHIIII")
_LOGPROBS, _TOPK, _SPANS, _START = 1, 2, 4, 8
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# In the order of a record; the mask follows.
_ARRAYS: dict[str, tuple[DTypeLike, int]] = {  # name -> type, flag of a record that has it
    "token_ids": ("<i4", 0),
    "logprobs": ("<f4", _LOGPROBS),
    "tail_logprobs": ("<f4", _TOPK),
    "topk_ids": ("<i4", _TOPK),
    "topk_logprobs": (_BFLOAT16, _TOPK),
    "start_logprobs": ("<f4", _START),
}


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
    completion, width = int(np.count_nonzero(trace.completion_mask)), score_kind(trace)[1]
    shapes = {
        "logprobs": (completion,),
        "topk_ids": (completion, width),
        "topk_logprobs": (completion, width),
        "tail_logprobs": (completion,),
        "span_starts": (completion,),
        "start_logprobs": (completion,),
    }
    arrays = {n: getattr(trace, n) for n in shapes if getattr(trace, n) is not None}
    beside = {"span_starts", "start_logprobs"}
    if set(arrays) - beside not in (set(), {"logprobs"}, set(shapes) - beside):
        raise DcodError(
            f"trace {trace.id!r}: logprobs, topk_ids, topk_logprobs and tail_logprobs go together"
        )
    if "span_starts" in arrays and set(arrays) - {"start_logprobs"} != {"span_starts", "logprobs"}:
        raise DcodError(f"trace {trace.id!r}: spans go with log-probs and without a top-k")
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise DcodError(
                f"trace {trace.id!r}: {name} has shape {array.shape}, expected {shapes[name]} "
                f"for its {completion} completion tokens"
            )
    for of, values in (("teacher", trace.logprobs), ("start", trace.start_logprobs)):
        if values is not None and not np.all(np.isfinite(values)):
            raise DcodError(f"trace {trace.id!r}: a {of} log-prob is NaN or infinite")
    return tokens, completion, width


def encode(trace: Trace) -> bytes:
    """One trace as a record; raises DcodError where its fields do not fit together."""
    tokens, completion, width = _check(trace)
    arrays = [(getattr(trace, name), dtype) for name, (dtype, _) in _ARRAYS.items()]
    body = [np.asarray(array, dtype).tobytes() for array, dtype in arrays if array is not None]
    flags = _LOGPROBS * (trace.logprobs is not None) | _TOPK * (trace.topk_ids is not None)
    flags |= _SPANS * (trace.span_starts is not None) | _START * (trace.start_logprobs is not None)
    for bits in (trace.completion_mask, trace.span_starts):
        if bits is not None:
            body.append(np.packbits(np.asarray(bits, bool), bitorder="little").tobytes())
    name = trace.id.encode()
    try:
        meta = json.dumps(trace.meta, ensure_ascii=False).encode() if trace.meta else b""
    except (TypeError, ValueError) as error:
        raise DcodError(f"trace {trace.id!r}: meta must hold JSON values: {error}") from error
    if len(name) > 0xFFFF:
        raise DcodError(f"trace id of {len(name)} bytes, at most 65535 fit: {trace.id[:60]!r}...")
    header = _HEADER.pack(RECORD_VERSION, flags, len(name), tokens, completion, width, len(meta))
    return b"".join([header, *body, name, meta])


def _parts(record: bytes) -> list[bytes]:
    """The bytes of each array (absent ones are empty), of mask and spans, id and meta."""
    if len(record) < _HEADER.size:
        raise DcodError(f"a record of {len(record)} bytes is shorter than its header")
    version, flags, name, n, C, K, meta = _HEADER.unpack_from(record)
    if version != RECORD_VERSION:
        raise DcodError(f"record version {version}, expected {RECORD_VERSION}")
    top = C if flags & _TOPK else 0
    sizes = [4 * n, 4 * C * (flags & _LOGPROBS), 4 * top, 4 * top * K, 2 * top * K]
    sizes.append(4 * C if flags & _START else 0)
    parts, start = [], _HEADER.size
    for size in (*sizes, -(-n // 8), -(-C // 8) if flags & _SPANS else 0, name, meta):
        parts.append(record[start : start + size])
        start += size
    if start != len(record):
        raise DcodError(f"a record of {len(record)} bytes, expected {start} by its header")
    mask = int.from_bytes(parts[6], "little")
    if mask.bit_count() != C or mask.bit_length() > n:
        raise DcodError(f"a record whose mask does not have the {C} tokens of its header")
    return parts


def decode(record: bytes) -> Trace:
    """The trace in a record, with read-only arrays.

    Raises DcodError when the record has another version or its sizes do not add up.
    """
    *arrays, mask, spans, name, meta = _parts(record)
    _, flags, _, n, C, K, _ = _HEADER.unpack_from(record)
    fields: dict[str, Any] = {}
    for (field, (dtype, flag)), content in zip(_ARRAYS.items(), arrays, strict=True):
        if flag & flags == flag:
            array = np.frombuffer(content, dtype)
            fields[field] = array.reshape(C, K) if field.startswith("topk") else array
    if flags & _SPANS:
        fields["span_starts"] = _span_starts(spans, C)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=n, bitorder="little")
    try:
        identity = name.decode()
    except ValueError as error:
        raise DcodError(f"a record whose id cannot be read: {error}") from error
    return Trace(identity, completion_mask=bits.astype(bool), meta=_meta(meta), **fields)


def _meta(content: bytes) -> dict[str, Any]:
    """A record's meta; DcodError where it is no JSON object."""
    try:
        own = json.loads(content) if content else {}
    except (ValueError, RecursionError) as error:
        raise DcodError(f"a record whose meta cannot be read: {error}") from error
    if not isinstance(own, dict):
        raise DcodError(f"a record whose meta is a {type(own).__name__}, not an object")
    return own


def _weight(meta: bytes, teacher_weights: Mapping[str, float]) -> float:
    """A trace's own weight (1 without one) times its teacher's (1 where the mapping has none)."""
    known = _meta(meta)
    own, teacher = known.get(WEIGHT, 1), known.get(TEACHER, "")
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own < math.inf:
        raise DcodError(f"a record whose weight is {str(own)[:40]}; expected a finite number >= 0")
    return own * (teacher_weights.get(teacher, 1.0) if isinstance(teacher, str) else 1.0)


def _span_starts(content: bytes, count: int) -> Bool[np.ndarray, " C"]:
    """Of a record's bits; without bits each token is a span of its own."""
    if not content:
        return np.ones(count, bool)
    return np.unpackbits(np.frombuffer(content, np.uint8), count=count, bitorder="little").view(
        bool
    )


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
    span_starts: Bool[np.ndarray, " C"] | None = None
    weights: Float[np.ndarray, " R"] | None = None  # of each trace in the loss
    start_logprobs: Float[np.ndarray, " S"] | None = None  # as logprobs, of the student's start


def decode_columns(
    records: Sequence[bytes],
    *,
    top_k: int = 0,
    spans: bool = False,
    start: bool = False,
    teacher_weights: Mapping[str, float] | None = None,
) -> Columns:
    """What training reads of the records, without a Python object per trace.

    top_k: the K that all records hold, when it is wanted. spans, start: whether those are. With
    teacher_weights, also the weights of the traces.
    """
    parts = [_parts(record) for record in records]
    size = np.asarray([len(part[0]) // 4 for part in parts], np.int64)
    ids, scores, tail, topk_ids, topk_logprobs, own, masks = (
        b"".join(part[place] for part in parts) for place in range(7)
    )
    bits = np.unpackbits(np.frombuffer(masks, np.uint8), bitorder="little")
    bytes_before = np.cumsum((size + 7) // 8) - (size + 7) // 8
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    mask = bits[np.repeat(8 * bytes_before, size) + within].view(bool)
    logprobs = np.zeros(len(mask), np.float32)
    scored = np.repeat(np.asarray([len(part[1]) > 0 for part in parts], bool), size)
    logprobs[mask & scored] = np.frombuffer(scores, "<f4")
    columns = Columns(np.frombuffer(ids, "<i4"), mask, logprobs, size)
    if teacher_weights is not None:
        weights = [_weight(part[-1], teacher_weights) for part in parts]
        columns = dataclasses.replace(columns, weights=np.asarray(weights, np.float32))
    if start:
        start_logprobs = np.zeros(len(mask), np.float32)
        start_logprobs[mask] = np.frombuffer(own, "<f4")
        columns = dataclasses.replace(columns, start_logprobs=start_logprobs)
    if spans:
        counts = [_HEADER.unpack_from(record)[4] for record in records]
        starts = [_span_starts(p[7], c) for p, c in zip(parts, counts, strict=True)]
        columns = dataclasses.replace(columns, span_starts=np.concatenate(starts))
    if not top_k:
        return columns
    return dataclasses.replace(
        columns,
        topk_ids=np.frombuffer(topk_ids, "<i4").reshape(-1, top_k),
        topk_logprobs=np.frombuffer(topk_logprobs, _BFLOAT16).reshape(-1, top_k),
        tail_logprobs=np.frombuffer(tail, "<f4"),
    )
