"""The composed loss against a naive one, gradients against finite differences, two passes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.data.codec import Columns
from dcod_jax.data.packing import fill_rows
from dcod_jax.errors import DcodError
from dcod_jax.losses import reduce, weights
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead, target_logprobs
from dcod_jax.losses.weights import Tokens, WeightConfig
from dcod_jax.types import Batch

B, T, D, V = 3, 13, 8, 29
SCOPES = ("token", "prefix", "sequence")
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
    return LossConfig(divergence="nll", weights=WeightConfig(**values | changes))


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


def loss_of(cfg, hidden, head_weight, batch, step=3, valid=None):
    loss = DistillLoss(cfg, VocabHead(12, valid))
    sums, stats = loss(hidden, head_weight, batch, step=step)
    return sums.loss, (sums, stats)


@pytest.mark.parametrize(
    ("scope", "normalize"), [("token", "mean"), ("prefix", "sequence"), ("sequence", "none")]
)
def test_values_and_gradients_equal_frozen_weights_on_naive_logits(scope, normalize):
    hidden, head_weight, batch = example()
    cfg = config(scope=scope, normalize=normalize, warmup_steps=9)
    logprobs = plain_logprobs(hidden, head_weight, batch)
    tokens = Tokens(logprobs, batch.teacher_logprobs, batch.loss_mask, batch.segment_ids)
    frozen = weights.weigh(cfg.weights, tokens, 3, None)

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


@pytest.mark.parametrize("scope", ["token", "prefix", "sequence"])
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
        logprobs = target_logprobs(logits, targets)
        return -logprobs, logprobs

    def plain(hidden, head_weight):
        inputs = (hidden, head_weight, batch.targets, batch.loss_mask)
        return VocabHead(12).loss(*inputs, unweighted)[0]

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


@pytest.mark.parametrize(
    ("name", "scope"), [("idft", "token"), ("eaft", "token"), ("eaft", "sequence")]
)
def test_weights_of_an_entropy_match_numpy_on_the_whole_vocabulary(name, scope):
    """V = 29 with 4 rows of padding; the entropies of 25 tokens, and of the 20 most probable."""
    hidden, head_weight, batch = example()
    batch = dataclasses.replace(batch, targets=batch.targets % 25)
    cfg = config(name=name, scope=scope, temperature=0.7)
    _, (_, stats) = loss_of(cfg, hidden, head_weight, batch, valid=25)
    logits = np.einsum("btd,vd->btv", np.float64(hidden), np.float64(head_weight))[..., :25]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.take_along_axis(logprobs, np.asarray(batch.targets)[..., None], -1)[..., 0]
    mask = np.asarray(batch.loss_mask)
    if name == "idft":
        entropy = -(np.exp(logprobs) * logprobs).sum(-1)
        gamma = np.clip(np.exp(-(q + entropy)), 0.1, 2)
        wanted = np.exp(gamma * q)
    else:
        top = np.sort(np.exp(logprobs), -1)[..., -20:]
        top /= top.sum(-1, keepdims=True)
        share = -(top * np.log(top)).sum(-1) / np.log(20)
        wanted = share ** (1 / 0.7)
        if scope == "sequence":  # the geometric mean over the trace
            for row, segment in itertools.product(range(B), (1, 2, 3)):
                own = (np.asarray(batch.segment_ids)[row] == segment) & mask[row]
                wanted[row, own] = np.exp(np.log(wanted[row, own]).mean()) if own.any() else 0
    np.testing.assert_allclose(np.asarray(stats.weights)[mask], wanted[mask], rtol=2e-5)


def test_weights_of_the_start_read_its_log_probs_and_need_no_pass():
    hidden, head_weight, batch = example()
    start = jnp.where(batch.loss_mask, batch.teacher_logprobs * 0.3 - 0.2, 0.0)
    cfg = config(scope="sequence", temperature=0.3, ratio="start/teacher")
    with pytest.raises(DcodError, match=r"score\.student=True"):
        loss_of(cfg, hidden, head_weight, batch)
    batch = dataclasses.replace(batch, start_logprobs=start)
    _, (_, stats) = loss_of(cfg, hidden, head_weight, batch)
    tokens = Tokens(start, batch.teacher_logprobs, batch.loss_mask, batch.segment_ids)
    plain = config(scope="sequence", temperature=0.3).weights
    np.testing.assert_array_equal(stats.weights, weights.weigh(plain, tokens, 3, None))
    assert _matmuls(cfg, batch) == 3
    assert _matmuls(config(scope="sequence", ratio="student/start"), batch) == 4


def _matmuls(cfg, batch=None):
    """Matrix products over the vocabulary in the program of the gradient."""
    hidden, head_weight, own = example()
    batch = own if batch is None else batch
    function = jax.grad(lambda h: loss_of(cfg, h, head_weight, batch)[0])
    return str(jax.make_jaxpr(function)(hidden)).count("dot_general")


def test_only_weights_that_look_at_other_tokens_pay_for_a_second_pass():
    assert _matmuls(config(**UNIFORM)) == 3  # logits, dhidden, dW
    assert _matmuls(config()) == 3
    assert _matmuls(config(scope="prefix")) == 4
    assert _matmuls(config(normalize="sequence")) == 4


def test_padded_vocabulary_and_row_order_and_padding_content():
    hidden, head_weight, batch = example()
    for scope, normalize in (("token", "mean"), ("prefix", "sequence"), ("sequence", "mean")):
        cfg = config(scope=scope, normalize=normalize)
        loss, _ = loss_of(cfg, hidden, head_weight, batch)
        padded = jnp.concatenate([head_weight, 50 * jnp.ones((5, D))])
        _, (sums, _) = loss_of(cfg, hidden, padded, batch, valid=V)
        np.testing.assert_allclose(sums.loss, loss, rtol=1e-6)
        order = jnp.array([2, 0, 1])
        reordered = jax.tree.map(lambda x, order=order: x[order], batch)
        np.testing.assert_allclose(
            loss_of(cfg, hidden[order], head_weight, reordered)[0], loss, rtol=1e-6
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


@pytest.mark.parametrize(("scope", "normalize"), [("token", "mean"), ("sequence", "sequence")])
def test_weights_of_traces_multiply_their_tokens_in_any_packing(scope, normalize):
    """Four traces of their own hidden states, packed in two ways, each against float64."""
    generator = np.random.default_rng(5)
    own = np.array([0.5, 0.0, 2.0, 1.25], np.float32)
    lengths = np.array([6, 4, 5, 3])
    hidden = [generator.normal(size=(n, D)).astype(np.float32) for n in lengths]
    logprobs = [-3 * generator.random(n).astype(np.float32) for n in lengths]
    ids = [generator.integers(0, V, n).astype(np.int32) for n in lengths]
    matrix = generator.normal(size=(V, D)).astype(np.float32)
    cfg = config(scope=scope, normalize=normalize)
    found, compiled = [], jax.jit(loss_of, static_argnums=0)
    for order, counts in (([0, 1, 2, 3], [2, 1, 1]), ([3, 1, 0, 2], [1, 1, 2])):
        columns = Columns(
            token_ids=np.concatenate([ids[i] for i in order]),
            completion_mask=np.concatenate([np.arange(lengths[i]) >= 2 for i in order]),
            logprobs=np.concatenate([logprobs[i] for i in order]),
            lengths=lengths[order],
            weights=own[order],
        )
        fields = fill_rows(columns, counts, T, capacity=T)
        index = fields.pop("trace_index")
        states = np.zeros((*index.shape, D), np.float32)
        for place, number in enumerate(order):
            states[index == place] = hidden[number]
        batch = Batch(**{name: jnp.asarray(value) for name, value in fields.items()})
        _, (sums, stats) = compiled(cfg, states, matrix, batch)
        bare = dataclasses.replace(batch, trace_weights=None)
        _, (_, unweighted) = compiled(cfg, states, matrix, bare)
        at = np.minimum(np.asarray(batch.head_positions), T - 1)
        number = np.take_along_axis(np.where(index >= 0, np.array(order)[index], 0), at, 1)
        factor = own[number].astype(np.float64)
        wanted = np.asarray(unweighted.weights, np.float64) * factor
        np.testing.assert_allclose(stats.weights, wanted, rtol=1e-6)
        picked = np.asarray(unweighted.student_logprobs, np.float64)
        np.testing.assert_allclose(sums.loss, -(wanted * picked).sum(), rtol=1e-5)
        np.testing.assert_allclose(sums.weight, wanted.sum(), rtol=1e-5)
        found.append([float(x) for x in (sums.loss, sums.weight, sums.count, sums.nll)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_extreme_logits_stay_finite():
    hidden, head_weight, batch = example()
    for name in weights.WEIGHTS:
        cfg = config(name=name, normalize="none")
        (loss, _), gradients = jax.value_and_grad(loss_of, argnums=(1, 2), has_aux=True)(
            cfg, 1e4 * hidden, head_weight, batch
        )
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in gradients)

    def of(logits, targets, *_):
        return target_logprobs(logits, targets)

    logprobs = VocabHead(8).observe(1e4 * hidden, head_weight, batch.targets, of)
    assert np.isfinite(logprobs).all()
