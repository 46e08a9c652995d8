"""Answers are found by the stated rules, compared right, and nothing a model wrote can stop it."""

import json
import time
from pathlib import Path

import pytest

from dcod_jax.evaluate import answers, spelling
from dcod_jax.evaluate.answers import Extraction, extract_answer, reference_answer
from dcod_jax.evaluate.equality import equal
from dcod_jax.evaluate.grading import Expected, grade, graded

SOLVERS = {
    "6b_finetuning": 286,
    "6b_verification": 515,
    "175b_finetuning": 458,
    "175b_verification": 742,
}


CASES = [
    json.loads(line)
    for file in sorted((Path(__file__).parent / "cases").glob("*.jsonl"))
    for line in file.read_text().splitlines()
]


KINDS = list(dict.fromkeys(case["kind"] for case in CASES))


@pytest.mark.parametrize("kind", KINDS)
def test_cases(kind: str) -> None:
    """Real kinds of answers. "either": both verdicts can be defended, for the stated reason."""
    asked = [case for case in CASES if case["kind"] == kind and not case.get("reason")]
    found = [(case, grade(case["prediction"], case["gold"])) for case in asked]
    assert not [pair for pair in found if pair[1].correct != (pair[0]["expected"] == "correct")]


def test_what_a_pattern_is_skipped_by_is_in_all_that_it_matches() -> None:
    """The words that are looked for before a pattern is tried change nothing but the time."""
    texts = [case[side] for case in CASES[::4] for side in ("prediction", "gold")]
    for key, pattern, new in (*spelling._LATEX, *spelling._PHRASES, *spelling._DIGITS):
        skipped = [text for text in texts if key not in text]
        assert skipped == [pattern.sub(new, text) for text in skipped]
    marks = [(mark, words) for mark, _, words in answers._MARKS.values()]
    for pattern, words in (*marks, (answers._RETRACTED, answers._RETRACTIONS)):
        skipped = [text for text in texts if not any(word in text for word in words)]
        assert skipped
        assert not any(map(pattern.search, skipped))


def test_a_case_with_two_defensible_verdicts_says_why() -> None:
    assert all((case["expected"] == "either") == bool(case.get("reason")) for case in CASES)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7", None),
        ("The answer is 12", None),
        ("#### 1", None),
        ("The answer is 12.\nLet me check", "12"),
        ("so \\boxed{12} and then I", "12"),
        ("so \\boxed{12", None),
    ],
)
def test_a_text_that_was_cut_off_ends_in_no_answer(text: str, answer: str | None) -> None:
    found = extract_answer(text, complete=False)
    assert (found.answer if found else None) == answer
    assert grade(text, Expected("12", complete=False)).correct == (answer == "12")
    assert extract_answer(text) is not None


def test_a_tolerance_is_that_of_the_benchmark() -> None:
    pairs = [("\\boxed{2.05}", tolerance) for tolerance in (0.0, 0.01, 0.1)]
    expected = [
        ("\\boxed{\\sqrt{2}}", Expected("1.4", 0.1)),
        ("\\boxed{\\sqrt{2}}", Expected("1.4")),
    ]
    asked = [*((text, Expected("2", t)) for text, t in pairs), *expected]
    assert [grade(*one).correct for one in asked] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("first \\boxed{3}, no: \\boxed{\\frac{1}{2}} done 7", "\\frac{1}{2}", "boxed"),
        ("set \\boxed{\\{1, 2\\}}.", "\\{1, 2\\}", "boxed"),
        ("\\boxed{} then \\boxed 5.", "5", "boxed"),
        ("2 + 2 = <<2+2=4>>4\n#### 1,234", "1,234", "hash"),
        ("She has 18 left\nA: 18", "18", "answer_line"),
        ("**Final Answer:** 42", "42", "answer_line"),
        ("Thus the answer is $18$ dollars. Good luck with 7.", "18 dollars", "answer_is"),
        ("The answer is: 3.5.", "3.5", "answer_is"),
        ("So the answer is **18** fresh eggs.", "18", "answer_is"),
        ("A: $40 dollars", "40 dollars", "answer_line"),
        ("The answer is 2 dozen eggs.", "2 dozen eggs", "answer_is"),
        ("The answer is 5 or 6.", "5 or 6", "answer_is"),
        ("an area of 12 cm^2", "12 cm^2", "last_number"),
        ("10 eggs minus 3 gives 7 eggs.", "7", "last_number"),
        ("that costs $1,200.50, all told", "1,200.50", "last_number"),
    ],
)
def test_extraction_rules(text: str, answer: str, rule: str) -> None:
    assert extract_answer(text) == Extraction(answer, rule)


def test_no_answer_is_told_from_a_wrong_one() -> None:
    grades = [grade("I do not know.", "5"), grade("it is 6", "5")]
    assert [(g.reason, g.extracted) for g in grades] == [("no_answer", None), ("wrong", "6")]


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        ("10{,}000", "10000", True),
        ("$1,234.00", "1234", True),
        ("\\text{(B)}", "B", True),
        ("18.", "18", True),
        ("4:30 \\text{ p.m.}", "\\text{4:30 p.m.}", True),
        ("17", "18", False),
        ("(1,234)", "(1234)", False),
        ("1/2", "0.5", True),
        ("x/2", "0.5x", True),
    ],
)
def test_plain_comparison(predicted: str, reference: str, expected: bool) -> None:
    assert equal(predicted, reference) is expected


def test_algebra_agrees_and_keeps_order() -> None:
    pairs = [
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{x/3}", "\\frac{x}{2}"),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1"),
        ("\\boxed{(1,234)}", "(1234)"),
        ("\\boxed{7}", "7"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}"),
        ("\\boxed{18 \\text{ dollars}}", "The sum.\n#### 18"),
        ("\\boxed{\ud83d}", "x^2"),
        ("\\boxed{" + "(" * 400 + "}", "2x"),
        ('{"answer": ' + "[" * 900 + "2" + "]" * 900 + "}", "2x"),
        ("\\boxed{y + x}", "x+y"),
    ]
    expected = [True, False, True, False, True, True, True, True, False, False, False, True]
    assert [grade(*pair).correct for pair in pairs] == expected


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "10^{10^{10}} - 10^{10^{9}}",
        "((((((7^{99})^{99})^{99})^{99})^{99})^{99})^{99}",
        "\\sum_{a=1}^{999} \\sum_{b=1}^{999} \\sum_{c=1}^{999} \\frac{1}{a+b^{c}}",
        "\\int_0^1 \\int_0^1 \\int_0^1 x y z dx dy dz",
        "\\binom{999999999}{500000} + 9999999!",
        "\\sqrt{" * 60 + "2" + "}" * 60,
        "(" * 240 + "x" + ")" * 240,
        "|" * 300,
        "2^" * 200 + "2",
        ", ".join(["x^{99}"] * 60),
        "\ud83d",
    ],
)
def test_an_answer_that_is_made_to_take_forever_is_wrong_at_once(answer: str) -> None:
    started = time.process_time()
    assert grade(f"\\boxed{{{answer}}}", "5 + x").reason == "wrong"
    assert time.process_time() - started < 10  # 1 on two cores; without bounds, days


def test_an_item_without_a_reference_passes_ungraded() -> None:
    out = list(graded([("a", "text", None), ("b", "it is 5", "5")]))
    assert out[0] == ("a", None)
    assert out[1][1].correct


def test_a_long_text_is_searched_in_linear_time() -> None:
    texts = ["answer is " * 20000, "\\boxed{" * 20000, "1,2" * 60000, "#### " * 20000]
    texts += [blank * 20000 for blank in (" ", "\t", "\n ")]
    texts += ["1" * 20000, "１" * 20000, "$$" + " " * 9000, "actually it's " + "$" * 20000]
    for text in texts:
        started = time.process_time()
        extract_answer(text)
        reference_answer(text)
        assert time.process_time() - started < 10  # a quadratic search takes minutes


@pytest.mark.shared
def test_real_qwen_traces_sampled(shared_data) -> None:
    """Every fourth problem, eight samples each, against the scores that came with them."""
    check_qwen(shared_data, step=4)


@pytest.mark.long
@pytest.mark.shared
def test_real_qwen_traces_all(shared_data) -> None:
    assert check_qwen(shared_data, step=1) == 800


def check_qwen(shared_data, *, step: int) -> int:
    path = shared_data / "qwen25_math_traces" / "math_cot_100.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()][::step]
    pairs = [(text, p["answer"]) for p in problems for text in p["code"]]
    scores = [score for p in problems for score in p["score"]]
    grades = [grade(*pair) for pair in pairs]
    differ = [
        (g.extracted, pair[1])
        for g, pair, score in zip(grades, pairs, scores, strict=True)
        if g.correct != score
    ]
    # The scores hold these for different: two spellings of one answer, theirs is the mistake.
    spellings = {("10000", "10{,}000"), ("4:30 \\text{ p.m.}", "\\text{4:30 p.m.}")}
    assert set(differ) <= spellings
    return len(pairs)


@pytest.mark.shared
def test_real_gsm8k_solutions_of_four_solvers(shared_data) -> None:
    path = shared_data / "gsm8k" / "example_model_solutions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(row[name]["solution"], row["ground_truth"]) for name in SOLVERS for row in rows]
    expected = [row[name]["is_correct"] for name in SOLVERS for row in rows]
    correct = [grade(*pair).correct for pair in pairs]
    assert correct == expected
    assert [sum(correct[i * 1319 : (i + 1) * 1319]) for i in range(4)] == list(SOLVERS.values())
