"""Training from a server's log-probs against training from our scoring of the same GGUF file.

    llama-server -m MODEL.gguf --alias teacher --parallel 2 -c 1024 --port 8080 &
    python tools/server_training.py --model MODEL.gguf --student DIR --traces TRACES.jsonl \
        --server http://127.0.0.1:8080

Prints how far the two sides' log-probs are apart, and the held-out nll of students that were
trained from each, by seed: two seeds of one side tell the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from dcod_jax import config as configs
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score
from dcod_jax.train.loop import fit


def make_config(options: argparse.Namespace, side: str) -> Any:
    """side: "own" or "server"."""
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(options.out / side)
    config.student.path = str(options.student)
    config.student.compute_dtype = config.teacher.dtype = "float32"
    config.data.traces, config.data.eval_fraction = str(options.traces), 0.2
    config.data.max_length = config.data.seq_len = options.length
    config.data.batch_size, config.train.steps = 2, options.steps
    config.optim.learning_rate = options.rate
    config.prepare.filter_correct = config.train.progress = False
    config.prepare.shard_records = 32
    config.score.batch_tokens = 2048
    config.train.save_every, config.train.eval_every = 0, options.steps
    if side == "server":
        config.score.server, config.score.dialect = options.server, options.dialect
        config.score.concurrency, config.teacher.name = options.concurrency, options.name
    else:
        config.teacher.path = str(options.model)
    return config


def scored(options: argparse.Namespace, side: str) -> np.ndarray:
    """The log-probs of all completion tokens, in the order of the traces."""
    config = make_config(options, side)
    prepare(config)
    score(config)
    root, found = Path(config.run_dir) / "dataset", []
    for split in ("train", "eval"):
        dataset = TraceDataset(root / split)
        found += [trace.logprobs for trace in dataset.read(range(len(dataset)))]
    return np.concatenate(found).astype(np.float64)


def trained(options: argparse.Namespace, side: str, seed: int) -> float:
    """The held-out nll at the end."""
    config = make_config(options, side)
    config.data.dataset = str(options.out / side / "dataset")
    config.run_dir, config.seed = str(options.out / f"{side}-{seed}"), seed
    shutil.rmtree(config.run_dir, ignore_errors=True)
    fit(config)
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["eval/nll"] for line in lines if "eval/nll" in line][-1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train from a server's log-probs and from ours.")
    for name in ("model", "student", "traces"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--server", required=True, help="its URL")
    parser.add_argument("--name", default="teacher", help="what the server calls the model")
    parser.add_argument("--dialect", default="llama_server")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--length", type=int, default=192, help="tokens of the longest trace")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=Path("build/server_training"))
    options = parser.parse_args()
    try:
        own, other = (scored(options, side) for side in ("own", "server"))
        apart = np.abs(own - other)
        print(
            f"{len(own):,} completion tokens, mean log-prob {own.mean():.4f} and "
            f"{other.mean():.4f}; apart by {apart.mean():.4f} on average, at most {apart.max():.3f}"
        )
        for side, seed in (("own", 0), ("server", 0), ("own", 1)):
            print(f"{side}, seed {seed}: eval/nll {trained(options, side, seed):.4f}", flush=True)
    except DcodError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
