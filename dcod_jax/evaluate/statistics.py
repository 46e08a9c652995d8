"""95 % intervals of proportions and of means over problems.

Resampling draws problems, never single answers: the answers to one problem are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from dcod_jax.errors import DcodError

RESAMPLES = 10_000
_VALUES_AT_ONCE = 4_000_000  # drawn values in memory at one time


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 10) -> (0.0, 0.278)."""
    if total < 1:
        raise DcodError("an interval needs at least one problem")
    low, high = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of one value for each problem.

    Equal values give an interval without width.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or not len(data):
        raise DcodError(f"an interval needs values of at least one problem, got {data.shape}")
    if (data == data[0]).all():  # scipy refuses a single value
        return float(data[0]), float(data[0])
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

    Resampled, but Wilson's where all shares are 0 or all are 1: every resample would be the same,
    and three problems without a right answer prove no 0: [0, 0, 0] -> (0.0, 0.562).
    """
    if set(scores) in ({0.0}, {1.0}):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap_interval(scores)
