"""Curves against float64 loops, intervals against resampling written out."""

import numpy as np
import pytest

from dcod_jax.drift import curves as drift_curves
from dcod_jax.drift.curves import Sequences
from dcod_jax.drift.curves import drift_curves as curves_of
from dcod_jax.errors import DcodError


def example(seed, *, count=12, length=7):
    generator = np.random.default_rng(seed)
    kl = generator.gamma(1.0, 0.3, (count, length))
    lengths = generator.integers(1, length, count)
    mask = np.arange(length) < lengths[:, None]
    return Sequences(kl, mask, np.repeat(np.arange(count // 3), 3))


def mean_alive(kl, mask, t):
    """A loop: sequences that have ended are not in the average."""
    alive = [float(kl[i, t]) for i in range(len(kl)) if mask[i, t]]
    return sum(alive) / len(alive) if alive else float("nan")


def loop_errors(own, other, length):
    """[(R, E, ExAccErr)] for l = 1..length from the definition, in float64 loops."""
    rows, R, E = [], 0.0, 0.0
    for t in range(length):
        R, E = R + mean_alive(*own[:2], t), E + mean_alive(*other[:2], t)
        rows.append((R, E, 100 * (R - E) / E))
    return np.array(rows)


def test_curves_equal_a_loop_over_sequences():
    own, other = example(0), example(1)
    own[0][~own[1]] = np.nan  # what stands behind the end of a sequence is not looked at
    curves = curves_of(own, other, resamples=5)
    wanted = loop_errors(own, other, 7)
    for name, column in (("accumulated", 0), ("reference", 1), ("excess", 2)):
        found = getattr(curves, name).value
        np.testing.assert_allclose(found, wanted[:, column], rtol=1e-12)
    assert np.isnan(wanted[6]).all()  # no sequence is that long: absent, not 0
    assert curves.student_alive.tolist() == own[1].sum(axis=0).tolist()
    assert curves.reach(1) == 5
    assert curves.reach(13) == 0


def test_intervals_equal_resampling_written_out():
    """The same draws, each resample built by copying sequences and averaged in loops."""
    own, other = example(2), example(3)
    found = curves_of(own, other, resamples=300, seed=4)
    draws = np.concatenate(list(drift_curves._draws(4, 300, 4)))
    assert draws.sum(axis=1).tolist() == [4] * 300
    excess = []
    for times in draws:
        pieces = []
        for kl, mask, prompt in (own, other):
            rows = [
                i for g in range(4) for _ in range(int(times[g])) for i in np.where(prompt == g)[0]
            ]
            pieces.append((kl[rows], mask[rows]))
        excess.append(loop_errors(*pieces, 4)[:, 2])
    wanted = np.nanquantile(excess, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.excess.low[:3], wanted[0][:3], rtol=1e-9)
    np.testing.assert_allclose(found.excess.high[:3], wanted[1][:3], rtol=1e-9)
    undefined = np.isnan(excess).mean(axis=0)
    assert (np.isnan(found.excess.low[:4]) == (undefined > 0.01)).all()
    assert np.isnan(found.excess.low[6])


def test_the_interval_covers_a_known_expectation():
    """200 experiments whose true R = E: about 95 % of the intervals hold 0."""
    generator = np.random.default_rng(0)
    mask = np.ones((40, 2), bool)
    inside = 0
    for number in range(200):
        own, other = generator.gamma(1.0, 1.0, (2, 40, 2))
        sets = Sequences(own, mask, np.arange(40)), Sequences(other, mask, np.arange(40))
        curve = curves_of(*sets, resamples=200, seed=number).excess
        inside += curve.low[1] <= 0 <= curve.high[1]
    assert 178 <= inside <= 198  # 190 ± 3 standard deviations, and the bootstrap's own bias


def test_equal_models_have_no_excess_and_zero_error_is_absent():
    same = example(5)
    curves = curves_of(same, same, resamples=50)
    assert np.nanmax(np.abs(curves.excess.value)) < 1e-12
    assert np.isnan([curves.excess.low, curves.excess.high]).all()  # nothing was seen to vary
    zero = same._replace(values=same.values * 0)
    nothing = curves_of(zero, zero, resamples=5).excess
    assert np.isnan(nothing.value).all()


def test_prompts_that_do_not_differ_give_no_interval():
    """One prompt, and several of the same KLs, whose means differ by rounding."""
    values, mask = np.full((4, 3), 0.1), np.ones((4, 3), bool)
    for prompt in (np.zeros(4, int), np.arange(4)):
        same = Sequences(values, mask, prompt)
        curves = curves_of(same, Sequences(values / 3, mask, prompt), resamples=50)
        for curve in (curves.student_kl, curves.accumulated, curves.excess):
            assert np.isfinite(curve.value).all()
            assert np.isnan([curve.low, curve.high]).all()


def test_paired_difference_of_two_students():
    first, second, teacher = example(6), example(7), (example(8), example(9))
    found = drift_curves.excess_difference((first, teacher[0]), (second, teacher[1]), resamples=100)
    wanted = [
        loop_errors(own, other, 4)[:, 2]
        for own, other in zip((first, second), teacher, strict=True)
    ]
    np.testing.assert_allclose(found.value[:4], wanted[1] - wanted[0], rtol=1e-9)
    assert (found.low[:4] <= found.value[:4]).all()
    pair = (first, teacher[0])
    same = drift_curves.excess_difference(pair, pair, resamples=100)
    assert np.nanmax(np.abs(same.value)) == 0  # what both share cancels
    assert np.isnan([same.low, same.high]).all()
    other = first._replace(prompt=first.prompt + 1)
    with pytest.raises(DcodError, match="same prompts"):
        drift_curves.excess_difference(pair, (other, teacher[1]), resamples=100)


def test_sets_that_do_not_belong_together_are_refused():
    own, other = example(0), example(1)
    with pytest.raises(DcodError, match="the same prompts"):
        curves_of(own, other._replace(prompt=other.prompt + 1), resamples=1)
    with pytest.raises(DcodError, match="resamples"):
        curves_of(own, other, resamples=0)
