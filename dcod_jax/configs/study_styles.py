"""The study with a teacher that mixes six styles, one of which is the student's.

    python -m dcod_jax.study --config study_styles
    python tools/make_study_page.py --recipe study_styles --results RUN_DIR/results.jsonl

The study trains the teacher itself. In the second condition no trace has the student's style.
"""

from dcod_jax.configs.study import NLL
from dcod_jax.configs.study import get_config as study

CONDITIONS = (
    f"main study.only={NLL}",
    f"own-style-absent study.styles=words,groups,values,chain,table study.only={NLL}",
)


def get_config():
    c = study()
    c.run_dir = "runs/study-styles"
    c.study.teacher_steps = 3000
    c.study.drift_prompts = 0
    c.study.conditions = CONDITIONS
    return c
