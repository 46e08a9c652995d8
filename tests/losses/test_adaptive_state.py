"""Automatic temperature and TAID from step to step: smoothing, window, state, restart."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adaptive import AUTO, MASK, SEGMENTS, WHERE, B, T, config, ratios, solutions

from dcod_jax.losses import adaptive, weights
from dcod_jax.losses.adaptive import (
    MIN_TEMPERATURE,
    TaidConfig,
)
from dcod_jax.losses.weights import Tokens
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.types import LossState, TrainState


@functools.partial(jax.jit, static_argnums=0)
def retemper(cfg, state, r, mask):
    return adaptive.retemper(cfg, state, Tokens(r, jnp.zeros_like(r), mask, WHERE[1]))


def test_weights_begin_uniform_and_the_first_solution_is_taken_whole():
    state = adaptive.initial()
    r = jnp.asarray(ratios()["from scratch"])
    for name, level in (("sigmoid", 0.5), ("power", 1.0)):
        raw = weights.raw(config(name=name), r, state)
        np.testing.assert_allclose(raw, level, rtol=3e-5)
    cfg = config(smoothing=0.9, offset=AUTO, target_ess=0.8, target_mean=0.4)
    wanted = solutions(cfg)["from scratch"]
    after = retemper(cfg, state, r, jnp.asarray(MASK))
    assert float(after.temperature) == pytest.approx(wanted[0], rel=1e-4)
    assert float(after.offset) == pytest.approx(wanted[1], rel=1e-3)
    after = retemper(cfg, after, jnp.asarray(ratios()["lags"]), jnp.asarray(MASK))
    new = solutions(cfg)["lags"]
    log_temperature = 0.9 * math.log(wanted[0]) + 0.1 * math.log(new[0])
    assert float(after.temperature) == pytest.approx(math.exp(log_temperature), rel=1e-3)
    assert float(after.offset) == pytest.approx(0.9 * wanted[1] + 0.1 * new[1], rel=1e-3)


@pytest.mark.parametrize(
    "target",
    [{"target_ess": 0.995}, {"target_loss": 0.9}, {"unit": "spread", "temperature": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_batch_that_cannot_teach_changes_nothing_bit_for_bit(smoothing, target):
    cfg = config(smoothing=smoothing, offset=AUTO, **target)
    r, mask = jnp.asarray(ratios()["lags"]), jnp.asarray(MASK)
    row, column = np.argwhere(MASK)[0]
    useless = {
        "no completion token": (r, jnp.zeros_like(mask)),
        "NaN": (r.at[row, column].set(jnp.nan), mask),
        "-inf": (r.at[row, column].set(-jnp.inf), mask),
    }
    taught = retemper(cfg, adaptive.initial(), r, mask)
    for name, state in itertools.product(useless, (adaptive.initial(), taught)):
        after = retemper(cfg, state, *useless[name])
        jax.tree.map(np.testing.assert_array_equal, after, state)
    outside = jnp.where(mask, r, jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal, retemper(cfg, adaptive.initial(), outside, mask), taught
    )


def test_a_loss_without_automatic_numbers_keeps_its_state():
    state = adaptive.initial()
    cfg = config(temperature=1.0)
    r = jnp.zeros((B, T))
    assert adaptive.retemper(cfg, state, Tokens(r, r, *WHERE)) is state


@pytest.mark.parametrize("scope", ["prefix", "sequence"])
def test_the_target_is_met_by_the_scoped_weights(scope):
    """By the tokens' weights; one weight a trace: by the traces', however long they are."""
    cfg = config(scope=scope, target_ess=0.9)
    mask = MASK & ((SEGMENTS > 1) | (np.arange(T) % 4 == 0))  # the first of a row are short
    r, where = jnp.asarray(ratios()["both signs"]) * 4, (jnp.asarray(mask), WHERE[1])
    tokens = Tokens(r, jnp.zeros((B, T)), *where)
    state = jax.jit(adaptive.retemper, static_argnums=0)(cfg, adaptive.initial(), tokens)
    w = np.float64(weights.raw(cfg, weights.scoped_signal(cfg, tokens), state))
    places = [(n == SEGMENTS) & (np.arange(B)[:, None] == row) & mask
              for row, n in itertools.product(range(B), (1, 2, 3))]  # fmt: skip
    w = np.array([w[place][0] for place in places]) if scope == "sequence" else w[mask]
    assert w.mean() ** 2 / np.square(w).mean() == pytest.approx(0.9, rel=0.01)
    unscoped = retemper(config(target_ess=0.9), adaptive.initial(), tokens[0], jnp.asarray(mask))
    assert float(unscoped.temperature) > 1.2 * float(state.temperature)


def spread_by_hand(cfg, batches):
    """The deviation in a window that decays by `smoothing` a step, float64, one unit after another.

    batches: the log-ratios [B,T] of each step."""
    values, ages = [], []
    for age, r in enumerate(reversed(batches)):
        for row, n in itertools.product(range(B), (1, 2, 3)):
            own = np.float64(r[row][(SEGMENTS[row] == n) & MASK[row]])
            units = [own.mean()] if cfg.scope == "sequence" else own
            values.extend(units)
            ages.extend([age] * len(units))
    shares = np.float64(cfg.smoothing) ** np.array(ages)
    mean = np.average(values, weights=shares)
    return math.sqrt(np.average(np.square(np.array(values) - mean), weights=shares))


@pytest.mark.parametrize(
    ("scope", "smoothing"), [("sequence", 0.9), ("sequence", 0.0), ("token", 0.5)]
)
def test_the_unit_is_the_deviation_in_a_window_over_the_stream(scope, smoothing):
    cfg = config(scope=scope, smoothing=smoothing, temperature=0.7, unit="spread")
    generator = np.random.default_rng(5)
    batches = [np.float32(generator.normal(-3, 0.5 + i, (B, T))) for i in range(4)]
    state = adaptive.initial()
    uniform = np.asarray(weights.raw(cfg, jnp.asarray(batches[0]), state))
    np.testing.assert_allclose(uniform, 0.5, rtol=3e-5)  # no trace was seen yet
    for i, r in enumerate(batches):
        state = retemper(cfg, state, jnp.asarray(r), jnp.asarray(MASK))
        wanted = 0.7 * spread_by_hand(cfg, batches[: i + 1])
        assert float(state.temperature) == pytest.approx(wanted, rel=2e-5)
    shifted = [retemper(cfg, adaptive.initial(), jnp.asarray(r + 50), jnp.asarray(MASK)).temperature
               for r in batches]  # fmt: skip
    assert float(shifted[0]) == pytest.approx(0.7 * spread_by_hand(cfg, batches[:1]), rel=1e-4)
    # Traces that are all alike: differences by rounding must not be taken for a spread.
    same = retemper(cfg, adaptive.initial(), jnp.full((B, T), -0.3), jnp.asarray(MASK))
    assert float(same.temperature) == np.float32(MIN_TEMPERATURE)


@pytest.mark.parametrize("target", [{"target_ess": 0.995}, {"target_loss": 0.9}], ids=str)
def test_the_solution_carries_no_gradient(target):
    cfg = config(offset=AUTO, smoothing=0.5, **target)

    def of(r):
        after = retemper(cfg, adaptive.initial(), r, WHERE[0])
        found = adaptive.solve(cfg, r, -r, jnp.asarray(MASK))  # its brackets depend on r
        return after.temperature + after.offset + found.temperature + found.offset

    assert not np.any(jax.jit(jax.grad(of))(jnp.asarray(ratios()["lags"])))


def test_only_smoothing_zero_needs_the_log_probs_of_the_same_step():
    assert adaptive.same_step(config(smoothing=0.0))
    assert adaptive.same_step(config(smoothing=0.0, temperature=1.0, offset=AUTO))
    assert not adaptive.same_step(config(smoothing=0.5))
    assert not adaptive.same_step(config(smoothing=0.0, temperature=1.0))


# ---------------------------------------------------------------- TAID


def published(cfg, losses):
    """arXiv 2501.16937, Algorithm 1, with plain numbers: s before each step, and at the end."""
    s, momentum, before, out = cfg.start, 0.0, math.inf, []
    for step, loss in enumerate(losses):
        out.append(s)
        if math.isinf(before):
            before = loss
            continue
        momentum = cfg.beta * momentum + (1 - cfg.beta) * (before - loss) / before
        linear = cfg.start + (cfg.end - cfg.start) * step / cfg.steps
        faster = s + cfg.alpha * (1 - s) / (1 + math.exp(-momentum))
        s, before = min(cfg.end, max(linear, faster)), loss
    return [*out, s]


@pytest.mark.parametrize(
    "cfg",
    [
        TaidConfig(steps=40),
        TaidConfig(start=0.2, end=0.9, alpha=0.2, beta=0.5, steps=10_000),
        TaidConfig(start=0.0, end=0.3, alpha=0.5, beta=0.9, steps=30),
    ],
)
def test_taids_interpolation_is_the_published_loop(cfg):
    generator = np.random.default_rng(3)
    losses = np.float32(3 * np.exp(-0.05 * np.arange(30)) * generator.uniform(0.7, 1.3, 30))
    update = jax.jit(lambda *inputs: adaptive.interpolate(cfg, *inputs))
    state, found = adaptive.initial(), []
    for step, loss in enumerate(losses):
        found.append(float(adaptive.interpolation(cfg, state)))
        state = update(state, jnp.float32(loss), jnp.int32(step))
    found.append(float(adaptive.interpolation(cfg, state)))
    wanted = published(cfg, losses.tolist())
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)
    assert np.all(np.diff(found) >= -1e-7)
    assert found[-1] > found[0]


def test_the_state_is_restored_exactly(tmp_path):
    values = (0.1234567, -3.7654321, 0.4321987, -1.0e-9, 2.7182817, 17.3, -0.7654321, 3.1e-7)
    loss_state = LossState(*(jnp.float32(value) for value in values))
    for name, state in (("1", loss_state), ("2", adaptive.initial())):
        whole = TrainState(jnp.int32(4), {"w": jnp.ones(2)}, {"m": jnp.zeros(2)}, state)
        checkpointer = Checkpointer(tmp_path / name)
        checkpointer.save(Snapshot(state=whole, step=4, config={}))
        checkpointer.wait()
        restored = checkpointer.restore(whole).state
        checkpointer.close()
        jax.tree.map(np.testing.assert_array_equal, restored, whole)
        assert isinstance(restored.loss_state, LossState)
        assert all(
            getattr(restored.loss_state, field.name).dtype == jnp.float32
            for field in dataclasses.fields(LossState)
        )
