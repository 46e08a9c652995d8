"""A recipe of a short run, and what tests read of the run that it makes."""

import json
import subprocess
from pathlib import Path

import jax
import numpy as np
from forks import Started

from dcod_jax import config as configs
from dcod_jax.models import hf, transformer
from dcod_jax.train.checkpoint_reader import read_params

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
from dcod_jax.configs.base import get_config as base

def get_config():
    c = base()
    c.student.path = {student!r}
    c.student.compute_dtype = "float32"
    c.teacher.path = {teacher!r}
    c.teacher.dtype = "float32"
    c.data.traces = {traces!r}
    c.data.dataset = {dataset!r}
    c.data.eval_fraction = 0.2
    c.data.max_length = 64
    c.data.seq_len = 64
    c.data.batch_size = 16
    c.prepare.shard_records = 32
    c.optim.learning_rate = 3e-3
    c.train.steps = 8
    c.train.log_every = 1
    c.train.eval_every = 4
    c.train.save_every = 4
    c.train.microbatches = 2
    c.train.progress = False
    c.export.dtype = "float32"
    return c
"""


def words(place, run_dir, *more):
    return ["--config", str(place / "recipe.py"), f"--config.run_dir={run_dir}", *more]


def load(place, run_dir, *more):
    return configs.load(words(place, run_dir, *more), verb="train")


def start(place, run_dir, *more):
    return Started(
        ["-m", "dcod_jax.train", *words(place, run_dir, *more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(run_dir):
    """Lines of metrics.jsonl without what a clock gives."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def final_params(run_dir, place):
    config, _ = hf.load_config(place / "student")
    shapes = transformer.param_shapes(config)
    return read_params(run_dir, shapes)[0]


def assert_same_run(place, run_dir, reference):
    assert metrics(run_dir) == metrics(reference)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(run_dir, place),
        final_params(reference, place),
    )
