"""A run's files in a store: the same content as on disk, whole or absent, damage named."""

import gzip
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_store import BUCKET, fake_gcs
from fake_traces import make_traces, write

from dcod_jax import metrics, storage
from dcod_jax.checkpoint import Checkpointer
from dcod_jax.data import manifest as manifests
from dcod_jax.data.formats import Fields
from dcod_jax.data.records import TraceDataset, extend
from dcod_jax.data.traces import describe, find_sources, read_traces
from dcod_jax.evals import Generation, read_generations, to_line
from dcod_jax.losses.adaptive import initial
from dcod_jax.models import hf
from dcod_jax.paths import RemotePath, as_path
from dcod_jax.prepare import prepare
from dcod_jax.problems import read_problems
from dcod_jax.storage import Mirror, local_copy, local_directory, publish, unfinished
from dcod_jax.types import DcodError, TrainState

TEACHER = {"name": "big", "revision": "r1", "weights": "abc"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Copies of remote files, away from the user's own."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gcs():
    with fake_gcs():
        yield as_path(f"gs://{BUCKET}")


@pytest.fixture(params=["memory", "gs"])
def store(request):
    """An empty directory, in fsspec's memory and on the fake Cloud Storage server."""
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "gs":
        return request.getfixturevalue("gcs") / name
    root = as_path(f"memory://{name}")
    storage.remove_tree(root)
    return root


@pytest.fixture
def memory(request):
    root = as_path(f"memory://{request.node.name}".replace("[", "-").replace("]", ""))
    storage.remove_tree(root)
    return root


def upload(local: pathlib.Path, remote: RemotePath) -> RemotePath:
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        (remote / file.relative_to(local).as_posix()).upload(file)
    return remote


def contents(directory) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path).removeprefix(str(directory)): path.read_bytes() for path in files}


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

    return extend(directory, teacher=TEACHER, settings={"top_k": 0}, score_shard=score)


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
        extend(memory, teacher=TEACHER, settings={"top_k": 0}, score_shard=interrupted)
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


def test_a_damaged_copy_is_fetched_again(memory, cache):
    write(memory, make_traces(12))
    expected = TraceDataset(memory).read_records(range(12))
    [copy] = cache.glob("*/traces-00000.array_record")
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
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "file"))
    with pytest.raises(DcodError, match=storage.CACHE):
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
        manifests.replace_file(as_path("gs://no-such-bucket/m.json"), b"{}")


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


# ---------------------------------------------------------------- everything a run reads and writes


def test_metrics_go_on_in_a_store_as_on_disk(tmp_path, store):
    def run(root):
        with metrics.MetricsWriter(root, 0) as writer:
            for step in (1, 2, 3):
                writer.write(step, {"loss": 1.0 / step})
        with metrics.MetricsWriter(root, 2) as writer:
            writer.write(2, {"loss": 0.25})
            writer.write(3, {"loss": 0.125})
            writer.sync()
            lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            assert json.loads(lines[-1]) == {"step": 3, "loss": 0.125}
        return (root / "metrics.jsonl").read_bytes()

    assert run(store) == run(tmp_path / "run")
    assert len(list((store / "tensorboard").iterdir())) == 2


def test_a_minute_of_metrics_is_the_most_that_a_crash_can_lose(memory, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with metrics.MetricsWriter(memory, 0) as writer:
        writer.write(1, {"loss": 1.0})
        assert not (memory / "metrics.jsonl").exists()
        clock[0] = metrics.SYNC_SECONDS + 1
        writer.write(2, {"loss": 0.5})
        assert len((memory / "metrics.jsonl").read_text().splitlines()) == 2


def test_raw_traces_are_read_from_a_store(tmp_path, store):
    import pyarrow as pa
    from pyarrow import parquet

    records = tiny.sums(6)
    tiny.write_jsonl(tmp_path / "a.jsonl", records[:2])
    packed = "".join(json.dumps(record) + "\n" for record in records[2:4]).encode()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    parquet.write_table(pa.Table.from_pylist(records[4:]), tmp_path / "c.parquet")
    upload(tmp_path, store / "raw")

    def read(root):
        sources = find_sources(f"{root}/*.jsonl,{root}/b.jsonl.gz,{root}/c.parquet")
        found = [(t.id, t.messages) for t in read_traces(sources, Fields())]
        described = [{k: v for k, v in d.items() if k != "path"} for d in describe(sources)]
        return found, described

    assert read(store / "raw") == read(tmp_path)
    assert len(read(store / "raw")[0]) == 6
    assert [s.path for s in find_sources(str(store / "raw"))] == [
        f"{store}/raw/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")
    ]
    with pytest.raises(DcodError, match=r"no such file or directory: (gs|memory)://"):
        find_sources(str(store / "nothing"))
    with pytest.raises(DcodError, match="matches no file"):
        find_sources(f"{store}/*.nothing")


def test_problems_and_generations_are_kept_in_a_store(tmp_path, memory):
    tiny.write_jsonl(tmp_path / "problems.jsonl", tiny.sums(3))
    upload(tmp_path, memory)
    problems = read_problems(memory / "problems.jsonl")
    assert [p.fields for p in problems] == tiny.sums(3)
    kept = [Generation("a", "42", "42", "42", True, True, 2)]
    (memory / "out.jsonl").write_text("".join(map(to_line, kept)))
    assert read_generations(memory / "out.jsonl") == kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), seed=3)


def test_a_model_directory_is_read_and_written_in_a_store(model, store):
    remote = upload(model, store / "model")
    here, there = hf.load_model(model, dtype="float32"), hf.load_model(remote, dtype="float32")
    assert here[0] == there[0]
    jax.tree.map(np.testing.assert_array_equal, here[1], there[1])
    assert hf.weights_fingerprint(remote) == hf.weights_fingerprint(model)
    for size in (1 << 30, 20_000):  # one file, then several with an index in its place
        options = {"dtype": jnp.float32, "max_shard_bytes": size}
        hf.save_params(store / "model", *here, **options)
        again = hf.load_model(remote, dtype="float32")[1]
        jax.tree.map(np.testing.assert_array_equal, here[1], again)
    assert not (remote / hf.SINGLE).exists()
    local = local_directory(remote, wanted=lambda name: name == "config.json")
    assert [path.name for path in local.iterdir()] == ["config.json"]


def config_of(root, model, **changes):
    from dcod_jax.config import BASE, load_recipe

    config = load_recipe(BASE)
    values = {
        "run_dir": str(root / "run"),
        "student.path": str(model),
        "data.traces": str(root / "traces.jsonl"),
        "data.max_length": 64,
        "data.seq_len": 64,
        "data.eval_fraction": 0.3,
        "prepare.workers": 1,
        "train.progress": False,
    }
    config.update_from_flattened_dict(values | changes)
    return config


def test_prepare_writes_the_same_dataset_into_a_store(tmp_path, model, memory, capsys):
    tiny.write_jsonl(tmp_path / "traces.jsonl", tiny.sums(20))
    upload(tmp_path, memory)
    remote_model = upload(model, memory / "model")
    here = prepare(config_of(tmp_path, model))
    there = prepare(config_of(memory, remote_model))
    assert isinstance(there, RemotePath)

    def stable(directory):
        """All but the paths that the traces were read from, which each record tells."""
        files = sorted(name for name in contents(directory))
        datasets = [TraceDataset(directory / name) for name in ("train", "eval")]
        traces = [trace for dataset in datasets for trace in dataset.read(range(len(dataset)))]
        plain = [(t.id, t.token_ids.tolist(), t.completion_mask.tolist()) for t in traces]
        return files, plain, [dataset.manifest["counts"] for dataset in datasets]

    assert stable(there) == stable(here)
    capsys.readouterr()
    prepare(config_of(memory, remote_model))
    assert "already prepared" in capsys.readouterr().out
    # What an interrupted publication leaves is no dataset, and is replaced.
    (there / storage.UPLOADING).write_bytes(b"")
    (there / "train" / "manifest.json").unlink()
    assert stable(prepare(config_of(memory, remote_model))) == stable(here)


# ---------------------------------------------------------------- checkpoints (Orbax, tensorstore)


def state_of(step: int) -> TrainState:
    params = {"layers": {"kernel": jnp.arange(12.0).reshape(3, 4) + step}}
    moments = {"mu": jax.tree.map(lambda x: x / 7, params), "count": jnp.int32(step)}
    return TrainState(jnp.int32(step), params, moments, initial())


def test_checkpoints_are_saved_and_restored_in_cloud_storage(gcs):
    run = gcs / "run"
    checkpointer = Checkpointer(run, keep=2, best_metric="eval/nll")
    for step in (1, 2, 3, 4):
        checkpointer.save(
            state_of(step),
            step=step,
            progress={"iterator": {"row": step}},
            config={"seed": 1},
            metrics={"eval/nll": float(abs(step - 2))},
        )
    checkpointer.close()
    again = Checkpointer(run, keep=2, best_metric="eval/nll")
    assert again.steps() == [2, 3, 4]  # the newest two and the best
    assert again.best() == 2
    state, restored = again.restore(state_of(0))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))
    assert restored.progress == {"iterator": {"row": 4}}
    params, _ = again.restore_params(state_of(0).params, step=2)
    jax.tree.map(np.testing.assert_array_equal, params, state_of(2).params)
    wrong = {"layers": {"kernel": jnp.zeros((3, 5))}}
    with pytest.raises(
        DcodError, match=r"\['kernel'\] has shape \(3, 4\), the model needs \(3, 5\)"
    ):
        again.restore_params(wrong)
    again.close()


def test_a_half_written_checkpoint_in_cloud_storage_is_not_restored(gcs):
    run = gcs / "half"
    checkpointer = Checkpointer(run)
    for step in (1, 2):
        checkpointer.save(state_of(step), step=step, progress={}, config={})
    checkpointer.close()
    (run / "checkpoints" / "2" / "commit_success.txt").unlink()  # what is written last
    again = Checkpointer(run)
    assert again.steps() == [1]
    deadline = time.monotonic() + 60
    while (run / "checkpoints" / "2").exists():  # its remains are removed in the background
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again.close()


def test_checkpoints_elsewhere_are_refused_by_name():
    with pytest.raises(DcodError, match="memory://x: checkpoints need a local directory or gs://"):
        Checkpointer("memory://x")
