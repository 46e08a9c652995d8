"""The quickstart's student: half learned, on worked solutions of problems the teacher never saw.

    python tools/make_quickstart_assets.py data
    python -m dcod_jax.train --config configs/quickstart_student.py

It solves about half of the validation problems, which decided its steps. The weights correct the
drift of a student that has the skill; they do not teach the skill.
"""

from quickstart_teacher import get_config as teacher


def get_config():
    c = teacher()
    c.run_dir = "build/quickstart/student"
    c.student.config = "build/quickstart/student_init"
    c.student.tokenizer = "build/quickstart/student_init"
    c.data.traces = "build/quickstart/student_traces.jsonl"
    c.data.eval_fraction = 0.02
    c.optim.learning_rate = 3e-3
    c.train.steps = 750
    return c
