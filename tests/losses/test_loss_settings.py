"""Each wrong value under loss.* has one message; what is allowed is not refused."""

import pytest
from test_distill import config

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.losses.weight_errors import config_errors
from dcod_jax.train.settings import loss_config

WRONG = [  # (changed keys of loss.*, what the one message must say)
    ("divergence=kl", "loss.divergence='kl' must be one of nll, forward_kl"),
    ("teacher=top_k", "loss.teacher='top_k' must be one of cached, live"),
    ("weights.name=softmax", "loss.weights.name='softmax' must be one of uniform, sigmoid"),
    ("weights.scope=batch", "loss.weights.scope='batch' must be one of token, prefix, sequence"),
    ("weights.normalize=max", "loss.weights.normalize='max' must be one of mean, none, sequence"),
    ("head_chunk=0", "loss.head_chunk=0 must be greater than 0"),
    ("alpha=1.5", "loss.alpha=1.5 must be in [0, 1]"),
    ("alpha=nan", "loss.alpha='nan' must be a finite number"),
    ("beta=-0.1", "loss.beta=-0.1 must be in [0, 1]"),
    ("skew=0.0", "loss.skew=0.0 must be between 0 and 1; at the ends skew KL is a plain KL"),
    ("skew=1.0", "loss.skew=1.0 must be between 0 and 1"),
    ("taid_start=1.0", "loss.taid_start=1.0 must be in [0, 1)"),
    ("taid_end=0.3", "loss.taid_end=0.3 must be >= loss.taid_start=0.4"),
    ("taid_end=1.5", "loss.taid_end=1.5 must be in [0, 1]"),
    ("taid_alpha=2.0", "loss.taid_alpha=2.0 must be in [0, 1]"),
    ("taid_beta=1.0", "loss.taid_beta=1.0 must be in [0, 1)"),
    ("temperature=0.0 teacher=live divergence=jsd", "loss.temperature=0.0 must be a finite number"),
    (
        "temperature=inf teacher=live divergence=jsd",
        "loss.temperature='inf' must be a finite number",
    ),
    ("temperature=2.0", "loss.temperature=2.0 is nothing for loss.divergence=nll"),
    ("temperature=2.0 divergence=jsd", "set loss.teacher=live, or loss.temperature=1"),
    ("weights.temperature=-1.0", "loss.weights.temperature=-1.0 must be a finite number > 0"),
    ("weights.offset=nan", "loss.weights.offset='nan' must be a finite number"),
    ("weights.clip=-1.0", "loss.weights.clip=-1.0 must be a finite number > 0"),
    ("weights.warmup_steps=-1", "loss.weights.warmup_steps=-1 must not be negative"),
    ("weights.name=clip weights.temperature=auto", "it is for sigmoid, power"),
    ("weights.name=power weights.offset=auto", "loss.weights.offset='auto' means nothing for"),
    ("weights.target_loss=1.0", "loss.weights.target_loss=1.0 must be in [0, 1)"),
    ("weights.target_ess=1.0", "loss.weights.target_ess=1.0 must be in [0, 1)"),
    ("weights.target_mean=0.0", "loss.weights.target_mean=0.0 must be between 0 and 1"),
    ("weights.smoothing=1.0", "loss.weights.smoothing=1.0 must be in [0, 1)"),
    (
        "weights.temperature=auto weights.offset=auto weights.target_loss=0.0",
        "leave one target for two unknowns",
    ),
    (
        "weights.temperature=auto weights.target_ess=0.9",
        "loss.weights.target_ess=0.9 are two targets for one temperature; set one of them to 0",
    ),
    ("weights.temperature=auto weights.target_mean=0.3", "target_mean=0.3 is not read"),
    ("weights.ratio=teacher/student", "must be one of student/teacher, start/teacher"),
    ("weights.ratio=start/teacher", "the training must begin at student.path"),
    ("weights.unit=tokens", "loss.weights.unit='tokens' must be one of nats, spread"),
    ("weights.unit=spread weights.temperature=auto", "is for a number loss.weights.temperature"),
    ("weights.unit=spread weights.name=q_power", "of sigmoid or power, got loss.weights.name='q_p"),
    ("weights.name=q_threshold weights.threshold=0.0", "threshold=0.0 must be in (0, 1]"),
    ("weights.name=drift_share weights.scope=prefix", "set loss.weights.scope='token'"),
    ("weights.name=advantage", "Set loss.weights.normalize='none'"),
    (
        "weights.name=advantage weights.normalize=none weights.warmup_steps=9",
        "loss.weights.warmup_steps=0",
    ),
    (
        "weights.name=advantage weights.normalize=none divergence=forward_kl",
        "weighs the log-prob of the sampled token",
    ),
    ("weights.name=auto weights.temperature=0.5", "temperature=0.5: loss.weights.name='auto' choo"),
    ("weights.name=auto weights.scope=prefix", "leave it at 'token', or set loss.weights.name=sig"),
    (
        "weights.name=auto weights.unit=spread",
        "loss.weights.unit='spread': loss.weights.name='auto'",
    ),
    ("anchor=-0.1", "loss.anchor=-0.1 must not be negative"),
    ("anchor=0.1 weights.normalize=none", "a loss.divergence other than nll"),
    ("anchor=0.1 divergence=forward_kl", "divisor Σw of mean would scale it"),
]


def check(changes):
    """Check the base configuration with other values of loss.* and a teacher and a top-k cache."""
    made = configs.load_recipe(configs.BASE)
    for change in ("teacher.path=T", "score.top_k=64", *(f"loss.{c}" for c in changes.split())):
        configs.assign(made, *change.split("=", 1))
    configs.check(made)


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[c for c, _ in WRONG])
def test_each_wrong_value_has_its_one_message(changes, message):
    with pytest.raises(DcodError) as error:
        check(changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["temperature", "offset"])
def test_a_text_of_a_recipe_that_is_not_auto_is_refused(name):
    (error,) = config_errors(config(**{name: "warm"}).weights)
    assert error == f"loss.weights.{name}='warm' must be a number or 'auto'"


def test_auto_is_one_weight_a_trace_at_a_temperature_of_its_own():
    made = [configs.load_recipe(configs.BASE) for _ in range(2)]
    configs.assign(made[0], "loss.weights.name", "auto")
    for key, value in (("name", "sigmoid"), ("scope", "sequence"), ("temperature", "0.3")):
        configs.assign(made[1], f"loss.weights.{key}", value)
    assert (
        loss_config(made[0])
        == loss_config(made[1])
        != loss_config(configs.load_recipe(configs.BASE))
    )


def test_what_is_allowed_is_not_refused():
    for changes in (
        "divergence=jsd beta=0.0 teacher=live temperature=3.0",
        "divergence=taid taid_start=0.0 taid_end=1.0 alpha=0.0",
        "weights.temperature=auto weights.target_loss=0.0 weights.target_mean=0.3",
        "weights.temperature=auto weights.target_loss=0.0 weights.target_ess=0.9",
        "weights.temperature=auto weights.offset=auto weights.target_mean=0.3",
        "weights.target_ess=0.9 weights.target_mean=0.3",  # nothing is automatic
        "weights.temperature=auto weights.offset=auto weights.smoothing=0.0",
        "weights.name=power weights.temperature=auto",
        "anchor=0.1 divergence=forward_kl weights.name=dft weights.normalize=none",
        "anchor=0.1 divergence=forward_kl weights.name=uniform",
        "weights.unit=spread weights.scope=sequence weights.offset=auto",
        "weights.name=auto weights.normalize=sequence weights.warmup_steps=3",
        "weights.name=advantage weights.normalize=none",
        "weights.name=drift_share weights.normalize=sequence",
    ):
        check(changes)
