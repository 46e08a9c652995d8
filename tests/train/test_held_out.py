"""Answers while training: their accuracy, the bits of the training, and what is refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.config_checks import config_errors
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.statistics import wilson
from dcod_jax.models import hf, transformer
from dcod_jax.prepare.command import prepare
from dcod_jax.sample import decoding
from dcod_jax.train import checkpoint_reader, checkpointer, loop, setup
from dcod_jax.train.command import train
from dcod_jax.train.settings import best_metric, loss_config
from tests.train.test_checkpointer import make_state

# Answers on several devices are in tests/parallel.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A student that learns to answer 7; half of the problems ask for it."""
    place = tmp_path_factory.mktemp("held-out")
    tiny.write_model(place / "student", seed=1, num_hidden_layers=1)
    traces = [record | {"completion": "#### 7", "answer": "7"} for record in tiny.sums(40)]
    tiny.write_jsonl(place / "traces.jsonl", traces)
    asked = [{"prompt": f"{i}+{i}?", "answer": "7" if i % 2 else "8"} for i in range(10)]
    tiny.write_jsonl(place / "problems.jsonl", [*asked, {"prompt": "1?", "answer": ""}])
    config = configs.load_recipe(configs.BASE)
    values = {
        "student.path": str(place / "student"),
        "student.compute_dtype": "float32",
        "data.traces": str(place / "traces.jsonl"),
        "data.dataset": str(place / "dataset"),
        "data.eval_fraction": 0.2,
        "data.max_length": 32,
        "data.seq_len": 32,
        "loss.weights.name": "uniform",
        "evaluate.max_new_tokens": 8,
        "evaluate.batch_size": 4,
        "optim.learning_rate": 2e-2,
        "optim.schedule": "constant",
        "train.steps": 30,
        "train.log_every": 5,
        "train.eval_every": 10,
        "train.save_every": 10,
        "train.keep": 4,
        "train.progress": False,
    }
    config = configs.replace(config, values)
    prepare(config)
    return config


ASKING = {"train.eval_problems_every": 10, "train.best_metric": "accuracy"}


def variant(config, name, **changes):
    place = config.student.path.removesuffix("student")
    asking = ASKING | {"train.eval_problems": f"{place}problems.jsonl"}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    found = configs.replace(config, {"run_dir": f"{place}{name}"} | asking | changes)
    assert config_errors(configs.keys(found), loss_config(found)) == []
    return found


def lines(config, *, answers):
    """Lines of metrics.jsonl without what a clock gives, and with the answers or without."""
    text = Path(config.run_dir, "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    left_out = ("time",) if answers else ("time", *ANSWERS)
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in found]


ANSWERS = ("eval/accuracy", "eval/unfinished")


def params_of(config):
    model, _ = hf.load_config(config.student.path)
    like = transformer.param_shapes(model)
    return checkpoint_reader.read_params(config.run_dir, like, step=config.train.steps)[0]


@pytest.mark.usefixtures("one_train_step")
def test_answers_are_graded_and_leave_the_bits_of_the_training(config):
    """With answers to the end, and to step 20 only: the same run; one program for all rounds."""
    before = [f._cache_size() for f in (decoding.decode, decoding.prefill)]
    asking = variant(config, "asking")
    loop.fit(asking)
    assert [f._cache_size() for f in (decoding.decode, decoding.prefill)] == [
        size + 1 for size in before
    ]
    answered = [line for line in lines(asking, answers=True) if "eval/accuracy" in line]
    assert [line["step"] for line in answered] == [0, 10, 20, 30]
    assert all("eval/nll" in line for line in answered)
    last = answered[-1]
    assert (last["eval/accuracy"], last["eval/unfinished"]) == (0.5, 0.0)  # the 11th has no answer
    assert (last["eval/accuracy_low"], last["eval/accuracy_high"]) == wilson(5, 10)
    assert answered[0]["eval/accuracy"] < 0.5
    seconds = json.loads(Path(asking.run_dir, "goodput.json").read_text())["total"]
    assert 0 < seconds["eval_seconds"] < seconds["wall_seconds"]

    stopped = variant(config, "stopped", train__steps=20)
    loop.fit(stopped)
    whole = lines(asking, answers=True)
    assert lines(stopped, answers=True) == [line for line in whole if line["step"] <= 20]
    silent = {"train.eval_problems": "", "train.eval_problems_every": 0, "train.best_metric": ""}
    silent = configs.replace(stopped, silent | {"train.steps": 30})
    loop.fit(silent)  # goes on from step 20
    assert lines(silent, answers=False) == lines(asking, answers=False)
    assert lines(silent, answers=True)[-1].keys() < whole[-1].keys()
    jax.tree.map(np.testing.assert_array_equal, params_of(asking), params_of(silent))

    found = {line["step"]: line["eval/accuracy"] for line in answered[1:]}
    wanted = max(found, key=lambda step: (found[step], step))
    like = transformer.param_shapes(hf.load_config(asking.student.path)[0])
    _, record = checkpoint_reader.read_params(asking.run_dir, like, best_metric=best_metric(asking))
    assert (record.step, record.metrics["eval/accuracy"]) == (wanted, found[wanted])


def test_the_highest_accuracy_is_kept_and_of_equal_ones_the_latest(tmp_path):
    run = checkpointer.Checkpointer(tmp_path, keep=1, best_metric="eval/accuracy")
    for step, accuracy in enumerate([0.2, 0.7, 0.7, 0.4, None, 0.1], 1):
        metrics = {} if accuracy is None else {"eval/accuracy": accuracy, "eval/nll": step}
        run.save(checkpointer.Snapshot(state=make_state(), step=step, metrics=metrics))
    run.close()
    assert run.steps() == [3, 6]
    like = make_state().params
    assert checkpoint_reader.read_params(tmp_path, like, best_metric="eval/accuracy")[1].step == 3
    assert checkpoint_reader.read_params(tmp_path, like, best_metric="eval/loss")[1].step == 6


@pytest.mark.parametrize(
    ("record", "changes", "error"),
    [
        (None, {}, "none.jsonl: no such file"),
        ({"prompt": "1+1?", "gold": "2"}, {}, "x.jsonl:1: no answer.*prepare.answer_field"),
        ({"prompt": "1+1?", "gold": "2"}, {"prepare.answer_field": "gold"}, ""),
        ({"text": "1+1?", "answer": "2"}, {}, "x.jsonl:1: no prompt.*prepare.prompt_field"),
        (
            {"prompt": "1+1?", "answer": "2"},
            {"evaluate.max_new_tokens": 252},
            "x.jsonl:1: the prompt has 7 tokens.*lower evaluate.max_new_tokens",
        ),
        ({"prompt": "1+1?", "answer": ""}, {}, "no problems.*1 with an empty answer"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(
    config, tmp_path, record, changes, error
):
    path = tmp_path / ("x.jsonl" if record else "none.jsonl")
    if record:
        tiny.write_jsonl(path, [record])
    asked = configs.replace(config, {"train.eval_problems": str(path), **changes})
    if not error:
        return setup.preflight(asked)
    with pytest.raises(DcodError, match=error):
        setup.preflight(asked)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"evaluate.problems": "none.jsonl"}, "none.jsonl: no such file"),
        ({"evaluate.sets": ("mine=none.jsonl",)}, "none.jsonl: no such file"),
        ({"evaluate.max_new_tokens": 252}, r"problems.jsonl:1: the prompt has \d+ tokens"),
        ({"evaluate.max_new_tokens": 256}, "evaluate.max_new_tokens=256 leaves no room"),
        ({"student.path": "{place}/bare"}, r"bare: no model\.safetensors"),
        ({"student.path": "{place}/stude"}, "no such model directory; .*/student is there"),
        ({"loss.weights.name": "auto"}, "weights.name=auto needs a teacher's log-probs.*set teach"),
    ],
)
def test_what_the_end_needs_is_looked_for_before_the_work(config, changes, error):
    """Hours of training and scoring would come before it."""
    place = Path(config.student.path).parent
    if not (place / "bare").exists():
        tiny.write_tokenizer(place / "bare")
        (place / "bare" / "config.json").write_text(json.dumps(tiny.raw_config()))
    changes = {
        key: value.format(place=place) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    problems = {"evaluate.problems": str(place / "problems.jsonl")}
    asked = configs.replace(config, {"run_dir": str(place / "late")} | problems | changes)
    with pytest.raises(DcodError, match=error):
        train(asked)
    assert not (place / "late" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, ""),
        ({"train.eval_problems_every": 25}, r"save_every=10 must be a multiple of \S+_every=25"),
        ({"train.eval_problems_every": 25, "train.best_metric": "nll"}, ""),
        ({"train.eval_problems": ""}, r"(?s)every=10 needs.*best_metric=accuracy needs"),
        ({"train.eval_problems_every": 0, "train.eval_every": 0}, "is never asked"),
        ({"train.best_metric": "acuracy"}, "must be one of .*accuracy"),
        ({"train.best_metric": "eval/accuracy"}, ""),
        ({"train.eval_problems_every": -1}, "train.eval_problems_every=-1 must not be negative"),
    ],
)
def test_settings_of_the_answers_that_cannot_be(config, changes, error):
    given = ASKING | {"train.eval_problems": "some.jsonl"} | changes
    found = "\n".join(
        config_errors(configs.keys(configs.replace(config, given)), loss_config(config))
    )
    assert (found == "") == (error == "")
    assert not error or re.search(error, found), found
