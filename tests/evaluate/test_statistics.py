"""Intervals against published and known values, and their coverage."""

import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.evaluate import statistics as stats
from dcod_jax.evaluate.statistics import wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval_has_its_published_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_has_the_width_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert stats.bootstrap_interval(values.tolist()) == (low, high)
    assert stats.bootstrap_interval([0.25] * 9) == (-np.inf, np.inf)  # without bounds: anything
    with pytest.raises(DcodError, match="at least one problem"):
        stats.bootstrap_interval([])


def test_a_share_that_is_the_same_everywhere_is_not_certain():
    assert (
        stats.share_interval([0.0] * 10)
        == stats.wilson(0, 10)
        == pytest.approx((0.0, 0.2775), abs=1e-4)
    )
    assert stats.share_interval([1.0] * 3) == stats.wilson(3, 3)
    for values in ([0.0, 0.5, 1.0], [0.5, 0.5], [0.0, 1.0]):
        assert stats.share_interval(values) == stats.bootstrap_interval(values, bounds=(0.0, 1.0))
    with pytest.raises(DcodError, match="at least one problem"):
        stats.share_interval([])


@pytest.mark.parametrize(
    ("values", "bounds", "low", "high"),
    [
        ([0.0] * 5, (-1.0, 1.0), -0.5218, 0.5218),  # 1 - 0.025^(1/5)
        ([1.0] * 3, (-1.0, 1.0), -0.4152, 1.0),  # 1 - 2 (1 - 0.025^(1/3))
        ([-1.0] * 3, (-1.0, 1.0), -1.0, 0.4152),
        ([0.5] * 10, (0.0, 1.0), 0.3458, 0.6542),  # Clopper and Pearson: 0 of 10 is below 0.3085
        ([0.5], (0.0, 1.0), 0.0125, 0.9875),
        ([0.3 - 0.1, 0.2] * 5, (-1.0, 1.0), -0.1702, 0.4468),  # equal but for rounding
    ],
)
def test_equal_values_have_the_exact_interval_of_what_was_not_seen(values, bounds, low, high):
    """A bootstrap of them would have no width."""
    assert stats.bootstrap_interval(values, bounds=bounds) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    inside = 0
    for trial in range(300):
        values = generator.binomial(4, 0.3, 60) / 4
        low, high = stats.bootstrap_interval(values.tolist(), resamples=500, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.98
