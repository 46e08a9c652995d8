"""The quickstart's path on a real model: SmolLM2-135M-Instruct teaches a copy with fewer layers.

    python tools/get_smollm2.py --layers 24
    python -m dcod_jax.train --config quickstart_smollm2

Short enough for a laptop (521 CPU-seconds, 3.9 GiB), so what it shows is that real weights go
through every step and that the held-out loss falls. No accuracy is claimed: neither model solves
word problems reliably, which is also why traces are kept whether right or wrong.
"""

from pathlib import Path

import dcod_jax
from dcod_jax.configs.base import get_config as base

ASSETS = Path(dcod_jax.__file__).resolve().parent / "assets" / "smollm2"


def get_config():
    c = base()
    c.run_dir = "runs/quickstart-smollm2"
    c.student.path = "models/SmolLM2-135M-Instruct-24L"
    c.student.compute_dtype = "float32"  # CPUs emulate bfloat16
    c.student.remat = "full"  # a third of a GB for a quarter more time
    c.teacher.path = "models/SmolLM2-135M-Instruct"
    c.teacher.name = "SmolLM2-135M-Instruct"
    c.teacher.dtype = "float32"

    c.generate.prompts = str(ASSETS / "prompts.jsonl")
    c.generate.samples = 1
    c.generate.max_new_tokens = 64
    c.generate.batch_size = 32
    c.prepare.filter_correct = False

    c.data.eval_fraction = 0.15
    c.data.max_length = 256
    c.data.seq_len = 256
    c.data.batch_size = 2
    c.score.batch_tokens = 2048
    c.loss.head_chunk = 128

    c.optim.learning_rate = 2e-4  # the missing layers have to be made up for in few steps
    c.optim.warmup_steps = 4
    c.train.steps = 24
    c.train.log_every = 1
    c.train.eval_every = 8
    c.train.save_every = 0
    c.train.keep = 1
    c.train.best_metric = ""
    c.compare = ("sft loss.weights.name=uniform", "discord loss.weights.name=sigmoid")
    return c
