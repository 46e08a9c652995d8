"""Files that grow by blocks: cut back to whole ones, finished once, told from other requests."""

import json

import pytest

from dcod_jax.data.blocks import BlockFiles

REQUEST = {"seed": 0, "prompts": "abc", "stop": ("x",)}


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def write(files, blocks, done=0):
    with files.open() as handles:
        for count in range(done + 1, done + blocks + 1):
            for handle in handles:
                handle.write(f"block {count}\n".encode())
            files.commit(handles, {"blocks": count})


def test_whole_blocks_stay_and_the_rest_is_cut(paths):
    files = BlockFiles(paths, REQUEST)
    assert files.finished() == (None, "")
    assert files.resume() == {}
    write(files, 2)
    for partial in files.partials:
        with open(partial, "ab") as handle:
            handle.write(b"half a bl")
    again = BlockFiles(paths, REQUEST)
    assert again.resume() == {"blocks": 2}
    write(again, 1, done=2)
    manifest = again.finish()
    assert [p.read_text() for p in paths] == ["block 1\nblock 2\nblock 3\n"] * 2
    assert manifest["blocks"] == 3
    assert BlockFiles(paths, REQUEST).finished() == (manifest, "")
    names = sorted(p.name for p in paths[0].parent.iterdir())
    assert names == ["a.jsonl", "a.jsonl.manifest.json", "b.jsonl"]


def test_another_request_starts_anew_and_is_told(paths):
    files = BlockFiles(paths, REQUEST)
    files.resume()
    write(files, 2)
    other = BlockFiles(paths, REQUEST | {"seed": 1})
    assert other.resume() == {}
    write(other, 1)
    other.finish()
    assert files.finished() == (None, "with other seed")
    paths[1].write_text("changed")
    assert other.finished() == (None, "and changed since")
    other.manifest.unlink()
    assert "no manifest" in other.finished()[1]


def test_a_file_shorter_than_its_record_starts_anew(paths):
    files = BlockFiles(paths, REQUEST)
    files.resume()
    write(files, 2)
    files.partials[1].write_bytes(b"bl")
    assert BlockFiles(paths, REQUEST).resume() == {}


def test_a_stop_between_the_last_renames_loses_nothing(paths, monkeypatch):
    files = BlockFiles(paths, REQUEST)
    files.resume()
    write(files, 2)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())
        source.unlink()

    with monkeypatch.context() as patch:
        patch.setattr("dcod_jax.data.blocks.replace_file", lambda *a: None)
        patch.setattr("dcod_jax.data.blocks.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            files.finish()
    again = BlockFiles(paths, REQUEST)
    assert again.finished() == (None, "")
    assert again.resume() == {"blocks": 2}
    again.finish()
    assert paths[1].read_text() == "block 1\nblock 2\n"
    assert json.loads(again.manifest.read_text())["blocks"] == 2
