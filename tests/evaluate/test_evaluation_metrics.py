"""pass@k and maj@k against brute force, paired differences, groups of answers."""

import itertools
import random

import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.evaluate import metrics
from dcod_jax.evaluate.generations import Generation
from dcod_jax.evaluate.metrics import paired_difference


@pytest.mark.parametrize("total", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(total):
    for correct, k in itertools.product(range(total + 1), range(1, total + 1)):
        marks = [place < correct for place in range(total)]
        subsets = [any(s) for s in itertools.combinations(marks, k)]
        assert metrics.pass_at_k(total, correct, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_refuses_what_cannot_be():
    for total, correct, k in ((4, 1, 5), (4, 5, 1), (4, 0, 0)):
        with pytest.raises(DcodError, match="need 1 <= k <= n"):
            metrics.pass_at_k(total, correct, k)


def brute_majority(answers, correct, k):
    """Every subset, every way to break its ties."""
    outcomes = []
    for subset in itertools.combinations(range(len(answers)), k):
        voted = [answers[i] for i in subset if answers[i] is not None]
        if not voted:
            outcomes.append(0.0)
            continue
        most = max(voted.count(a) for a in voted)
        winners = [a for a in dict.fromkeys(voted) if voted.count(a) == most]
        outcomes.append(np.mean([correct[answers.index(a)] for a in winners]))
    return float(np.mean(outcomes))


def test_majority_at_k_equals_brute_force():
    generator = random.Random(0)
    for _ in range(60):
        total = generator.randint(1, 7)
        answers = [generator.choice(["3", "5", "x+1", None]) for _ in range(total)]
        right = generator.choice(["3", "5", "x+1"])
        correct = [answer == right for answer in answers]
        for k in range(1, total + 1):
            expected = brute_majority(answers, correct, k)
            assert metrics.majority_at_k(answers, correct, k) == pytest.approx(expected)


def test_majority_of_one_and_of_two_is_the_mean():
    """A pair either agrees or is a tie: maj@1 = maj@2 = pass@1 where every answer votes."""
    answers, correct = ["3", "3", "4", "5"], [True, True, False, False]
    for k in (1, 2):
        assert metrics.majority_at_k(answers, correct, k) == pytest.approx(0.5)


def test_majority_of_many_samples_is_drawn_and_near_the_exact_value(monkeypatch):
    answers = ["1"] * 9 + ["2"] * 6 + [None]
    correct = [True] * 9 + [False] * 7
    drawn = metrics.majority_at_k(answers, correct, 8)  # 12870 subsets: 2000 are drawn
    monkeypatch.setattr(metrics, "SUBSETS", 20_000)
    exact = metrics.majority_at_k(answers, correct, 8)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.03)


def test_spellings_of_a_number_vote_together_and_algebra_is_not_done():
    assert metrics.vote_key("$18.0$") == metrics.vote_key("18") == metrics.vote_key("\\text{18}.")
    assert metrics.vote_key("2 dozen eggs") == metrics.vote_key("24 cm") == 24.0
    assert metrics.vote_key("1/2") != metrics.vote_key("0.5")
    assert metrics.vote_key("nan") == "nan"
    assert metrics.vote_key("inf") == metrics.vote_key("\\infty") == "\\infty"


def test_length_bins_hold_everything_once():
    lengths = np.random.default_rng(3).geometric(0.05, 501).tolist()
    ranges = metrics.length_bins(lengths)
    assert len(ranges) == 4
    counts = [sum(low <= n <= high for n in lengths) for low, high in ranges]
    assert sum(counts) == 501
    assert min(counts) > 90
    assert metrics.length_bins([7, 7, 7]) == [(7, 7)]
    assert metrics.length_bins([1, 2, 3, 4], bins=2) == [(1, 2), (3, 4)]


def test_the_ks_of_a_table():
    assert [metrics.ks(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def graded(marks: str) -> list[Generation]:
    return [Generation(str(i), "", "", None, mark == "1", True, 1) for i, mark in enumerate(marks)]


def test_paired_difference_knows_what_both_runs_share():
    first = graded("1" * 50 + "0" * 50)
    second = graded("1" * 60 + "0" * 40)
    mean, low, high = paired_difference(first, second)
    assert mean == pytest.approx(0.1)
    # Only ten problems changed: sd of the mean is sqrt(0.1 * 0.9 / 100) = 0.03.
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03), abs=0.012)
    assert paired_difference(first, list(reversed(second)))[0] == pytest.approx(0.1)
    unseen = 1 - 0.025 ** (1 / 100)  # of the problems, may differ although no one of 100 did
    assert paired_difference(first, first) == pytest.approx((0.0, -unseen, unseen))
    assert paired_difference(second, first)[0] == pytest.approx(-0.1)


def test_paired_difference_refuses_other_problems():
    with pytest.raises(DcodError, match="differ in 1 problems"):
        paired_difference(graded("101"), graded("10"))
