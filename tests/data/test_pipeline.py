"""The row stream: complete epochs, exact restoration anywhere, the same for any number of hosts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_traces import make_traces, write

from dcod_jax.data import pipeline
from dcod_jax.data.codec import decode_columns, encode
from dcod_jax.data.dataset import DatasetWriter, TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
TRACES = make_traces(53)
OPTIONS = {"seq_len": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return TraceDataset(write(tmp_path_factory.mktemp("d") / "d", TRACES))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows_of(dataset, *, seed, epoch=0):
    return len(pipeline.RowStream(dataset, pipeline.Reading(64, 1), seed).rows(epoch))


def assert_equal(a, b):
    assert len(a) == len(b)
    for (batch, index), (other, other_index) in zip(a, b, strict=True):
        np.testing.assert_array_equal(index, other_index)
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_weights_follow_their_traces(tmp_path, dataset):
    """A trace's own weight times its teacher's; absent where neither is named."""
    assert "trace_weights" not in take(pipeline.eval_batches(dataset, **OPTIONS), 1)[0][0]
    traces, wanted = [], []
    for number, trace in enumerate(TRACES):
        own = {} if number % 3 == 0 else {"weight": number / 7}
        teacher = {} if number % 4 == 0 else {"teacher": "ab"[number % 2]}
        traces.append(dataclasses.replace(trace, meta=trace.meta | own | teacher))
        wanted.append(own.get("weight", 1.0) * (0.5 if teacher.get("teacher") == "a" else 1.0))
    manifest = {"weighted": True, "teachers": ["a", "b"]}
    with DatasetWriter(tmp_path / "d", shard_records=8, manifest=manifest) as writer:
        for trace in traces:
            writer.write(trace)
    options = OPTIONS | {"teacher_weights": (("a", 0.5),)}
    weighted = TraceDataset(tmp_path / "d")
    for batch, index in take(pipeline.train_batches(weighted, seed=3, **options), 5):
        expected = np.append(np.float32(wanted), np.float32(0))[index]
        np.testing.assert_array_equal(batch["trace_weights"], expected)
    with pytest.raises(DcodError, match=r"teacher_weights names c; the traces of .* are of a, b"):
        pipeline.train_batches(weighted, seed=3, **OPTIONS, teacher_weights=(("c", 1.0),))
    for meta in ({"weight": "2"}, {"weight": -1}, {"weight": float("nan")}, {"weight": True}):
        record = encode(dataclasses.replace(TRACES[0], meta=meta))
        with pytest.raises(DcodError, match=r"whose weight is .*expected a finite number >= 0"):
            decode_columns([record], teacher_weights={})
    with pytest.raises(DcodError, match=r"names a; .* are of no named teacher"):
        pipeline.train_batches(dataset, seed=3, **options)


def test_an_epoch_holds_every_token_of_every_trace_once(dataset):
    rows = rows_of(dataset, seed=7)
    iterator = pipeline.train_batches(dataset, seq_len=64, batch_size=1, seed=7)
    seen: dict[tuple[int, int], list] = {}
    for batch, index in take(iterator, rows):
        for t in np.flatnonzero(index[0] >= 0):
            place = (int(index[0, t]), int(batch["positions"][0, t]))
            values = [
                batch[name][0, t] for name in ("tokens", "targets", "loss_mask", "teacher_logprobs")
            ]
            assert place not in seen
            seen[place] = values
        assert ((index >= 0) == (batch["segment_ids"] > 0)).all()
    assert iterator.get_state()["epoch"] == 0
    assert iterator.get_state()["row"] == rows
    for number, trace in enumerate(TRACES):
        scores = iter(trace.logprobs)
        after = np.append(trace.token_ids[1:], 0)
        supervised = np.append(trace.completion_mask[1:], False)
        for t, token in enumerate(trace.token_ids):
            expected = next(scores) if supervised[t] else 0
            assert seen.pop((number, t)) == [token, after[t], supervised[t], expected]
    assert not seen


def stream_of(dataset, seed, rows):
    iterator = pipeline.train_batches(dataset, seq_len=64, batch_size=1, seed=seed)
    return np.concatenate([index for _, index in take(iterator, rows)])


def test_the_order_follows_from_seed_and_epoch(dataset):
    rows = [rows_of(dataset, seed=3, epoch=epoch) for epoch in (0, 1)]
    first, again = (stream_of(dataset, 3, sum(rows)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = stream_of(dataset, 4, sum(rows))
    assert (first != other).any()
    for part in (first[: rows[0]], first[rows[0] :]):  # both epochs are complete
        assert set(part[part >= 0].tolist()) == set(range(len(TRACES)))
    assert (first[: min(rows)] != first[rows[0] :][: min(rows)]).any()


def test_the_shuffle_stays_what_it_was(dataset):
    """Checkpoints hold positions in it; a change of the order must be a decision."""
    first = stream_of(dataset, 0, 2)
    order = [row[np.sort(np.unique(row, return_index=True)[1])].tolist() for row in first]
    assert order == [[0, 31, 51, -1], [8, 19, 26, -1]]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_restored_anywhere_it_goes_on_exactly(dataset, prefetch):
    """All positions of two epochs, 4 rows to a batch: no multiple of the rows of an epoch."""
    iterator = pipeline.train_batches(dataset, seed=1, prefetch=prefetch, **OPTIONS)
    rows = rows_of(dataset, seed=1)
    assert rows % 4
    count = 2 * rows // 4 + 2
    states, batches = [iterator.get_state()], []
    for _ in range(count):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    assert {state["epoch"] for state in states} == {0, 1, 2}
    iterator.close()
    other = pipeline.train_batches(dataset, seed=1, prefetch=prefetch, **OPTIONS)
    for start in range(count):
        fresh = pipeline.train_batches(dataset, seed=1, prefetch=prefetch, **OPTIONS)
        for again in (fresh, other):  # a new process, and the same iterator sent back
            again.set_state(json.loads(json.dumps(states[start])))
            assert again.get_state() == states[start]
            assert_equal(take(again, min(2, count - start)), batches[start : start + 2])
        fresh.close()
    other.close()


def test_a_position_serves_another_number_of_hosts_and_another_batch_size(dataset):
    iterator = pipeline.train_batches(dataset, seed=1, **OPTIONS)
    take(iterator, 3)
    state = iterator.get_state()
    expected = np.concatenate([index for _, index in take(iterator, 2)])
    other = pipeline.train_batches(
        dataset, seq_len=64, batch_size=8, seed=1, process_index=1, process_count=2
    )
    other.set_state(state)
    np.testing.assert_array_equal(next(other)[1], expected[4:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_hosts_together_read_the_batches_of_one(dataset, hosts, training):
    def opened(**host):
        if training:
            return pipeline.train_batches(dataset, seed=5, **OPTIONS, **host)
        return pipeline.eval_batches(dataset, **OPTIONS, **host)

    parts = [opened(process_index=i, process_count=hosts) for i in range(hosts)]
    whole = take(opened(), 9) if training else list(opened())
    shares = [take(part, len(whole)) for part in parts]
    states = [part.get_state() for part in parts]
    joined = [
        (
            {name: np.concatenate([b[name] for b, _ in pieces]) for name in pieces[0][0]},
            np.concatenate([index for _, index in pieces]),
        )
        for pieces in zip(*shares, strict=True)
    ]
    assert_equal(joined, whole)
    assert all(state == states[0] for state in states)


def test_evaluation_is_one_ordered_pass_with_empty_rows_at_the_end(dataset):
    batches = list(pipeline.eval_batches(dataset, **OPTIONS))
    index = np.concatenate([index for _, index in batches])
    assert all(batch["tokens"].shape == (4, 64) for batch, _ in batches)
    found = np.unique(index[index >= 0])
    np.testing.assert_array_equal(found, np.arange(len(TRACES)))
    tokens = sum(len(trace.token_ids) for trace in TRACES)
    assert (index >= 0).sum() == tokens
    empty = [(row < 0).all() for row in index]
    assert sum(empty) == -len([row for row in empty if not row]) % 4
    assert empty == sorted(empty)
    again = list(pipeline.eval_batches(dataset, **OPTIONS, prefetch=0))
    assert_equal(batches, again)


def test_fewer_rows_than_a_batch(tmp_path):
    small = TraceDataset(write(tmp_path / "d", make_traces(3)))
    iterator = pipeline.train_batches(small, seq_len=64, batch_size=7, seed=0)
    batch, index = next(iterator)
    assert batch["tokens"].shape == (7, 64)
    assert (index >= 0).any(1).all()
    assert iterator.get_state()["epoch"] >= 2


def test_what_cannot_be_read_is_refused(dataset, tmp_path):
    with pytest.raises(DcodError, match=r"data\.batch_size=4 must be a positive multiple of the 3"):
        pipeline.train_batches(dataset, seed=0, process_count=3, **OPTIONS)
    with pytest.raises(DcodError, match=r"data\.seq_len=20"):
        pipeline.train_batches(dataset, seq_len=20, batch_size=4, seed=0)
    with pytest.raises(DcodError, match=r"data\.seq_len=20"):
        pipeline.eval_batches(dataset, seq_len=20, batch_size=4)
    with pytest.raises(DcodError, match="seed=-1"):
        pipeline.train_batches(dataset, seed=-1, **OPTIONS)
    bare = TraceDataset(write(tmp_path / "bare", make_traces(9, scored=False)))
    for refused in (
        lambda: pipeline.train_batches(bare, seed=0, **OPTIONS),
        lambda: pipeline.eval_batches(bare, **OPTIONS),
    ):
        with pytest.raises(DcodError, match=r"python -m dcod_jax\.score"):
            refused()
    iterator = pipeline.train_batches(bare, seed=0, require_scores=False, **OPTIONS)
    assert not next(iterator)[0]["teacher_logprobs"].any()


def test_a_position_of_another_stream_is_refused(dataset, tmp_path):
    state = pipeline.train_batches(dataset, seed=0, **OPTIONS).get_state()
    other = TraceDataset(write(tmp_path / "d", make_traces(52)))
    for iterator in (
        pipeline.train_batches(dataset, seed=1, **OPTIONS),
        pipeline.train_batches(dataset, seq_len=65, batch_size=4, seed=0),
        pipeline.train_batches(other, seed=0, **OPTIONS),
    ):
        with pytest.raises(DcodError, match="stream"):
            iterator.set_state(state)


def test_damage_met_in_the_prefetch_thread_reaches_the_loop(tmp_path):
    directory = write(tmp_path / "d", make_traces(8, low=3000, high=4000))
    shard = directory / "traces-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    damaged = TraceDataset(directory, verify=False)
    iterator = pipeline.train_batches(damaged, seq_len=4096, batch_size=8, seed=0)
    with pytest.raises(DcodError, match="traces-00000"):
        next(iterator)


EXITS = """
import atexit, sys, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # runs last
from dcod_jax.data import pipeline
from dcod_jax.data.dataset import TraceDataset

dataset = TraceDataset({directory!r})
batches = pipeline.train_batches(dataset, seq_len=64, batch_size=64, seed=0, prefetch=10**6)
next(batches)
sys.exit(7)
"""


def test_a_process_can_end_while_the_thread_reads(dataset):
    """A thread in native code when the interpreter ends aborts the process (-6)."""
    code = EXITS.format(directory=str(dataset.directory))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "['MainThread']\n")


def test_batches_on_the_device_keep_rows_and_sharding(dataset):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    host_batch, _ = next(pipeline.train_batches(dataset, seed=0, **OPTIONS))
    batch = pipeline.to_device(host_batch, mesh)
    for name, values in host_batch.items():
        array = getattr(batch, name)
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(np.asarray(array), values, err_msg=name)
        assert array.sharding.shard_shape(array.shape) == (1, 64)
    assert pipeline.host_slice(mesh, 4) == (0, 1)


class FakeDevice:
    def __init__(self, process_index):
        self.process_index = process_index


def lay_out(monkeypatch, rows):
    """Two hosts, whose devices hold these rows of a batch, the first host's first."""
    devices = [FakeDevice(2 * place // len(rows)) for place in range(len(rows))]

    class Layout:
        def devices_indices_map(self, shape):
            pieces = [(slice(*piece), slice(None)) for piece in rows]
            return dict(zip(devices, pieces, strict=True))

    monkeypatch.setattr(pipeline.meshes, "sharding", lambda mesh, logical: Layout())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 2), (1, 2)]),  # data parallel over both hosts
        ([(0, 4), (4, 8), (0, 4), (4, 8)], [(0, 1), (0, 1)]),  # each host has the whole batch
        ([(4, 6), (6, 8), (0, 2), (2, 4)], [(1, 2), (0, 2)]),  # devices in another order
    ],
)
def test_hosts_with_the_same_rows_read_the_same(monkeypatch, rows, expected):
    lay_out(monkeypatch, rows)
    for process, slice_of_it in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert pipeline.host_slice(make_mesh(), 8) == slice_of_it


def test_hosts_that_share_a_part_of_their_rows_are_refused(monkeypatch):
    """Two hosts of three devices, two devices a batch shard: the middle one is on both."""
    lay_out(monkeypatch, [(0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6)])
    with pytest.raises(DcodError, match=r"in part, they begin at \(0, 2\) and \(2, 4\): mesh"):
        pipeline.host_slice(make_mesh(), 6)
