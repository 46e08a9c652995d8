"""Checkpoints: exact, asynchronous, never half-read, and clear when the disk is not."""

import dataclasses
import errno
import gc
import math
import os
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.losses.adaptive import initial
from dcod_jax.parallel import mesh as meshes
from dcod_jax.train import checksums
from dcod_jax.train.checkpoint_reader import read_params, read_record
from dcod_jax.train.checkpointer import ITEMS, Checkpointer, Snapshot, explain, finished
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.types import TrainState

OPTIMIZER = optax.adamw(1e-2)


def make_state(seed=0, rows=64):
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(seed), (rows, 16))}}
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=OPTIMIZER.init(params), loss_state=initial()
    )


@jax.jit
def _advance(state):
    grads = jax.tree.map(jnp.sin, state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.loss_state
    )


advance = jax.jit(_advance.__wrapped__, donate_argnums=0)


def write(run_dir, losses, *, keep=2, best_metric="eval/nll"):
    """A checkpoint after each step with that held-out loss (None: not evaluated)."""
    state, copies = make_state(), []
    checkpointer = Checkpointer(run_dir, keep=keep, best_metric=best_metric)
    for step, loss in enumerate(losses, 1):
        state = advance(state)
        copies.append(jax.tree.map(np.array, state))
        metrics = {} if loss is None else {"eval/nll": loss}
        checkpointer.save(
            Snapshot(
                state=state,
                step=step,
                iterator={"epoch": 0, "row": 4 * step},
                tokens_seen=10**12 + step,
                config={"seed": 7},
                metrics=metrics,
            )
        )
    checkpointer.wait()
    return checkpointer, copies


def best(run_dir):
    """The step that a reader takes for the best of those that are there."""
    return read_params(run_dir, make_state().params, best_metric="eval/nll")[1].step


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_restore_gives_the_bits_that_were_saved_although_the_state_was_donated(tmp_path):
    checkpointer, copies = write(tmp_path, [3.0, 2.0, 4.0, 5.0])
    run = checkpointer.restore(make_state(seed=1))
    assert_equal(run.state, copies[-1])
    assert run.step == 4
    assert (run.iterator, run.tokens_seen) == ({"epoch": 0, "row": 16}, 10**12 + 4)
    assert run.config == {"seed": 7}
    older = checkpointer.restore(make_state(seed=1), step=2)
    assert_equal(older.state, copies[1])
    params, run = read_params(tmp_path, make_state(seed=1).params, step=2)
    assert_equal(params, copies[1].params)
    assert read_record(tmp_path, step=2).metrics == {"eval/nll": 2.0}


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpointer, _ = write(tmp_path, [3.0, 1.0, 2.0, None, 4.0])
    assert checkpointer.steps() == [2, 4, 5]
    assert best(tmp_path) == 2
    again = Checkpointer(tmp_path, keep=2, best_metric="eval/nll")
    assert (again.steps(), best(tmp_path)) == ([2, 4, 5], 2)


def test_a_restart_keeps_the_best_of_the_checkpoints_before_it(tmp_path):
    checkpointer, _ = write(tmp_path, [3.0, 1.0, 2.0])
    checkpointer.close()
    again = Checkpointer(tmp_path, keep=2, best_metric="eval/nll")
    for step in (4, 5, 6):
        again.save(Snapshot(state=make_state(), step=step, metrics={"eval/nll": 5.0}))
    again.close()
    assert (again.steps(), best(tmp_path)) == ([2, 5, 6], 2)


def test_what_a_kill_kept_from_being_removed_is_removed_by_a_start_that_saves_nothing(tmp_path):
    """Step 1 is the best, 2 an older one; NaN is no best."""
    checkpointer, _ = write(tmp_path, [1.0, 2.0, math.nan, 3.0], keep=9)
    checkpointer.close()
    assert (checkpointer.steps(), best(tmp_path)) == ([1, 2, 3, 4], 1)
    Checkpointer(tmp_path, keep=1, best_metric="eval/nll").close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]


def test_a_checkpoint_without_metrics_is_no_warning(tmp_path, caplog):
    checkpointer, _ = write(tmp_path, [None, 1.0])
    checkpointer.close()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_save_leaves_no_numbers_of_tensorstore_in_memory(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(Snapshot(state=make_state(), step=1))
    checkpointer.close()
    lists = [one for one in gc.get_objects() if type(one) is list and len(one) == 1]
    assert not [one for (one,) in lists if type(one) is dict and one.keys() == {"value"}]


def test_without_a_best_metric_only_age_decides(tmp_path):
    checkpointer, _ = write(tmp_path, [1.0, 2.0, 3.0], best_metric="")
    assert (checkpointer.steps(), best(tmp_path)) == ([2, 3], 2)


def test_restores_onto_another_mesh(tmp_path):
    checkpointer, copies = write(tmp_path, [1.0])
    mesh = meshes.make_mesh(2, 4)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=meshes.sharding(mesh, ("embed", None) if x.ndim == 2 else ()),
        ),
        make_state(),
    )
    state = checkpointer.restore(like).state
    kernel = state.params["layers"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 16)
    assert_equal(state, copies[-1])


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(a run with steps 1 and 2, their states); tests damage a copy."""
    place = tmp_path_factory.mktemp("whole") / "run"
    checkpointer, copies = write(place, [2.0, 1.0])
    checkpointer.close()
    return place, copies


@pytest.fixture
def damaged(two_steps, tmp_path):
    return shutil.copytree(two_steps[0], tmp_path / "run")


def largest(directory):
    return max(filter(Path.is_file, directory.rglob("*")), key=lambda file: file.stat().st_size)


def truncate(file, other):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, other):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def of_step_1(file, other):
    shutil.copy(other, file)


def missing(file, other):
    file.unlink()


@pytest.mark.parametrize("item", ["params", "opt_state", "run"])
@pytest.mark.parametrize("damage", [truncate, flip, missing, of_step_1])
def test_a_damaged_file_is_named_and_the_whole_step_offered(damaged, item, damage):
    home = damaged / "checkpoints"
    new, old = largest(home / "2" / item), largest(home / "1" / item)
    damage(new, old)
    said = (
        rf"checkpoints/2 is damaged: {new.relative_to(home / '2')} .*; step 1 is whole: train.on_"
    )
    with pytest.raises(DcodError, match=said):
        Checkpointer(damaged).restore(make_state())
    if item != "opt_state":
        with pytest.raises(DcodError, match=said):
            read_params(damaged, make_state().params)
    assert_equal(read_params(damaged, make_state().params, step=1)[1].step, 1)


def test_one_flipped_bit_in_any_file_is_found(damaged):
    step = damaged / "checkpoints" / "2"
    files = [f for f in step.rglob("*") if f.is_file() and f.parent != step]
    assert len(files) > 15
    for file in files:
        whole = file.read_bytes()
        flip(file, None)
        with pytest.raises(checksums.DamagedCheckpointError, match=f"{file.relative_to(step)} has"):
            checksums.verify(step.parent, 2, [*ITEMS, "metrics"])
        file.write_bytes(whole)
    checksums.verify(step.parent, 2, [*ITEMS, "metrics"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "checksums.json is missing"),
        ("", "checksums.json cannot be read"),
        ("[]", "checksums.json cannot be read"),
        ('{"step": 1, "files": {}}', "checksums.json is of step 1"),
    ],
)
def test_checksums_that_are_no_longer_these_are_refused(damaged, content, said):
    path = damaged / "checkpoints" / "2" / checksums.NAME
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DcodError, match=said):
        Checkpointer(damaged).restore(make_state())


def test_a_checkpoint_under_another_number_is_refused(damaged):
    shutil.move(damaged / "checkpoints" / "1", damaged / "checkpoints" / "9")
    with pytest.raises(DcodError, match=r"checksums\.json is of step 1; step 2 is whole"):
        Checkpointer(damaged).restore(make_state())


def policy(run_dir, what):
    train = {"save_every": 1, "keep": 2, "local_dir": "", "local_every": 0}
    settings = types.SimpleNamespace(**train, on_damaged_checkpoint=what)
    config = types.SimpleNamespace(run_dir=run_dir, train=settings)
    return Checkpoints(config, best_metric="eval/nll")


def test_a_run_goes_on_from_the_whole_step_where_it_may(two_steps, damaged, caplog):
    flip(damaged / "checkpoints" / "2" / "run" / "metadata", None)
    with pytest.raises(DcodError, match="step 1 is whole"):
        policy(damaged, "stop").restore(make_state(), before=9)
    checkpoints = policy(damaged, "previous")
    found = checkpoints.restore(make_state(), before=9)
    assert_equal(found.state, two_steps[1][0])
    assert "run/metadata has checksum" in caplog.text
    assert (damaged / "damaged" / "2" / "run" / "metadata").is_file()
    due = checkpoints.due(2, stop=False)
    assert due is checkpoints.shared
    due.save(dataclasses.replace(found, step=2))
    checkpoints.close()
    assert policy(damaged, "stop").restore(make_state(), before=9).step == 2


def test_what_the_system_refuses_to_read_is_no_damage(damaged, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "metadata")

    for name in ("read_whole", "_checksums"):
        with monkeypatch.context() as patch:
            patch.setattr(checksums, name, refuse)
            with pytest.raises(OSError, match="Too many open files"):
                policy(damaged, "previous").restore(make_state(), before=9)
    with pytest.raises(OSError, match="Too many"), explain(damaged, 2):
        refuse()
    assert not (damaged / "damaged").exists()
    assert policy(damaged, "previous").restore(make_state(), before=9).step == 2


def test_damaged_metrics_are_named_before_orbax_reads_them(damaged):
    truncate(damaged / "checkpoints" / "1" / "metrics" / "metrics", None)
    with pytest.raises(DcodError, match=r"checkpoints/1 is damaged: metrics/metrics has 8 bytes"):
        policy(damaged, "stop")
    assert policy(damaged, "previous").restore(make_state(), before=9).step == 2
    assert (damaged / "damaged" / "1").is_dir()


def test_the_only_checkpoint_is_never_set_aside(damaged):
    shutil.rmtree(damaged / "checkpoints" / "1")
    flip(damaged / "checkpoints" / "2" / "run" / "metadata", None)
    with pytest.raises(DcodError, match="no other checkpoint is whole"):
        policy(damaged, "previous").restore(make_state(), before=9)
    assert finished(damaged / "checkpoints") == [2]


def test_a_save_that_fails_keeps_the_one_before_it(tmp_path, monkeypatch):
    checkpointer, copies = write(tmp_path, [1.0], keep=1)

    def refuse(directory, step):
        raise OSError("the disk is bad")

    monkeypatch.setattr(checksums, "write", refuse)
    checkpointer.save(Snapshot(state=make_state(), step=2))
    with pytest.raises(DcodError, match=r"disk is bad; finished checkpoints \[1\] are untouched"):
        checkpointer.wait()
    assert_equal(Checkpointer(tmp_path).restore(make_state()).state, copies[0])


# ---------------------------------------------------------------- what else is refused


def test_a_half_written_directory_is_not_a_checkpoint(tmp_path):
    checkpointer, _ = write(tmp_path, [2.0])
    checkpointer.close()
    steps = tmp_path / "checkpoints"
    shutil.copytree(steps / "1", steps / "2.orbax-checkpoint-tmp")
    (steps / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    assert Checkpointer(tmp_path).steps() == [1]


def test_another_model_is_refused(tmp_path):
    checkpointer, _ = write(tmp_path, [1.0])
    with pytest.raises(
        DcodError, match=r"has shape \(64, 16\), the model needs \(65, 16\).*of ano"
    ):
        checkpointer.restore(make_state(rows=65))
    with pytest.raises(DcodError, match="of another model"):
        read_params(tmp_path, {"other": {"kernel": jnp.zeros((64, 16))}})


def test_a_step_that_is_not_there_is_refused(tmp_path):
    checkpointer, _ = write(tmp_path, [1.0])
    with pytest.raises(DcodError, match=r"step 9 was expected, but it holds steps \[1\]"):
        checkpointer.restore(make_state(), step=9)
    with pytest.raises(DcodError, match=r"a checkpoint was expected, but it holds steps \[\]"):
        Checkpointer(tmp_path / "empty").restore(make_state())


def test_a_full_disk_is_told_and_the_finished_checkpoints_stay(small_disk):
    checkpointer, copies = write(small_disk, [1.0])
    noise = jax.random.normal(jax.random.key(0), (2000, 1000))
    big = TrainState(jnp.int32(2), {"w": noise}, OPTIMIZER.init({"w": noise}), initial())
    checkpointer.save(Snapshot(state=big, step=2, config={}))
    with pytest.raises(DcodError, match=r"finished checkpoints \[1\].*free disk space"):
        checkpointer.wait()
    state = Checkpointer(small_disk).restore(make_state()).state
    assert_equal(state, copies[0])
