"""Answers are found by the stated rules, compared right, and nothing a model wrote can stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcod_jax.errors import DcodError
from dcod_jax.evaluate import grading
from dcod_jax.evaluate.answers import Extraction, extract_answer
from dcod_jax.evaluate.equality import equal
from dcod_jax.evaluate.grading import Expected, Grade, Grader, grade

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


@pytest.fixture(scope="module")
def case_grades() -> list[Grade]:
    return grade([(case["prediction"], case["gold"]) for case in CASES], workers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_cases(kind: str, case_grades: list[Grade]) -> None:
    """Real kinds of answers. "either": both verdicts can be defended, for the stated reason."""
    wrong = [
        (case, found)
        for case, found in zip(CASES, case_grades, strict=True)
        if case["kind"] == kind
        and not case.get("reason")
        and found.correct != (case["expected"] == "correct")
    ]
    assert not wrong


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
    grades = grade([(text, Expected("12", complete=False))], workers=1)
    assert grades[0].correct == (answer == "12")
    assert extract_answer(text) is not None


def test_a_tolerance_is_that_of_the_benchmark() -> None:
    pairs = [("\\boxed{2.05}", tolerance) for tolerance in (0.0, 0.01, 0.1)]
    expected = [
        ("\\boxed{\\sqrt{2}}", Expected("1.4", 0.1)),
        ("\\boxed{\\sqrt{2}}", Expected("1.4")),
    ]
    graded = grade([*((text, Expected("2", t)) for text, t in pairs), *expected], workers=1)
    assert [g.correct for g in graded] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("first \\boxed{3}, no: \\boxed{\\frac{1}{2}} done 7", "\\frac{1}{2}", "boxed"),
        ("set \\boxed{\\{1, 2\\}}.", "\\{1, 2\\}", "boxed"),
        ("\\boxed{} then \\boxed 5.", "5", "boxed"),
        ("2 + 2 = <<2+2=4>>4\n#### 1,234", "1,234", "hash"),
        ("She has 18 left\nA: 18", "18", "answer_line"),
        ("**Final Answer:** 42", "42", "answer_line"),
        ("Thus the answer is $18$ dollars. Good luck with 7.", "18", "answer_is"),
        ("The answer is: 3.5.", "3.5", "answer_is"),
        ("So the answer is **18** fresh eggs.", "18", "answer_is"),
        ("A: $40 dollars", "40", "answer_line"),
        ("The answer is 2 dozen eggs.", "2 dozen eggs", "answer_is"),
        ("The answer is 5 or 6.", "5 or 6", "answer_is"),
        ("an area of 12 cm^2", "12", "last_number"),
        ("10 eggs minus 3 gives 7 eggs.", "7", "last_number"),
        ("that costs $1,200.50, all told", "1,200.50", "last_number"),
    ],
)
def test_extraction_rules(text: str, answer: str, rule: str) -> None:
    assert extract_answer(text) == Extraction(answer, rule)


def test_no_answer_is_told_from_a_wrong_one() -> None:
    grades = grade([("I do not know.", "5"), ("it is 6", "5")], timeout=5, workers=1)
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
        ("x/2", "0.5x", None),
    ],
)
def test_plain_comparison(predicted: str, reference: str, expected: bool | None) -> None:
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
        ("\\boxed{y + x}", "x+y"),
    ]
    expected = [True, False, True, False, True, True, True, True, False, False, True]
    assert [g.correct for g in grade(pairs, timeout=5, workers=2)] == expected


# ---------------------------------------------------------------- workers

HOSTILE = """
import os, signal, sys, time
from dcod_jax.evaluate import grading
calls = []
def algebra(predicted, reference, tolerance):
    calls.append(predicted)
    if "sleep" in predicted:
        time.sleep(float(predicted.split()[1]))
    if "spin" in predicted:
        while True:
            pass
    if "deaf" in predicted:  # as in a long operation of C
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        while True:
            pass
    if "eat" in predicted:
        bytearray(4 << 30)
    if "die" in predicted:
        os._exit(3)
    if "late" in predicted and len(calls) > 1:
        raise MemoryError
    if "raise" in predicted:
        raise RecursionError
    return True
grading.serve(lambda: algebra)
"""


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose algebra does what the answer says."""
    real = grading.subprocess.Popen
    monkeypatch.setattr(
        grading.subprocess, "Popen", lambda args, **kw: real([*args[:-1], HOSTILE], **kw)
    )


def verdicts(*answers: str, timeout: float = 5, workers: int = 1) -> list[str]:
    pairs = [(f"\\boxed{{{answer}}}", "x + b") for answer in answers]
    return [g.reason for g in grade(pairs, timeout=timeout, workers=workers)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("eat + x", "error"),
        ("die + x", "error"),
        ("raise + x", "error"),
        ("late + x", "correct"),  # in a worker of its own, whatever was there before
    ],
)
def test_a_hostile_answer_is_judged_alone(hostile: None, answer: str, reason: str) -> None:
    assert verdicts("a + x", answer, "c + x") == ["correct", reason, "correct"]


def test_processor_time_is_limited_and_not_the_time_of_the_clock(hostile: None) -> None:
    answers = ("sleep 0.6 + x", "spin + x", "deaf + x", "a + x")
    reasons = ["correct", "timeout", "timeout", "correct"]
    assert verdicts(*answers, timeout=0.2, workers=2) == reasons


def test_an_answer_without_a_processor_is_stalled_and_that_is_said(
    hostile: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grading, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(grading, "STALL_FACTOR", 1.0)
    reasons = verdicts("a + x", "sleep 1000 + x", "c + x", timeout=0.2)
    assert reasons == ["correct", "stalled", "correct"]
    assert "dropped as grading_stalled" in caplog.text


def test_a_worker_that_dies_is_replaced_and_all_end_with_the_grader(hostile: None) -> None:
    with Grader(timeout=5, workers=1) as grader:
        assert next(grader.stream([(0, "\\boxed{a + x}", "b")]))[1].correct
        children = [w.process for w in grader.workers]
        os.kill(children[0].pid, signal.SIGKILL)
        rest = list(grader.stream((i, "\\boxed{a + x}", "b") for i in range(20)))
        children += [w.process for w in grader.workers]
    assert [payload for payload, g in rest if g.correct] == list(range(20))
    assert len(children) == 2
    assert all(child.poll() is not None for child in children)


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = grading.subprocess.Popen
    monkeypatch.setattr(
        grading.subprocess, "Popen", lambda args, **kw: real([args[0], "-c", "exit(1)"], **kw)
    )
    with pytest.raises(DcodError, match=r"did not start: .*import math_verify"):
        verdicts("a + x")


def test_a_tower_of_powers_is_no_answer_and_stops_nothing() -> None:
    pairs = [("\\boxed{9^{9^{9^{9}}}}", "5 + x"), *[("\\boxed{1/4 + x}", "0.25 + x")] * 3]
    first, *rest = grade(pairs, timeout=1, workers=1)
    assert first.reason in ("timeout", "error", "wrong")
    assert all(g.correct for g in rest)


def test_workers_end_with_a_parent_that_was_killed() -> None:
    program = (
        "import time\n"
        "from dcod_jax.evaluate import grading\n"
        f"HOSTILE = {HOSTILE!r}\n"
        "real = grading.subprocess.Popen\n"
        "grading.subprocess.Popen = lambda args, **kw: real([*args[:-1], HOSTILE], **kw)\n"
        "grader = grading.Grader(timeout=5, workers=1)\n"
        "list(grader.stream([(0, '\\\\boxed{a + x}', 'b')]))\n"
        "print(grader.workers[0].process.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_item_without_a_reference_passes_ungraded() -> None:
    with Grader(timeout=5, workers=1) as grader:
        out = list(grader.stream([("a", "text", None), ("b", "it is 5", "5")]))
    assert out[0] == ("a", None)
    assert out[1][1].correct


def test_a_long_text_is_searched_in_linear_time() -> None:
    for text in ("answer is " * 20000, "\\boxed{" * 20000, "1,2" * 60000, "#### " * 20000):
        started = time.process_time()
        extract_answer(text)
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
    grades = grade(pairs, timeout=5, workers=2)
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
    correct = [g.correct for g in grade(pairs, timeout=5, workers=2)]
    assert correct == expected
    assert [sum(correct[i * 1319 : (i + 1) * 1319]) for i in range(4)] == list(SOLVERS.values())
