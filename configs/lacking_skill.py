"""The quickstart from a student that lacks the skill: what a fixed temperature does to it.

    python tools/make_quickstart_assets.py data
    python -m dcod_jax.train --config configs/quickstart_student.py \\
        --config.run_dir=build/quickstart/early --config.train.steps=300
    python -m dcod_jax.train --config configs/lacking_skill.py

The first two commands make the student, which solves about 7 % of the validation problems. Then
plain SFT, the sigmoid at temperature 1 and the sigmoid with the automatic temperature are trained
from it and compared on the validation problems, from which the defaults of
loss.weights.target_loss and smoothing were chosen. Results: docs/auto_temperature.md.
"""

from dcod_jax.configs.quickstart import ASSETS
from dcod_jax.configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.run_dir = "runs/lacking-skill"
    c.student.path = "build/quickstart/early/export"
    c.evaluate.problems = str(ASSETS / "validation.jsonl")
    c.compare = (
        "sft loss.weights.name=uniform",
        "fixed loss.weights.temperature=1",
        "auto loss.weights.temperature=auto",
    )
    return c
