"""Files of records are read in pieces: long lines, arrays, tables, packed files, hostile JSON."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time

import pyarrow
import pytest

from dcod_jax.data import json_text, lines
from dcod_jax.data.lines import TooLong
from dcod_jax.data.records import BadRecordError
from dcod_jax.errors import DcodError


def contents(path, limit=1 << 20):
    return [(w.rpartition(":")[2], c) for w, c in lines.read_contents(str(path), limit=limit)]


def test_a_long_line_is_told_and_the_next_one_read(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    long = b'"' + b"a" * 3_000_000 + b'"\n'
    path.write_bytes(b"1\n" + long + b"2\n" + long[:-1])
    first, told, second, last = contents(path, limit=1000)
    assert (first, second) == (("1", b"1\n"), ("3", b"2\n"))
    assert (told[0], told[1].size, last[1].size) == ("2", len(long), len(long) - 1)
    assert isinstance(told[1], TooLong)
    assert len(told[1].begins) <= 1001


@pytest.mark.parametrize("size", [9, 10, 11])
def test_the_limit_is_exact(tmp_path, size) -> None:
    for ending in (b"\n", b""):
        path = tmp_path / "t.jsonl"
        path.write_bytes(b"x" * size + ending)
        [(_, content)] = contents(path, limit=10)
        assert isinstance(content, TooLong) == (size > 10)


def _pieces(monkeypatch, size: int) -> None:
    monkeypatch.setattr(lines, "PIECE", size)


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
def test_an_array_is_read_element_by_element(tmp_path, monkeypatch, piece) -> None:
    _pieces(monkeypatch, piece)
    values = [{"a": '[{"\\"}],'}, [], "x", {"b": {"c": [1, "]"]}}, "\\", 3]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(values, indent=1))
    found = contents(path)
    assert [json_text.parse(content) for _, content in found] == values
    text = path.read_text().splitlines()
    for number, content in found:
        assert text[int(number) - 1].strip().startswith(content.decode().splitlines()[0].rstrip())
    assert lines.count_records(str(path)) == len(values)


def parse_all(path) -> None:
    for _, content in contents(path):
        if isinstance(content, BadRecordError):
            raise content
        json_text.parse(content)


def test_an_array_without_its_end_or_with_more_behind_it(tmp_path) -> None:
    path = tmp_path / "t.json"
    for text, problem in (
        ('[{"a": 1},\n{"a"', "truncated JSON"),
        ("[1] [2]", r"invalid JSON: the file goes on with '\[2\]' behind"),
        ("[1,,2]", "truncated JSON"),
    ):
        path.write_text(text)
        with pytest.raises(BadRecordError, match=problem):
            parse_all(path)
    path.write_text("  []\n")
    assert contents(path) == []
    path.write_text('[1, "' + "a" * 50 + '", 2]')
    assert [type(c) for _, c in contents(path, limit=10)] == [bytes, TooLong, bytes]


def test_a_table_has_a_header_and_absent_cells(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffprompt,completion,answer\n"a, ""b""\nc",d,\n\ne,f\n\n', encoding="utf-8")
    (_, row), (where, short) = contents(path)
    assert row == {"prompt": 'a, "b"\nc', "completion": "d", "answer": None}
    assert isinstance(short, BadRecordError)
    assert where == "5"
    path.write_bytes(b"prompt\n\xff\n")
    with pytest.raises(DcodError, match=r"t.csv:2: not a readable table"):
        contents(path)


def test_a_header_of_many_cells_is_compared_in_linear_time(tmp_path) -> None:
    path, cells = tmp_path / "t.csv", [f"c{number}" for number in range(40_000)]
    path.write_text(",".join(cells) + "\n")
    began = time.process_time()
    assert contents(path, limit=1 << 20) == []
    assert time.process_time() - began < 5  # compared with each other they take half a minute
    path.write_text(",".join([*cells, "c7"]) + "\n")
    with pytest.raises(DcodError, match="names 'c7' twice"):
        contents(path, limit=1 << 20)


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("kind", PACK)
def test_packed_files_are_read_and_a_damaged_one_is_named(tmp_path, kind) -> None:
    path = tmp_path / f"t.jsonl.{kind}"
    packed = PACK[kind](b"".join(b"%d\n" % (n * n) for n in range(999)))
    path.write_bytes(packed)
    assert contents(path)[998] == ("999", b"996004\n")
    for damage in (packed[:-9], b"junk" * 9):
        path.write_bytes(damage)
        with pytest.raises(DcodError, match=r"is not a whole \w+ file: .*pack it again"):
            contents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "nested more than 200 deep"),
        (b'{"a":' * 100_000, "nested more than 200 deep"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 200 deep"),
        (rb'{"a": {"b": ["x\ud83d"]}}', r"a\.b\[0\] holds '\\ud83d' at character 1"),
        (rb'{"a\ud800": 1}', r"a name in the record holds '\\ud800'"),
        (b"1" * 5000, "invalid JSON"),
        (b'{"a": 1}{"a": 2}', "a record is one line"),
    ],
)
def test_json_that_nothing_could_use_is_refused(line, message) -> None:
    with pytest.raises(BadRecordError, match=message):
        json_text.parse(line)


def test_brackets_inside_a_text_are_no_nesting() -> None:
    text = '\\"[{' * 1000
    assert json_text.parse(json.dumps({"a": text}).encode()) == {"a": text}
    assert json_text.parse(rb'"\ud83d\ude00"') == "😀"


@pytest.mark.long
def test_a_line_of_a_gigabyte_takes_no_memory(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "p", "completion": "')
        for _ in range(1024):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"prompt": "p", "completion": "c"}\n')
    program = (
        "import sys, resource\n"
        "from dcod_jax.data.traces import describe, find_sources, read_traces\n"
        "from dcod_jax.data.presets import Fields\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sources, told = find_sources(sys.argv[1]), []\n"
        "describe(sources)\n"
        "kept = list(read_traces(sources, Fields(), on_drop=lambda *why: told.append(why[2])))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert (len(kept), told) == (1, ['too_long']), told\n"
        "assert grown < 100_000, grown\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
