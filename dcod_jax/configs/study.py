"""The study on embedded arithmetic: every method with and without weights, over eight seeds.

    python -m dcod_jax.study --config study
    python tools/make_study_page.py

The first command goes on where it was interrupted; the second writes the tables of docs/study.md.
Nothing is downloaded: the teacher is the quickstart's.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import dcod_jax
from dcod_jax.configs.base import get_config as base

TEACHER = Path(dcod_jax.__file__).resolve().parent / "assets" / "quickstart" / "teacher"

SIGMOID = "loss.weights.name=sigmoid"
UNIFORM = "loss.weights.name=uniform"
GKD = "loss.divergence=jsd loss.teacher=live on_policy.fraction=0.5"
LIGHTNING = "loss.weights.name=advantage loss.weights.normalize=none loss.weights.clip=2"
LIGHTNING += " loss.weights.ratio=start/teacher study.select=own"
# A name "x+w" is method x with weights w: its tables compare it with "x".
AUTO = "loss.weights.name=auto"
SEQUENCE = f"{SIGMOID} loss.weights.scope=sequence loss.weights.temperature"
SPREAD = f"{SEQUENCE}=0.5 loss.weights.unit=spread"
ARMS = (
    f"sft loss.divergence=nll {UNIFORM}",
    f"sft+sigmoid loss.divergence=nll {SIGMOID}",
    f"sft+auto loss.divergence=nll {AUTO}",
    "dft loss.divergence=nll loss.weights.name=dft loss.weights.normalize=none",
    f"fkl loss.divergence=forward_kl {UNIFORM}",
    f"fkl+sigmoid loss.divergence=forward_kl {SIGMOID}",
    f"fkl+auto loss.divergence=forward_kl {AUTO}",
    f"jsd loss.divergence=jsd {UNIFORM}",
    f"jsd+auto loss.divergence=jsd {AUTO}",
    f"gkd {GKD} {UNIFORM}",
    f"lightning-opd loss.divergence=nll {LIGHTNING}",
    f"sft+likely loss.divergence=nll {UNIFORM} study.select=likely:0.3",
    f"sft+short loss.divergence=nll {UNIFORM} study.select=short:0.3",
    f"sft+t1 loss.divergence=nll {SEQUENCE}=1",
    f"sft+t0.1 loss.divergence=nll {SEQUENCE}=0.1",
    f"sft+start loss.divergence=nll {SEQUENCE}=0.3 loss.weights.ratio=start/teacher",
    f"sft+spread loss.divergence=nll {SPREAD}",
    "sft+eaft loss.divergence=nll loss.weights.name=eaft",
    "sft+idft loss.divergence=nll loss.weights.name=idft",
    "sft+drift-share loss.divergence=nll loss.weights.name=drift_share",
)
NLL = "sft,sft+sigmoid,sft+auto"
OWN = f"study.own_rates=true study.only={NLL}"
SELECTED = f"{OWN},sft+likely,sft+start"
GIVEN = f"study.start_steps=0 student.path={TEACHER.parent / 'student'}"
# In the order of their weight: an interrupted study has the first ones whole.
CONDITIONS = (
    f"main study.only={NLL},dft,jsd,gkd,sft+likely,sft+short,sft+start",
    f"start-in-the-teachers-styles {GIVEN} {SELECTED}",
    f"lacking study.start_steps=200 {SELECTED}",
    f"noise-30% study.noise=0.3 {SELECTED}",
    f"traces-in-a-foreign-style study.styles=words {OWN}",
    f"three-times-the-steps train.steps=600 study.only={NLL}",
    f"mastering study.start_steps=2000 {OWN}",
    f"own-style-rare study.styles=words,groups,equations:0.1 study.only={NLL}",
    f"short-solutions study.terms=2,3 study.only={NLL}",
    f"noise-10% study.noise=0.1 study.only={NLL}",
    f"traces-in-the-starts-style study.styles=equations study.only={NLL}",
    f"smaller-student study.width=32 {OWN}",
    f"no-capacity-gap study.width=96 study.layers=3 {OWN}",
    f"teacher-temperature-1.5 generate.temperature=1.5 study.only={NLL}",
    f"teacher-temperature-0.5 generate.temperature=0.5 study.only={NLL}",
    f"teachers-styles-at-one-rate {GIVEN} study.own_rates=true study.only=sft,sft+auto "
    "study.learning_rates=(1e-3,)",
    "main-variants study.only=sft+t1,sft+t0.1,sft+spread",
    "main-other-weights study.only=sft+eaft,sft+idft,sft+drift-share",
    "main-offline-on-policy study.only=lightning-opd",
    "main-other-losses study.only=fkl,fkl+sigmoid,fkl+auto,jsd+auto",
    f"nine-times-the-steps train.steps=1800 study.only={NLL}",
)


def study_keys() -> Any:
    """The section `study` of a config: every key that only the study reads, with its default."""
    c: Any = ConfigDict()
    c.study = ConfigDict()
    c.study.domain = "arithmetic"  # of the problems: arithmetic | letters
    c.study.teacher_steps = 0  # of a teacher trained here, in every style; 0: teacher.path
    c.study.arms = ()  # losses compared by the study: ("sft loss.weights.name=uniform", ...)
    c.study.conditions = ()  # ("main", "hot generate.temperature=1.5", ...); "main" comes first
    c.study.only = ()  # names of the arms to run; empty: all
    c.study.seeds = 5  # test runs of each arm
    c.study.tuning_seeds = 3  # tuning runs of each arm and rate; their mean chooses the rate
    c.study.learning_rates = (1e-3, 3e-3)  # the grid of every arm
    c.study.own_rates = False  # a condition's own grid, not the rates found in "main"
    c.study.width = 64  # hidden size of the student, a multiple of 16
    c.study.layers = 2  # layers of the student
    c.study.start_steps = 1000  # warm start, more is more competent; 0: student.path
    c.study.start_learning_rate = 3e-3  # constant learning rate of the warm start
    c.study.start_styles = ("equations",)  # styles of the warm start's worked solutions
    c.study.start_terms = (3, 6)  # fewest and most terms of a problem in the warm start
    c.study.start_problems = 6000  # worked solutions of the warm start
    c.study.terms = (3, 4)  # fewest and most terms in the traces and the test set "in"
    c.study.longer_terms = (5, 6)  # fewest and most terms in the test set "longer"
    c.study.first_operands = (1, 6)  # lowest and highest first operand of everything trained on
    c.study.held_out_operands = (7, 9)  # lowest and highest first operand of the set "operands"
    c.study.traces = 3000  # traces of the teacher
    c.study.noise = 0.0  # share of the traces with one digit of the steps replaced
    c.study.styles = ()  # keep traces of these styles only ("words:0.1": a tenth); empty: all
    c.study.select = ""  # a part: "likely:0.3" under the start, "short:0.3"; or "own" answers
    c.study.problems = 256  # problems in each held-out set
    c.study.drift_length = 20  # tokens over which ExAccErr is accumulated
    c.study.drift_prompts = 128  # prompts of a test run's drift measurement; 0: none
    return c.study


def get_config():
    c = base()
    with c.unlocked():
        c.study = study_keys()
    c.run_dir = "runs/study"
    c.student.compute_dtype = "float32"
    c.student.remat = "none"
    c.teacher.path = str(TEACHER)
    c.teacher.dtype = "float32"
    c.generate.temperature = 1.0
    c.generate.max_new_tokens = 72
    c.generate.batch_size = 256
    c.on_policy.max_new_tokens = 72
    c.score.top_k = 101  # the whole vocabulary: a cached divergence is the exact one
    c.data.max_length = 128
    c.data.seq_len = 128
    c.data.batch_size = 8
    c.data.head_tokens = 112
    c.loss.head_chunk = 1024
    c.optim.learning_rate = 1e-3  # not used: study.learning_rates
    c.optim.warmup_steps = 10
    c.train.steps = 200
    c.study.arms = ARMS
    c.study.conditions = CONDITIONS
    c.study.seeds = 8
    c.study.learning_rates = (3e-4, 1e-3, 3e-3)
    return c
