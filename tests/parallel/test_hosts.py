"""Several real processes over gloo: agreement, continuation, split work."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from host_runs import finish, launch, said, succeed
from hosts_recipe import RECIPE, files, load, metrics, params, tasks

from dcod_jax import config as configs
from dcod_jax.errors import EXIT_INTERRUPTED
from dcod_jax.evaluate.command import evaluate
from dcod_jax.generate_traces.command import generate_traces
from dcod_jax.models import hf
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.parallel.monitor import EXIT_PEER
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score
from dcod_jax.train import checksums
from dcod_jax.train import loop as train
from dcod_jax.train.checkpointer import ITEMS, Checkpointer
from dcod_jax.train.local_checkpoints import LocalCheckpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe whose traces are prepared and not yet scored."""
    place = tmp_path_factory.mktemp("hosts")
    tiny.write_model(place / "student", seed=1, num_hidden_layers=1)
    tiny.write_model(place / "teacher", seed=2, num_hidden_layers=1)
    tiny.write_jsonl(place / "traces.jsonl", tiny.sums(60))
    recipe = RECIPE.format(
        run=str(place / "two"),
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        traces=str(place / "traces.jsonl"),
        dataset=str(place / "dataset"),
    )
    (place / "recipe.py").write_text(recipe)
    prepare(load(place))
    shutil.copytree(place / "dataset", place / "one" / "dataset")
    shutil.copytree(place / "dataset", place / "unscored")
    return place


@pytest.fixture(scope="module")
def one(place):
    """What one process makes of it; scoring and sampling on two devices, as each of two did."""
    config = load(
        place, **{"run_dir": str(place / "one"), "data.dataset": str(place / "one" / "dataset")}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "share", lambda config: (make_mesh(devices=jax.devices()[:2]), 0, 1))
        score(config)
        generate_traces(config)
        evaluate(config)
    train.fit(configs.replace(config, {"run_dir": str(place / "one" / "a")}))
    return place / "one"


@pytest.fixture(scope="module")
def two(place):
    """Two processes: split work, a whole run and its export, then one that loses a process."""
    ends = finish(tasks(place, "score; generate; evaluate; fit a; export a; fit b kill 5"))
    assert [end[0] for end in ends] == [EXIT_PEER, -signal.SIGKILL], ends
    return place / "two", ends


def test_scores_are_those_of_one_process_to_the_byte(place, one, two):
    scored = files(place / "dataset")
    assert [name for name in scored if "progress" in name] == []
    assert len([name for name in scored if "scored-" in name]) == 4
    assert scored == files(one / "dataset")


def test_traces_are_those_of_one_process_to_the_byte(one, two):
    for name in ("traces.jsonl", "traces.rejected.jsonl", "traces.jsonl.manifest.json"):
        assert (two[0] / name).read_bytes() == (one / name).read_bytes()
    assert not list(two[0].glob("traces.jsonl.partial*"))


def test_generations_are_those_of_one_process(one, two):
    for name in ("teacher", "start"):
        ours, theirs = (path / "evaluation" / f"{name}.jsonl" for path in (two[0], one))
        assert len(ours.read_text().splitlines()) == 9
        assert ours.read_bytes() == theirs.read_bytes()
    left = {path.name for path in (two[0] / "evaluation").glob(".*")}
    assert left == {".lock"}


def test_two_processes_train_as_one(place, one, two):
    ours, theirs = metrics(two[0] / "a"), metrics(one / "a")
    assert [line["step"] for line in ours] == list(range(1, 7))
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "nll", "grad_norm", "weights/mean", "tokens_seen"):
            np.testing.assert_allclose(a[key], b[key], rtol=2e-5, err_msg=key)
    mine, other = params(place, two[0] / "a")[0], params(place, one / "a")[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), mine, other)


def test_each_process_hashes_its_own_files_of_a_checkpoint(two):
    step = two[0] / "a" / "checkpoints" / "6"
    assert not list(step.glob(f"{checksums.NAME}.*"))  # the parts were joined
    listed = json.loads((step / checksums.NAME).read_text())["files"]
    arrays = [name for name in listed if "/d/" in name]
    assert all(any(f"process_{i}/" in name for name in arrays) for i in (0, 1))
    assert set(listed) == {
        name for name in files(step) if name not in (*checksums.LATER, checksums.NAME)
    }
    checksums.verify(step.parent, 6, ITEMS)


def test_the_first_process_speaks_for_all(two):
    first, second = map(said, two[1])
    assert "parameters from" in first
    assert "parameters from" not in second
    assert len(list((two[0] / "a" / "tensorboard").iterdir())) == 1
    assert json.loads((two[0] / "a" / "config.json").read_text())["hosts"]["processes"] == 2


def test_the_export_of_two_processes_is_the_checkpoint(place, two):
    exported = hf.load_model(two[0] / "a" / "export", dtype=np.float32)[1]
    jax.tree.map(np.testing.assert_array_equal, params(place, two[0] / "a")[0], exported)


def same_run(place, ours, theirs):
    assert metrics(ours) == metrics(theirs)
    (mine, step), (other, last) = params(place, ours), params(place, theirs)
    assert step == last == 6
    jax.tree.map(np.testing.assert_array_equal, mine, other)


@pytest.fixture(scope="module")
def again(place, two):
    """The run that lost a process goes on to its end; the next one is told to stop."""
    assert "lost: process 1" in two[1][0][2]
    steps = Checkpointer(two[0] / "b").steps()
    ends = succeed(tasks(place, "fit b; fit c stop 3"), code=EXIT_INTERRUPTED)
    return steps, ends


def test_a_run_that_lost_a_process_goes_on_to_the_same_bits(place, two, again):
    steps, ends = again
    assert steps == [3]
    assert f"resuming {two[0] / 'b'} at step 3" in said(ends[0])
    same_run(place, two[0] / "b", two[0] / "a")


def test_a_sigterm_on_one_stops_all_at_one_step_saved_once(two, again):
    _, ends = again
    told = re.search(r"step (\d+): a process was told to stop", said(ends[0]))
    assert told is not None
    step = int(told[1])
    assert 2 <= step < 6
    assert re.search(rf"interrupted, saved at step {step} in \d.* s; the same", said(ends[0]))
    assert Checkpointer(two[0] / "c").steps() == ([step] if step <= 3 else [3, step])
    assert [line["step"] for line in metrics(two[0] / "c")] == list(range(1, step + 1))


# ---------------------------------------------------------------- long forms


@pytest.mark.long
def test_a_stopped_run_goes_on_to_the_same_bits(place, two, again):
    [first, _] = succeed(tasks(place, "fit c"))
    assert "resuming" in said(first)
    same_run(place, two[0] / "c", two[0] / "a")


@pytest.fixture(scope="module")
def local(place, two):
    """Two runs of which process 1 is killed at step 6, after local saves of 1, 2, 4 and 5.

    The first goes on with both disks; the second's process 1 comes back with an empty one, and of
    a third the disk of process 1 refuses everything; a fourth is told to stop. Each process holds
    half of every array, so the other half is on no disk of its own.
    """
    disk = place / "disk"
    more = [f"--config.train.local_dir={disk}", "--config.train.local_every=1"]
    more += ["--config.mesh.data=1", "--config.mesh.fsdp=4"]
    homes = {}
    for name in ("kept", "replaced", "refused", "halted"):
        shared = Checkpointer(two[0] / name)
        homes[name] = LocalCheckpoints(shared, directory=str(disk), every=1).home.parent
        shared.close()
    first = finish(tasks(place, "fit kept kill 6", *more))
    left = {path.parts[-4] for path in homes["kept"].glob("process-*/*/checkpoints/5")}
    second = finish(tasks(place, "fit kept; fit replaced kill 6", *more))
    shutil.rmtree(homes["replaced"] / "process-1")
    homes["refused"].mkdir(parents=True)
    (homes["refused"] / "process-1").write_text("not a directory")
    third = succeed(
        tasks(place, "fit sound; fit replaced; slow; fit refused; fit halted stop 3", *more),
        code=EXIT_INTERRUPTED,
    )
    for ends in (first, second):
        assert [end[0] for end in ends] == [EXIT_PEER, -signal.SIGKILL], ends
    return left, second, third, homes


@pytest.mark.long
def test_a_killed_run_goes_on_from_the_local_step_to_the_same_bits(place, two, local):
    left, second, _, homes = local
    assert left == {"process-0", "process-1"}
    assert f"resuming {two[0] / 'kept'} at step 5, from the local checkpoints in" in said(second[0])
    same_run(place, two[0] / "kept", two[0] / "sound")
    assert not homes["kept"].exists()


@pytest.mark.long
def test_a_process_without_its_disk_sends_all_to_the_shared_step(place, two, local):
    told = said(local[2][0])
    assert re.search(r"local checkpoints: process 1 \(.*\) has none of step 5; not used", told)
    assert f"resuming {two[0] / 'replaced'} at step 3\n" in told
    same_run(place, two[0] / "replaced", two[0] / "sound")


@pytest.mark.long
def test_a_disk_that_refuses_on_one_process_leaves_the_shared_saves_alone(place, two, local):
    errors = local[2][1][2]
    assert errors.count("warning: process 1 (") == 1
    assert str(local[3]["refused"] / "process-1") in errors
    same_run(place, two[0] / "refused", two[0] / "sound")


@pytest.mark.long
def test_a_sigterm_between_local_saves_saves_in_the_shared_directory(two, local):
    *_, third, homes = local
    step = int(re.search(r"interrupted, saved at step (\d+) in", said(third[0]))[1])
    assert Checkpointer(two[0] / "halted").steps()[-1] == step
    assert not homes["halted"].exists()


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_all_at_one_step(place):
    settings = {
        "loss.weights.name": "uniform",
        "optim.learning_rate": "1e30",
        "optim.warmup_steps": "0",
        "optim.clip_norm": "0",
        "train.save_every": "0",
    }
    more = [f"--config.{key}={value}" for key, value in settings.items()]
    ends = finish(tasks(place, "fit nan", *more))
    assert [end[0] for end in ends] == [1, 1], ends
    told = [set(re.findall(r"step (\d+): loss=", end[2])) for end in ends]
    assert len(told[0]) == 1
    assert told[0] == told[1]
    ids = set(re.findall(r"sum-\d+-\d+", ends[0][2]))
    assert len(ids) > 8  # of the whole batch, not of one process's four rows alone
    assert len(metrics(place / "two" / "nan")) == int(told[0].pop()) - 1


@pytest.mark.long
def test_four_processes_of_which_one_is_killed(place, two):
    ends = finish(tasks(place, "fit four kill 5", count=4, devices=1))
    assert [end[0] for end in ends] == [EXIT_PEER, -signal.SIGKILL, EXIT_PEER, EXIT_PEER], ends
    for process in (0, 2, 3):
        assert "lost: process 1" in ends[process][2]
    succeed(tasks(place, "fit four", count=4, devices=1))
    succeed(tasks(place, "fit whole", count=4, devices=1))
    same_run(place, two[0] / "four", two[0] / "whole")
    # Four processes of one device are two of two: another order of sums and no more.
    for a, b in zip(metrics(two[0] / "whole"), metrics(two[0] / "a"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)


@pytest.mark.long
def test_work_begun_by_three_processes_is_finished_by_two(place, one, two, tmp_path):
    """One of three is killed before its first shard; two others end with the same bytes."""
    shutil.copytree(place / "unscored", tmp_path / "dataset")
    where = [f"--config.run_dir={tmp_path}", f"--config.data.dataset={tmp_path / 'dataset'}"]
    ends = finish(tasks(place, "die 1; score; generate", *where, count=3))
    assert ends[1][0] == -signal.SIGKILL
    assert list((tmp_path / "dataset" / "train").glob("scored-*"))
    succeed(tasks(place, "score; generate", *where))
    assert files(tmp_path / "dataset") == files(one / "dataset")
    assert (tmp_path / "traces.jsonl").read_bytes() == (one / "traces.jsonl").read_bytes()


@pytest.mark.long
def test_a_notice_between_two_loops_stops_before_the_next(place, two):
    ends = succeed(tasks(place, "late; fit never"), code=EXIT_INTERRUPTED)
    assert "a process was told to stop" in said(ends[0])
    assert not (two[0] / "never").exists()


@pytest.mark.long
def test_one_two_and_four_processes_stay_within_the_bound_that_the_page_states(place):
    """Four devices in all three; docs/hosts.md, Exactness."""
    for count in (1, 2, 4):
        succeed(tasks(place, f"score; fit of{count}", count=count, devices=4 // count))
    lines = {n: metrics(place / "two" / f"of{n}") for n in (1, 2, 4)}
    ends = {n: jax.tree.leaves(params(place, place / "two" / f"of{n}")[0]) for n in (1, 2, 4)}
    for n in (2, 4):
        loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines[n], lines[1], strict=True))
        far = max(np.abs(a - b).max() for a, b in zip(ends[n], ends[1], strict=True))
        print(f"{n} processes: loss {loss:.1e}, weights {far:.1e}")
        assert loss <= 2e-6
        assert far <= 1e-6


@pytest.mark.long
def test_on_policy_batches_of_two_processes_are_those_of_one(place, two):
    more = [
        "--config.loss.teacher=live",
        "--config.loss.divergence=reverse_kl",
        "--config.loss.weights.name=uniform",
        "--config.on_policy.fraction=0.6",
        "--config.on_policy.max_new_tokens=16",
        f"--config.train.eval_problems={place / 'problems.jsonl'}",
        "--config.train.eval_problems_every=3",
        "--config.evaluate.grade_truncated=true",
    ]
    # The last number of a few tokens: some start writes a 1.
    asked = [{"prompt": f"{i}+1?", "answer": "1"} for i in range(9)]
    tiny.write_jsonl(place / "problems.jsonl", asked)
    succeed(tasks(place, "fit own2", *more))
    succeed(tasks(place, "fit own1", *more, count=1, devices=4))
    ours, theirs = metrics(two[0] / "own2"), metrics(two[0] / "own1")
    answered = [[line for line in run if "eval/accuracy" in line] for run in (ours, theirs)]
    assert [line["step"] for line in answered[0]] == [0, 3, 6]
    assert answered[0] == answered[1]
    ours, theirs = ([line for line in run if "loss" in line] for run in (ours, theirs))
    assert {line["on_policy/batch"] for line in ours} == {0.0, 1.0}
    for a, b in zip(ours, theirs, strict=True):
        assert a["on_policy/tokens_generated"] == b["on_policy/tokens_generated"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)


@pytest.mark.long
def test_the_commands_themselves_from_traces_to_a_graded_export(place, tmp_path):
    """prepare, score and train as a user starts them, and a SIGTERM to process 0 in between."""
    where = [f"--config.run_dir={tmp_path}", f"--config.data.dataset={tmp_path / 'dataset'}"]
    more = ["--config.data.eval_fraction=0.2", "--config.train.eval_every=3", *where]

    def verb(name, *own):
        words = ["-m", f"dcod_jax.{name}", "--config", str(place / "recipe.py"), *more, *own]
        return launch(2, words)

    early = finish(verb("train"))
    assert [end[0] for end in early] == [1, 1]
    for _, _, errors in early:
        assert "run these first" in errors
        assert "dcod_jax.prepare" in errors
    succeed(verb("prepare"))
    assert [end[0] for end in finish(verb("train"))] == [1, 1]  # not scored yet
    succeed(verb("score"))
    ends = succeed(verb("train"))
    assert "student" in said(ends[0])
    assert (tmp_path / "export" / "model.safetensors").exists()
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {name: row["problems"] for name, row in results["models"].items()} == {
        "teacher": 9,
        "start": 9,
        "student": 9,
    }
    assert [m["step"] for m in metrics(tmp_path) if "eval/nll" in m] == [0, 3, 6]
