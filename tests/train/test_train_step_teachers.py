"""Steps with cached and live teachers, automatic temperature and TAID: devices, memory, restart."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_losses as reference
from test_train_step import MODEL, ROWS, VALID, forward_of, packed, params

from dcod_jax.losses.adaptive import MAX_TEMPERATURE, TaidConfig
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import AUTO, WeightConfig
from dcod_jax.models import transformer
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.forward import Forward, TeacherModel
from dcod_jax.train.step import init_state, make_eval_step, make_train_step

K, CAPACITY = 4, 20  # top-k; the head's capacity of a row
TEACHER = dataclasses.replace(MODEL, vocab_size=VALID + 5, hidden_size=40, intermediate_size=44)


ESS = {"target_loss": 0.0, "target_ess": 0.9}


def config(divergence, teacher, *, smoothing, scope="token", target=ESS) -> LossConfig:
    more = {"smoothing": smoothing, **target}
    weights = WeightConfig("sigmoid", AUTO, 0.0, 2.0, scope, "mean", 0, **more)
    taid = TaidConfig(start=0.3, alpha=0.3, beta=0.5, steps=50)
    return LossConfig(divergence, weights, teacher, alpha=0.8, taid=taid)


@functools.cache
def teacher_params():
    return jax.device_get(transformer.init_params(TEACHER, jax.random.key(7)))


def compacted(batch):
    mask = np.asarray(batch.loss_mask)
    at = np.full((ROWS, CAPACITY), mask.shape[1], np.int32)
    for row, supervised in enumerate(mask):
        at[row, : supervised.sum()] = np.flatnonzero(supervised)
    return dataclasses.replace(batch, head_positions=jnp.asarray(at))


def with_cache(batch):
    """A made-up teacher's top-k at the head's positions."""
    logits = 2 * np.random.default_rng(3).normal(size=(ROWS * CAPACITY, VALID))
    cache = reference.top_k(reference.log_softmax(logits), K)
    ids, known, tail = (x.reshape(ROWS, CAPACITY, *x.shape[1:]) for x in cache)
    return dataclasses.replace(
        compacted(batch),
        topk_ids=jnp.int32(ids),
        topk_logprobs=jnp.asarray(known, jnp.bfloat16),
        tail_logprobs=jnp.float32(tail),
    )


@functools.cache
def step_of(cfg, sizes=(1, 1, 1), microbatches=1):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(sizes[0], sizes[1], tensor=sizes[2], devices=devices)
    optimizer = optax.sgd(0.5)
    live = TeacherModel(TEACHER, jnp.float32) if cfg.teacher == "live" else None
    forward = forward_of(cfg, mesh, teacher=live)
    step = make_train_step(
        forward,
        optimizer,
        lambda step: jnp.float32(0.5),
        batch_size=ROWS,
        microbatches=microbatches,
    )
    teacher = () if live is None else (teacher_params(),)
    evaluate = make_eval_step(forward)

    def fresh():
        return init_state(
            jax.tree.map(jnp.array, params()), optimizer, mesh=mesh, model_config=MODEL
        )

    return (
        lambda state, batch: step(state, batch, *teacher),
        fresh,
        lambda state, batch: evaluate(state, batch, *teacher),
    )


def run(cfg, batch, *, steps=3, **options):
    step, fresh, _ = step_of(cfg, **options)
    state, history = fresh(), []
    for _ in range(steps):
        state, values = step(state, batch)
        history.append({name: float(value) for name, value in values.items()})
    return jax.device_get(state), history


CACHED = config("forward_kl", "cached", smoothing=0.0)
KEPT = config("nll", "cached", smoothing=0.0, target={"target_loss": 0.97})
LIVE = config("taid", "live", smoothing=0.9, scope="prefix")


@pytest.mark.parametrize(
    "cfg",
    [CACHED, pytest.param(KEPT, marks=pytest.mark.long), LIVE],
    ids=["cached same step", "kept loss", "live taid smoothed"],
)
def test_devices_microbatches_and_the_compact_head_change_nothing(cfg):
    batch = with_cache(packed()) if cfg is CACHED else packed()
    wanted, history = run(cfg, batch)
    again = with_cache(packed()) if cfg is CACHED else compacted(packed())
    found, other = run(cfg, again, sizes=(2, 2, 2), microbatches=2)

    def close(got, want, start):
        change = np.abs(want - start).max()
        assert change > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * change + 1e-7)

    jax.tree.map(close, found.params, wanted.params, params())
    for name in ("temperature", "offset", "interpolation", "momentum", "previous"):
        got, want = (float(getattr(x.loss_state, name)) for x in (found, wanted))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6), name
    for got, want in zip(other, history, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=3e-4, abs=1e-5, nan_ok=True), key
    if cfg is CACHED:  # solved before the step: in force in the first one, and on target
        assert history[0]["weights/ess"] == pytest.approx(0.9, rel=0.01)
        assert 0 < history[0]["teacher/captured_mass"] < 1
    elif cfg is KEPT:  # neither of the ends
        assert 1.1 < history[0]["weights/temperature"] < 1e3
    else:  # the step before's: uniform at first
        assert history[0]["weights/temperature"] == MAX_TEMPERATURE
        assert history[0]["weights/ess"] == pytest.approx(1.0, rel=1e-6)
        assert history[1]["weights/temperature"] < 100
        assert history[2]["taid/interpolation"] > history[1]["taid/interpolation"] > 0.29
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_restart_goes_on_bit_for_bit_with_the_losss_state(tmp_path):
    step, fresh, evaluate = step_of(LIVE)
    state, _ = step(fresh(), packed())
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(Snapshot(state=state, step=1, config={}))
    checkpointer.wait()
    restored = checkpointer.restore(fresh()).state
    checkpointer.close()
    assert float(restored.loss_state.temperature) < 100
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    held_out = evaluate(state, packed())
    for got, want in zip(
        jax.tree.leaves(evaluate(restored, packed())), jax.tree.leaves(held_out), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    on, off = step(state, packed()), step(restored, packed())
    jax.tree.map(np.testing.assert_array_equal, off, on)


@pytest.mark.parametrize("cfg", [CACHED, LIVE], ids=["cached", "live"])
def test_a_batch_without_completion_tokens_teaches_the_loss_nothing(cfg):
    batch = with_cache(packed()) if cfg is CACHED else packed()
    step, fresh, _ = step_of(cfg)
    state, _ = step(fresh(), batch)
    before = jax.device_get(state)
    empty = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    state, values = step(state, empty)
    jax.tree.map(np.testing.assert_array_equal, state.loss_state, before.loss_state)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    assert float(values["nonfinite"]) == 0


def test_a_bfloat16_teacher_gives_the_loss_of_its_own_logits():
    """As loss.teacher=live runs by default: teacher in bfloat16, student and softmax in float32."""
    weights = WeightConfig("uniform", 1.0, 0.0, 2.0, "token", "mean", 0)
    cfg = LossConfig("forward_kl", weights, "live")
    strong = jax.tree.map(lambda x: 3 * jnp.asarray(x), teacher_params())  # so that rounding shows
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), strong)
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluate = make_eval_step(forward_of(cfg, mesh, teacher=TeacherModel(TEACHER, jnp.bfloat16)))
    batch = packed()
    places = {"segment_ids": batch.segment_ids, "positions": batch.positions}

    def logprobs(model, own, dtype):
        logits = transformer.logits(model, own, batch.tokens, compute_dtype=dtype, **places)
        return reference.log_softmax(np.asarray(logits)[..., :VALID])[np.asarray(batch.loss_mask)]

    log_q = logprobs(MODEL, jax.tree.map(jnp.asarray, params()), jnp.float32)
    wanted, exact = (
        (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
        for log_p in (
            logprobs(TEACHER, half, jnp.bfloat16),
            logprobs(TEACHER, strong, jnp.float32),
        )
    )
    own = jax.tree.map(jnp.asarray, params())
    state = init_state(own, optax.sgd(1.0), mesh=mesh, model_config=MODEL)
    sums = evaluate(state, batch, half)
    found = float(sums.loss) / float(sums.count)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(found - exact) > 1e-4 * exact


WIDE = 1009  # a vocabulary that no other size is
HIDDEN = {MODEL.hidden_size, TEACHER.hidden_size}


@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_no_buffer_of_tokens_times_vocabulary_is_compiled(teacher):
    """In the optimised program of a whole train step, forward and backward, of either model."""
    sizes = (2, 1, 2)
    vocab = WIDE * sizes[2]
    student, live = (dataclasses.replace(c, vocab_size=vocab) for c in (MODEL, TEACHER))
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(sizes[0], sizes[1], tensor=sizes[2], devices=devices)
    cfg = config("todi", teacher, smoothing=0.0, scope="prefix")
    optimizer = optax.sgd(1.0)
    forward = Forward(
        student,
        DistillLoss(cfg, VocabHead(16, None, mesh)),
        jnp.float32,
        teacher=TeacherModel(live, jnp.float32) if teacher == "live" else None,
    )
    step = make_train_step(forward, optimizer, lambda step: jnp.float32(1.0), batch_size=ROWS)
    shapes = transformer.param_shapes(student)
    state = init_state(shapes, optimizer, mesh=mesh, model_config=student, abstract=True)
    inputs = [transformer.param_shapes(live)] if teacher == "live" else []
    batch = with_cache(packed()) if teacher == "cached" else compacted(packed())
    text = step.lower(state, batch, *inputs).compile().as_text()
    widest = 0
    for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text):
        dimensions = {int(size) for size in dims.split(",")}
        if dimensions & HIDDEN:  # an embedding, a head or its gradient
            continue
        assert vocab not in dimensions, f"[{dims}]: the vocabulary is not sharded"
        if WIDE in dimensions:
            widest = max(widest, int(np.prod([int(size) for size in dims.split(",")])) // WIDE)
    # chunk counts the tokens of one shard: 16, of ROWS * CAPACITY = 160 in all.
    assert widest == 16, f"logits of {widest} tokens at one time"
