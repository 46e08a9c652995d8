"""Memory follows from a record's limit, not from the size of the file that it is in."""

import contextlib
import json
import lzma
import time
import tracemalloc

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from dcod_jax.data import lines
from dcod_jax.data.kept import Kept
from dcod_jax.data.presets import Fields
from dcod_jax.data.reasoning import Reasoning, has_reasoning, of_channels
from dcod_jax.data.traces import describe, find_sources, read_traces
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import problems
from dcod_jax.files import LARGEST, read_json
from dcod_jax.prepare import overlap


def read(path, longest=1 << 20, **more):
    """(traces, reasons of what was dropped, messages of what could not be read)."""
    found, reasons, bad = 0, [], []
    for _ in read_traces(
        find_sources(str(path)),
        Fields(),
        longest=longest,
        on_bad=lambda trace, why: bad.append(why),
        on_drop=lambda trace, why, reason: reasons.append(reason),
        **more,
    ):
        found += 1
    return found, reasons, bad


@contextlib.contextmanager
def arrow_memory():
    """A memory pool that counts what the body unpacks of tables."""
    own, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(own)
    try:
        yield own
    finally:
        pa.set_memory_pool(before)


def test_what_is_kept_is_a_mapping_in_the_order_of_insertion() -> None:
    rows = Kept()
    for number in range(2500):
        rows[f"{number}"] = number
    rows["7"], rows["\ud800"] = 70, "text"
    assert list(rows) == [*map(str, range(2500)), "\ud800"]
    rows[b"\xff\0"] = 1
    assert (rows.get("7"), rows.get("8"), rows.get("x"), rows.get("x", 3)) == (70, 8, None, 3)
    assert (rows.get(b"\xff\0"), rows.get("\ud800")) == (1, "text")
    assert "9" in rows
    assert "x" not in rows
    rows._run("pragma max_page_count=1")  # a disk that is full
    with pytest.raises(DcodError, match=r"temporary file: database or disk is full; free space"):
        rows["more"] = "a" * 10_000


def request(number, text):
    body = {"messages": [{"role": "user", "content": text}]}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/", "body": body})


def test_requests_that_wait_for_their_outputs_are_not_held(tmp_path, caplog) -> None:
    path, count = tmp_path / "t.jsonl", 100
    said = {"choices": [{"message": {"role": "assistant", "content": "a"}}]}
    output = json.dumps({"custom_id": "r3", "response": {"status_code": 200, "body": said}})
    lines_of = [request(n, f"{n} " + "q" * 20_000) for n in range(count)]
    path.write_text("\n".join([*lines_of, output, ""]))
    tracemalloc.start()
    try:
        assert read(path) == (1, [], [])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < path.stat().st_size / 2
    assert "99 requests of batches have no output, the first is 'r0'" in caplog.text


def table(rows, size=20_000, **more):
    columns = {"prompt": [f"q{n}" for n in range(rows)], "completion": ["a" * size] * rows}
    return pa.table(columns | more)


def test_a_compressed_table_is_unpacked_batch_by_batch(tmp_path) -> None:
    path, rows = tmp_path / "t.feather", table(100)
    feather.write_feather(rows, path, compression="zstd", chunksize=10)
    with arrow_memory() as memory:
        [told] = describe(find_sources(str(path)))
        assert (told["records"], read(path)) == (100, (100, [], []))
    assert memory.max_memory() < rows.nbytes / 4


def test_a_long_value_that_every_row_repeats_is_not_unpacked_for_many_rows(tmp_path) -> None:
    path, rows, size = tmp_path / "t.parquet", 64, 200_000
    once = pa.DictionaryArray.from_arrays([0] * rows, ["a" * size])
    parquet.write_table(pa.table({"prompt": ["q"] * rows, "completion": once}), path)
    with arrow_memory() as memory:
        assert read(path, longest=size // 2) == (0, ["too_long"] * rows, [])
    assert memory.max_memory() < 8 * size


@pytest.mark.parametrize("form", ["parquet", "arrow", "feather"])
def test_a_row_has_the_limit_of_a_line(tmp_path, form) -> None:
    path, nested = tmp_path / f"t.{form}", "a"
    for _ in range(30):
        nested = [nested]
    rows = pa.table({"prompt": ["q"] * 3, "completion": ["a", "b" * 99, "c"], "n": [nested] * 3})
    if form == "parquet":
        parquet.write_table(rows, path)
    elif form == "feather":
        feather.write_feather(rows, path)
    else:
        with ipc.new_stream(str(path), rows.schema) as stream:
            stream.write_table(rows, max_chunksize=2)
    assert read(path, longest=90) == (2, ["too_long"], [])


def test_nesting_of_a_table_has_the_limit_of_json(tmp_path, monkeypatch) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"prompt": ["q"], "completion": ["a"], "n": [[[["a"]]]]}), path)
    assert read(path)[0] == 1
    monkeypatch.setattr("dcod_jax.data.records.DEEPEST", 2)
    assert read(path) == (0, [], ["nested more than 2 deep"])


def test_an_xz_file_is_read_whole_or_refused(tmp_path, monkeypatch) -> None:
    path, line = tmp_path / "t.jsonl.xz", b'{"prompt": "q", "completion": "a"}\n'
    many = [lzma.compress(line * n) for n in (1, 90, 1)]
    path.write_bytes(many[0] + bytes(400_000) + many[1] + many[2] + bytes(8))
    assert read(path)[0] == 92
    path.write_bytes(many[1][:-20])
    with pytest.raises(DcodError, match="not a whole xz file: it ends in the middle"):
        read(path)
    monkeypatch.setattr(lines, "_XZ_MEMORY", 1 << 20)
    with pytest.raises(DcodError, match=r"not a whole xz file: Memory usage limit"):
        read(path)


def test_a_row_of_a_table_of_text_has_the_limit_of_a_line(tmp_path) -> None:
    path = tmp_path / "t.csv"
    cell = '"' + "a\n" * 30 + '"'  # each cell is below the limit
    path.write_text(f"prompt,completion\nq,a\n{cell},{cell}\n")
    assert read(path)[0] == 2
    with pytest.raises(DcodError, match=r":3: not a readable table \(a row of more than 90 bytes"):
        read(path, longest=90)


@pytest.mark.parametrize(
    ("key", "at"), [("id", ()), ("custom_id", ()), ("model", ()), ("model", ("response", "body"))]
)
def test_a_name_that_is_a_text_is_refused(tmp_path, key, at) -> None:
    path = tmp_path / "t.jsonl"
    said = {"choices": [{"message": {"role": "assistant", "content": "a"}}]}
    record = inner = {"prompt": "q", "response": {"status_code": 200, "body": said}}
    for name in at:
        inner = inner[name]
    for size, expected in ((4096, (1, [], [])), (4097, (0, [], ["4,097 characters"]))):
        inner[key] = "x" * size
        path.write_text(json.dumps(record))
        found, reasons, bad = read(path)
        bad = ["4,097 characters" for why in bad if "4,097 characters, at most 4,096" in why]
        assert (found, reasons, bad) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completions": [""] * 99},
        {"prompt": "q", "choices": [{"message": None, "text": ""}] * 99},
    ],
    ids=["column", "answer"],
)
def test_empty_completions_are_counted_before_they_are_read(tmp_path, record, monkeypatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record))
    assert read(path)[1] == ["failed_request"] * 99
    monkeypatch.setattr("dcod_jax.data.records.MOST_PARTS", 99)
    monkeypatch.setattr("dcod_jax.data.columns.Row.prompt", None)  # nothing is read
    _, _, [why] = read(path)
    assert "99 completions beside" in why


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"custom_id": "x", "request": "GET", "response": {"choices": [{"text": "a"}]}}, "no pro"),
        ({"prompt": "q", "candidates": [None]}, "no completion"),
        ({"prompt": "q", "candidates": [{"finishReason": "SAFETY"}]}, None),
    ],
)
def test_an_absent_or_odd_part_of_an_answer_is_no_crash(tmp_path, record, message) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record))
    found, reasons, bad = read(path)
    assert (found, reasons) == (0, [] if message else ["failed_request"])
    assert not message or message in bad[0]


def test_what_is_held_of_problems_is_bounded(tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.jsonl"
    texts = [f"{n} a b c d e f g" for n in range(9)]
    path.write_text("\n".join(json.dumps({"question": t, "answer": 1}) for t in texts))
    assert len(problems.read_problems(path)) == 9
    assert len(overlap.build_index([str(path)], size=8).ngrams) == 9
    monkeypatch.setattr(problems, "LARGEST", 100)
    monkeypatch.setattr(overlap, "MOST", 2)
    with pytest.raises(DcodError, match=r"p.jsonl:3: more than .*, or 100 bytes of them"):
        problems.read_problems(path)
    with pytest.raises(DcodError, match=r"p.jsonl:3: more than 2 different runs of 8 words"):
        overlap.build_index([str(path)], size=8)


DROP = Reasoning(policy="drop")


def refused_channels(text):
    with pytest.raises(DcodError, match="outside of the messages"):
        of_channels(text)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (has_reasoning, "".join(f"<think{n}>\n" for n in range(4000))),
        (lambda text: DROP.fold(text, ""), "".join(f"<think{n}></think>\n" for n in range(2000))),
        (refused_channels, "<|channel|>" * 20_000),
        (refused_channels, "<|channel|>final<|message|>a<|end|>" + " " * 40_000 + "b"),
    ],
    ids=["begun", "ended", "channels", "spaces"],
)
def test_reasoning_is_found_in_one_pass(read, text) -> None:
    start = time.process_time()
    read(text)
    assert time.process_time() - start < 2  # 0.2 where it is one


def test_a_huge_file_of_json_is_not_read(tmp_path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(DcodError, match=r"config.json has 268,435,457 bytes; at most 268,435,456"):
        read_json(path)
