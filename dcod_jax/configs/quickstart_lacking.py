"""The quickstart from a student that lacks half of the skill, where weights do not beat SFT.

    python -m dcod_jax.train --config quickstart_lacking

The student writes as the teacher does, in three ways, and solves half of the problems. Of 200 and
400 steps and learning rates 3e-4 and 1e-3 the recipe takes those with which plain SFT did best on
the validation problems, for DisCorD too.
"""

from dcod_jax.configs.quickstart import ASSETS
from dcod_jax.configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.run_dir = "runs/quickstart-lacking"
    c.student.path = str(ASSETS / "student")
    c.generate.prompts = str(ASSETS / "prompts.jsonl")
    c.generate.samples = 2
    c.data.seq_len = 192
    c.data.batch_size = 12
    c.optim.warmup_steps = 20
    c.train.steps = 400
    c.train.eval_every = 100
    c.evaluate.problems = str(ASSETS / "eval.jsonl")
    c.evaluate.sets = ()
    c.compare = ("sft loss.weights.name=uniform", "discord loss.weights.name=sigmoid")
    return c
