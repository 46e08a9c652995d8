"""The dataset on disk: exact round trips, damage that is named, and scoring that survives kill."""

import dataclasses
import io
import json
import math
import os
import threading
from pathlib import Path

import forks
import ml_dtypes
import numpy as np
import pytest
from fake_traces import (
    MANIFEST,
    TEACHER,
    contents,
    equal,
    fake_scores,
    make_trace,
    make_traces,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dcod_jax.data.codec import bytes_per_token, decode, decode_columns, encode
from dcod_jax.data.dataset import DatasetWriter, TraceDataset, check_fingerprints
from dcod_jax.data.scores import add_scores
from dcod_jax.errors import DcodError
from dcod_jax.files import file_entry
from dcod_jax.types import Trace

TESTS = Path(__file__).resolve().parents[1]


def bits(kind, shape):
    """Arrays of a float type over its finite values, signed zeros and subnormals included."""
    wide = st.floats(-(2.0**120), 2.0**120, width=32)
    size = int(np.prod(shape))
    return st.lists(wide, min_size=size, max_size=size).map(
        lambda values: np.asarray(values, np.float32).astype(kind).reshape(shape)
    )


def flags(count):
    return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda x: np.array(x, bool))


@st.composite
def traces(draw):
    mask = np.array(draw(st.lists(st.booleans(), max_size=20)), bool)
    count, top_k = int(mask.sum()), draw(st.integers(0, 3))
    ids = st.integers(-(2**31), 2**31 - 1)
    tokens = draw(st.lists(ids, min_size=len(mask), max_size=len(mask)))
    scored = draw(st.booleans())
    topk = {}
    if scored and top_k:
        topk = {
            "topk_ids": np.arange(count * top_k, dtype=np.int32).reshape(count, top_k),
            "topk_logprobs": draw(bits(ml_dtypes.bfloat16, (count, top_k))),
            "tail_logprobs": draw(bits(np.float32, (count,))),
        }
    elif scored and draw(st.booleans()):
        topk = {"span_starts": draw(flags(count))}
    if draw(st.booleans()):
        topk["start_logprobs"] = draw(bits(np.float32, (count,)))
    return Trace(
        draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        np.array(tokens, np.int32),
        mask,
        draw(bits(np.float32, (count,))) if scored else None,
        **topk,
        meta=draw(
            st.dictionaries(st.text("aä中", max_size=3), st.integers() | st.none(), max_size=2)
        ),
    )


@given(traces())
@settings(max_examples=150, deadline=None)
def test_a_record_gives_back_the_trace_bit_for_bit(trace):
    assert equal(decode(encode(trace)), trace)


@given(st.lists(traces(), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_columns_hold_what_the_traces_hold(given):
    columns = decode_columns([encode(trace) for trace in given], spans=True)
    starts = [
        np.ones(int(t.completion_mask.sum()), bool) if t.span_starts is None else t.span_starts
        for t in given
    ]
    np.testing.assert_array_equal(columns.span_starts, np.concatenate(starts))
    start = 0
    for trace, length in zip(given, columns.lengths, strict=True):
        part = slice(start, start + length)
        np.testing.assert_array_equal(columns.token_ids[part], trace.token_ids)
        np.testing.assert_array_equal(columns.completion_mask[part], trace.completion_mask)
        expected = np.zeros(length, np.float32)
        if trace.logprobs is not None:
            expected[trace.completion_mask] = trace.logprobs
        np.testing.assert_array_equal(columns.logprobs[part], expected)
        start += length
    assert start == len(columns.token_ids)


@pytest.mark.parametrize("top_k", [0, 1, 64])
def test_scores_take_the_stated_bytes(top_k):
    bare, scored = (make_trace(0, length=50, scored=s, top_k=s * top_k) for s in (False, True))
    added = len(encode(scored)) - len(encode(bare))
    assert added == bytes_per_token(top_k) * int(scored.completion_mask.sum())
    assert bytes_per_token(top_k) <= 6 * top_k + 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": np.zeros(3, np.float32)}, "logprobs has shape"),
        ({"completion_mask": np.ones(5, bool)}, "10 token_ids but 5 completion_mask"),
        ({"logprobs": None}, "go together"),
        ({"tail_logprobs": None}, "go together"),
        ({"topk_ids": np.zeros((7, 3), np.int32)}, "topk_logprobs has shape"),
        ({"span_starts": np.ones(7, bool)}, "without a top-k"),
        ({"start_logprobs": np.zeros(3, np.float32)}, "start_logprobs has shape"),
        ({"start_logprobs": np.full(7, np.nan, np.float32)}, "a start log-prob is NaN"),
        ({"meta": {"x": {1, 2}}}, "meta must hold JSON"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(change, words):
    trace = make_trace(3, length=10, top_k=2)
    with pytest.raises(DcodError, match=words):
        encode(dataclasses.replace(trace, **change))


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_log_prob_that_is_not_a_number_is_refused(value):
    trace = make_trace(3, length=10)
    bad = np.array(trace.logprobs)
    bad[2] = value
    with pytest.raises(DcodError, match="trace-3"):
        encode(dataclasses.replace(trace, logprobs=bad))


def test_a_record_cut_short_is_refused():
    record = encode(make_trace(3, length=10))
    with pytest.raises(DcodError, match="expected"):
        decode(record[:-1])
    with pytest.raises(DcodError, match="version 9"):
        decode(b"\x09" + record[1:])


def test_a_dataset_reads_back_in_any_order(tmp_path):
    given = make_traces(21, top_k=2)
    dataset = TraceDataset(write(tmp_path / "d", given))
    order = [20, 0, 7, 8, 7, 15]
    assert all(equal(a, given[i]) for a, i in zip(dataset.read(order), order, strict=True))
    assert (len(dataset), dataset.scored, dataset.top_k) == (21, True, 2)
    expected = [[len(t.token_ids), t.completion_mask.sum()] for t in given]
    np.testing.assert_array_equal(dataset.lengths, expected)
    shards = dataset.manifest["shards"]
    assert [shard["records"] for shard in shards] == [8, 8, 5]
    assert dataset.manifest["totals"]["tokens"] == sum(len(t.token_ids) for t in given)
    assert dataset.manifest["tokenizer"] == MANIFEST["tokenizer"]
    with pytest.raises(DcodError, match="out of range"):
        dataset.read([21])


def test_threads_share_a_dataset(tmp_path):
    given = make_traces(40)
    dataset = TraceDataset(write(tmp_path / "d", given))
    wrong = []

    def work(seed):
        for _ in range(5):
            order = np.random.default_rng(seed).permutation(40)
            found = dataset.read(order)
            wrong.extend(i for i, t in zip(order, found, strict=True) if t.id != f"trace-{i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_equal_traces_give_equal_bytes(tmp_path):
    a, b = (write(tmp_path / name, make_traces(20)) for name in "ab")
    assert contents(a) == contents(b)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_named_with_both_hashes(tmp_path, place):
    directory = write(tmp_path / "d", make_traces(21))
    shard = directory / "traces-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[int(len(data) * place)] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DcodError, match=r"traces-00001.*sha256 \w{64}, found \w{64}; rest"):
        TraceDataset(directory)


def test_a_flipped_byte_is_found_on_reading_when_hashes_were_not_checked(tmp_path):
    directory = write(tmp_path / "d", make_traces(8, low=3000, high=4000))
    shard = directory / "traces-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    dataset = TraceDataset(directory, verify=False)
    with pytest.raises(DcodError, match=r"traces-00000.* is damaged"):
        dataset.read(range(8))


def test_a_truncated_or_missing_shard_is_named_even_unverified(tmp_path):
    directory = write(tmp_path / "d", make_traces(21))
    shard = directory / "traces-00002.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    with pytest.raises(DcodError, match=f"traces-00002.*{len(data)} bytes, found {len(data) - 7}"):
        TraceDataset(directory, verify=False)
    shard.unlink()
    with pytest.raises(DcodError, match=r"traces-00002.* is missing"):
        TraceDataset(directory, verify=False)


def test_a_half_written_dataset_is_none_and_a_rerun_cleans_up(tmp_path):
    directory, traces = tmp_path / "d", make_traces(21)

    def interrupted():
        with DatasetWriter(directory, shard_records=4, manifest={}) as writer:
            for trace in traces[:10]:
                writer.write(trace)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (directory / "traces-00009.array_record.tmp").write_bytes(b"cut short")
    (directory / "quarantine.jsonl").write_text("mine")
    assert (directory / "traces-00001.array_record").exists()
    with pytest.raises(DcodError, match="prepare was interrupted"):
        TraceDataset(directory)
    write(directory, traces)
    assert len(TraceDataset(directory)) == 21
    assert (directory / "quarantine.jsonl").read_text() == "mine"
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *(f"traces-0000{i}.array_record" for i in range(3)),
        "lengths.npy",
        "manifest.json",
        "quarantine.jsonl",
    }
    with pytest.raises(DcodError, match="already holds a complete dataset"):
        write(directory, traces)


def test_the_root_of_two_datasets_says_so(tmp_path):
    for name in ("train", "eval"):
        write(tmp_path / name, make_traces(3))
    with pytest.raises(DcodError, match="holds the datasets eval, train"):
        TraceDataset(tmp_path)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (make_trace(1, length=9, scored=False), "one or the other"),
        (make_trace(1, length=9, top_k=2), "one or the other"),
        (make_trace(0, length=9), "comes twice"),
        (make_trace(1, length=1, prompt=0), "no completion token"),
    ],
)
def test_the_writer_refuses_what_cannot_be_a_dataset(tmp_path, second, words):
    with pytest.raises(DcodError, match=words):
        write(tmp_path / "d", [make_trace(0, length=8), second])
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(DcodError, match="no trace was written"):
        write(tmp_path / "d", [])


def test_another_version_of_the_format_is_refused(tmp_path):
    path = write(tmp_path / "d", make_traces(3)) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(DcodError, match=r"version 1, found dcod_jax\.traces version 2"):
        TraceDataset(path.parent)


ENTRY = dict.fromkeys("records tokens completion_tokens bytes".split(), 1)
ENTRY |= {"file": "traces-00000.array_record", "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": []}, r"shards=\[\] must be a list of 1 to"),
        ({"scored": "yes"}, "scored='yes' must be true or false"),
        ({"top_k": None}, "top_k is missing"),
        ({"top_k": 10**30}, "top_k=10+ must be a whole number"),
        ({"shards": [3]}, r"shards\[0\]=3 must be an object"),
        ({"shards": [ENTRY | {"file": "../x"}]}, "'../x' is no file beside it"),
        ({"shards": [ENTRY | {"records": 1 << 60}]}, r"shards\[0\].records=\d+ must be"),
        ({"shards": [ENTRY | {"records": 7}]}, "totals.records=3, the shards have 7"),
        ({"lengths": {"file": 3}}, "lengths.file=3 must be a text"),
        ({"lengths": ENTRY | {"file": "/etc/passwd"}}, "is no file beside it"),
        ({"totals": {"records": 3}}, "totals.tokens is missing"),
        ({"tokenizer": "abc"}, "tokenizer='abc' must be an object"),
        ({"teacher": {"weights": 3}}, "teacher.weights=3 must be a text"),
        ({"format": [1]}, "expected format"),
        # What only inspect and the model card show.
        ({"tokenizer": {"source": 3}}, "tokenizer.source=3 must be a text"),
        ({"teacher": {"teachers": [1]}}, r"teacher.teachers=\[1\] must be an object"),
        ({"counts": {"read": "x"}}, "counts.'read'.='x' must be a whole number"),
        ({"counts": {"read": None}}, "counts.'read'. is missing"),
        ({"counts": {"dropped": [1]}}, r"counts.'dropped'.=\[1\] must be"),
        ({"counts": {"dropped": 3}}, "counts.dropped=3 must be an object"),
        ({"sources": "abc"}, "sources='abc' must be a list"),
        ({"sources": [1]}, r"sources\[0\]=1 must be an object"),
        ({"by_teacher": {"a": 3}}, "by_teacher.'a'.=3 must be an object"),
        ({"mean_logprob": "x"}, "mean_logprob='x' must be a number"),
        ({"captured_mass": math.nan}, "captured_mass=nan must be a number"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, change, words):
    path = write(tmp_path / "d", make_traces(3)) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DcodError, match=words):
        TraceDataset(path.parent)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DcodError, match="is not valid JSON"):
        TraceDataset(path.parent)


def test_a_lengths_file_or_a_shard_that_announces_more_than_it_has_is_refused(tmp_path):
    """With a manifest that fits it: a stranger's dataset, not a damaged one."""
    whole = write(tmp_path / "d", make_traces(3))
    manifest = json.loads((whole / "manifest.json").read_text())
    lengths = (whole / "lengths.npy").read_bytes()

    def refused(words):
        entry = file_entry(whole / "lengths.npy")
        (whole / "manifest.json").write_text(json.dumps(manifest | {"lengths": entry}))
        with pytest.raises(DcodError, match=words):
            TraceDataset(whole)

    for content in (
        lengths.replace(b"(3, 2)", b"(1099511627776, 2)"),
        lengths.replace(b"<i4", b"|O "),
        lengths.replace(b"(3, 2), } ", b"(3L, 2), }"),  # of Python 2, which numpy reads and warns
        lengths.replace(b"<i4", b"<i8"),
        lengths[:-4],
        lengths[:-24] + bytes(24),  # no completion token
        b"",
        b"\x93NUMPY\x01\x00\xff\xff",
    ):
        (whole / "lengths.npy").write_bytes(content)
        refused(r"lengths\.npy: ")
    (whole / "lengths.npy").write_bytes(lengths)
    [shard] = manifest["shards"]
    less = {"records": 2}
    changed = {"shards": [shard | less], "totals": manifest["totals"] | less}
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(lengths[-24:-8], "<i4").reshape(2, 2))
    (whole / "lengths.npy").write_bytes(buffer.getvalue())
    changed["lengths"] = file_entry(whole / "lengths.npy")
    (whole / "manifest.json").write_text(json.dumps(manifest | changed))
    with pytest.raises(DcodError, match=r"has 3 records, manifest\.json says 2"):
        TraceDataset(whole).read([0])


def test_another_tokenizer_template_or_teacher_is_refused(tmp_path):
    directory = write(tmp_path / "d", make_traces(9, scored=False))
    add_scores(directory, teacher=TEACHER, settings={}, score_shard=fake_scores)
    dataset = TraceDataset(directory)
    check_fingerprints(dataset, tokenizer="tok", template="tem", teacher="abc")
    for name, found in (("tokenizer", "tok"), ("template", "tem"), ("teacher", "abc")):
        with pytest.raises(DcodError, match=f"another {name}: expected .*other, found {found}"):
            check_fingerprints(dataset, **{name: "other"})


FULL_DISK = """
import resource, signal
from pathlib import Path
from fake_traces import make_traces, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write(Path({directory!r}), make_traces(30, low=3000, high=3001), shard_records=30)
"""


def test_a_disk_that_is_full_is_reported_and_leaves_no_dataset(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = forks.run(["-c", FULL_DISK.format(directory=str(tmp_path / "d"))], env=environment)
    assert all(text in done.stderr for text in ("DcodError: cannot write", "File too large"))
    assert not list((tmp_path / "d").iterdir())
