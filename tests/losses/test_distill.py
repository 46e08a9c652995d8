"""The composed loss against a naive one, gradients against finite differences, two passes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.losses import distill, reduce, weights
from dcod_jax.losses.adaptive import TaidConfig
from dcod_jax.losses.distill import LossConfig, distill_loss
from dcod_jax.losses.head import head_loss, token_logprobs
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.types import Batch

B, T, D, V = 3, 13, 8, 29
UNIFORM = {"name": "uniform", "scope": "token", "normalize": "mean"}


def config(**changes) -> LossConfig:
    values = {
        "name": "sigmoid",
        "temperature": 1.0,
        "offset": 0.0,
        "clip": 2.0,
        "scope": "token",
        "normalize": "mean",
        "warmup_steps": 0,
    }
    return LossConfig(divergence="nll", head_chunk=12, weights=WeightConfig(**values | changes))


def example():
    keys = jax.random.split(jax.random.key(3), 5)
    segments = jnp.array([[1] * 6 + [2] * 7, [1] * 9 + [0] * 4, [1] * 2 + [2] * 5 + [3] * 6])
    mask = jax.random.bernoulli(keys[0], 0.7, (B, T)) & (segments > 0)
    batch = Batch(
        tokens=jnp.zeros((B, T), jnp.int32),
        targets=jax.random.randint(keys[1], (B, T), 0, V),
        loss_mask=mask,
        segment_ids=segments,
        positions=jnp.zeros((B, T), jnp.int32),
        teacher_logprobs=jnp.where(mask, -3 * jax.random.uniform(keys[2], (B, T)), 0.0),
    )
    hidden = jax.random.normal(keys[3], (B, T, D))
    return hidden, jax.random.normal(keys[4], (V, D)) * 0.5, batch


def plain_logprobs(hidden, head_weight, batch):
    logits = jnp.einsum("btd,vd->btv", hidden, head_weight)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
    return picked[..., 0]


def loss_of(cfg, hidden, head_weight, batch, step=3):
    sums, stats = distill_loss(cfg, hidden, head_weight, batch, step=step)
    return sums.loss, (sums, stats)


@pytest.mark.parametrize("scope", weights.SCOPES)
@pytest.mark.parametrize("normalize", weights.NORMALIZATIONS)
def test_values_and_gradients_equal_frozen_weights_on_naive_logits(scope, normalize):
    hidden, head_weight, batch = example()
    cfg = config(scope=scope, normalize=normalize, warmup_steps=9)
    logprobs = plain_logprobs(hidden, head_weight, batch)
    frozen = weights.weigh(
        cfg.weights, logprobs, batch.teacher_logprobs, batch.loss_mask, batch.segment_ids, 3
    )

    def naive(hidden, head_weight):
        return -(frozen * plain_logprobs(hidden, head_weight, batch)).sum()

    wanted, wanted_gradients = jax.value_and_grad(naive, argnums=(0, 1))(hidden, head_weight)
    (loss, (sums, stats)), gradients = jax.jit(
        jax.value_and_grad(loss_of, argnums=(1, 2), has_aux=True), static_argnums=0
    )(cfg, hidden, head_weight, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(stats.weights, frozen, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats.student_logprobs, logprobs, rtol=1e-5, atol=1e-6)
    assert int(sums.count) == int(batch.loss_mask.sum())
    np.testing.assert_allclose(sums.weight, frozen.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.nll, -jnp.where(batch.loss_mask, logprobs, 0).sum(), rtol=1e-5)


@pytest.mark.parametrize("scope", weights.SCOPES)
def test_gradient_is_the_finite_difference_of_the_frozen_weight_loss(scope):
    hidden, head_weight, batch = example()
    cfg = config(scope=scope, temperature=0.5)
    _, (_, stats) = loss_of(cfg, hidden, head_weight, batch)
    gradient = jax.grad(lambda h: loss_of(cfg, h, head_weight, batch)[0])(hidden)
    direction = jax.random.normal(jax.random.key(9), hidden.shape)
    frozen = np.asarray(stats.weights, np.float64)

    def loss64(hidden, factors):
        logits = np.einsum("btd,vd->btv", hidden, np.asarray(head_weight, np.float64))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logprobs, np.asarray(batch.targets)[..., None], -1)[..., 0]
        factors = frozen if factors is None else factors(picked)
        return -(factors * picked).sum()

    def difference(factors):
        h, e = np.asarray(hidden, np.float64), 1e-5
        along = np.asarray(direction, np.float64)
        return (loss64(h + e * along, factors) - loss64(h - e * along, factors)) / (2 * e)

    slope = float((gradient * direction).sum())
    np.testing.assert_allclose(slope, difference(None), rtol=1e-5)
    if scope == "token":  # with weights that move, the slope is another: the test can fail

        def moving(logprobs):
            r = logprobs - np.asarray(batch.teacher_logprobs, np.float64)
            return np.asarray(batch.loss_mask) / (1 + np.exp(-r / 0.5))

        assert abs(slope - difference(moving)) > 1e-2 * abs(slope)


def test_unit_weights_are_the_unweighted_loss_bit_for_bit():
    hidden, head_weight, batch = example()

    def unweighted(logits, targets, aux, shared):
        logprobs = distill.target_logprobs(logits, targets)
        return -logprobs, logprobs

    def plain(hidden, head_weight):
        return head_loss(
            hidden, head_weight, batch.targets, batch.loss_mask, (), unweighted, chunk=12
        )[0]

    wanted, wanted_gradients = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head_weight)
    ways = [config(**UNIFORM)]
    # A sigmoid this wide at this offset saturates at exactly 1; both in one pass and in two.
    ways += [config(offset=1e6, scope=scope) for scope in ("token", "sequence")]
    for cfg in ways:
        (loss, (sums, _)), gradients = jax.value_and_grad(loss_of, argnums=(1, 2), has_aux=True)(
            cfg, hidden, head_weight, batch
        )
        np.testing.assert_array_equal(loss, wanted)
        jax.tree.map(np.testing.assert_array_equal, gradients, wanted_gradients)
        count = sums.count.astype(jnp.float32)
        np.testing.assert_array_equal(reduce.finish(sums, "mean"), loss * (1.0 / count))


def _matmuls(cfg):
    """Matrix products over the vocabulary in the program of the gradient."""
    hidden, head_weight, batch = example()
    function = jax.grad(lambda h: loss_of(cfg, h, head_weight, batch)[0])
    return str(jax.make_jaxpr(function)(hidden)).count("dot_general")


def test_only_weights_that_look_at_other_tokens_pay_for_a_second_pass():
    assert _matmuls(config(**UNIFORM)) == 3  # logits, dhidden, dW
    assert _matmuls(config()) == 3
    assert _matmuls(config(scope="prefix")) == 4
    assert _matmuls(config(normalize="sequence")) == 4


def test_padded_vocabulary_and_row_order_and_padding_content():
    hidden, head_weight, batch = example()
    for scope, normalize in itertools.product(weights.SCOPES, ("mean", "sequence")):
        cfg = config(scope=scope, normalize=normalize)
        loss, _ = loss_of(cfg, hidden, head_weight, batch)
        padded = jnp.concatenate([head_weight, 50 * jnp.ones((5, D))])
        sums, _ = distill_loss(cfg, hidden, padded, batch, step=3, valid_vocab=V)
        np.testing.assert_allclose(sums.loss, loss, rtol=1e-6)
        order = jnp.array([2, 0, 1])
        turned = jax.tree.map(lambda x, order=order: x[order], batch)
        np.testing.assert_allclose(
            loss_of(cfg, hidden[order], head_weight, turned)[0], loss, rtol=1e-6
        )
        empty = batch.segment_ids == 0
        other = Batch(
            **{
                **{name: getattr(batch, name) for name in ("tokens", "loss_mask", "segment_ids")},
                "targets": jnp.where(empty, 7, batch.targets),
                "positions": jnp.where(empty, 99, batch.positions),
                "teacher_logprobs": jnp.where(empty, -1e4, batch.teacher_logprobs),
            }
        )
        noisy = jnp.where(empty[..., None], 3.0, hidden)
        np.testing.assert_array_equal(loss_of(cfg, noisy, head_weight, other)[0], loss)


def test_extreme_logits_stay_finite():
    hidden, head_weight, batch = example()
    for name in weights.WEIGHTS:
        cfg = config(name=name)
        (loss, _), gradients = jax.value_and_grad(loss_of, argnums=(1, 2), has_aux=True)(
            cfg, 1e4 * hidden, head_weight, batch
        )
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in gradients)
    logprobs = token_logprobs(1e4 * hidden, head_weight, batch.targets, chunk=8)
    assert np.isfinite(logprobs).all()


def test_configuration_errors_name_their_keys():
    assert distill.config_errors(config()) == []
    bad = LossConfig(divergence="kl", head_chunk=0, weights=config(temperature=-1.0).weights)
    text = "\n".join(str(error) for error in distill.config_errors(bad))
    for key in ("loss.divergence='kl'", "loss.head_chunk=0", "loss.weights.temperature=-1.0"):
        assert key in text


WRONG = [  # (what of the loss, what of its weights, what the one message must say)
    ({"divergence": "kl"}, {}, "loss.divergence='kl' is not known; choose one of nll, forward_kl"),
    ({"teacher": "top_k"}, {}, "loss.teacher='top_k' is not known; choose one of cached, live"),
    ({"head_chunk": 0}, {}, "loss.head_chunk=0 must be >= 1"),
    ({"alpha": 1.5}, {}, "loss.alpha=1.5 is out of its range"),
    ({"alpha": math.nan}, {}, "loss.alpha=nan is out of its range"),
    ({"beta": -0.1}, {}, "loss.beta=-0.1 is out of its range"),
    ({"skew": 0.0}, {}, "loss.skew=0.0 must be between 0 and 1"),
    ({"skew": 1.0}, {}, "loss.skew=1.0 must be between 0 and 1"),
    ({"taid": TaidConfig(start=1.0)}, {}, "loss.taid_start=1.0 is out of its range"),
    ({"taid": TaidConfig(start=0.5, end=0.4)}, {}, "loss.taid_end=0.4 is out of its range"),
    ({"taid": TaidConfig(alpha=2.0)}, {}, "loss.taid_alpha=2.0 is out of its range"),
    ({"taid": TaidConfig(beta=1.0)}, {}, "loss.taid_beta=1.0 is out of its range"),
    ({"temperature": 0.0}, {}, "loss.temperature=0.0 must be a finite number > 0"),
    ({"temperature": math.inf}, {}, "loss.temperature=inf must be a finite number > 0"),
    ({"temperature": 2.0}, {}, "loss.temperature=2.0 is nothing for loss.divergence=nll"),
    ({"temperature": 2.0, "divergence": "jsd"}, {}, "set loss.teacher=live, or loss.temperature=1"),
    ({}, {"temperature": "warm"}, "loss.weights.temperature='warm' must be a number or 'auto'"),
    ({}, {"offset": "warm"}, "loss.weights.offset='warm' must be a number or 'auto'"),
    ({}, {"name": "clip", "temperature": "auto"}, "it is for sigmoid, power"),
    ({}, {"name": "power", "offset": "auto"}, "loss.weights.offset='auto' means nothing for"),
    ({}, {"target_loss": 1.0}, "loss.weights.target_loss=1.0 must be in [0, 1)"),
    ({}, {"target_ess": 1.0}, "loss.weights.target_ess=1.0 must be in [0, 1)"),
    ({}, {"target_mean": 0.0}, "loss.weights.target_mean=0.0 must be between 0 and 1"),
    ({}, {"smoothing": 1.0}, "loss.weights.smoothing=1.0 must be in [0, 1)"),
    (
        {},
        {"temperature": "auto", "offset": "auto", "target_loss": 0.0},
        "leave one target for two unknowns",
    ),
    (
        {},
        {"temperature": "auto", "target_ess": 0.9},
        "loss.weights.target_ess=0.9 are two targets for one temperature; set one of them to 0",
    ),
    ({}, {"temperature": "auto", "target_mean": 0.3}, "target_mean=0.3 is not read"),
]


@pytest.mark.parametrize(("loss", "weight", "message"), WRONG, ids=[m[:30] for _, _, m in WRONG])
def test_each_wrong_value_has_its_one_message(loss, weight, message):
    cfg = dataclasses.replace(config(**weight), **loss)
    (error,) = distill.config_errors(cfg)
    assert message in str(error)


def test_what_is_allowed_is_not_refused():
    for loss, weight in (
        ({"divergence": "jsd", "beta": 0.0, "teacher": "live", "temperature": 3.0}, {}),
        ({"divergence": "taid", "taid": TaidConfig(start=0.0, end=1.0), "alpha": 0.0}, {}),
        ({}, {"temperature": "auto", "target_loss": 0.0, "target_mean": 0.3}),
        ({}, {"temperature": "auto", "target_loss": 0.0, "target_ess": 0.9}),
        ({}, {"temperature": "auto", "offset": "auto", "target_mean": 0.3}),
        ({}, {"target_ess": 0.9, "target_mean": 0.3}),  # nothing is automatic
        ({}, {"temperature": "auto", "offset": "auto", "smoothing": 0.0}),
        ({}, {"name": "power", "temperature": "auto"}),
    ):
        assert distill.config_errors(dataclasses.replace(config(**weight), **loss)) == []
