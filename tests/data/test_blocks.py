"""Files made by blocks: whole ones are kept, joined in order, told from other requests."""

import json

import pytest

from dcod_jax.data.blocks import BlockFiles

REQUEST = {"seed": 0, "prompts": "abc", "stop": ("x",)}


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def write(files, *blocks):
    for block in blocks:
        texts = [f"a {block.start}\n", f"b {block.start}\n"]
        files.write(block, texts, {"done": len(block), "by": {"x": 1}})


def test_whole_blocks_stay_and_are_joined_in_their_order(paths):
    files = BlockFiles(paths, REQUEST)
    assert files.finished() == (None, "")
    assert files.pending(10, 4) == (0, [range(0, 4), range(4, 8), range(8, 10)])
    write(files, range(8, 10), range(0, 4))
    (files.directory / "000000004-000000008.0.jsonl").write_text("half a bl")  # without its counts
    again = BlockFiles(paths, REQUEST)
    assert again.pending(10, 4) == (6, [range(4, 8)])
    assert again.pending(10, 3) == (6, [range(4, 7), range(7, 8)])  # another batch size
    write(again, range(4, 8))
    manifest = again.finish()
    assert [p.read_text() for p in paths] == ["a 0\na 4\na 8\n", "b 0\nb 4\nb 8\n"]
    assert (manifest["done"], manifest["by"]) == (10, {"x": 3})
    assert BlockFiles(paths, REQUEST).finished() == (manifest, "")
    names = sorted(p.name for p in paths[0].parent.iterdir())
    assert names == ["a.jsonl", "a.jsonl.manifest.json", "b.jsonl"]


def test_another_request_starts_anew_and_is_told(paths):
    files = BlockFiles(paths, REQUEST)
    write(files, range(0, 4))
    other = BlockFiles(paths, REQUEST | {"seed": 1})
    assert other.pending(4, 4) == (0, [range(0, 4)])
    write(other, range(0, 4))
    other.finish()
    assert files.finished() == (None, "with other seed")
    assert files.pending(4, 4) == (4, [])
    paths[1].write_text("changed")
    assert other.finished() == (None, "and changed since")
    other.manifest.unlink()
    assert "no manifest" in other.finished()[1]


def test_a_stop_while_the_files_get_their_names_loses_nothing(paths, monkeypatch):
    files = BlockFiles(paths, REQUEST)
    write(files, range(0, 4))
    calls = []

    def commit(temporary, final):
        calls.append(final)
        if final == paths[0]:
            raise KeyboardInterrupt
        temporary.replace(final)

    with monkeypatch.context() as patch:
        patch.setattr("dcod_jax.files._commit", commit)
        with pytest.raises(KeyboardInterrupt):
            files.finish()
    assert calls == [paths[1], files.manifest, paths[0]]
    again = BlockFiles(paths, REQUEST)
    assert again.finished() == (None, "")
    assert again.pending(4, 4) == (4, [])
    again.finish()
    assert paths[1].read_text() == "b 0\n"
    assert json.loads(again.manifest.read_text())["done"] == 4
