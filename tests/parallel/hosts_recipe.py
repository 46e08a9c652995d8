"""The recipe that several processes run together, and what tests read of its runs."""

import json

import jax
import numpy as np
from host_runs import ROOT, launch

from dcod_jax import config as configs
from dcod_jax.models import hf, transformer
from dcod_jax.train.checkpoint_reader import read_params

RECIPE = """
from dcod_jax.configs.base import get_config as base

def get_config():
    c = base()
    c.run_dir = {run!r}
    c.student.path = {student!r}
    c.student.compute_dtype = "float32"
    c.student.remat = "none"
    c.teacher.path = {teacher!r}
    c.teacher.dtype = "float32"
    c.data.traces = {traces!r}
    c.data.dataset = {dataset!r}
    c.data.max_length = 64
    c.data.seq_len = 64
    c.data.batch_size = 8
    c.prepare.shard_records = 16
    c.generate.prompts = {traces!r}
    c.generate.max_new_tokens = 8
    c.generate.batch_size = 8
    c.evaluate.problems = {traces!r}
    c.evaluate.limit = 9
    c.evaluate.max_new_tokens = 8
    c.evaluate.batch_size = 4
    c.optim.learning_rate = 3e-3
    c.train.steps = 6
    c.train.log_every = 1
    c.train.eval_every = 0
    c.train.save_every = 3
    c.train.progress = False
    c.export.dtype = "float32"
    c.hosts.heartbeat = 4.0
    return c
"""


def load(place, **changes):
    words = ["--config", str(place / "recipe.py")]
    return configs.replace(configs.load(words, verb="train"), changes)


def tasks(place, what, *more, count=2, devices=2):
    script = str(ROOT / "tests" / "host_tasks.py")
    command = [script, what, "--config", str(place / "recipe.py"), *more]
    return launch(count, command, devices=devices)


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def params(place, run_dir):
    shapes = transformer.param_shapes(hf.read_config(place / "student"))
    found, restored = read_params(run_dir, shapes)
    return jax.tree.map(np.asarray, found), restored.step
