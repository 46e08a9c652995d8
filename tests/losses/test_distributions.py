"""Top-k and a tail bucket: equal to the whole distribution at K = V, rising to it from below."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as reference
from reference_losses import CASES, label

from dcod_jax.losses import distributions
from dcod_jax.losses.distributions import TopK
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.losses.head import VocabHead
from dcod_jax.score.scoring import TAIL_FLOOR, top_k_logprobs

QUICK = {"xla_backend_optimization_level": 0}  # many small programs that run once
TOKENS, V = 9, 37
COARSE = [case for case in CASES if case[0] not in ("todi", "taid")]  # f-divergences


HEAD = VocabHead(1)


def ours(case, *pair):
    """The registry's value of (name, its parameter's value)."""
    entry = DIVERGENCES[case[0]]
    return entry.value(*pair, **({entry.parameter: case[1]} if entry.parameter else {}))


def buckets(ids, logprobs, tail, student):
    return distributions.buckets(TopK(ids, logprobs, tail), student, ids[..., 0], HEAD)[:2]


def _all(pair, student, *inputs):
    def of(case, student):
        values = ours(case, *pair(*inputs, student))
        return values.sum(), values

    found = {}
    for case in CASES:
        gradient, values = jax.grad(functools.partial(of, case), has_aux=True)(student)
        found[label(case)] = (values, gradient)
    return found


@functools.partial(jax.jit, compiler_options=QUICK)
def sparse(ids, logprobs, tail, student):
    """case -> (values, gradient of their sum in the student's logits)"""
    return _all(buckets, student, ids, logprobs, tail)


@functools.partial(jax.jit, compiler_options=QUICK)
def full(teacher, student):
    return _all(distributions.dense, student, teacher)


@functools.cache
def logits():
    generator = np.random.default_rng(0)
    teacher = generator.normal(size=(TOKENS, V)) * 3
    student = 0.6 * teacher + generator.normal(size=(TOKENS, V)) * 2
    return jnp.float32(teacher), jnp.float32(student)


def cached(teacher, k, dtype=np.float32):
    """As a cache holds the teacher: ids, log-probs in its dtype, the tail in float32."""
    ids, logprobs, tail = reference.top_k(reference.log_softmax(teacher), k)
    return jnp.int32(ids), jnp.asarray(logprobs, dtype), jnp.float32(tail)


def test_top_k_with_k_equal_v_is_the_whole_distribution():
    teacher, student = logits()
    wanted = full(teacher, student)
    for case, (value, gradient) in sparse(*cached(teacher, V), student).items():
        np.testing.assert_allclose(value, wanted[case][0], rtol=1e-5, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(gradient, wanted[case][1], rtol=1e-5, atol=1e-6, err_msg=case)


def test_what_scoring_writes_is_what_the_loss_reads():
    teacher, student = logits()
    written = top_k_logprobs(teacher, HEAD, top_k=4)
    for got, wanted in zip(written, cached(teacher, 4), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    wanted = sparse(*cached(teacher, 4), student)
    for case, (value, _) in sparse(*written, student).items():
        np.testing.assert_allclose(value, wanted[case][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_values_and_gradients_equal_float64_over_k_ids_and_the_tail(k):
    teacher, student = logits()
    cache = cached(teacher, k)
    found = sparse(*cache, student)
    log_q = reference.log_softmax(student)
    log_p, log_q_events, event = reference.buckets(*(np.asarray(x) for x in cache), log_q)
    for case in CASES:
        value, gradient = found[label(case)]
        wanted = reference.values(*case, log_p, log_q_events)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=label(case))
        slopes = reference.bucket_gradients(*case, log_p, log_q_events, event, log_q)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6, err_msg=label(case))


def test_the_sparse_error_falls_as_k_grows():
    """Merging events can only lower an f-divergence, so those rise to the whole value from below.

    todi's coefficients and taid's entropy are not of that kind: they only end nearer.
    """
    teacher, student = logits()
    whole = full(teacher, student)
    sizes = (1, 4, 8, V)  # those of the other tests, whose programs are compiled
    found = [sparse(*cached(teacher, k), student) for k in sizes]
    for case in CASES:
        wanted = np.asarray(whole[label(case)][0])
        values = np.stack([step[label(case)][0] for step in found])
        errors = np.abs(values - wanted)
        assert np.all(errors[-1] < errors[0]), label(case)
        if case in COARSE:
            assert np.all(values <= wanted + 1e-5), label(case)
            assert np.all(np.diff(values, axis=0) >= -1e-5), label(case)
            assert np.all(np.diff(errors.mean(1)) < 0), label(case)


def test_a_bfloat16_cache_gives_the_loss_to_its_precision():
    teacher, student = logits()
    exact, stored = (cached(teacher, 8, dtype) for dtype in (np.float32, jnp.bfloat16))
    assert stored[1].dtype == jnp.bfloat16
    log_p = np.asarray(exact[1], np.float64)
    # A log-prob moves by |log p|/256 at most, and the normalisation by their mean: 2 · E|log p|/256
    # in forward KL. The others are as steep in log p as log p - log q is far.
    moved = 2 / 256 * (np.exp(log_p) * np.abs(log_p)).sum(-1) + 1e-3
    wanted = sparse(*exact, student)
    for case, (value, _) in sparse(*stored, student).items():
        error = np.abs(np.asarray(value) - wanted[case][0])
        assert np.all(error < 4 * moved * (1 + np.abs(wanted[case][0]))), case
        assert error.max() > 1e-5, case  # it was rounded at all
    for sums in (jnp.exp(buckets(*stored, student)[i]).sum(-1) for i in (0, 1)):
        np.testing.assert_allclose(sums, 1.0, rtol=1e-6)


TAILS = {  # (log of the teacher's tail, of the student's)
    "both empty": (TAIL_FLOOR, -60.0),
    "the student's empty": (-5.0, -60.0),
    "the student's below float32's rounding": (-3.0, -20.0),
    "the teacher's empty": (TAIL_FLOOR, -1.0),
    "the teacher's is all but everything": (-1e-4, -8.0),
}


@pytest.mark.parametrize("name", TAILS)
def test_extreme_tails_are_finite_and_exact(name):
    teacher_tail, student_tail = TAILS[name]
    generator = np.random.default_rng(4)
    k = 4
    ids = generator.permuted(np.tile(np.arange(V), (TOKENS, 1)), axis=1)[:, :k]
    inside = reference.log_softmax(generator.normal(size=(TOKENS, k)))
    logprobs = np.float32(inside + np.log1p(-np.exp(teacher_tail)))
    log_q = reference.log_softmax(generator.normal(size=(TOKENS, V))) + student_tail
    chosen = reference.log_softmax(generator.normal(size=(TOKENS, k))) + np.log1p(
        -np.exp(student_tail)
    )
    np.put_along_axis(log_q, ids, chosen, -1)
    student = np.float32(log_q + 3.0)
    tail = np.full(TOKENS, teacher_tail, np.float32)
    found = sparse(jnp.int32(ids), jnp.asarray(logprobs), jnp.asarray(tail), jnp.asarray(student))
    log_q = reference.log_softmax(student)
    log_p, log_q_events, event = reference.buckets(ids, logprobs, np.float64(tail), log_q)
    for case in CASES:
        value, gradient = found[label(case)]
        wanted = reference.values(*case, log_p, log_q_events)
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=1e-6, err_msg=label(case))
        slopes = reference.bucket_gradients(*case, log_p, log_q_events, event, log_q)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6, err_msg=label(case))


def test_extreme_logits_give_finite_values_and_gradients_in_buckets():
    ramp, hot = np.linspace(-1e4, 1e4, V), 1e4 * np.eye(V)[1]
    flat, other = 0 * ramp, 1e4 * np.eye(V)[3]
    teacher = np.stack([ramp, ramp, hot, hot, hot, flat, -ramp, flat, other])
    student = np.stack([-ramp, ramp, -hot, hot, flat, hot, other, other, -other])
    for k in (1, 4, V):
        cache = cached(teacher, k)
        assert np.isfinite(cache[1]).all()
        for masked in (False, True):
            logits = jnp.float32(student)
            if masked and k < V:
                logits = VocabHead(1, V - 1).masked(logits)
            for case, (value, gradient) in sparse(*cache, logits).items():
                assert np.isfinite(value).all(), (case, k, value)
                assert np.isfinite(gradient).all(), (case, k)


def test_rows_beyond_the_vocabulary_do_not_reach_the_tail():
    teacher, student = logits()
    cache = cached(teacher, 4)
    wanted = sparse(*cache, student)
    wide = jnp.concatenate([student, jnp.full((TOKENS, 5), 30.0)], axis=-1)
    for case, (value, gradient) in sparse(*cache, VocabHead(1, V).masked(wide)).items():
        np.testing.assert_allclose(value, wanted[case][0], rtol=1e-6, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(gradient[:, :V], wanted[case][1], rtol=1e-6, atol=1e-6)
        assert not np.any(gradient[:, V:])


def test_the_teacher_gets_no_gradient_from_either_distribution():
    teacher, student = logits()
    cache = cached(teacher, 4)

    def of(teacher, logprobs, tail):
        dense = distributions.dense(teacher, student, 2.0)
        sparse = buckets(cache[0], logprobs, tail, student)
        return sum(DIVERGENCES["reverse_kl"].value(*p).sum() for p in (dense, sparse))

    for gradient in jax.grad(of, argnums=(0, 1, 2))(teacher, *cache[1:]):
        assert not np.any(gradient)
