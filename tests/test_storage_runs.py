"""What a run reads from and writes into a store: metrics, traces, models, datasets, checkpoints."""

import contextlib
import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_store import contents, upload

from dcod_jax import files
from dcod_jax.copies import local_directory
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.presets import Fields
from dcod_jax.data.traces import describe, find_sources, read_traces
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.generations import Generation, read_generations, to_line
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.losses.adaptive import initial
from dcod_jax.models import hf
from dcod_jax.prepare.command import prepare
from dcod_jax.stores import RemotePath
from dcod_jax.train import metrics
from dcod_jax.train.checkpoint_reader import read_params
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.types import TrainState

pytestmark = pytest.mark.usefixtures("copy_cache")

# ---------------------------------------------------------------- everything a run reads and writes


def test_metrics_go_on_in_a_store_as_on_disk(tmp_path, store):
    def run(root):
        with contextlib.closing(metrics.MetricsWriter(root, 0)) as writer:
            for step in (1, 2, 3):
                writer.write(step, {"loss": 1.0 / step})
        with contextlib.closing(metrics.MetricsWriter(root, 2)) as writer:
            writer.write(2, {"loss": 0.25})
            writer.write(3, {"loss": 0.125})
            writer.sync()
            lines = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            assert json.loads(lines[-1]) == {"step": 3, "loss": 0.125}
        assert [line["step"] for line in metrics.read_metrics(root / "metrics.jsonl")] == [1, 2, 3]
        return (root / "metrics.jsonl").read_bytes()

    assert run(store) == run(tmp_path / "run")
    assert len(list((store / "tensorboard").iterdir())) == 2


def test_a_minute_of_metrics_is_the_most_that_a_crash_can_lose(memory, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with contextlib.closing(metrics.MetricsWriter(memory, 0)) as writer:
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
        "train.progress": False,
    }
    config.update_from_flattened_dict(values | changes)
    return config


def test_prepare_writes_the_same_dataset_into_a_store(tmp_path, model, memory, capsys, caplog):
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
    assert "already prepared" in capsys.readouterr().out + caplog.text
    # What an interrupted publication leaves is no dataset, and is replaced.
    (there / files.UPLOADING).write_bytes(b"")
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
            Snapshot(
                state=state_of(step),
                step=step,
                iterator={"row": step},
                config={"seed": 1},
                metrics={"eval/nll": float(abs(step - 2))},
            )
        )
    checkpointer.close()
    again = Checkpointer(run, keep=2, best_metric="eval/nll")
    assert again.steps() == [2, 3, 4]  # the newest two and the best
    restored = again.restore(state_of(0))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(4))
    assert restored.iterator == {"row": 4}
    params, _ = read_params(run, state_of(0).params, step=2)
    jax.tree.map(np.testing.assert_array_equal, params, state_of(2).params)
    assert read_params(run, state_of(0).params, best_metric="eval/nll")[1].step == 2
    wrong = {"layers": {"kernel": jnp.zeros((3, 5))}}
    with pytest.raises(
        DcodError, match=r"\['kernel'\] has shape \(3, 4\), the model needs \(3, 5\)"
    ):
        read_params(run, wrong, best_metric="eval/nll")
    again.close()


def test_local_checkpoints_beside_those_in_cloud_storage(gcs, tmp_path):
    for expected in (None, 2):
        shared = Checkpointer(gcs / "beside", beside_local=True)
        local = LocalCheckpoints(shared, directory=str(tmp_path), every=1)
        found = local.restore(jax.tree.map(jnp.asarray, state_of(0)), before=9)
        assert (found.step if found else None) == expected
        if expected is None:
            shared.save(Snapshot(state=state_of(1), step=1, config={}))
            local.save(Snapshot(state=state_of(2), step=2, config={}))
            local.own.wait()
        shared.close()
    assert Checkpointer(gcs / "beside").steps() == [1]
    local.close()
    assert [path.name for path in (gcs / "beside" / "checkpoints").iterdir()] == ["1"]


def test_a_half_written_checkpoint_in_cloud_storage_is_not_restored(gcs):
    run = gcs / "half"
    checkpointer = Checkpointer(run)
    for step in (1, 2):
        checkpointer.save(Snapshot(state=state_of(step), step=step, config={}))
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
