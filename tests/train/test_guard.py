"""Steps that are skipped: bits that stay, the running quantile, what is told, and restarts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcod_jax import config as configs
from dcod_jax.config_checks import config_errors
from dcod_jax.errors import DcodError
from dcod_jax.train import optim as guard
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.metrics import StepMetrics
from dcod_jax.train.optim import OptimConfig, make_optimizer
from dcod_jax.train.settings import loss_config
from dcod_jax.train.step import init_state, make_train_step
from dcod_jax.train.telemetry import Pending, Telemetry
from tests.train import test_train_step as steps

SKIPPING = OptimConfig(
    3e-3, "cosine", 2, 0.1, 0.01, 0.9, 0.95, 1e-8, 1.0, on_nonfinite="skip", max_skipped=2
)


def test_a_step_that_is_not_finite_leaves_every_bit_and_a_restart_goes_on(tmp_path):
    """Good, bad, good equals good, good; a checkpoint between them changes nothing."""
    mesh = steps.make_mesh(devices=jax.devices()[:1])
    optimizer, schedule = make_optimizer(SKIPPING, 100)
    forward = steps.forward_of(steps.loss_config(), mesh)
    step = make_train_step(forward, optimizer, schedule, batch_size=steps.ROWS)
    own = jax.tree.map(jnp.array, steps.params())
    own["norm"]["scale"] = (
        own["norm"]["scale"].at[0].set(-0.0)
    )  # an update of 0 would lose its sign
    state = init_state(own, optimizer, mesh=mesh, model_config=steps.MODEL)
    good = steps.packed()
    bad = dataclasses.replace(good, teacher_logprobs=good.teacher_logprobs.at[0].set(jnp.nan))

    state, values = step(state, good)
    assert (float(values["skipped"]), float(values["skipped_total"])) == (0, 0)
    before = jax.device_get(state)
    state, values = step(state, bad)
    after = jax.device_get(state)
    assert (float(values["skipped"]), float(values["nonfinite"])) == (1, 1)
    assert after.opt_state.skipped == 1
    same = (after.params, after.loss_state, after.opt_state._replace(skipped=np.int32(0)))
    bits = (before.params, before.loss_state, before.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.tobytes(), b.tobytes()), same, bits)

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(Snapshot(state=state, step=2, config={}))
    checkpointer.close()
    found = Checkpointer(tmp_path).restore(jax.tree.map(jnp.zeros_like, state)).state
    without = dataclasses.replace(
        jax.tree.map(jnp.asarray, before), step=jnp.int32(1)
    )  # the same run, had there been no bad batch
    ends = [step(one, good) for one in (state, found, without)]
    rates = [float(values["learning_rate"]) for _, values in ends]
    assert rates[0] == rates[1] == rates[2] > 0
    for one, _ in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, ends[0][0].params, one.params)
        jax.tree.map(np.testing.assert_array_equal, ends[0][0].opt_state.inner, one.opt_state.inner)


def test_a_norm_above_the_running_quantile_is_skipped_and_does_not_enter_it():
    """Against numpy, over more steps than the window holds."""
    optimizer = guard.guarded(optax.sgd(1.0), 2.0)
    update = jax.jit(optimizer.update)
    generator, params = np.random.default_rng(0), {"w": jnp.zeros(2)}
    state, taken, skips = optimizer.init(params), [], 0
    for number in range(260):
        size = float(np.float32(generator.uniform(0.5, 1.5) * (4.0 if number % 7 == 3 else 1.0)))
        known = np.array(taken[-guard.WINDOW :], np.float32)
        limit = 2.0 * np.quantile(known, guard.QUANTILE) if len(known) >= guard.FEWEST else np.inf
        assert float(guard.limit(state, 2.0)) == pytest.approx(limit, rel=1e-5)
        gradient = {"w": jnp.array([size, 0.0])}
        changes, state = update(gradient, state, params, loss=jnp.float32(1), norm=size)
        skip = size > limit
        assert float(changes["w"][0]) == (0.0 if skip else -np.float32(size))
        skips += skip
        taken += [] if skip else [size]
    assert 20 < skips < 40
    assert (int(state.taken), int(state.skipped)) == (260 - skips, skips)


def test_without_a_factor_no_finite_norm_is_too_large():
    optimizer = guard.guarded(optax.sgd(1.0), 0.0)
    state = optimizer.init({"w": jnp.zeros(1)})
    for size in (*[1e-6] * 12, 1e30):
        gradient = {"w": jnp.full(1, size)}
        _, state = optimizer.update(gradient, state, loss=jnp.float32(0), norm=jnp.float32(size))
    assert int(state.skipped) == 0
    _, state = optimizer.update(gradient, state, loss=jnp.float32(jnp.inf), norm=jnp.float32(1))
    assert (int(state.skipped), int(state.taken)) == (1, 13)


class Traces:
    """A dataset whose traces are named by their numbers."""

    def read(self, numbers):
        return [dataclasses.make_dataclass("Trace", ["id"])(f"trace-{n}") for n in numbers]


def test_skipped_steps_are_told_with_their_traces_and_too_many_stop(caplog):
    telemetry = Telemetry.__new__(Telemetry)
    telemetry.dataset = Traces()
    telemetry.config = configs.replace(configs.load_recipe(configs.BASE), {"optim.max_skipped": 2})
    pending = Pending(7, StepMetrics(jnp.zeros(0), ()), np.array([[3, 3, -1], [1, 1, 1]]), {})
    values = {"loss": float("nan"), "grad_norm": 2.0, "skipped_total": 2.0}
    telemetry._skipped(pending, values)
    assert caplog.messages == [
        "step 7 was skipped: loss=nan, grad_norm=2.0; 2 skipped so far, optim.max_skipped=2. "
        "Traces of the batch: trace-1, trace-3"
    ]
    with pytest.raises(DcodError, match=r"step 7 was skipped.*3 skipped.*raise optim\.max_skipped"):
        telemetry._skipped(pending, values | {"skipped_total": 3.0})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"optim.on_nonfinite": "skip", "optim.spike_factor": 1.5}, ""),
        ({"optim.on_nonfinite": "warn"}, "optim.on_nonfinite='warn' must be one of stop, skip"),
        ({"optim.spike_factor": 0.5}, "optim.spike_factor=0.5 must be 0 or a finite number > 1"),
        ({"optim.max_skipped": -1}, "optim.max_skipped=-1 must not be negative"),
    ],
)
def test_what_the_config_may_say(changes, error):
    config = configs.replace(configs.load_recipe(configs.BASE), changes)
    found = config_errors(configs.keys(config), loss_config(config))
    assert [line.startswith(error) for line in found] == ([True] if error else [])
    if not error:
        study = configs.replace(configs.load_recipe(configs.STUDY), changes)
        [line] = config_errors(configs.keys(study), loss_config(study))
        assert line.startswith("study compares runs that take every step")
