"""The head's positions and the teacher's top-k in a batch, and rows with a completion capacity."""

import numpy as np
import pytest
from fake_traces import make_trace, make_traces, write
from hypothesis import given, settings
from hypothesis import strategies as st

from dcod_jax.data import pipeline
from dcod_jax.data.codec import decode_columns, encode
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.packing import fill_rows, first_fit, head_capacity
from dcod_jax.errors import DcodError

TRACES = make_traces(41, top_k=3)


def test_every_supervised_position_once_with_its_own_top_k():
    rows = [[0, 3], [], [1, 2, 4]]
    ordered = [TRACES[i] for row in rows for i in row]
    columns = decode_columns([encode(trace) for trace in ordered], top_k=3)
    batch = fill_rows(columns, [len(row) for row in rows], 96, capacity=80)
    assert batch["topk_ids"].shape == (3, 80, 3)
    assert batch["topk_logprobs"].dtype.name == "bfloat16"
    for row, members in enumerate(rows):
        # By a loop over traces and tokens: token i of a trace is predicted at position i - 1.
        expected, start = [], 0
        for i in members:
            trace = TRACES[i]
            for seen, place in enumerate(np.flatnonzero(trace.completion_mask)):
                fields = (
                    trace.topk_ids[seen],
                    trace.topk_logprobs[seen],
                    trace.tail_logprobs[seen],
                )
                expected.append((start + place - 1, *fields))
            start += len(trace.token_ids)
        for place, (position, ids, logprobs, tail) in enumerate(expected):
            assert batch["head_positions"][row, place] == position
            assert batch["loss_mask"][row, position]
            np.testing.assert_array_equal(batch["topk_ids"][row, place], ids)
            np.testing.assert_array_equal(batch["topk_logprobs"][row, place], logprobs)
            assert batch["tail_logprobs"][row, place] == tail
        assert (batch["head_positions"][row, len(expected) :] == 96).all()


def test_a_row_with_more_supervised_tokens_than_the_capacity_is_an_error():
    columns = decode_columns([encode(make_trace(0, length=12))])
    with pytest.raises(DcodError, match="a row has 9 supervised tokens, room is for 8"):
        fill_rows(columns, [1], 16, capacity=8)


pairs = st.lists(
    st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
    min_size=1,
    max_size=40,
)


@given(pairs, st.integers(12, 40), st.integers(12, 20), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_a_plan_keeps_both_limits_and_loses_no_trace(lengths, seq_len, capacity, open_bins):
    lengths = np.array(lengths)
    rows = first_fit(
        lengths[:, 0],
        seq_len,
        completions=lengths[:, 1],
        capacity=capacity,
        open_bins=open_bins,
    )
    assert sorted(member for row in rows for member in row) == list(range(len(lengths)))
    for row in rows:
        assert lengths[row, 0].sum() <= seq_len
        assert lengths[row, 1].sum() <= capacity


def test_the_capacity_follows_the_datasets_share_of_completions():
    half = np.tile([[100, 50]], (40, 1))
    assert head_capacity(half, 2048) == 1152  # 1024 and an eighth
    assert head_capacity(np.tile([[100, 99]], (40, 1)), 2048) == 2048
    assert head_capacity(np.array([[2000, 20], [300, 290]]), 2048) == 320  # the longest fits
    assert head_capacity(half, 2048, 500) == 500
    with pytest.raises(DcodError, match=r"data\.head_tokens=40, but a trace has 50"):
        head_capacity(half, 2048, 40)


def test_the_capacity_costs_little_fill():
    """Lengths as of chat traces: prompts and completions of about equal, varying length."""
    generator = np.random.default_rng(0)
    prompt, completion = np.clip(generator.lognormal(np.log(110), 0.5, (2, 6000)), 20, 900)
    lengths = np.stack([prompt + completion, completion], 1).astype(int)
    capacity = head_capacity(lengths, 2048)
    assert capacity < 1300
    free = first_fit(lengths[:, 0], 2048)
    rows = first_fit(lengths[:, 0], 2048, completions=lengths[:, 1], capacity=capacity)
    assert len(rows) < 1.02 * len(free)


def test_the_pipeline_reads_the_top_k_only_where_it_is_wanted(tmp_path):
    dataset = TraceDataset(write(tmp_path / "d", TRACES))
    options = {"seq_len": 64, "batch_size": 4, "seed": 0}
    plain, _ = next(pipeline.train_batches(dataset, **options))
    full, _ = next(pipeline.train_batches(dataset, **options, require_top_k=True))
    assert "topk_ids" not in plain
    for name in plain:
        np.testing.assert_array_equal(plain[name], full[name])
    capacity = head_capacity(dataset.lengths, 64)
    assert full["topk_ids"].shape == (4, capacity, 3)
    counts = full["loss_mask"].sum(1)
    np.testing.assert_array_equal((full["head_positions"] < 64).sum(1), counts)


def test_a_dataset_without_top_k_is_refused_with_the_command(tmp_path):
    dataset = TraceDataset(write(tmp_path / "d", make_traces(9)))
    with pytest.raises(DcodError, match=r"dcod_jax\.score.*score\.top_k=64"):
        pipeline.train_batches(dataset, seq_len=64, batch_size=4, seed=0, require_top_k=True)


def test_another_capacity_is_another_stream(tmp_path):
    dataset = TraceDataset(write(tmp_path / "d", TRACES))
    options = {"seq_len": 64, "batch_size": 4, "seed": 0}
    state = pipeline.train_batches(dataset, **options).get_state()
    other = pipeline.train_batches(dataset, **options, head_tokens=40)
    with pytest.raises(DcodError, match="belongs to stream"):
        other.set_state(state)
