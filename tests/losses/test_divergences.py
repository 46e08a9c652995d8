"""Each divergence: values and gradients against float64, against TRL, its range and its zeros."""

import ast
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_losses import CASES, label

from dcod_jax.losses import distributions, weights
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import WeightConfig

# Many small programs that run once: their compilation is what costs.
QUICK = {"xla_backend_optimization_level": 0}


def ours(case, *pair):
    """The registry's value of (name, its parameter's value)."""
    entry = DIVERGENCES[case[0]]
    return entry.value(*pair, **({entry.parameter: case[1]} if entry.parameter else {}))


@functools.partial(jax.jit, static_argnames="temperature", compiler_options=QUICK)
def everything(teacher, student, temperature=1.0):
    """case -> (value per token, gradient of their sum in the student's and the teacher's logits)"""

    def of(case, student, teacher):
        values = ours(case, *distributions.dense(teacher, student, temperature))
        return values.sum(), values

    found = {}
    for case in CASES:
        both = jax.grad(functools.partial(of, case), argnums=(0, 1), has_aux=True)
        (gradient, teachers), values = both(student, teacher)
        found[label(case)] = (values, gradient, teachers)
    return found


def random_logits(seed, tokens, vocab, *, scale=3.0):
    generator = np.random.default_rng(seed)
    teacher, student = (generator.normal(size=(tokens, vocab)) * scale for _ in range(2))
    return jnp.float32(teacher), jnp.float32(student)


def test_every_divergence_of_the_registry_is_a_case():
    assert set(reference.NAMES) == {n for n, entry in DIVERGENCES.items() if entry.value}


@pytest.mark.parametrize(("vocab", "temperature"), [(5, 1.0), (5, 0.7), (5, 4.0), (32003, 1.0)])
def test_values_and_gradients_equal_a_float64_loop(vocab, temperature):
    teacher, student = random_logits(vocab, 12 if vocab == 5 else 7, vocab)
    found = everything(teacher, student, temperature)
    log_p, log_q = (
        reference.log_softmax(np.float64(logits) / temperature) for logits in (teacher, student)
    )
    for case in CASES:
        value, gradient, teachers = found[label(case)]
        wanted = reference.values(*case, log_p, log_q)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=label(case))
        slopes = reference.gradients(*case, log_p, log_q) / temperature
        largest = np.abs(slopes).max()
        np.testing.assert_allclose(
            gradient, slopes, rtol=1e-4, atol=1e-5 * largest, err_msg=label(case)
        )
        assert not np.any(teachers)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_closed_form_gradients_are_finite_differences_of_the_loop(case):
    log_p, logits = (np.float64(x) for x in random_logits(1, 6, 5))
    log_p, log_q = reference.log_softmax(log_p), reference.log_softmax(logits)
    found = np.zeros_like(log_q)
    for v in range(5):
        step = 1e-6 * (np.arange(5) == v)
        up, down = (
            reference.values(*case, log_p, reference.log_softmax(logits + s), frozen_q=log_q)
            for s in (step, -step)
        )
        found[:, v] = (up - down) / 2e-6
    np.testing.assert_allclose(reference.gradients(*case, log_p, log_q), found, atol=2e-9)


def test_where_student_and_teacher_agree_the_value_and_its_gradient_are_zero():
    logits, _ = random_logits(2, 7, 32003)
    log_p = reference.log_softmax(logits)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    for case, (value, gradient, _) in everything(logits, logits, 1.0).items():
        least = entropy if case.startswith("taid") else 0.0
        np.testing.assert_allclose(value, least, rtol=1e-5, atol=2e-6, err_msg=case)
        np.testing.assert_allclose(gradient, 0, atol=2e-7, err_msg=case)


logits5 = st.lists(st.floats(-40, 40, width=32), min_size=5, max_size=5)


@settings(max_examples=150, deadline=None)
@given(teacher=logits5, student=logits5)
def test_no_divergence_is_negative_and_each_keeps_its_bound(teacher, student):
    teacher, student = jnp.float32([teacher]), jnp.float32([student])
    found = {case: float(value[0]) for case, (value, _, _) in everything(teacher, student).items()}
    log_p, log_q = reference.log_softmax(teacher), reference.log_softmax(student)
    rounding = 2e-5  # of log-probabilities around 80
    for name, knob in CASES:
        value = found[label((name, knob))]
        if name == "taid":
            target = reference.taid_target(knob, log_p, log_q)
            value += (target * np.log(np.maximum(target, 1e-300))).sum()
        assert value >= -rounding, (name, knob, value)
        if name.startswith("skew"):
            assert value <= -np.log(knob) + rounding, (name, knob, value)
        if name == "jsd" and 0 < knob < 1:
            assert value <= -knob * np.log(knob) - (1 - knob) * np.log1p(-knob) + rounding


def test_the_ends_of_jsd_are_the_plain_kls_and_its_interior_vanishes_there():
    log_p, log_q = (jax.nn.log_softmax(x) for x in random_logits(3, 9, 50))
    forward, reverse, jsd = (DIVERGENCES[n].value for n in ("forward_kl", "reverse_kl", "jsd"))
    np.testing.assert_array_equal(jsd(log_p, log_q, beta=0.0), forward(log_p, log_q))
    np.testing.assert_array_equal(jsd(log_p, log_q, beta=1.0), reverse(log_p, log_q))
    assert np.all(jsd(log_p, log_q, beta=0.999) < 0.02 * reverse(log_p, log_q))
    assert np.all(jsd(log_p, log_q, beta=0.001) < 0.02 * forward(log_p, log_q))


def test_todis_reverse_coefficient_at_the_observed_token_is_the_sigmoid_weight():
    """Read off the gradient: at an event of todi it is -(1-w)·p + w·q·(log q/p + 1)."""
    teacher, student = random_logits(4, 8, 5, scale=1.5)
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    g = jax.grad(lambda log_q: DIVERGENCES["todi"].value(log_p, log_q).sum())(log_q)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    coefficient = (g + p) / (p + q * (log_q - log_p + 1))
    cfg = WeightConfig("sigmoid", 1.0, 0.0, 2.0, "token", "none", 0)
    weight = weights.raw(cfg, log_q - log_p, None)
    clear = jnp.abs(p + q * (log_q - log_p + 1)) > 1e-2
    assert clear.sum() > 30
    np.testing.assert_allclose(coefficient[clear], weight[clear], rtol=2e-4)


def _extremes(vocab):
    """Logits of ±1e4, one-hot teachers that agree and that do not, students that underflow."""
    ramp = np.linspace(-1e4, 1e4, vocab)
    hot, flat = 1e4 * np.eye(vocab)[1], np.zeros(vocab)
    rows = [
        (ramp, -ramp), (ramp, ramp), (hot, -hot), (hot, hot), (hot, np.roll(hot, 1)), (flat, hot),
        (hot, flat), (flat, -1e4 * np.eye(vocab)[2]), (200 * np.sign(ramp), -200 * np.sign(ramp)),
        (np.full(vocab, 1e4), np.full(vocab, -1e4)),
    ]  # fmt: skip
    teacher, student = zip(*rows, strict=True)
    return jnp.float32(np.stack(teacher)), jnp.float32(np.stack(student))


@pytest.mark.parametrize("vocab", [pytest.param(5, marks=pytest.mark.long), 301])
def test_extreme_logits_give_finite_values_and_gradients(vocab):
    teacher, student = _extremes(vocab)
    for temperature in (1.0, 0.1):
        for case, (value, gradient, _) in everything(teacher, student, temperature).items():
            assert np.isfinite(value).all(), (case, temperature, value)
            assert np.isfinite(gradient).all(), (case, temperature)
    masked = [VocabHead(1, vocab - 2).masked(x) for x in (teacher, student)]
    cut = everything(*(x[:, : vocab - 2] for x in (teacher, student)))
    for case, (value, gradient, _) in everything(*masked).items():
        np.testing.assert_allclose(value, cut[case][0], rtol=1e-5, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(gradient[:, : vocab - 2], cut[case][1], rtol=1e-5, atol=1e-5)
        assert not np.any(gradient[:, vocab - 2 :]), case


@pytest.fixture(scope="module")
def generalized_jsd_loss():
    """TRL's, out of the file of its GKD trainer, whose import takes seconds."""
    [root] = importlib.util.find_spec("trl").submodule_search_locations
    [file] = Path(root).rglob("gkd_trainer.py")
    functions = ast.walk(ast.parse(file.read_text()))
    name = "generalized_jsd_loss"
    [found] = [node for node in functions if getattr(node, "name", "") == name]
    found.decorator_list = []
    names = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names[name]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_jsd_is_trls_generalized_jsd(generalized_jsd_loss, temperature):
    logits = random_logits(5, 12, 5)
    found = everything(*logits, temperature)
    teacher, student = (torch.tensor(np.float64(x)) for x in logits)
    student.requires_grad_()
    betas = [knob for name, knob in CASES if name == "jsd"]
    assert betas == [0.0, 0.1, 0.5, 0.9, 1.0]
    for beta in betas:
        theirs = generalized_jsd_loss(
            student, teacher, beta=beta, temperature=temperature, reduction="none"
        ).sum(-1)
        (slopes,) = torch.autograd.grad(theirs.sum(), student)
        value, gradient, _ = found[label(("jsd", beta))]
        np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, slopes.numpy(), rtol=1e-4, atol=1e-6)
