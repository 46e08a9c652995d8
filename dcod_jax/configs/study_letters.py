"""The study on a second domain, whose answers are words: letters that change places.

    python -m dcod_jax.study --config study_letters
    python tools/make_study_page.py --recipe study_letters --results RUN_DIR/results.jsonl

The study trains the teacher itself, in all three styles. The starts are less competent than those
of `study`, and drift is not measured.
"""

from dcod_jax.configs.study import NLL, OWN
from dcod_jax.configs.study import get_config as study

CONDITIONS = (
    f"main study.only={NLL}",
    f"less-competent study.start_steps=1000 {OWN}",
    f"noise-30% study.noise=0.3 {OWN}",
    "start-in-the-teachers-styles study.start_styles=steps,words,tracks study.start_steps=1000 "
    f"{OWN}",
)


def get_config():
    c = study()
    c.run_dir = "runs/study-letters"
    c.study.domain = "letters"
    c.study.teacher_steps = 2000
    c.study.start_styles = ("steps",)
    c.study.start_steps = 1500
    c.generate.max_new_tokens = 96  # five moves in words
    c.on_policy.max_new_tokens = 96
    c.study.drift_prompts = 0
    c.study.conditions = CONDITIONS
    return c
