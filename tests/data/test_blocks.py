"""Files made of blocks: whole ones stay, the result appears once, other requests are told apart."""

import pytest

from dcod_jax.data import blocks
from dcod_jax.data.blocks import BlockFiles

REQUEST = {"seed": 0, "prompts": "abc", "stop": ("x",)}


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def write(files, *parts):
    for part in parts:
        text = f"{part.start} to {part.stop}\n".encode()
        files.commit(part, [text, text.upper()], {"items": len(part), "why": {"odd": 1}})


def test_whole_blocks_stay_and_another_size_goes_on_between_them(paths):
    files = BlockFiles(paths, REQUEST)
    assert files.finished() == (None, "")
    assert files.pending(10, 4) == [range(4), range(4, 8), range(8, 10)]
    write(files, range(4), range(8, 10))
    (files.blocks / "000000004-000000008.0").write_bytes(b"a block without its cou")
    again = BlockFiles(paths, REQUEST)
    assert again.pending(10, 3) == [range(4, 7), range(7, 8)]
    write(again, range(7, 8), range(4, 7))
    manifest = again.finish()
    assert paths[0].read_text() == "0 to 4\n4 to 7\n7 to 8\n8 to 10\n"
    assert paths[1].read_text() == paths[0].read_text().upper()
    assert (manifest["items"], manifest["why"]) == (10, {"odd": 4})
    assert BlockFiles(paths, REQUEST).finished() == (manifest, "")
    names = sorted(p.name for p in paths[0].parent.iterdir())
    assert names == ["a.jsonl", "a.jsonl.manifest.json", "b.jsonl"]


def test_another_request_starts_anew_and_is_told(paths):
    files = BlockFiles(paths, REQUEST)
    write(files, range(4))
    other = BlockFiles(paths, REQUEST | {"seed": 1})
    assert other.pending(4, 4) == [range(4)]
    write(other, range(4))
    other.finish()
    assert files.finished() == (None, "with other seed")
    paths[1].write_text("changed")
    assert other.finished() == (None, "and changed since")
    other.manifest.unlink()
    assert "no manifest" in other.finished()[1]


@pytest.mark.parametrize("stops_at", [1, 2, 3, 4])
def test_a_stop_anywhere_in_the_joining_loses_nothing(paths, monkeypatch, stops_at):
    files = BlockFiles(paths, REQUEST)
    write(files, range(4), range(4, 6))
    steps = []

    def stopping(real):
        def step(*args):
            steps.append(args)
            if len(steps) == stops_at:
                raise KeyboardInterrupt
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace_file", "commit_file", "remove_tree"):
            patch.setattr(blocks, name, stopping(getattr(blocks, name)))
        with pytest.raises(KeyboardInterrupt):
            files.finish()
    again = BlockFiles(paths, REQUEST)
    manifest, other = again.finished()
    assert other == ""
    if manifest is None:
        assert again.pending(6, 4) == []
        manifest = again.finish()
    assert [p.read_text().lower() for p in paths] == ["0 to 4\n4 to 6\n"] * 2
    assert manifest["items"] == 6
    assert not again.blocks.exists()
