"""Random traces, and datasets of them, for tests of what lies on disk and of the input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

from dcod_jax.data.dataset import DatasetWriter
from dcod_jax.types import Trace

TEACHER = {"name": "big", "revision": "r1", "weights": "abc"}
MANIFEST = {"tokenizer": {"fingerprint": "tok"}, "template": {"fingerprint": "tem"}}


def make_trace(
    number: int, *, length: int, prompt: int = 2, scored: bool = True, top_k: int = 0
) -> Trace:
    """Ids and log-probs that tell which trace and which place they come from."""
    generator = np.random.default_rng(number)
    mask = np.arange(length) >= prompt
    if length > prompt + 4:
        mask[prompt + 2] = False  # a hole, as between two assistant turns
    count = int(mask.sum())
    topk = {
        "topk_ids": generator.integers(0, 99, (count, top_k)).astype(np.int32),
        "topk_logprobs": (-2 - generator.random((count, top_k))).astype(ml_dtypes.bfloat16),
        "tail_logprobs": -generator.random(count).astype(np.float32),
    }
    return Trace(
        f"trace-{number}",
        (1000 * number + np.arange(length)).astype(np.int32),
        mask,
        -generator.random(count).astype(np.float32) if scored else None,
        **(topk if top_k else {}),
        meta={"source": f"made.jsonl:{number}"},
    )


def make_traces(
    count: int, *, low: int = 6, high: int = 30, scored: bool = True, top_k: int = 0
) -> list[Trace]:
    lengths = np.random.default_rng(99).integers(low, high, count)
    return [
        make_trace(number, length=int(length), scored=scored, top_k=top_k)
        for number, length in enumerate(lengths)
    ]


def write(directory: Path, traces: list[Trace], *, shard_records: int = 8) -> Path:
    with DatasetWriter(directory, shard_records=shard_records, manifest=MANIFEST) as writer:
        for trace in traces:
            writer.write(trace)
    return directory


def fake_scores(traces: list[Trace], *, top_k: int = 2) -> list[Trace]:
    """Scores that depend on the trace alone."""
    made = []
    for trace in traces:
        assert trace.logprobs is None
        count = int(trace.completion_mask.sum())
        base = -np.arange(1, count + 1, dtype=np.float32) / 8
        made.append(
            dataclasses.replace(
                trace,
                logprobs=base,
                topk_ids=np.tile(np.arange(top_k, dtype=np.int32), (count, 1)),
                topk_logprobs=np.full((count, top_k), -1.5, ml_dtypes.bfloat16),
                tail_logprobs=np.full(count, np.log(0.25), np.float32),
            )
        )
    return made


def equal(a: Trace, b: Trace) -> bool:
    for field in dataclasses.fields(Trace):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            if y is None or x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                return False
        elif x != y:
            return False
    return True


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
