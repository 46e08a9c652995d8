"""A run's files in a store: the same content as on disk, whole or absent, damage named."""

import numpy as np
import pytest
from fake_store import contents
from fake_traces import make_traces, write

from dcod_jax import copies
from dcod_jax.copies import Mirror, local_copy
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.scores import add_scores
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, publish, replace_file, unfinished
from dcod_jax.stores import RemotePath

pytestmark = pytest.mark.usefixtures("copy_cache")

TEACHER = {"name": "big", "revision": "r1", "weights": "abc"}

# ---------------------------------------------------------------- datasets


def scored(directory, *, seen=None, fail=False):
    def score(traces):
        if fail:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append(len(traces))
        return [
            type(t)(t.id, t.token_ids, t.completion_mask, -np.ones(n, np.float32), meta=t.meta)
            for t, n in ((t, int(t.completion_mask.sum())) for t in traces)
        ]

    return add_scores(directory, teacher=TEACHER, settings={"top_k": 0}, score_shard=score)


def test_a_dataset_in_a_store_has_the_bytes_of_one_on_disk(tmp_path, store):
    traces = make_traces(20, scored=False)
    for root in (tmp_path / "local", store / "data"):
        write(root, traces)
        scored(root)
    assert contents(store / "data") == contents(tmp_path / "local")
    here, there = TraceDataset(tmp_path / "local"), TraceDataset(store / "data")
    order = [3, 19, 0, 8]
    assert there.read_records(order) == here.read_records(order)
    np.testing.assert_array_equal(there.lengths, here.lengths)


def test_scoring_in_a_store_goes_on_behind_the_last_shard(memory):
    write(memory, make_traces(20, scored=False), shard_records=8)
    first, second = [], []

    def interrupted(traces):
        if len(first) == 2:
            raise KeyboardInterrupt
        first.append(len(traces))
        return make_scored(traces)

    def make_scored(traces):
        return [
            type(t)(t.id, t.token_ids, t.completion_mask, -np.ones(n, np.float32), meta=t.meta)
            for t, n in ((t, int(t.completion_mask.sum())) for t in traces)
        ]

    with pytest.raises(KeyboardInterrupt):
        add_scores(memory, teacher=TEACHER, settings={"top_k": 0}, score_shard=interrupted)
    assert not TraceDataset(memory).scored
    scored(memory, seen=second)
    assert (first, second) == ([8, 8], [4])
    assert TraceDataset(memory).scored
    assert not [p for p in memory.rglob("*") if p.name.startswith("traces-")]


def test_a_damaged_shard_in_a_store_is_named_on_opening(memory):
    write(memory, make_traces(12))
    path = memory / "traces-00000.array_record"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DcodError, match=r"traces-00000.array_record is damaged: expected sha256"):
        TraceDataset(memory)
    path.unlink()
    with pytest.raises(DcodError, match="missing"):
        TraceDataset(memory)


def test_a_damaged_copy_is_fetched_again(memory, copy_cache):
    write(memory, make_traces(12))
    expected = TraceDataset(memory).read_records(range(12))
    [copy] = copy_cache.glob("*/traces-00000.array_record")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + b"x")
    assert TraceDataset(memory).read_records(range(12)) == expected
    assert copy.read_bytes() == whole


def test_a_changed_object_is_copied_again(store):
    path = store / "weights.bin"
    path.write_bytes(b"one")
    first = local_copy(path)
    stamp = first.stat().st_mtime_ns
    assert local_copy(path).stat().st_mtime_ns == stamp  # not fetched twice
    path.write_bytes(b"two")
    assert local_copy(path).read_bytes() == b"two"


def test_what_cannot_be_copied_names_path_cache_and_reason(store, monkeypatch, tmp_path):
    with pytest.raises(DcodError, match=r"absent.bin cannot be copied.*no such object"):
        local_copy(store / "absent.bin")
    (store / "there.bin").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(copies.CACHE, str(tmp_path / "file"))
    with pytest.raises(DcodError, match=copies.CACHE):
        local_copy(store / "there.bin")


# ---------------------------------------------------------------- what must appear whole


def test_a_directory_is_valid_only_when_its_last_file_is_there(store, monkeypatch):
    """Interrupted at any write, the old directory is gone or whole, and the next one repairs it."""
    final = store / "final"

    def fill(text):
        work = store / "work"
        for name in ("a.txt", "sub/b.txt", "done.json"):
            (work / name).write_bytes(f"{text} {name}".encode())
        return work

    publish(fill("old"), final, last="done.json")
    (final / "stale.txt").write_bytes(b"stale")
    copy, seen = RemotePath.copy_to, []

    def breaks(path, other):
        if len(seen) == breaks.after:
            raise KeyboardInterrupt
        seen.append(other.name)
        copy(path, other)

    monkeypatch.setattr(RemotePath, "copy_to", breaks)
    for after in range(3):
        seen.clear()
        breaks.after = after
        with pytest.raises(KeyboardInterrupt):
            publish(fill("new"), final, last="done.json")
        assert unfinished(final, last="done.json")
        assert not (final / "done.json").exists()
    breaks.after = 99
    publish(fill("new"), final, last="done.json")
    assert seen[-1] == "done.json"
    assert not unfinished(final, last="done.json")
    names = ("/a.txt", "/done.json", "/sub/b.txt")
    assert contents(final) == {name: f"new {name[1:]}".encode() for name in names}
    assert not (store / "work").exists()


def test_an_upload_that_ends_short_is_an_error(memory, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"four")

    def short(source, target):
        memory.filesystem.pipe_file(target, b"fou")

    monkeypatch.setattr(memory.filesystem, "put_file", short)
    with pytest.raises(OSError, match="has 3 bytes after 4 were sent"):
        (memory / "file").upload(tmp_path / "file")


def test_what_the_store_refuses_is_a_message_with_the_path(gcs):
    with pytest.raises(DcodError, match=r"cannot write gs://no-such-bucket/m.json"):
        replace_file(as_path("gs://no-such-bucket/m.json"), b"{}")


def test_a_mirror_sends_what_changed_and_removes_what_is_gone(store):
    (store / "old.txt").write_bytes(b"old")
    mirror = Mirror(store, fetch=("old.txt", "absent.txt"))
    assert (mirror.directory / "old.txt").read_bytes() == b"old"
    (mirror.directory / "grows.txt").write_bytes(b"1")
    mirror.send()
    (mirror.directory / "grows.txt").write_bytes(b"12")
    (mirror.directory / "old.txt").unlink()
    mirror.close()
    assert contents(store) == {"/grows.txt": b"12"}
    assert not mirror.directory.exists()
