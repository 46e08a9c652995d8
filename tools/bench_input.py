"""Measure the input: packed ArrayRecord against tokenising on the fly, and iterator restoration.

    python tools/bench_input.py                      # generated text, a BPE tokenizer trained on it
    python tools/bench_input.py --tokenizer DIR      # your tokenizer

Both ways end in the same [B, T] host batches in one process; the rounds alternate. On a machine
that does other work read the CPU columns: a token's cost does not depend on the neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dcod_jax.data import packing, pipeline
from dcod_jax.data.codec import Columns
from dcod_jax.data.dataset import DatasetWriter, TraceDataset
from dcod_jax.types import Trace

VOCABULARY = 16_000
TARGETS = {"packed tokens/s": 5e6, "ratio": 20.0, "restore seconds": 1.0}


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens read, and the wall and CPU seconds of this process that it took."""

    tokens: int
    wall: float
    cpu: float


def corpus(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, completion) texts with the lengths of GSM8K: word problems of made-up words."""
    generator = random.Random(seed)
    syllables = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo za".split()
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(8000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence() -> str:
        body = generator.choices(words, weights, k=generator.randint(6, 14))
        body.insert(generator.randrange(len(body)), str(generator.randint(2, 400)))
        return " ".join(body).capitalize() + "."

    def step() -> str:
        a, b = generator.randint(2, 400), generator.randint(2, 400)
        return f"{sentence()} {a} + {b} = <<{a}+{b}={a + b}>>{a + b}."

    return [
        (
            " ".join(sentence() for _ in range(generator.randint(2, 5))),
            "\n".join(step() for _ in range(generator.randint(2, 6)))
            + f"\n#### {generator.randint(1, 999)}",
        )
        for _ in range(count)
    ]


def train_tokenizer(texts: Sequence[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((part for text in texts for part in text), trainer)
    return tokenizer


def write_inputs(
    directory: Path, texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, copies: int
) -> tuple[Path, Path]:
    """(JSONL, trace dataset) of the same texts; the dataset repeats them for `copies` epochs."""
    jsonl = directory / "traces.jsonl"
    with jsonl.open("w") as file:
        for prompt, completion in texts:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    generator = np.random.default_rng(0)
    encoded = [encode(tokenizer, *text) for text in texts]
    with DatasetWriter(directory / "dataset", shard_records=8192, manifest={}) as writer:
        for copy in range(copies):
            for number, (ids, mask) in enumerate(encoded):
                logprobs = -generator.random(int(mask.sum()), np.float32)
                writer.write(Trace(f"{copy}-{number}", ids, mask, logprobs))
    return jsonl, directory / "dataset"


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, completion mask): the least work a loader that tokenises can do."""
    first = tokenizer.encode(prompt, add_special_tokens=False).ids
    second = tokenizer.encode(completion, add_special_tokens=False).ids
    ids = np.array(first + second, np.int32)
    return ids, np.arange(len(ids)) >= len(first)


def time_packed(
    dataset: TraceDataset, *, seq_len: int, batch_size: int, tokens: int, prefetch: int = 4
) -> Rate:
    """Batches of the trace dataset until `tokens` were read; the first one is not timed."""
    batches = pipeline.train_batches(
        dataset, seq_len=seq_len, batch_size=batch_size, seed=0, prefetch=prefetch
    )
    next(batches)
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < tokens:
        batch, _ = next(batches)
        done += int(np.count_nonzero(batch["segment_ids"]))
    rate = Rate(done, time.perf_counter() - wall, time.process_time() - cpu)
    batches.close()
    return rate


def time_tokenising(
    jsonl: Path, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, tokens: int
) -> Rate:
    """Batches of the JSONL file, parsed, tokenised and packed as they are read."""
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    for batch in _tokenised_batches(jsonl, tokenizer, seq_len=seq_len, batch_size=batch_size):
        done += int(np.count_nonzero(batch["segment_ids"]))
        if done >= tokens:
            break
    return Rate(done, time.perf_counter() - wall, time.process_time() - cpu)


def _tokenised_batches(
    jsonl: Path, tokenizer: Tokenizer, *, seq_len: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    with jsonl.open() as file:
        for line in file:
            record: dict[str, Any] = json.loads(line)
            waiting.append(encode(tokenizer, record["prompt"], record["completion"]))
            if len(waiting) < 16 * batch_size:
                continue
            lengths = np.array([len(ids) for ids, _ in waiting])
            rows = packing.first_fit(lengths, seq_len)[:batch_size]
            members = [member for row in rows for member in row]
            columns = Columns(
                np.concatenate([waiting[member][0] for member in members]),
                np.concatenate([waiting[member][1] for member in members]),
                np.zeros(int(lengths[members].sum()), np.float32),
                lengths[members],
            )
            yield packing.fill_rows(columns, [len(row) for row in rows], seq_len)
            taken = set(members)
            waiting = [item for number, item in enumerate(waiting) if number not in taken]


def time_restore(dataset: TraceDataset, *, seq_len: int, batch_size: int) -> tuple[float, float]:
    """(wall, CPU) seconds from an open dataset to the first batch in the middle of epoch 3."""
    batches = pipeline.train_batches(dataset, seq_len=seq_len, batch_size=batch_size, seed=0)
    rows = len(pipeline.RowStream(dataset, pipeline.Reading(seq_len, 1), 0).rows(0))
    state = batches.get_state() | {"epoch": 3, "row": rows // 2}
    wall, cpu = time.perf_counter(), time.process_time()
    again = pipeline.train_batches(
        dataset, seq_len=seq_len, batch_size=batch_size, seed=0, prefetch=0
    )
    again.set_state(state)
    next(again)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    again.close()
    return seconds


def measure(args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """The figures by name, medians over the rounds."""
    texts = corpus(args.traces)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts[:5000])
    copies = max(args.restore_traces // args.traces, 1)
    jsonl, path = write_inputs(directory, texts, tokenizer, copies=copies)
    opened = time.perf_counter()
    dataset = TraceDataset(path)
    opened = time.perf_counter() - opened
    shape = {"seq_len": args.seq_len, "batch_size": args.batch_size}
    packed, tokenised = [], []
    for _ in range(args.rounds):
        packed.append(time_packed(dataset, tokens=args.tokens, **shape))
        tokenised.append(
            time_tokenising(jsonl, tokenizer, tokens=max(args.tokens // 20, 1), **shape)
        )
    restores = [time_restore(dataset, **shape) for _ in range(args.rounds)]
    rows = len(pipeline.RowStream(dataset, pipeline.Reading(args.seq_len, 1), 0).rows(0))
    figures = {
        "traces": float(len(dataset)),
        "mean length": float(dataset.lengths[:, 0].mean()),
        "fill": float(dataset.lengths[:, 0].sum() / (rows * args.seq_len)),
        "open seconds, hashes checked": opened,
        "restore seconds": statistics.median(wall for wall, _ in restores),
        "restore CPU seconds": statistics.median(cpu for _, cpu in restores),
    }
    for name, rates in (("packed", packed), ("tokenised", tokenised)):
        figures[f"{name} tokens/s"] = statistics.median(r.tokens / r.wall for r in rates)
        figures[f"{name} tokens/CPU-s"] = statistics.median(r.tokens / r.cpu for r in rates)
    figures["ratio"] = figures["packed tokens/s"] / figures["tokenised tokens/s"]
    figures["ratio by CPU"] = figures["packed tokens/CPU-s"] / figures["tokenised tokens/CPU-s"]
    return figures


def print_figures(figures: dict[str, float], console: Console) -> None:
    table = Table("figure", "measured", "target", title="input", title_justify="left")
    for name, value in figures.items():
        target = TARGETS.get(name)
        sign = "<" if name.startswith("restore") else ">="
        text = f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
        table.add_row(name, text, f"{sign} {target:,.0f}" if target else "")
    console.print(table)
    load = os.getloadavg()[0]
    console.print(f"load average {load:.1f} on {os.cpu_count()} cores while measuring")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--traces", type=int, default=20_000, help="different texts")
    parser.add_argument("--restore-traces", type=int, default=200_000, help="traces in the dataset")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens read in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokenizer", default="", help="directory with tokenizer.json")
    args = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one thread, both ways
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(args, Path(directory))
    print_figures(figures, Console())
    return figures


if __name__ == "__main__":
    main()
