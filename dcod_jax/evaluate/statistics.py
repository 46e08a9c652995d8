"""95 % intervals of proportions and of means over problems.

Resampling draws problems, never single answers: the answers to one problem are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcod_jax.errors import DcodError

RESAMPLES = 10_000
_VALUES_AT_ONCE = 4_000_000  # drawn values in memory at one time


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 10) -> (0.0, 0.278)."""
    if total < 1:
        raise DcodError("an interval needs at least one problem")
    from scipy import stats  # a second to import, and wanted only where answers are graded

    low, high = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def equal(values: np.ndarray) -> bool:
    """Whether values differ by rounding only, so that resampling them shows no spread."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max(initial=0.0))


def unanimous(value: float, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Interval of the mean of numbers within bounds, of which `count` drawn ones were all equal.

    At most a share s = 1 - 0.025^(1/count) of all numbers is another one, the exact upper limit of
    a proportion of which nothing was seen (Clopper and Pearson 1934; near 3.7/count, cf. the "rule
    of three" of Hanley and Lippman-Hand 1983), and those lie anywhere within bounds:
    0, 5, (-1, 1) -> (-0.522, 0.522).
    """
    from scipy import stats

    share = stats.binomtest(0, count).proportion_ci(0.95, method="exact").high
    low, high = (value + share * (bound - value) for bound in bounds)
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of one value for each problem; all are within bounds.

    Equal values, of which every resample is the same, have the interval of `unanimous`.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or not len(data):
        raise DcodError(f"an interval needs values of at least one problem, got {data.shape}")
    if equal(data):
        return unanimous(float(data[0]), len(data), bounds)
    from scipy import stats

    found = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _VALUES_AT_ONCE // len(data)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def share_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of shares in [0, 1], one for each problem.

    Resampled, but Wilson's where all shares are 0 or all are 1, as with one answer a problem:
    three problems without a right answer prove no 0: [0, 0, 0] -> (0.0, 0.562).
    """
    if set(scores) in ({0.0}, {1.0}):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap_interval(scores, bounds=(0.0, 1.0))
