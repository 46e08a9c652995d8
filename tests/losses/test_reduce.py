"""Sums over the global batch, one division."""

import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.losses import reduce


def sums_of(logprobs, weights, mask):
    logprobs, weights = jnp.float32(logprobs), jnp.float32(weights)
    mask = jnp.asarray(mask, bool)
    own = (logprobs, jnp.zeros_like(logprobs), weights, -logprobs, -weights * logprobs)
    return reduce.token_sums(reduce.TokenStats(*own), mask, jnp.ones_like(mask, jnp.int32))


BATCH = ([[-1.0, -2.0, -9.0]], [[0.5, 0.25, 7.0]], [[1, 1, 0]])


@pytest.mark.parametrize(
    ("normalize", "loss"), [("mean", 1.0 / 0.75), ("none", 0.5), ("sequence", 0.5)]
)
def test_the_divisor_is_the_weight_sum_for_mean_and_the_count_else(normalize, loss):
    sums = sums_of(*BATCH)  # Σwd = .5 + .5, Σw = .75, Σm = 2
    np.testing.assert_allclose(reduce.finish(sums, normalize), loss, rtol=1e-6)
    np.testing.assert_allclose(reduce.mean_nll(sums), 1.5, rtol=1e-6)
    gradients = reduce.mean_gradients({"w": jnp.ones(2)}, sums, normalize)
    np.testing.assert_allclose(gradients["w"], 1 / (0.75 if normalize == "mean" else 2), rtol=1e-6)


def test_adding_is_taking_the_batches_together_not_averaging_their_means():
    one = sums_of([[-1.0, -1.0, -1.0]], [[1.0, 1.0, 1.0]], [[1, 1, 1]])
    two = sums_of([[-5.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]], [[1, 0, 0]])
    total = reduce.add(reduce.add(reduce.zero(), one), two)
    assert float(reduce.finish(total, "none")) == 2.0  # (1+1+1+5)/4; a mean of means says 3
    assert (int(total.count), int(total.tokens)) == (4, 6)


def test_counts_are_exact_beyond_what_float32_counts():
    """9,000 rows of 2,047 tokens of which 2,045 are supervised: 18 million and more."""
    mask = np.ones((9000, 2047), bool)
    mask[:, :2] = False
    own = jnp.broadcast_to(jnp.float32(0), mask.shape)
    sums = reduce.token_sums(
        reduce.TokenStats(*[own] * 5), jnp.asarray(mask), jnp.ones(mask.shape, jnp.int32)
    )
    assert (int(sums.count), int(sums.tokens)) == (9000 * 2045, 9000 * 2047)


@pytest.mark.parametrize("normalize", ["mean", "none", "sequence"])
@pytest.mark.parametrize("weight", [1.0, 0.0, 1e-42])
def test_nothing_to_divide_by_gives_zero_and_no_nan(normalize, weight):
    mask = [[0, 0]] if weight == 1.0 else [[1, 1]]
    sums = sums_of([[-3.0, -4.0]], [[weight, weight]], mask)
    gradients = reduce.mean_gradients({"w": jnp.zeros(3)}, sums, normalize)
    assert np.isfinite(reduce.finish(sums, normalize))
    assert not np.any(gradients["w"])
    if not np.any(mask):
        assert float(reduce.finish(sums, normalize)) == 0.0
        assert np.isnan(reduce.mean_nll(sums))
