"""The quickstart from a student that lacks the skill: SFT, a fixed and an automatic temperature.

    python tools/make_quickstart_assets.py data
    python -m dcod_jax.train --config configs/quickstart_student.py \\
        --config.run_dir=build/quickstart/early --config.train.steps=300
    python -m dcod_jax.train --config configs/lacking_skill.py

The first two commands make the student, which solves about 7 % of the validation problems. The
third trains it with plain SFT, with the sigmoid at temperature 1 and with the automatic
temperature, and compares them on the validation problems. The results decided the defaults
of loss.weights.target_loss and smoothing. Results: docs/auto_temperature.md.
"""

from dcod_jax.configs.quickstart_lacking import ASSETS
from dcod_jax.configs.quickstart_lacking import get_config as quickstart


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
