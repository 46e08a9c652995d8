"""Random traces, and datasets of them, for tests of what lies on disk and of the input."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from dcod_jax.data.records import DatasetWriter
from dcod_jax.types import Trace

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
