"""The quickstart's start: it solves most problems, in a style of its own.

    python tools/make_quickstart_assets.py data
    python -m dcod_jax.train --config configs/quickstart_competent.py

It is the warm start of the study's condition `main`: 1000 steps on worked solutions as equations,
one of the teacher's three styles, of problems with 3 to 6 terms.
"""

from quickstart_teacher import get_config as teacher


def get_config():
    c = teacher()
    c.run_dir = "build/quickstart/competent"
    c.student.config = "build/quickstart/competent_init"
    c.student.tokenizer = "build/quickstart/competent_init"
    c.data.traces = "build/quickstart/competent_traces.jsonl"
    c.data.eval_fraction = 0.02
    c.data.seq_len = 128
    c.data.batch_size = 8
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 10
    c.optim.weight_decay = 0.0
    c.train.steps = 1000
    c.evaluate.problems = "dcod_jax/assets/quickstart/competent/validation.jsonl"
    return c
