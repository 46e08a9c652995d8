"""Answers are found by the stated rules, compared right, and nothing a model wrote can stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcod_jax.evaluate import grading
from dcod_jax.evaluate.answers import Extraction, compare_plain, extract_answer
from dcod_jax.evaluate.grading import Grader, grade

SOLVERS = {
    "6b_finetuning": 286,
    "6b_verification": 515,
    "175b_finetuning": 458,
    "175b_verification": 742,
}


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
        ("(1,234)", "(1234)", None),
        ("1/2", "0.5", None),
    ],
)
def test_plain_comparison(predicted: str, reference: str, expected: bool | None) -> None:
    assert compare_plain(predicted, reference) is expected


def test_algebra_agrees_and_keeps_order() -> None:
    pairs = [
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{1/3}", "\\frac{1}{2}"),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1"),
        ("\\boxed{(1,234)}", "(1234)"),
        ("\\boxed{7}", "7"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}"),
        ("\\boxed{18 \\text{ dollars}}", "The sum.\n#### 18"),
        ("\\boxed{\ud83d}", "x^2"),
    ]
    expected = [True, False, True, False, True, True, True, True, False]
    assert [g.correct for g in grade(pairs, timeout=5, workers=2)] == expected


def test_a_tower_of_powers_a_crash_and_a_flood_do_not_stop_the_rest() -> None:
    tower = "\\boxed{9^{9^{9^{9}}}}"
    pairs = [("\\boxed{1/2}", "0.5"), (tower, "5"), ("\\boxed{" + "(" * 400 + "}", "2x")]
    pairs += [("\\boxed{1/4}", "0.25")] * 20
    grades = grade(pairs, timeout=5, workers=2)
    assert grades[0].correct
    assert grades[1].reason in ("timeout", "error", "wrong")
    assert not grades[2].correct
    assert all(g.correct for g in grades[3:])


def test_a_worker_that_dies_is_replaced() -> None:
    with Grader(timeout=5, workers=1) as grader:
        first = list(grader.stream([(0, "\\boxed{1/2}", "0.5")]))
        os.kill(grader.workers[0].process.pid, signal.SIGKILL)
        rest = list(grader.stream((i, "\\boxed{1/4}", "0.25") for i in range(20)))
        children = [w.process for w in grader.workers]
    assert first[0][1].correct
    assert [payload for payload, g in rest if g.correct] == list(range(20))
    assert all(child.poll() is not None for child in children)


def test_an_answer_that_kills_its_worker_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, os; print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    os._exit(3) if 'bomb' in line else print('correct', flush=True)\n"
    )
    real = grading.subprocess.Popen
    monkeypatch.setattr(
        grading.subprocess, "Popen", lambda args, **kw: real([args[0], "-c", program], **kw)
    )
    pairs = [("\\boxed{a}", "b"), ("\\boxed{bomb}", "b"), ("\\boxed{a}", "b")]
    assert [g.reason for g in grade(pairs, timeout=5, workers=1)] == ["correct", "error", "correct"]


def test_a_worker_that_ignores_its_alarm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, time; print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    time.sleep(1000) if 'stuck' in line else print('correct', flush=True)\n"
    )
    real = grading.subprocess.Popen
    monkeypatch.setattr(
        grading.subprocess, "Popen", lambda args, **kw: real([args[0], "-c", program], **kw)
    )
    monkeypatch.setattr(grading, "GRACE_SECONDS", 0.2)
    pairs = [("\\boxed{a}", "b"), ("\\boxed{stuck}", "b"), ("\\boxed{a}", "b")]
    reasons = [g.reason for g in grade(pairs, timeout=3, workers=1)]
    assert reasons == ["correct", "timeout", "correct"]


MEMORY_BOMB = """
import sys, types
def verify(reference, predicted, timeout_seconds):
    if "bomb" in predicted:
        bytearray(4 << 30)
    return True
stub = types.ModuleType("math_verify")
stub.verify, stub.parse = verify, lambda text, parsing_timeout: text
sys.modules["math_verify"] = stub
from dcod_jax.evaluate.grading import _worker_main
_worker_main()
"""


def test_an_answer_that_eats_memory_is_wrong_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = grading.subprocess.Popen
    monkeypatch.setattr(
        grading.subprocess, "Popen", lambda args, **kw: real([args[0], "-c", MEMORY_BOMB], **kw)
    )
    pairs = [("\\boxed{a}", "b"), ("\\boxed{bomb}", "b"), ("\\boxed{a}", "b")]
    with Grader(timeout=10, workers=1) as grader:
        grades = [g for _, g in grader.stream((None, *pair) for pair in pairs)]
        assert len(grader.workers) == 1
    assert [(g.correct, g.reason) for g in grades] == [
        (True, "correct"),
        (False, "error"),
        (True, "correct"),
    ]


def test_workers_end_with_a_parent_that_was_killed() -> None:
    program = (
        "import time\n"
        "from dcod_jax.evaluate.grading import Grader\n"
        "grader = Grader(timeout=5, workers=1)\n"
        "list(grader.stream([(0, '\\\\boxed{1/2}', '0.5')]))\n"
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
