"""How two tokenisations of a scored dataset's texts align, and the weights that follow.

    dcod score --config RECIPE --config.score.student=True
    python tools/span_statistics.py --dataset RUN/dataset/train --student DIR --teacher DIR \
        [--chat-template FILE]

The weights are those of the start: sigmoid of each span's mean of log q - log p (loss.weights.name=
sigmoid, span=mean). Their effective sample size is (Σ w)² / (n Σ w²).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.templates import TemplateChoice
from dcod_jax.data.tokenizer import load_tokenizer, token_bytes
from dcod_jax.errors import DcodError
from dcod_jax.score.alignment import align

QUANTILES = (1, 10, 25, 50, 75, 90, 99)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Statistics of spans and of their weights.")
    for name in ("dataset", "student", "teacher"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--chat-template", default="", help="the teacher's, where not its own")
    options = parser.parse_args()
    try:
        report(options)
    except DcodError as error:
        sys.exit(f"error: {error}")


def report(options: argparse.Namespace) -> None:
    """Print bytes, spans, log-ratios and weights."""
    student = load_tokenizer(options.student)
    teacher = load_tokenizer(options.teacher, template=TemplateChoice(options.chat_template))
    dataset = TraceDataset(options.dataset)
    traces = dataset.read(range(len(dataset)))
    covered = total = ours = theirs = spans = several = longest = 0
    ratios = []
    for trace in traces:
        found = align(student, teacher, trace)
        of_ours = np.bincount(found.student_spans)
        counted = found.teacher_spans[found.teacher_spans >= 0]
        of_theirs = np.bincount(counted, minlength=len(of_ours))
        pieces = token_bytes(student, trace.token_ids[trace.completion_mask].tolist())
        sizes = np.array([len(piece) for piece in pieces])
        total += sizes.sum()
        covered += sizes[of_theirs[found.student_spans] > 0].sum()
        ours, theirs, spans = ours + of_ours.sum(), theirs + len(counted), spans + len(of_ours)
        several, longest = several + (of_ours > 1).sum(), max(longest, of_ours.max())
        if trace.logprobs is None or trace.start_logprobs is None:
            raise DcodError(f"{options.dataset} was not scored with score.student=True")
        r = trace.start_logprobs.astype(np.float64) - trace.logprobs
        ratios.append((np.bincount(found.student_spans, r) / of_ours)[found.student_spans])
    r = np.concatenate(ratios)
    weights = 1 / (1 + np.exp(-r))
    print(
        f"{len(traces):,} traces, {total:,} bytes, aligned {covered / total:.4%}; {spans:,} spans "
        f"of {ours / spans:.3f} student and {theirs / spans:.3f} teacher tokens; of several "
        f"student tokens {several / spans:.1%}, the longest of {longest}"
    )
    print(
        f"r: mean {r.mean():.3f}, deviation {r.std():.3f}, |r| < 0.1: {(abs(r) < 0.1).mean():.1%}"
    )
    told = ", ".join(f"{q} %: {np.percentile(weights, q):.3f}" for q in QUANTILES)
    share = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    print(f"weights: mean {weights.mean():.3f}; {told}; effective sample size {share:.3f} of n")


if __name__ == "__main__":
    main()
