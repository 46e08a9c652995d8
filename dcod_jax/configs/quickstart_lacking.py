"""The quickstart from a student that lacks half of the skill, where weights do not beat SFT.

    python -m dcod_jax.train --config quickstart_lacking

The student writes as the teacher does, in three ways, and solves half of the problems. Of 200 and
400 steps and learning rates 3e-4 and 1e-3 the recipe takes those with which plain SFT did best on
the validation problems, for DisCorD too.
"""

from pathlib import Path

import dcod_jax
from dcod_jax.configs.base import get_config as base

ASSETS = Path(dcod_jax.__file__).resolve().parent / "assets" / "quickstart"


def get_config():
    c = base()
    c.run_dir = "runs/quickstart-lacking"
    c.student.path = str(ASSETS / "student")
    c.student.compute_dtype = "float32"  # CPUs emulate bfloat16
    c.student.remat = "none"
    c.teacher.path = str(ASSETS / "teacher")
    c.teacher.name = "quickstart-teacher"
    c.teacher.dtype = "float32"

    c.generate.prompts = str(ASSETS / "prompts.jsonl")
    c.generate.samples = 2
    c.generate.temperature = 1.0
    c.generate.max_new_tokens = 72  # the longest possible worked solution has 67 tokens
    c.generate.batch_size = 256

    c.data.eval_fraction = 0.05
    c.data.max_length = 128
    c.data.seq_len = 192  # two or three traces in a row; longer rows only cost attention
    c.data.batch_size = 12
    c.score.batch_tokens = 16384

    c.loss.head_chunk = 128  # 101 rows of vocabulary: nothing to gain from smaller chunks
    c.loss.weights.name = "sigmoid"
    c.loss.weights.temperature = 1.0
    c.loss.weights.normalize = "mean"

    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 20
    c.train.steps = 400
    c.train.log_every = 10
    c.train.eval_every = 100
    c.train.save_every = 0
    c.train.best_metric = ""  # held-out nll would favour plain SFT: both export their last step

    c.evaluate.problems = str(ASSETS / "eval.jsonl")
    c.evaluate.max_new_tokens = 72
    c.evaluate.batch_size = 256
    c.export.dtype = "float32"
    c.report.at_end = True
    c.compare = ("sft loss.weights.name=uniform", "discord loss.weights.name=sigmoid")
    return c
