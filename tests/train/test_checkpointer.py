"""Checkpoints: exact, asynchronous, never half-read, and clear when the disk is not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.losses.adaptive import initial
from dcod_jax.parallel import mesh as meshes
from dcod_jax.train.checkpointer import Checkpointer, Snapshot, read_record
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
    params, run = checkpointer.restore_params(make_state(seed=1).params, step=2)
    assert_equal(params, copies[1].params)
    assert read_record(tmp_path, 2).metrics == {"eval/nll": 2.0}


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpointer, _ = write(tmp_path, [3.0, 1.0, 2.0, None, 4.0])
    assert checkpointer.steps() == [2, 4, 5]
    assert checkpointer.best() == 2
    again = Checkpointer(tmp_path, keep=2, best_metric="eval/nll")
    assert (again.steps(), again.best()) == ([2, 4, 5], 2)


def test_a_restart_keeps_the_best_of_the_checkpoints_before_it(tmp_path):
    checkpointer, _ = write(tmp_path, [3.0, 1.0, 2.0])
    checkpointer.close()
    again = Checkpointer(tmp_path, keep=2, best_metric="eval/nll")
    for step in (4, 5, 6):
        again.save(Snapshot(state=make_state(), step=step, metrics={"eval/nll": 5.0}))
    again.close()
    assert (again.steps(), again.best()) == ([2, 5, 6], 2)


def test_a_checkpoint_without_metrics_is_no_warning(tmp_path, caplog):
    checkpointer, _ = write(tmp_path, [None, 1.0])
    checkpointer.close()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_without_a_best_metric_only_age_decides(tmp_path):
    checkpointer, _ = write(tmp_path, [1.0, 2.0, 3.0], best_metric="")
    assert (checkpointer.steps(), checkpointer.best()) == ([2, 3], None)


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


@pytest.mark.parametrize("item", ["params", "opt_state", "run"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_named(tmp_path, item):
    _, copies = write(tmp_path, [2.0, 1.0])
    for file in (tmp_path / "checkpoints" / "2" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DcodError, match=r"checkpoints/2: .*to go on from step 1"):
        Checkpointer(tmp_path).restore(make_state())
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    state = Checkpointer(tmp_path).restore(make_state()).state
    assert_equal(state, copies[0])


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
        checkpointer.restore_params({"other": {"kernel": jnp.zeros((64, 16))}})


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
