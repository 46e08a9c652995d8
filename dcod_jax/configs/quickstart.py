"""The whole path on an embedded teacher and student: two CPU cores, no downloads, minutes.

    python -m dcod_jax.train --config quickstart

The student solves most problems, in a way of writing of its own. The teacher writes in three ways,
one of which is the student's. The run samples worked solutions from the teacher, drops the wrong
ones, scores them, trains the student on them once for each entry of `compare`, from the same start
and with the same batches, and compares greedy accuracy on held-out problems and on longer ones than
any trace. Each entry has the learning rate with which it did best on the validation problems
(docs/quickstart_results.md).
"""

from pathlib import Path

import dcod_jax
from dcod_jax.configs.base import get_config as base

ASSETS = Path(dcod_jax.__file__).resolve().parent / "assets" / "quickstart"
COMPETENT = ASSETS / "competent"


def get_config():
    c = base()
    c.run_dir = "runs/quickstart"
    c.student.path = str(COMPETENT / "model")
    c.student.compute_dtype = "float32"  # CPUs emulate bfloat16
    c.student.remat = "none"
    c.teacher.path = str(ASSETS / "teacher")
    c.teacher.name = "quickstart-teacher"
    c.teacher.dtype = "float32"

    c.generate.prompts = str(COMPETENT / "prompts.jsonl")
    c.generate.temperature = 1.0
    c.generate.max_new_tokens = 72  # the longest possible worked solution has 67 tokens
    c.generate.batch_size = 256

    c.data.eval_fraction = 0.05
    c.data.max_length = 128
    c.data.seq_len = 128  # two or three traces in a row; longer rows only cost attention
    c.data.batch_size = 8
    c.score.batch_tokens = 16384

    c.loss.head_chunk = 128  # 101 rows of vocabulary: nothing to gain from smaller chunks
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 10
    c.train.steps = 200
    c.train.log_every = 10
    c.train.eval_every = 50
    c.train.save_every = 0
    c.train.best_metric = ""  # held-out nll would favour plain SFT: all export their last step

    c.evaluate.problems = str(COMPETENT / "eval.jsonl")
    c.evaluate.sets = (f"longer={COMPETENT / 'longer.jsonl'}",)
    c.evaluate.max_new_tokens = 72
    c.evaluate.batch_size = 256
    c.export.dtype = "float32"
    c.report.at_end = True
    c.compare = (
        "sft loss.weights.name=uniform optim.learning_rate=3e-3",
        "discord-token loss.weights.name=sigmoid optim.learning_rate=1e-3",
        "discord-trace loss.weights.name=auto optim.learning_rate=3e-4",
    )
    return c
