"""Offline on-policy distillation (Lightning OPD, arXiv 2604.13010) on the quickstart's models.

    python -m dcod_jax.train --config lightning_opd

The student answers the prompts once, right or wrong; the teacher and the student's start score
these samples once; then the student is trained with −log q · sg[log p − log q₀], clipped. Nothing
but log-probs of the sampled tokens is read, 8 bytes a token. For models of your own set
student.path, teacher.path and generate.prompts. Rate, steps and clip are a place to begin: they
were not searched.
"""

from dcod_jax.configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.run_dir = "runs/lightning-opd"
    c.generate.model = "student"
    c.prepare.filter_correct = False  # wrong answers teach, too: their tokens have log p < log q
    c.score.student = True
    c.loss.weights.name = "advantage"
    c.loss.weights.ratio = "start/teacher"
    c.loss.weights.normalize = "none"
    c.loss.weights.clip = 2.0
    c.optim.learning_rate = 3e-4
    c.train.steps = 200
    c.compare = ()
    return c
