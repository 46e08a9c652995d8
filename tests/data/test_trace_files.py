"""Files of traces: packed ones, directories and globs, data sets of the Hub, what is not there."""

import gzip
from pathlib import Path

import datasets
import pyarrow
import pytest
from test_traces import GOOD, read, write

from dcod_jax.data.presets import Fields
from dcod_jax.data.traces import describe, find_sources, read_traces
from dcod_jax.errors import DcodError


def test_blank_lines_and_a_byte_order_mark(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n  \r\n" + GOOD)
    assert [t.source.split(":")[-1] for t in read(path)] == ["1", "4"]


def pack(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


def test_a_packed_file_is_read_as_what_it_holds(tmp_path) -> None:
    plain = tmp_path / "t.jsonl"
    plain.write_bytes(GOOD + b"\n" + GOOD)
    packed = pack(tmp_path / "t.jsonl.gz", plain.read_bytes())
    assert [t.source for t in read(packed)] == [f"{packed}:1", f"{packed}:3"]
    assert [t.messages for t in read(packed)] == [t.messages for t in read(plain)]
    both = describe(find_sources(f"{plain},{packed}"))
    assert both[0] | {"path": str(packed)} == both[1]
    assert both[1]["records"] == 3
    assert [t.id for t in read(f"{tmp_path}/*.gz")] == [f"{packed}:1", f"{packed}:3"]
    assert len(read(tmp_path)) == 4


@pytest.mark.parametrize("name", ["T.JSONL", "t.Json", "t.jsonl.GZ"])
def test_upper_case_in_a_files_name_does_not_matter(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD) if name.endswith("GZ") else GOOD)
    assert len(read(path)) == len(read(tmp_path)) == 1


def test_hidden_files_and_what_a_hub_adds_are_no_traces(tmp_path) -> None:
    for name in ("t.jsonl", "._t.jsonl", ".cache/t.jsonl", "dataset_infos.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD if name == "t.jsonl" else b"{}")
    assert len(read(tmp_path)) == 1


def test_a_bad_record_in_a_packed_file_is_named(tmp_path) -> None:
    path = pack(tmp_path / "t.jsonl.gz", GOOD + b'{"prompt": "p", "completion": "c')
    with pytest.raises(DcodError, match=r"t.jsonl.gz:2: truncated JSON"):
        read(path)
    bad = []
    assert len(read(path, on_bad=lambda trace, reason: bad.append(trace))) == 1
    assert bad[0].source == f"{path}:2"


@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed"])
def test_a_damaged_packed_file_stops_with_its_name(tmp_path, damage) -> None:
    path = pack(tmp_path / "t.jsonl.gz", b"".join(GOOD[:-1] + b" " * n + b"\n" for n in range(99)))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-20]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x55
    else:
        content = GOOD
    path.write_bytes(content)
    for use in (
        lambda: read(path, on_bad=lambda trace, reason: None),
        lambda: describe(find_sources(f"{path}")),
    ):
        with pytest.raises(
            DcodError, match=r"t.jsonl.gz is not a whole gzip file: .*pack it again"
        ):
            use()


def test_records_are_streamed(tmp_path) -> None:
    """The first trace comes before the bad line at the end is reached."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + b"{")
    stream = read_traces(find_sources(str(path)), Fields())
    assert next(stream).completion_text() == "c"


def test_globs_lists_and_directories(tmp_path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, {"prompt": name, "completion": "c"})
    for source in (f"{tmp_path}/*.jsonl", str(tmp_path)):
        assert [t.prompt_text() for t in read(source)] == ["a.jsonl", "b.jsonl"]
    both = read(f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl")
    assert [t.prompt_text() for t in both] == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.traces is empty"),
        ("{tmp}/x.jsonl", "no such file or directory"),
        ("{tmp}/*.jsonl", "matches no file"),
        ("{tmp}/t.txt", "has the suffix '.txt'"),
        ("{tmp}/x.jsonl.gz", "no such file or directory"),
        ("traces.jsonl.gz", "no such file or directory"),
        ("{tmp}/t.txt.gz", "has the suffix '.txt.gz'"),
        ("{tmp}/empty", "holds no traces"),
        ("a/b/c", "neither a file, a directory nor a hub id"),
    ],
)
def test_sources_that_are_not_there(tmp_path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("a,b")
    (tmp_path / "t.txt.gz").write_text("a,b")
    with pytest.raises(DcodError, match=message):
        find_sources(source.format(tmp=tmp_path))


def test_hf_datasets_by_path(tmp_path) -> None:
    rows = [{"prompt": "p", "completion": "c", "answer": "4"}, {"prompt": "q", "completion": "d"}]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet" / "train").mkdir(parents=True)
    table.to_parquet(tmp_path / "parquet" / "train" / "0.parquet")
    table.to_parquet(tmp_path / "upper.PARQUET")
    (tmp_path / "cache").mkdir()  # as the datasets package keeps what it has downloaded
    (tmp_path / "cache" / "dataset_info.json").write_text("{}")
    for name in ("train", "test"):
        stream = tmp_path / "saved" / "data-00000-of-00001.arrow"
        (tmp_path / "cache" / f"mine-{name}.arrow").write_bytes(stream.read_bytes())
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.data.schema) as file:
        file.write_table(table.data.table)
    for name in ("saved", "dict", "parquet", "upper.PARQUET", "cache", "file.arrow"):
        sources = find_sources(str(tmp_path / name))
        traces = list(read_traces(sources, Fields()))
        assert [(t.prompt_text(), t.answer) for t in traces] == [("p", "4"), ("q", None)]
        assert traces[1].source.endswith(":2")
        (entry,) = describe(sources)
        assert entry["records"] == 2
    with pytest.raises(DcodError, match=r"has the splits train, not 'test'; set data.split"):
        list(read_traces(find_sources(str(tmp_path / "dict"), split="test"), Fields()))


def test_only_a_name_that_can_be_one_is_looked_up_on_the_hub(monkeypatch) -> None:
    for name in ("runs/qwen", "traces/mine", "one_name", "tests/absent"):
        with pytest.raises(DcodError, match=f"no such file or directory: {name} "):
            find_sources(name)
    with pytest.raises(DcodError, match="the hub is not asked: HF_HUB_OFFLINE is set"):
        find_sources("nobody/nothing")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_sources("nobody/nothing")[0].kind == "hub"


def test_an_unreachable_hub_says_what_was_tried() -> None:
    with pytest.raises(DcodError, match="no file or directory 'nobody/nothing' here, and the hub"):
        describe(find_sources("nobody/nothing"))


@pytest.mark.shared
def test_real_qwen_traces(shared_data) -> None:
    path = shared_data / "qwen25_math_traces" / "math_cot_100.jsonl"
    traces = read(path)
    assert len(traces) == 800
    assert all(t.answer and t.completion_text() for t in traces)
    assert describe(find_sources(str(path)))[0]["records"] == 100


@pytest.mark.parametrize(
    ("name", "what"),
    [("train/0.array_record", "a prepared dataset"), ("model.safetensors", "a model")],
)
def test_a_directory_of_another_thing_is_named(name, what, tmp_path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DcodError, match=f"data.traces: .* is {what}"):
        find_sources(str(tmp_path))
