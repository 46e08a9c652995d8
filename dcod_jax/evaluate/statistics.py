r"""Numbers from graded answers: pass@k, maj@k, bootstrap intervals, groups, degenerate outputs.

Everything takes plain sequences: one list of n verdicts for each problem. Estimates are made for
each problem and averaged over problems; intervals resample problems, never single answers, because
the n answers to one problem are not independent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np

from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import normalise_answer

RESAMPLES = 10_000
Z95 = 1.959963984540054  # 97.5 % point of the normal distribution
SUBSETS = 2_000  # majority votes counted for one problem: all of them, or this many drawn ones
LOOP_REPEATS = 4  # how often a unit must stand at the end of a text to be a loop
LOOP_CHARACTERS = 60  # and how many characters that must cover
LOOP_WINDOW = 4_000  # characters looked at; a unit has at most a fourth of them


def pass_at_k(total: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, hold a correct one.

    1 − C(n−c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374; (4, 1, 2) -> 0.5.
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise DcodError(f"pass@{k} of {correct} correct among {total}: need 1 <= k <= n, c <= n")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def vote_key(answer: str | None) -> Hashable:
    """Equal for answers that count as one in a vote: spelling and number format do not matter.

    "18.0", "$18$" and "18" are one; "1/2" and "0.5" are two, as no algebra is done.
    """
    if answer is None:
        return None
    text = normalise_answer(answer)
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def majority_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int, *, seed: int = 0
) -> float:
    """Expected correctness of the most frequent of k answers drawn without replacement.

    Answers without a final answer (None) have no vote; no vote at all is wrong; a tie is broken at
    random, in expectation. Exact where there are at most SUBSETS subsets, else over as many drawn.
    """
    total = len(answers)
    if len(correct) != total or not 1 <= k <= total:
        raise DcodError(f"maj@{k} of {total} answers and {len(correct)} verdicts: need 1 <= k <= n")
    keys = [vote_key(answer) for answer in answers]
    if math.comb(total, k) <= SUBSETS:
        subsets = itertools.combinations(range(total), k)
    else:
        generator = np.random.default_rng(seed)
        subsets = (generator.permutation(total)[:k].tolist() for _ in range(SUBSETS))
    votes = [_vote(keys, correct, subset) for subset in subsets]
    return float(np.mean(votes))


def _vote(keys: Sequence[Hashable], correct: Sequence[bool], subset: Sequence[int]) -> float:
    counts: dict[Hashable, list[bool]] = {}
    for index in subset:
        if keys[index] is not None:
            counts.setdefault(keys[index], []).append(bool(correct[index]))
    if not counts:
        return 0.0
    most = max(map(len, counts.values()))
    tied = [marks for marks in counts.values() if len(marks) == most]
    return sum(sum(marks) / len(marks) for marks in tied) / len(tied)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (one for each problem), resampled.

    Where all values are equal it has no width; share_interval mends that at 0 and 1.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or not len(data):
        raise DcodError(f"an interval needs values of at least one problem, got {data.shape}")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // len(data))  # draws in memory at one time
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        draws = generator.integers(0, len(data), (stop - start, len(data)))
        means[start:stop] = data[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson score interval (95 %) of a proportion (Wilson 1927); (0, 10) -> (0.0, 0.278)."""
    if total < 1:
        raise DcodError("an interval needs at least one problem")
    share, square = correct / total, Z95 * Z95
    scale = 1 + square / total
    center = (share + square / (2 * total)) / scale
    spread = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / scale
    low = 0.0 if correct == 0 else center - spread
    high = 1.0 if correct == total else center + spread
    return low, high


def share_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of shares in [0, 1], one for each problem.

    Resampled; Wilson's where all are 0 or all are 1, of which every resample is the same again:
    three problems without a right answer, [0, 0, 0], are no proof of 0 but (0.0, 0.562).
    """
    if set(scores) in ({0.0}, {1.0}):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap_interval(scores)


def change_interval(
    change: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, resampled."""
    values = np.asarray(change, np.float64)
    if not np.isin(values, (-1, 0, 1)).all():
        return bootstrap_interval(change, resamples=resamples, seed=seed)
    generator = np.random.default_rng(seed)
    # A resample is n draws with replacement: counts of the values -1, 0, 1 are multinomial.
    shares = np.array([(values == value).mean() for value in (-1, 0, 1)])
    draws = generator.multinomial(len(values), shares, size=resamples)
    low, high = np.quantile((draws[:, 2] - draws[:, 0]) / len(values), [0.025, 0.975])
    return float(low), float(high)


def loops(text: str) -> bool:
    """Whether a text ends in a repetition: one unit at least 4 times, over 60 characters or more.

    A unit has at most 1,000 characters; the last one may be cut off. The Z function of the
    reversed text tells how far each period goes back.
    """
    reverse = text.rstrip()[-LOOP_WINDOW:][::-1]
    length = len(reverse)
    shared = [0] * length  # shared[p]: how far the text before its last p characters equals its end
    left = right = 0
    for place in range(1, length):
        size = min(shared[place - left], right - place) if place < right else 0
        while place + size < length and reverse[size] == reverse[place + size]:
            size += 1
        shared[place] = size
        if place + size > right:
            left, right = place, place + size
        if place + size >= max(LOOP_REPEATS * place, LOOP_CHARACTERS):
            return True
    return False


def length_bins(tokens: Sequence[int], *, bins: int = 4) -> list[tuple[int, int]]:
    """Inclusive ranges of about equally many lengths: [1, 2, 3, 4], bins=2 -> [(1, 2), (3, 4)].

    Equal lengths are never split, so there may be fewer bins.
    """
    ordered = np.sort(np.asarray(tokens, np.int64))
    ranges: list[tuple[int, int]] = []
    for piece in np.array_split(ordered, bins):
        if not len(piece):
            continue
        low, high = int(piece[0]), int(piece[-1])
        low = max(low, ranges[-1][1] + 1) if ranges else low
        if low <= high:
            ranges.append((low, high))
    return ranges


def difficulty_group(value: object) -> str:
    """The name of a difficulty: "Level 3" and 3 stay, 6.5 is "6-7", nothing is ""."""
    if value is None or value == "":
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{math.floor(value)}-{math.floor(value) + 1}"
    return str(int(value)) if isinstance(value, float) else str(value)


def ks(samples: int) -> list[int]:
    """The k that a table shows: powers of two up to n, and n itself; 6 -> [1, 2, 4, 6]."""
    powers = [1 << i for i in range(samples.bit_length()) if 1 << i < samples]
    return [*powers, samples]
