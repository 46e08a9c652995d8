"""Shifting and first-fit packing: every token once, its own target, nothing across a border."""

import dataclasses

import numpy as np
import pytest
from fake_traces import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from dcod_jax.data.codec import Columns, decode_columns, encode
from dcod_jax.data.packing import check_lengths, fill_rows, first_fit, shift
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace


def columns_of(traces: list[Trace], *, spans: bool = False, start: bool = False) -> Columns:
    return decode_columns([encode(trace) for trace in traces], spans=spans, start=start)


def test_shift_of_the_documented_example():
    trace = Trace(
        "x",
        np.array([5, 6, 7, 8], np.int32),
        np.array([False, False, True, True]),
        np.array([-0.5, -0.25], np.float32),
    )
    fields = shift(columns_of([trace, trace]))
    assert fields["tokens"].tolist() == [5, 6, 7, 8] * 2
    assert fields["targets"].tolist() == [6, 7, 8, 0] * 2
    assert fields["loss_mask"].tolist() == [False, True, True, False] * 2
    assert fields["teacher_logprobs"].tolist() == [0, -0.5, -0.25, 0] * 2


def test_a_completion_that_follows_another_trace_is_not_its_target():
    """A first token that is completion has no prefix; the trace before must not predict it."""
    whole = Trace("x", np.arange(3, dtype=np.int32), np.ones(3, bool), -np.ones(3, np.float32))
    fields = shift(columns_of([whole, whole]))
    assert fields["loss_mask"].tolist() == [True, True, False] * 2
    assert fields["teacher_logprobs"].tolist() == [-1, -1, 0] * 2


def by_loop(traces: list[Trace], rows: list[list[int]], seq_len: int) -> dict[str, np.ndarray]:
    """The batch, token by token."""
    shape = (len(rows), seq_len)
    names = ("tokens", "targets", "segment_ids", "positions")
    out = {name: np.zeros(shape, np.int32) for name in names}
    out["loss_mask"] = np.zeros(shape, bool)
    out["teacher_logprobs"] = np.zeros(shape, np.float32)
    out["start_logprobs"] = np.zeros(shape, np.float32)
    out["trace_index"] = np.full(shape, -1, np.int32)
    out["span_ids"] = np.zeros(shape, np.int32)
    number = 0
    for row, members in enumerate(rows):
        at = spans = 0
        for segment, member in enumerate(members, 1):
            trace = traces[member]
            ids, mask = trace.token_ids, trace.completion_mask
            for t in range(len(ids)):
                out["tokens"][row, at] = ids[t]
                out["segment_ids"][row, at] = segment
                out["positions"][row, at] = t
                out["trace_index"][row, at] = number
                if t + 1 < len(ids):
                    out["targets"][row, at] = ids[t + 1]
                    out["loss_mask"][row, at] = mask[t + 1]
                    if mask[t + 1] and trace.logprobs is not None:
                        entry = int(mask[: t + 1].sum())
                        out["teacher_logprobs"][row, at] = trace.logprobs[entry]
                        out["start_logprobs"][row, at] = 2 * trace.logprobs[entry]
                        spans += trace.span_starts is None or trace.span_starts[entry]
                out["span_ids"][row, at] = spans
                at += 1
            number += 1
        out["span_ids"][row, at:] = spans
    return out


lengths_lists = st.lists(st.integers(2, 12), min_size=1, max_size=30)


@given(lengths_lists, st.integers(12, 40), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_packed_rows_equal_a_loop_over_tokens(lengths, seq_len, open_bins, scored, spans):
    traces = [
        make_trace(number, length=length, prompt=1, scored=scored)
        for number, length in enumerate(lengths)
    ]
    for number in range(0, len(traces), 2) if spans and scored else ():  # the others have none
        starts = np.arange(int(traces[number].completion_mask.sum())) % 3 == 0
        traces[number] = dataclasses.replace(traces[number], span_starts=starts)
    start = scored and open_bins % 2 == 0
    for number, trace in enumerate(traces if start else ()):
        traces[number] = dataclasses.replace(trace, start_logprobs=2 * trace.logprobs)
    rows = first_fit(np.array(lengths), seq_len, open_bins=open_bins)
    ordered = [traces[member] for row in rows for member in row]
    columns = columns_of(ordered, spans=spans and scored, start=start)
    batch = fill_rows(columns, [len(row) for row in rows], seq_len)
    expected = by_loop(traces, rows, seq_len)
    if not (spans and scored):
        del expected["span_ids"]
    if not start:
        del expected["start_logprobs"]
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype, name
        np.testing.assert_array_equal(batch[name], values, err_msg=name)


@given(lengths_lists, st.integers(12, 40), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_a_plan_holds_each_trace_once_and_fits(lengths, seq_len, open_bins):
    rows = first_fit(np.array(lengths), seq_len, open_bins=open_bins)
    assert sorted(member for row in rows for member in row) == list(range(len(lengths)))
    assert all(sum(lengths[member] for member in row) <= seq_len for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_first_fit_takes_the_oldest_row_with_room():
    assert first_fit(np.array([5, 4, 3, 2]), 8) == [[0, 2], [1, 3]]
    assert first_fit(np.array([5, 6, 2, 3]), 8) == [[0, 2], [1], [3]]
    # One open row: the first is closed when the second opens.
    assert first_fit(np.array([5, 6, 3]), 8, open_bins=1) == [[0], [1], [2]]
    assert first_fit(np.zeros(0, np.int64), 8) == []


def test_empty_rows_are_padding_only():
    batch = fill_rows(columns_of([make_trace(1, length=6)]), [0, 1, 0], 8)
    for row in (0, 2):
        assert not batch["segment_ids"][row].any()
        assert not batch["loss_mask"][row].any()
        assert (batch["trace_index"][row] == -1).all()
    assert batch["segment_ids"][1].tolist() == [1] * 6 + [0] * 2


def test_a_trace_longer_than_a_row_is_refused_not_cut():
    check_lengths(np.array([3, 8, 5]), 8)
    with pytest.raises(DcodError, match=r"data\.seq_len=8.* 2 traces.*number 1, has 12 tokens"):
        check_lengths(np.array([3, 12, 9]), 8)


def test_rows_are_filled_at_lengths_like_gsm8k():
    """Lengths as of GSM8K with its solutions (mean 160 tokens, 58 to 460), rows of 2048."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(150), 0.36, 7473), 58, 461).astype(int)
    rows = first_fit(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.98
