"""The loop: exact resumption after kill -9, signals, NaN, held-out loss, and settings kept."""

import dataclasses
import gzip
import json
import math
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_store import contents
from runs import RECIPE, assert_same_run, final_params, load, metrics, start

from dcod_jax import copies
from dcod_jax.data.dataset import read_manifest
from dcod_jax.data.scores import add_scores
from dcod_jax.drift.command import drift
from dcod_jax.errors import EXIT_INTERRUPTED, DcodError
from dcod_jax.evaluate.command import evaluate
from dcod_jax.export.command import export
from dcod_jax.files import as_path, to_json
from dcod_jax.generate_traces.command import generate_traces
from dcod_jax.locks import locked
from dcod_jax.models import hf
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score
from dcod_jax.train import checksums, command, learned_from, setup
from dcod_jax.train import loop as train
from dcod_jax.train.checkpointer import Checkpointer
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.optim import make_optimizer
from dcod_jax.train.settings import optim_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe whose dataset is prepared and scored."""
    place = tmp_path_factory.mktemp("train")
    tiny.write_model(place / "student", seed=1)
    tiny.write_model(place / "teacher", seed=2, hidden_size=48, num_attention_heads=6)
    tiny.write_jsonl(place / "traces.jsonl", tiny.sums(120))
    recipe = RECIPE.format(
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        traces=str(place / "traces.jsonl"),
        dataset=str(place / "dataset"),
    )
    (place / "recipe.py").write_text(recipe)
    command.make_inputs(load(place, place / "unused"))
    return place


@pytest.fixture(scope="module")
def reference(place):
    """An uninterrupted run, in a process of its own like the interrupted ones."""
    run = start(place, place / "reference", "--config.profile.steps=3:4")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    return place / "reference"


def test_it_learns_and_writes_what_it_says(place, reference):
    lines = metrics(reference)
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval/nll" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in held_out] == [0, 4, 8]
    assert held_out[-1]["eval/nll"] < held_out[0]["eval/nll"]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert steps[-1]["tokens_seen"] == sum(line["tokens/completion"] for line in steps)
    stored = json.loads((reference / "config.json").read_text())
    assert stored["train"]["steps"] == 8
    assert (reference / "export" / "model.safetensors").exists()
    assert list((reference / "tensorboard").iterdir())


def test_the_time_of_a_step_is_told_by_its_phases(reference):
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    shares = []
    for line in (line for line in lines if "loss" in line):
        phases = [line[f"time/{name}_seconds"] for name in ("data_wait", "dispatch", "device")]
        assert min(phases) >= 0
        shares.append(sum(phases) / line["time/step_seconds"])
    assert max(shares) < 1.01  # nothing is counted twice
    assert max(shares) > 0.5  # the rest: writing the line itself, the bar, other processes


def test_the_steps_asked_for_are_traced(reference):
    [trace] = (reference / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e]
    assert sorted(map(int, steps)) == [3, 4]


def test_goodput_says_where_the_time_went(reference):
    found = json.loads((reference / "goodput.json").read_text())
    [attempt], total = found["attempts"], found["total"]
    assert (attempt["from_step"], attempt["step"], attempt["ended"]) == (0, 8, "ended")
    assert list(attempt["steps_at_save"]) == ["4", "8"]
    parts = ("startup", "eval", "save", "lost", "productive")
    seconds = [total[f"{name}_seconds"] for name in parts]
    assert sum(seconds) == pytest.approx(total["wall_seconds"])
    assert total["lost_seconds"] == 0
    assert min(total["eval_seconds"], total["save_seconds"], total["productive_seconds"]) > 0
    assert total["goodput"] == total["productive_seconds"] / total["wall_seconds"]


def kill_after(run, path, step, how):
    """Send a signal once the metrics of that step are on disk."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and run.poll() is None:
        if path.exists() and any(
            json.loads(line).get("step", 0) >= step and "loss" in line
            for line in path.read_text().splitlines()
            if line.endswith("}")
        ):
            run.send_signal(how)
            return
        time.sleep(0.01)
    pytest.fail(f"never reached step {step}: {run.communicate()[0]}")


def test_sigterm_then_kill_9_then_the_same_command_is_bit_identical(place, reference):
    run_dir = place / "stopped"
    first = start(place, run_dir, "--config.train.steps=8")
    kill_after(first, run_dir / "metrics.jsonl", 2, signal.SIGSTOP)
    with pytest.raises(
        DcodError, match=rf"run_dir=\S+stopped is in use by process {first.program} on"
    ):
        command.train(load(place, run_dir))
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    output = first.communicate(timeout=300)[0]
    if first.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert first.returncode == EXIT_INTERRUPTED, output
    assert "the same command goes on" in output
    [saved] = Checkpointer(run_dir).steps()
    second = start(place, run_dir)
    kill_after(second, run_dir / "metrics.jsonl", max(5, saved + 1), signal.SIGKILL)
    output = second.communicate()[0]
    assert second.returncode == -signal.SIGKILL
    assert f"resuming {run_dir} at step {saved}" in output
    kept = Checkpointer(run_dir).steps()
    assert set(kept) <= {saved, 4}
    third = start(place, run_dir)
    output = third.communicate(timeout=300)[0]
    assert third.returncode == 0, output
    assert f"resuming {run_dir} at step {kept[-1]}" in output
    assert_same_run(place, run_dir, reference)
    found = json.loads((run_dir / "goodput.json").read_text())
    stopped, killed, after = found["attempts"]
    assert [a["ended"] for a in (stopped, killed, after)] == ["ended", "killed", "ended"]
    assert killed["step"] >= 5
    assert stopped["lost"] == 0
    assert 0 < killed["lost"] == found["total"]["lost_seconds"]
    if after["from_step"] == 4:  # the steps up to the save were not lost
        steps = killed["elapsed"] - killed["startup"] - killed["eval"] - killed["save"]
        assert killed["lost"] == pytest.approx(steps - killed["steps_at_save"].get("4", 0.0))


VERBS = {
    "train": (command.train, "{run}/.train.lock", ["train.steps=9"]),
    "score": (score, "{place}/.dataset.lock", ["score.overwrite=true", "score.top_k=2"]),
    "prepare": (prepare, "{run}/.other.lock", ["data.dataset={run}/other"]),
    "export": (export, "{run}/.export.lock", []),
    "generate_traces": (
        generate_traces,
        "{run}/.traces.jsonl.lock",
        ["generate.prompts={place}/traces.jsonl"],
    ),
    "evaluate": (evaluate, "{run}/evaluation/.lock", ["evaluate.problems={place}/traces.jsonl"]),
    "drift": (
        drift,
        "{run}/drift/.lock",
        ["drift.prompts={place}/traces.jsonl", "drift.max_new_tokens=8"],
    ),
}


def without_locks(directory):
    return {k: v for k, v in contents(directory).items() if not k.endswith(".lock")}


@pytest.mark.parametrize("verb", VERBS)
def test_two_at_a_time_on_one_directory_refuse(place, reference, verb):
    function, lock, changes = VERBS[verb]
    names = {"place": place, "run": reference}
    words = [f"--config.{change.format(**names)}" for change in changes]
    before = without_locks(reference)
    path = as_path(lock.format(**names))
    with (
        locked(path, what="", shared=verb == "score"),  # a training reads the dataset
        pytest.raises(DcodError, match=rf"is in use by process {os.getpid()} on"),
    ):
        function(load(place, reference, *words))
    assert without_locks(reference) == before


def test_another_seed_is_another_run(place, reference):
    with pytest.raises(DcodError, match=r"other settings:\n  seed: 0 then, 1 now"):
        train.fit(load(place, reference, "--config.seed=1"))


def test_a_key_of_a_later_version_is_another_setting_where_it_is_not_at_its_default(
    place, reference, tmp_path, caplog
):
    caplog.set_level("INFO", logger="dcod_jax")
    step = shutil.copytree(reference, tmp_path / "run") / "checkpoints" / "8"
    record = json.loads((step / "run" / "metadata").read_text())
    del record["config"]["optim"]["b1"]
    (step / "run" / "metadata").write_text(json.dumps(record))
    checksums.write(step, 8)
    first_snapshot(load(place, tmp_path / "run"))
    assert f"{step.parent} is of an earlier version, without optim.b1" in caplog.text
    with pytest.raises(DcodError, match=r"optim\.b1: 'unknown' then, 0\.5 now"):
        first_snapshot(load(place, tmp_path / "run", "--config.optim.b1=0.5"))


def test_other_scores_of_the_same_traces_are_another_run(place, reference, tmp_path):
    """As after scoring them anew: the traces, the teacher and the position are the same."""

    def scored(traces):
        counts = [int(np.count_nonzero(trace.completion_mask)) for trace in traces]
        pairs = zip(traces, counts, strict=True)
        return [dataclasses.replace(t, logprobs=np.full(n, -1, np.float32)) for t, n in pairs]

    shutil.copytree(place / "dataset", tmp_path / "dataset")
    teacher = read_manifest(place / "dataset" / "train")["teacher"]
    options = {"settings": {"top_k": 0, "made": "up"}, "score_shard": scored, "overwrite": True}
    add_scores(tmp_path / "dataset" / "train", teacher=teacher, **options)
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "8")
    other = f"--config.data.dataset={tmp_path / 'dataset'}"
    with pytest.raises(DcodError, match=r"up to step 4:\n  training traces: \w{64} then, \w{64} n"):
        train.fit(load(place, run_dir, other))
    run = first_snapshot(load(place, run_dir, other, "--config.train.accept_changed_data=true"))
    assert run.step == 4
    assert "training traces" in [change["part"] for change in run.data["changes"]]


def test_a_finished_run_is_left_alone_but_for_what_a_kill_left(place, reference):
    def there():
        paths = (reference / "checkpoints").iterdir()
        return sorted((path, path.stat().st_mtime_ns) for path in paths)

    before = there()
    left = [reference / "goodput.json.tmp", reference / "checkpoints" / "local.txt.tmp"]
    for file in left:
        file.write_text('{"atte')
    assert train.fit(load(place, reference)) == 8
    assert not any(file.exists() for file in left)
    assert there() == before


def test_another_mesh_continues_within_rounding(place, reference, caplog):
    """From a checkpoint of replicas, with parameters and heads split and no micro-batches."""
    caplog.set_level("INFO", logger="dcod_jax")
    run_dir = place / "eight"
    shutil.copytree(reference, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "8")
    changes = ("mesh.fsdp=2", "mesh.tensor=2", "train.microbatches=1")
    assert train.fit(load(place, run_dir, *(f"--config.{change}" for change in changes))) == 8
    assert f"resuming {run_dir} at step 4" in caplog.text
    ours, theirs = metrics(run_dir), metrics(reference)
    assert ours != theirs  # the last steps were done anew
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "nll", "eval/nll", "eval/loss"):
            if key in mine:
                np.testing.assert_allclose(mine[key], other[key], rtol=2e-5, err_msg=key)


def test_not_finite_stops_with_step_traces_and_last_good_checkpoint(place):
    run_dir = place / "diverged"
    config = load(
        place,
        run_dir,
        "--config.optim.learning_rate=1e30",
        "--config.optim.warmup_steps=0",
        "--config.train.save_every=0",
        "--config.optim.clip_norm=0",
    )
    with pytest.raises(DcodError) as caught:
        train.fit(config)
    message = str(caught.value)
    assert message.startswith("step 2:") or message.startswith("step 3:")
    assert "Last good checkpoint: none" in message
    assert "sum-" in message


def test_the_wrong_tokenizer_is_refused(place, tmp_path):
    tiny.write_tokenizer(tmp_path / "other", alphabet=tiny.ALPHABET[::-1])
    config = load(place, tmp_path / "run", f"--config.student.tokenizer={tmp_path / 'other'}")
    with pytest.raises(DcodError, match="tokenizer"):
        train.fit(config)


def test_another_teachers_scores_are_refused(place, tmp_path):
    other = load(place, tmp_path / "run", f"--config.teacher.path={place / 'student'}")
    with pytest.raises(DcodError, match="written with another teacher"):
        train.fit(other)
    with pytest.raises(DcodError, match=r"score\.overwrite"):
        command.make_inputs(other)
    name = load(place, tmp_path / "run", "--config.teacher.name=any name")
    assert command.missing_verbs(name) == ["prepare"]


def test_a_trainer_that_reads_the_cache_needs_none_of_the_teachers_files(place, tmp_path):
    absent = load(place, tmp_path / "run", f"--config.teacher.path={tmp_path / 'teacher'}")
    train_set, _ = setup.open_datasets(absent, train.load_student(absent))
    assert train_set.manifest["teacher"]["name"] == "teacher"
    assert command.missing_verbs(absent) == ["prepare"]
    # The same name is no proof where this machine knows that the files are others now.
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_SETTLED", -1.0)
        hf.weights_fingerprint(tmp_path / "teacher")
        setup.open_datasets(absent, train.load_student(absent))
        shutil.copy(place / "student" / hf.SINGLE, tmp_path / "teacher" / hf.SINGLE)
        with pytest.raises(DcodError, match="written with another teacher"):
            setup.open_datasets(absent, train.load_student(absent))


def test_no_student_is_refused(place, tmp_path):
    with pytest.raises(DcodError, match=r"set student\.path"):
        train.fit(load(place, tmp_path / "run", "--config.student.path="))


def test_a_misspelt_run_to_start_from_is_refused_before_anything_is_made(place, tmp_path):
    typo = f"--config.train.init_from={tmp_path / 'typo'}"
    with pytest.raises(DcodError, match=r"train\.init_from=\S+typo: expected a run directory"):
        command.train(load(place, tmp_path / "run", typo))
    assert not any(tmp_path.iterdir())


def test_metrics_of_another_program_are_left(place, tmp_path):
    """They have steps as ours; ours have the config of their run beside them."""
    mine = tmp_path / "metrics.jsonl"
    mine.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(DcodError, match=r"metrics\.jsonl exists and .*lacks config\.json beside"):
        setup.preflight(load(place, tmp_path))
    (tmp_path / "config.json").write_bytes(to_json(load(place, tmp_path).to_dict()))
    setup.preflight(load(place, tmp_path))


def first_snapshot(config):
    """What the loop would begin or go on with."""
    student = train.load_student(config)
    datasets = setup.open_datasets(config, student)
    optimizer, _ = make_optimizer(optim_config(config), 8)
    return setup.initial_snapshot(
        config,
        student,
        optimizer,
        train.make_mesh(),
        Checkpoints(config, best_metric=""),
        learned_from.parts(config, student.tokenizer, *datasets),
    )


def test_parameters_from_another_run_and_from_a_config(place, reference, tmp_path):
    run = first_snapshot(load(place, tmp_path / "a", f"--config.train.init_from={reference}"))
    state = run.state
    jax.tree.map(np.testing.assert_array_equal, state.params, final_params(reference, place))
    assert int(state.step) == run.step == 0
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x))
    scratch = load(
        place,
        tmp_path / "b",
        "--config.student.path=",
        f"--config.student.config={place / 'student' / 'config.json'}",
    )
    run = first_snapshot(scratch)
    embedding = np.asarray(run.state.params["embed_tokens"]["embedding"])
    np.testing.assert_allclose(embedding.std(), 0.1, rtol=0.1)
