"""Print where our verdicts differ from those that came with real outputs, to be read by eye.

    python tools/grading_disagreements.py ../shared/data/gsm8k/example_model_solutions.jsonl \
        ../shared/data/qwen25_math_traces/math_cot_100.jsonl --sample 200 --seed 0 [--math-verify]

A line of a file holds one answer ({"completion", "answer", "correct"}), several of one problem
({"code": […], "score": […], "answer"}) or those of several models ({"ground_truth", model:
{"solution", "is_correct"}}). With --math-verify the second verdict is math-verify's own, with its
own search for the answer (pip install math-verify), in place of the one in the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from dcod_jax.evaluate.answers import reference_answer
from dcod_jax.evaluate.grading import graded


def answers(path: pathlib.Path) -> Iterator[tuple[str, str, bool]]:
    """(completion, reference, the verdict that came with it)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        if "code" in row:
            for completion, score in zip(row["code"], row["score"], strict=True):
                yield completion, row["answer"], bool(score)
        elif "ground_truth" in row:
            for one in row.values():
                if isinstance(one, dict):
                    yield one["solution"], row["ground_truth"], one["is_correct"]
        else:
            yield row["completion"], row["answer"], row["correct"]


def math_verify_verdict(completion: str, reference: str) -> bool:
    import math_verify

    gold = math_verify.parse(f"${reference_answer(reference)}$", parsing_timeout=5)
    found = math_verify.parse(completion, parsing_timeout=5)
    return bool(math_verify.verify(gold, found, timeout_seconds=5))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="answers of each file, drawn by seed")
    parser.add_argument("--math-verify", action="store_true")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    rows = []
    for path in given.files:
        found = list(answers(path))
        rows += draw.sample(found, given.limit) if 0 < given.limit < len(found) else found
    started, grades = [time.process_time()], []
    for one in graded((row, row[0], row[1]) for row in rows):
        grades.append(one)
        started.append(time.process_time())
    taken = statistics.median(b - a for a, b in itertools.pairwise(started))
    differ = []
    for (completion, reference, other), ours in grades:
        verdict = math_verify_verdict(completion, reference) if given.math_verify else other
        if verdict != ours.correct:
            differ.append((completion, reference, verdict, ours))
    print(f"{len(rows)} answers, {sum(g.correct for _, g in grades)} correct by ours")
    print(f"{taken * 1000:.3f} ms of processor time an answer (median)")
    print(f"{len(differ)} disagreements ({len(differ) / len(rows):.2%})")
    shown = draw.sample(differ, given.sample) if given.sample < len(differ) else differ
    for completion, reference, verdict, ours in shown:
        print(f"--- ours {ours.correct} ({ours.rule}: {ours.extracted!r}), the other {verdict}")
        print(f"reference {reference_answer(reference)!r}; …{completion[-160:]!r}")


if __name__ == "__main__":
    main()
