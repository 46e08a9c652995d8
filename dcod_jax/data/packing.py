"""Shift traces into (token, target) positions and pack them into rows of a fixed length.

A trace of n tokens takes n positions, as in types.Batch; the last one predicts nothing. So a
trace of exactly seq_len tokens still fits, and each of its tokens is in the row once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dcod_jax.data.codec import Columns
from dcod_jax.types import DcodError

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


def first_fit(
    lengths: Int[np.ndarray, " N"], seq_len: int, *, open_bins: int = OPEN_BINS
) -> list[list[int]]:
    """Pack lengths into rows: each goes to the oldest open row that has room.

    At most `open_bins` rows are open; then the fullest one is closed. Rows come in the order
    in which they were opened.

    first_fit([5, 4, 3, 2], 8) -> [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []  # of the open rows, oldest first; rows_open alike
    rows_open: list[list[int]] = []
    smallest = int(lengths.min()) if len(lengths) else 0
    for index, length in enumerate(lengths.tolist()):
        for place, left in enumerate(room):
            if left >= length:
                rows_open[place].append(index)
                room[place] = left = left - length
                if left < smallest:
                    del room[place], rows_open[place]
                break
        else:
            if len(room) == open_bins:
                fullest = room.index(min(room))
                del room[fullest], rows_open[fullest]
            row = [index]
            rows.append(row)
            rows_open.append(row)
            room.append(seq_len - length)
    return rows


def shift(columns: Columns) -> dict[str, np.ndarray]:
    """Flat per-position fields [S]: entry t speaks about predicting the token after t.

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
    for name in ("targets", "loss_mask", "teacher_logprobs"):
        fields[name][last] = 0
    return fields


def fill_rows(columns: Columns, counts: Sequence[int], seq_len: int) -> dict[str, np.ndarray]:
    """Batch fields [B, T] on the host, of traces that are in row order, counts[b] in row b.

    Also "trace_index" [B, T]: which of the R traces a position belongs to, -1 in padding.
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
    batch = {}
    for name, values in flat.items():
        rows = np.full((len(traces), seq_len), -1 if name == "trace_index" else 0, values.dtype)
        for row, (end, size) in enumerate(zip(ends, tokens.tolist(), strict=True)):
            rows[row, :size] = values[end - size : end]
        batch[name] = rows
    return batch
