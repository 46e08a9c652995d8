"""The quickstart's teacher, from random weights on worked solutions in three styles.

    python tools/make_quickstart_assets.py data
    python -m dcod_jax.train --config configs/quickstart_teacher.py

The first command writes the worked solutions and the model's shape to build/quickstart.
"""

from dcod_jax.configs.base import get_config as base


def get_config():
    c = base()
    c.run_dir = "build/quickstart/teacher"
    c.student.config = "build/quickstart/teacher_init"
    c.student.tokenizer = "build/quickstart/teacher_init"
    c.student.compute_dtype = "float32"
    c.student.remat = "none"

    c.data.traces = "build/quickstart/teacher_traces.jsonl"
    c.data.eval_fraction = 0.01
    c.data.max_length = 128
    c.data.seq_len = 192  # two or three traces in a row; longer rows only cost attention
    c.data.batch_size = 12
    c.prepare.filter_correct = False  # every worked solution is right: tests/study

    c.loss.head_chunk = 128
    c.loss.weights.name = "uniform"
    c.optim.learning_rate = 3e-3
    c.optim.warmup_steps = 20
    c.optim.weight_decay = 0.01
    c.train.steps = 2000
    c.train.log_every = 20
    c.train.eval_every = 200
    c.train.save_every = 200
    c.train.best_metric = ""

    c.evaluate.problems = "dcod_jax/assets/quickstart/validation.jsonl"
    c.evaluate.max_new_tokens = 72
    c.evaluate.batch_size = 256
    return c
