"""The composed loss with cached and live teachers against float64 with frozen weights."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as reference

from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive
from dcod_jax.losses.distill import DistillLoss, LiveTeacher, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import AUTO, WeightConfig
from dcod_jax.parallel.mesh import make_mesh, sharding
from dcod_jax.types import Batch, LossState

B, T, D, E, V, ROWS, K = 4, 13, 8, 6, 29, 32, 5  # V tokens; the heads have ROWS rows
QUICK = {"xla_backend_optimization_level": 0}  # many small programs that run once
KNOBS = {"jsd": ("beta", 0.3), "skew_kl": ("skew", 0.2), "skew_reverse_kl": ("skew", 0.2)}
STATE = LossState(*(jnp.float32(x) for x in (0.8, 0.4, 0.55, 0.0, 1.0, 0.0, 0.0, 0.0)))  # s = 0.55
TEACHERS = ("cached", "live")


def config(divergence="forward_kl", teacher="live", weights=None, **changes) -> LossConfig:
    values = {
        "name": "sigmoid",
        "temperature": 1.0,
        "offset": 0.0,
        "clip": 2.0,
        "scope": "token",
        "normalize": "mean",
        "warmup_steps": 0,
    }
    changes = {"beta": 0.3, "skew": 0.2, **changes}
    return LossConfig(divergence, WeightConfig(**values | (weights or {})), teacher, **changes)


@functools.cache
def example():
    """(student (hidden, head), live teacher (hidden, head), batch with its top-k cache)"""
    keys = jax.random.split(jax.random.key(5), 8)
    segments = jnp.array(
        [[1] * 6 + [2] * 7, [1] * 9 + [0] * 4, [1] * 2 + [2] * 5 + [3] * 6, [1] * 13]
    )
    mask = jax.random.bernoulli(keys[0], 0.6, (B, T)) & (segments > 0)
    targets = jax.random.randint(keys[1], (B, T), 0, V)
    teacher = (jax.random.normal(keys[2], (B, T, E)), jax.random.normal(keys[3], (ROWS, E)))
    student = (jax.random.normal(keys[4], (B, T, D)), jax.random.normal(keys[5], (ROWS, D)) * 0.7)
    log_p = logprobs(*teacher).reshape(B * T, V)
    ids, known, tail = reference.top_k(log_p, K)
    picked = np.take_along_axis(log_p, np.asarray(targets).reshape(-1, 1), -1).reshape(B, T)
    batch = Batch(
        tokens=targets,
        targets=targets,
        loss_mask=mask,
        segment_ids=segments,
        positions=jnp.zeros((B, T), jnp.int32),
        teacher_logprobs=jnp.where(mask, jnp.float32(picked), 0.0),
        topk_ids=jnp.int32(ids.reshape(B, T, K)),
        topk_logprobs=jnp.float32(known.reshape(B, T, K)),
        tail_logprobs=jnp.float32(tail.reshape(B, T)),
    )
    return student, teacher, batch


def logprobs(hidden, head, temperature=1.0):
    """[B, T, V] float64 over the tokenizer's V; padding rows left out."""
    logits = np.einsum("btd,vd->btv", np.float64(hidden), np.float64(head))
    return reference.log_softmax(logits[..., :V] / temperature)


def loss_of(cfg, student, teacher, batch, *, mesh=None, valid=V, state=STATE):
    live = LiveTeacher(*teacher) if cfg.teacher == "live" else None
    loss = DistillLoss(cfg, VocabHead(12, valid, mesh))
    sums, stats = loss(*student, batch, step=3, loss_state=state, teacher=live)
    return sums.loss, (sums, stats)


@functools.partial(jax.jit, static_argnames=("cfg", "mesh", "valid"), compiler_options=QUICK)
def both(cfg, student, teacher, batch, *, mesh=None, valid=V):
    """((loss, (sums, stats)), (gradient in hidden, in the head))"""
    of = functools.partial(loss_of, cfg, teacher=teacher, batch=batch, mesh=mesh, valid=valid)
    return jax.value_and_grad(of, has_aux=True)(student)


def by_hand(cfg, *, frozen=None):
    """(loss, gradient in hidden, in the head, weights): float64, weights and teacher constant."""
    student, teacher, batch = example()
    mask = np.asarray(batch.loss_mask)
    targets = np.asarray(batch.targets)[..., None]
    log_q1, log_p1 = logprobs(*student), logprobs(*teacher)
    nll = -np.take_along_axis(log_q1, targets, -1)[..., 0]
    w = np.ones((B, T))
    if cfg.weights.name == "sigmoid":
        w = 1 / (1 + np.exp(nll + np.take_along_axis(log_p1, targets, -1)[..., 0]))
    if cfg.weights.name == "dft":
        w = np.exp(-nll)
    w = np.where(mask, w, 0.0) if frozen is None else frozen
    knob = {"taid": 0.55}.get(cfg.divergence, KNOBS.get(cfg.divergence, (0, 0.0))[1])
    log_p, log_q = (logprobs(*x, cfg.temperature).reshape(-1, V) for x in (teacher, student))
    if cfg.divergence == "nll":
        d, slopes = nll.reshape(-1), np.exp(log_q1) - (np.arange(V) == targets)
    elif cfg.teacher == "live":
        d = reference.values(cfg.divergence, knob, log_p, log_q)
        slopes = reference.gradients(cfg.divergence, knob, log_p, log_q) / cfg.temperature
    else:
        flat = (np.asarray(x).reshape(B * T, -1) for x in (batch.topk_ids, batch.topk_logprobs))
        tail = np.float64(batch.tail_logprobs).reshape(-1)
        log_p, events, event = reference.buckets(*flat, tail, log_q)
        d = reference.values(cfg.divergence, knob, log_p, events)
        slopes = reference.bucket_gradients(cfg.divergence, knob, log_p, events, event, log_q)
    scale = cfg.temperature**2 if cfg.temperature_squared else 1.0
    d, slopes = scale * d.reshape(B, T), scale * slopes.reshape(B, T, V)
    beside, slopes_beside = cfg.anchor * np.where(mask, d, 0), cfg.anchor * slopes * mask[..., None]
    if cfg.divergence != "nll":
        d = (1 - cfg.alpha) * nll + cfg.alpha * d
        of_nll = np.exp(log_q1) - (np.arange(V) == targets)
        slopes = (1 - cfg.alpha) * of_nll + cfg.alpha * slopes
    slopes = slopes * w[..., None] + slopes_beside
    hidden, head = (np.float64(x) for x in student)
    in_head = np.zeros((ROWS, D))
    in_head[:V] = np.einsum("btv,btd->vd", slopes, hidden)
    return (w * d + beside).sum(), np.einsum("btv,vd->btd", slopes, head[:V]), in_head, w


def assert_close(got, wanted, *, rtol=2e-5, atol=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_equal(found, wanted, *, rtol=2e-5):
    (loss, (_, stats)), gradients = found
    np.testing.assert_allclose(loss, wanted[0], rtol=rtol)
    for got, want in zip(gradients, wanted[1:3], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())
    np.testing.assert_allclose(stats.weights, wanted[3], rtol=rtol, atol=1e-7)


SETTINGS = {
    **{f"{d}-{t}": {"divergence": d, "teacher": t} for d in reference.NAMES for t in TEACHERS},
    "nll-live": {"divergence": "nll"},
    # ASFT: dft·nll + 0.1·KL(start‖q), where the "teacher" is the start
    "asft-live": {"alpha": 0.0, "anchor": 0.1, "weights": {"name": "dft", "normalize": "none"}},
    "anchor-cached": {
        "alpha": 0.3,
        "anchor": 0.7,
        "teacher": "cached",
        "weights": {"normalize": "none"},
    },
    "uniform-cached": {"weights": {"name": "uniform"}, "teacher": "cached"},
    "uniform-live": {"weights": {"name": "uniform"}, "divergence": "todi"},
    "alpha-cached": {"alpha": 0.3, "teacher": "cached", "divergence": "reverse_kl"},
    "alpha-live-tempered": {"alpha": 0.3, "temperature": 2.0},
    "tempered": {"divergence": "reverse_kl", "temperature": 0.7},
    "tempered-not-squared": {"divergence": "jsd", "temperature": 2.0, "temperature_squared": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradients_equal_float64_with_frozen_weights(name):
    cfg = config(**SETTINGS[name])
    assert_equal(both(cfg, *example()), by_hand(cfg))


@pytest.mark.parametrize(
    ("divergence", "teacher"),
    [
        *(("todi", teacher) for teacher in TEACHERS),
        *(
            pytest.param(*own, marks=pytest.mark.long)
            for own in itertools.product(reference.NAMES, TEACHERS)
            if own[0] != "todi"
        ),
    ],
)
def test_unit_weights_are_the_unweighted_loss_bit_for_bit(divergence, teacher):
    """A sigmoid at this offset is exactly 1: its product must not touch a bit."""
    unweighted = config(divergence, teacher, {"name": "uniform"})
    ones = config(divergence, teacher, {"offset": 1e6})
    (loss, (sums, stats)), gradients = both(unweighted, *example())
    (loss1, (sums1, _)), gradients1 = both(ones, *example())
    jax.tree.map(np.testing.assert_array_equal, (loss1, gradients1), (loss, gradients))
    np.testing.assert_array_equal(sums1.weight, sums.count.astype(jnp.float32))
    del stats


def test_cached_equals_live_to_the_precision_of_the_cache():
    student, teacher, batch = example()
    log_p = logprobs(*teacher).reshape(B * T, V)
    ids, known, tail = reference.top_k(log_p, V)
    for dtype, rtol in ((jnp.float32, 2e-5), (jnp.bfloat16, 0.02)):
        whole = dataclasses.replace(
            batch,
            topk_ids=jnp.int32(ids.reshape(B, T, V)),
            topk_logprobs=jnp.asarray(known.reshape(B, T, V), dtype),
            tail_logprobs=jnp.float32(tail.reshape(B, T)),
        )
        for divergence in ("forward_kl", "todi"):
            (cached, _), slopes = both(config(divergence, "cached"), student, teacher, whole)
            (live, _), wanted = both(config(divergence), student, teacher, batch)
            np.testing.assert_allclose(cached, live, rtol=rtol)
            for got, want in zip(slopes, wanted, strict=True):
                np.testing.assert_allclose(got, want, atol=rtol * float(jnp.abs(want).max()))


@pytest.mark.parametrize("rows", [V, V + 9])
def test_the_padded_vocabulary_of_either_model_does_not_matter(rows):
    student, (teacher_hidden, teacher_head), batch = example()
    cut = jnp.concatenate([teacher_head[:V], jnp.full((rows - V, E), 40.0)])
    for divergence in ("reverse_kl", "taid"):
        cfg = config(divergence)
        found = both(cfg, student, (teacher_hidden, cut), batch)
        assert_equal(found, by_hand(cfg))
        assert not np.any(found[1][1][V:])
    short = teacher_head[: V - 1]
    with pytest.raises(DcodError, match=re.escape(f"have {V - 1} and {ROWS} vocabulary rows")):
        both(config(), student, (teacher_hidden, short), batch)
    with pytest.raises(DcodError, match="vocabulary rows"):
        both(config(), student, (teacher_hidden, cut), batch, valid=None)


def head_positions(batch, capacity):
    at = np.full((B, capacity), T, np.int32)
    for row, mask in enumerate(np.asarray(batch.loss_mask)):
        at[row, : mask.sum()] = np.flatnonzero(mask)
    return jnp.asarray(at)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(
    ("scope", "normalize"),
    [
        ("token", "mean"),
        ("prefix", "sequence"),
        pytest.param("sequence", "none", marks=pytest.mark.long),
    ],
)
def test_the_compact_head_equals_the_whole_one(teacher, scope, normalize):
    cfg = config("todi", teacher, {"scope": scope, "normalize": normalize, "warmup_steps": 9})
    (hidden, head), live, batch = example()
    (loss, (sums, stats)), gradients = both(cfg, *example())
    at = head_positions(batch, int(batch.loss_mask.sum(1).max()) + 3)
    take = functools.partial(jnp.take_along_axis, indices=jnp.minimum(at, T - 1), axis=1)
    small = dataclasses.replace(
        batch,
        head_positions=at,
        topk_ids=jnp.take_along_axis(batch.topk_ids, jnp.minimum(at, T - 1)[..., None], 1),
        topk_logprobs=jnp.take_along_axis(
            batch.topk_logprobs, jnp.minimum(at, T - 1)[..., None], 1
        ),
        tail_logprobs=take(batch.tail_logprobs),
    )

    (got, (got_sums, got_stats)), slopes = both(cfg, (hidden, head), live, small)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for a, b in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
    assert_close(got_sums, sums)
    used = np.asarray(at) < T
    for name in ("weights", "student_logprobs", "divergence"):
        np.testing.assert_allclose(
            np.asarray(getattr(got_stats, name))[used],
            np.asarray(getattr(stats, name))[np.asarray(batch.loss_mask)],
            rtol=1e-4,
            atol=1e-6,
        )
    assert not np.any(np.asarray(got_stats.weights)[~used])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_gradient_flows_through_weights_teacher_or_automatic_temperature(teacher):
    auto = {"temperature": AUTO, "offset": AUTO, "smoothing": 0.0}
    cfg = config("reverse_kl", teacher, auto | {"target_loss": 0.0, "target_ess": 0.9})
    student, live, batch = example()

    def of(student, live, known):
        batch_ = dataclasses.replace(batch, topk_logprobs=known)
        seen = LiveTeacher(*live) if teacher == "live" else None
        tokens = DistillLoss(cfg, VocabHead(12, V)).observe(*student, batch_, teacher=seen)
        state = adaptive.retemper(cfg.weights, adaptive.initial(), tokens)
        return loss_of(cfg, student, live, batch_, state=state)

    run = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    found, (slopes, *others) = run(student, live, batch.topk_logprobs)
    assert not any(np.any(x) for x in jax.tree.leaves(others))
    frozen = np.float64(found[1][1].weights)
    in_mask = frozen[np.asarray(batch.loss_mask)]
    assert in_mask.mean() == pytest.approx(0.5, rel=0.01)  # solved here, from these log-probs
    assert in_mask.mean() ** 2 / np.square(in_mask).mean() == pytest.approx(0.9, rel=0.01)
    assert in_mask.std() > 0.1
    assert_equal((found, slopes), by_hand(cfg, frozen=frozen))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_batch_and_vocabulary_sharded_over_eight_devices(teacher):
    mesh = make_mesh(2, 2, tensor=2)
    rows, head = sharding(mesh, ("batch",)), sharding(mesh, ("vocab", "embed"))
    (hidden, student_head), (teacher_hidden, teacher_head), batch = example()
    placed = (
        (jax.device_put(hidden, rows), jax.device_put(student_head, head)),
        (jax.device_put(teacher_hidden, rows), jax.device_put(teacher_head, head)),
        jax.device_put(batch, rows),
    )
    divergence, scope = {"cached": ("todi", "token"), "live": ("taid", "prefix")}[teacher]
    cfg = config(divergence, teacher, {"scope": scope})
    found = both(cfg, *placed, mesh=mesh)
    assert_close(found, both(cfg, *example()), atol=2e-5)
    assert found[1][1].sharding.is_equivalent_to(head, 2)


def test_a_teacher_that_is_not_there_is_asked_for():
    student, _, batch = example()
    with pytest.raises(DcodError, match=r"score\.top_k"):
        loss_of(config(teacher="cached"), student, (), dataclasses.replace(batch, topk_ids=None))
