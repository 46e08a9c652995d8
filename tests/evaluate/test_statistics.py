"""pass@k and maj@k against brute force, intervals against known values, loops and groups."""

import itertools
import random

import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.evaluate import statistics as stats


@pytest.mark.parametrize("total", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(total):
    for correct, k in itertools.product(range(total + 1), range(1, total + 1)):
        marks = [place < correct for place in range(total)]
        subsets = [any(s) for s in itertools.combinations(marks, k)]
        assert stats.pass_at_k(total, correct, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_refuses_what_cannot_be():
    for total, correct, k in ((4, 1, 5), (4, 5, 1), (4, 0, 0)):
        with pytest.raises(DcodError, match="need 1 <= k <= n"):
            stats.pass_at_k(total, correct, k)


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
            assert stats.majority_at_k(answers, correct, k) == pytest.approx(expected)


def test_majority_of_one_and_of_two_is_the_mean():
    """A pair either agrees or is a tie: maj@1 = maj@2 = pass@1 where every answer votes."""
    answers, correct = ["3", "3", "4", "5"], [True, True, False, False]
    for k in (1, 2):
        assert stats.majority_at_k(answers, correct, k) == pytest.approx(0.5)


def test_majority_of_many_samples_is_drawn_and_near_the_exact_value(monkeypatch):
    answers = ["1"] * 9 + ["2"] * 6 + [None]
    correct = [True] * 9 + [False] * 7
    drawn = stats.majority_at_k(answers, correct, 8)  # 12870 subsets: 2000 are drawn
    monkeypatch.setattr(stats, "SUBSETS", 20_000)
    exact = stats.majority_at_k(answers, correct, 8)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.03)


def test_spellings_of_a_number_vote_together_and_algebra_is_not_done():
    assert stats.vote_key("$18.0$") == stats.vote_key("18") == stats.vote_key("\\text{18}.")
    assert stats.vote_key("1/2") != stats.vote_key("0.5")
    assert stats.vote_key("nan") == "nan"
    assert stats.vote_key("inf") == "inf"


def test_bootstrap_has_the_width_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert stats.bootstrap_interval(values.tolist()) == (low, high)
    assert stats.bootstrap_interval([0.25] * 9) == (0.25, 0.25)
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
        assert stats.share_interval(values) == stats.bootstrap_interval(values)
    with pytest.raises(DcodError, match="at least one problem"):
        stats.share_interval([])


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    inside = 0
    for trial in range(300):
        values = generator.binomial(4, 0.3, 60) / 4
        low, high = stats.bootstrap_interval(values.tolist(), resamples=500, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_paired_change_of_shares_is_resampled():
    change = [0.25, -0.5, 0.75, 0.0] * 25
    assert stats.change_interval(change) == stats.bootstrap_interval(change)
    low, high = stats.change_interval([1.0, 0.0, 0.0, 0.0, -1.0] * 20)
    assert low == pytest.approx(-high, abs=0.03)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 4 + 4 = 8 and the answer is 8. " * 5, True),
        ("First we add. " + "wait, no. " * 10, True),
        ("ha" * 30, True),
        ("ha" * 29, False),  # 58 characters
        ("0" * 60, True),
        ("We add 1 and 2, which is 3. Then we double it and get 6.\n#### 6", False),
        ("a long sentence that is said three times over and over. " * 3, False),
        ("wait, no. " * 10 + "Now the answer: 5, because of what was said above.", False),
        ("wait, no, I should start again. " * 6 + "wait, no, I sh", True),  # cut off in a loop
        ("", False),
    ],
)
def test_a_loop_at_the_end_is_found(text, expected):
    assert stats.loops(text) is expected


def test_a_loop_of_a_long_unit_in_a_long_text():
    unit = "".join(chr(97 + (k * k) % 23) for k in range(900)) + "."
    assert stats.loops("q" * 50_000 + "." + unit * 4)
    assert not stats.loops("q" * 50_000 + "." + unit * 3)
    assert not stats.loops(unit * 100 + "so it is 4")


def test_length_bins_hold_everything_once():
    lengths = np.random.default_rng(3).geometric(0.05, 501).tolist()
    ranges = stats.length_bins(lengths)
    assert len(ranges) == 4
    counts = [sum(low <= n <= high for n in lengths) for low, high in ranges]
    assert sum(counts) == 501
    assert min(counts) > 90
    assert stats.length_bins([7, 7, 7]) == [(7, 7)]
    assert stats.length_bins([1, 2, 3, 4], bins=2) == [(1, 2), (3, 4)]


def test_difficulties_and_ks():
    groups = [stats.difficulty_group(v) for v in ("Level 3", 3, 4.0, 6.5, None, "")]
    assert groups == ["Level 3", "3", "4", "6-7", "", ""]
    assert [stats.ks(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]
