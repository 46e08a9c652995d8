"""The study on embedded arithmetic: every method with and without weights, over five seeds.

    python -m dcod_jax.study --config study
    python tools/make_study_page.py

The first command goes on where it was interrupted; the second writes the tables of docs/study.md.
Nothing is downloaded: the teacher is the quickstart's.
"""

from pathlib import Path

import dcod_jax
from dcod_jax.configs.base import get_config as base

TEACHER = Path(dcod_jax.__file__).resolve().parent / "assets" / "quickstart" / "teacher"

SIGMOID = "loss.weights.name=sigmoid"
UNIFORM = "loss.weights.name=uniform"
GKD = "loss.divergence=jsd loss.teacher=live on_policy.fraction=0.5"
# A name "x+w" is method x with weights w: its tables compare it with "x".
AUTO = "loss.weights.temperature=auto"  # holds the share of the loss that is kept, 0.9
ARMS = (
    f"sft loss.divergence=nll {UNIFORM}",
    f"sft+sigmoid loss.divergence=nll {SIGMOID}",
    f"sft+auto loss.divergence=nll {SIGMOID} {AUTO}",
    "dft loss.divergence=nll loss.weights.name=dft loss.weights.normalize=none",
    f"fkl loss.divergence=forward_kl {UNIFORM}",
    f"fkl+sigmoid loss.divergence=forward_kl {SIGMOID}",
    f"todi loss.divergence=todi {UNIFORM}",
    f"todi+sigmoid loss.divergence=todi {SIGMOID}",
    f"jsd loss.divergence=jsd {UNIFORM}",
    f"jsd+sigmoid loss.divergence=jsd {SIGMOID}",
    f"gkd {GKD} {UNIFORM}",
    f"gkd+sigmoid {GKD} {SIGMOID}",
    f"sft+t3 loss.divergence=nll {SIGMOID} loss.weights.temperature=3",
    f"sft+prefix loss.divergence=nll {SIGMOID} loss.weights.scope=prefix",
    f"sft+sequence loss.divergence=nll {SIGMOID} loss.weights.scope=sequence",
    f"sft+unnormalised loss.divergence=nll {SIGMOID} loss.weights.normalize=none",
    f"sft+each-sequence loss.divergence=nll {SIGMOID} loss.weights.normalize=sequence",
)
PLAIN = "sft,sft+sigmoid,sft+auto,dft,fkl,fkl+sigmoid"
OTHERS = "todi,todi+sigmoid,jsd,jsd+sigmoid,gkd,gkd+sigmoid"
NLL = "sft,sft+sigmoid,sft+auto"
VARIANTS = "sft,sft+sigmoid,sft+t3,sft+prefix,sft+sequence,sft+unnormalised,sft+each-sequence"
GIVEN = f"study.start_steps=0 student.path={TEACHER.parent / 'student'}"
# In the order of their weight: an interrupted study has the first ones whole.
CONDITIONS = (
    f"main study.seeds=8 study.only={PLAIN}",
    f"start-in-the-teachers-styles {GIVEN} study.own_rates=true study.only={NLL}",
    f"main-other-methods study.seeds=8 study.only={OTHERS}",
    f"lacking study.start_steps=200 study.own_rates=true study.only={NLL}",
    f"mastering study.start_steps=2000 study.own_rates=true study.only={NLL}",
    "three-times-the-steps train.steps=600 study.only=sft,sft+sigmoid",
    f"traces-in-the-starts-style study.styles=equations study.only={NLL}",
    f"noise-10% study.noise=0.1 study.only={NLL}",
    f"teacher-temperature-1.5 generate.temperature=1.5 study.only={NLL}",
    f"main-variants study.only={VARIANTS}",
    f"teacher-temperature-0.5 generate.temperature=0.5 study.only={NLL}",
    f"smaller-student study.width=32 study.own_rates=true study.only={NLL}",
    f"no-capacity-gap study.width=96 study.layers=3 study.own_rates=true study.only={NLL}",
    f"traces-in-a-foreign-style study.styles=words study.only={NLL}",
    f"noise-30% study.noise=0.3 study.only={NLL}",
)


def get_config():
    c = base()
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
    c.study.learning_rates = (3e-4, 1e-3, 3e-3)
    return c
