"""Shift traces into (token, target) positions and pack them into rows of a fixed length.

A trace of n tokens takes n positions, as in types.Batch; the last one predicts nothing. So a
trace of exactly seq_len tokens still fits, and each of its tokens is in the row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dcod_jax.data.codec import Columns
from dcod_jax.errors import DcodError

OPEN_BINS = 16  # rows that may still get a trace; more raise the fill by less than a percent


def check_lengths(lengths: Int[np.ndarray, " N"], seq_len: int, *, source: str = "a trace") -> None:
    """Raises DcodError when a trace is longer than a row: nothing is cut silently."""
    if len(lengths) and (longest := int(lengths.max())) > seq_len:
        count = int((lengths > seq_len).sum())
        raise DcodError(
            f"data.seq_len={seq_len}, but {source} has {count} traces that are longer "
            f"(the longest, number {int(lengths.argmax())}, has {longest} tokens); raise "
            f"data.seq_len to {longest}, or prepare again with data.max_length={seq_len}"
        )


def head_capacity(lengths: Int[np.ndarray, "N two"], seq_len: int, head_tokens: int = 0) -> int:
    """Supervised tokens that a row may hold: what the vocabulary head is compiled for.

    lengths are (tokens, completion tokens) of each trace. head_tokens 0: the dataset's share of
    completion tokens with an eighth of slack, so that rows hardly lose fill, in steps of 64.
    """
    longest = int(lengths[:, 1].max(initial=1))
    if head_tokens:
        if head_tokens < longest:
            raise DcodError(
                f"data.head_tokens={head_tokens}, but a trace has {longest} completion tokens; "
                f"raise it to at least {longest}, or set it to 0 (chosen from the dataset)"
            )
        return min(head_tokens, seq_len)
    share = lengths[:, 1].sum() / max(lengths[:, 0].sum(), 1)
    wanted = max(longest, share * seq_len * 1.125)
    return int(min(-(-wanted // 64) * 64, seq_len))


def first_fit(
    lengths: Int[np.ndarray, " N"],
    seq_len: int,
    *,
    completions: Int[np.ndarray, " N"] | None = None,
    capacity: int = 0,
    open_bins: int = OPEN_BINS,
) -> list[list[int]]:
    """Pack lengths into rows: each goes to the oldest open row that has room.

    With `completions` a row also holds at most `capacity` completion tokens. At most `open_bins`
    rows are open; then the fullest one is closed. Rows come in the order in which they were opened.

    first_fit([5, 4, 3, 2], 8) -> [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    opened: list[list[Any]] = []  # [room, spare completion tokens, row], oldest first
    smallest = int(lengths.min()) if len(lengths) else 0
    supervised = [0] * len(lengths) if completions is None else completions.tolist()
    for index, (length, count) in enumerate(zip(lengths.tolist(), supervised, strict=True)):
        for entry in opened:
            if entry[0] >= length and entry[1] >= count:
                break
        else:
            if len(opened) == open_bins:
                opened.remove(min(opened, key=lambda fullest: fullest[0]))
            entry = [seq_len, capacity, []]
            opened.append(entry)
            rows.append(entry[2])
        entry[0] -= length
        entry[1] -= count
        entry[2].append(index)
        if entry[0] < smallest:
            opened.remove(entry)
    return rows


def shift(columns: Columns) -> dict[str, np.ndarray]:
    """Flat per-position fields [S]: entry t speaks about predicting the token after t.

    "span_ids" are still 1 where a span starts, 0 elsewhere; `fill_rows` counts them.
    The last position of each trace has target 0 and loss_mask False, and a trace's first token is
    never a target. For one trace [5 6 7 8] with completion [7 8] and log-probs [a b]:
    targets [6 7 8 0], loss_mask [F T T F], teacher_logprobs [0 a b 0].
    """
    last = np.cumsum(columns.lengths) - 1
    fields = {
        "tokens": columns.token_ids,
        "targets": np.append(columns.token_ids[1:], np.int32(0)),
        "loss_mask": np.append(columns.completion_mask[1:], False),
        "teacher_logprobs": np.append(columns.logprobs[1:], np.float32(0)),
    }
    if columns.start_logprobs is not None:
        fields["start_logprobs"] = np.append(columns.start_logprobs[1:], np.float32(0))
    if columns.span_starts is not None:
        starts = np.zeros(len(columns.token_ids), np.int32)
        starts[columns.completion_mask] = columns.span_starts
        fields["span_ids"] = np.append(starts[1:], np.int32(0))
    for name in ("targets", "loss_mask", "teacher_logprobs", "start_logprobs", "span_ids"):
        if name in fields:
            fields[name][last] = 0
    return fields


def fill_rows(
    columns: Columns, counts: Sequence[int], seq_len: int, *, capacity: int = 0
) -> dict[str, np.ndarray]:
    """Batch fields [B, T] on the host, of traces that are in row order, counts[b] in row b.

    Also "trace_index" [B, T]: which of the R traces a position belongs to, -1 in padding. With
    `capacity` (C), head_positions [B, C] and, where the columns hold them, the top-k fields.
    """
    lengths, traces = columns.lengths, np.asarray(counts, np.int64)
    starts = np.cumsum(lengths) - lengths
    trace = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first_of_row = np.cumsum(traces) - traces
    row_of_trace = np.repeat(np.arange(len(traces)), traces)
    segment = np.arange(1, len(lengths) + 1) - first_of_row[row_of_trace]
    flat = shift(columns) | {
        "segment_ids": np.repeat(segment.astype(np.int32), lengths),
        "positions": np.arange(len(trace), dtype=np.int32)
        - np.repeat(starts.astype(np.int32), lengths),
        "trace_index": trace,
    }
    tokens = np.bincount(row_of_trace, weights=lengths, minlength=len(traces)).astype(np.int64)
    ends = np.cumsum(tokens).tolist()
    if columns.weights is not None:
        flat["trace_weights"] = np.repeat(columns.weights, lengths)
    batch = {}
    for name, values in flat.items():
        rows = np.full((len(traces), seq_len), -1 if name == "trace_index" else 0, values.dtype)
        for row, (end, size) in enumerate(zip(ends, tokens.tolist(), strict=True)):
            rows[row, :size] = values[end - size : end]
        batch[name] = rows
    if "span_ids" in batch:  # each turn of each trace starts a span, so none crosses a border
        batch["span_ids"] = np.cumsum(batch["span_ids"], axis=1, dtype=np.int32)
    if capacity:
        batch |= head_fields(columns, batch["loss_mask"], capacity)
    return batch


def head_fields(columns: Columns, loss_mask: np.ndarray, capacity: int) -> dict[str, np.ndarray]:
    """head_positions [B, C] (T behind the last one), and the top-k fields in the same places.

    The k-th supervised position of the batch is the k-th completion token of the columns: both
    count in row order.
    """
    rows, positions = np.nonzero(loss_mask)
    counts = np.count_nonzero(loss_mask, axis=1)
    if counts.max(initial=0) > capacity:
        raise DcodError(f"a row has {counts.max()} supervised tokens, room is for {capacity}")
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(loss_mask), capacity)
    fields = {"head_positions": np.full(shape, loss_mask.shape[1], np.int32)}
    fields["head_positions"][rows, places] = positions
    for name in ("topk_ids", "topk_logprobs", "tail_logprobs"):
        values = getattr(columns, name)
        if values is not None:
            fields[name] = np.zeros((*shape, *values.shape[1:]), values.dtype)
            fields[name][rows, places] = values
    return fields
