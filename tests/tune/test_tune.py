"""Tuning: what is tried and for how long, a tuning that is killed, and the recipe it writes."""

import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dcod_jax import config as configs
from dcod_jax.config_checks import config_errors
from dcod_jax.errors import DcodError
from dcod_jax.train import loop
from dcod_jax.train.settings import loss_config
from dcod_jax.tune import command
from dcod_jax.tune.grid import Rung, candidates, rungs, spent
from tests.train import test_held_out
from tests.train.test_held_out import params_of, variant

config = test_held_out.config  # a fixture
pytestmark = pytest.mark.usefixtures("one_device")
KEYS = configs.keys(configs.load_recipe(configs.BASE))
RATE = "optim.learning_rate"


def test_candidates_are_every_combination_of_the_alternatives():
    grid = (
        f"{RATE}=1e-5|3e-5",
        "loss.weights.name=uniform | loss.weights.name=sigmoid loss.weights.temperature=0.3",
    )
    assert candidates(grid, KEYS) == [
        (f"{RATE}=1e-5", "loss.weights.name=uniform"),
        (f"{RATE}=1e-5", "loss.weights.name=sigmoid", "loss.weights.temperature=0.3"),
        (f"{RATE}=3e-5", "loss.weights.name=uniform"),
        (f"{RATE}=3e-5", "loss.weights.name=sigmoid", "loss.weights.temperature=0.3"),
    ]


@pytest.mark.parametrize(
    ("grid", "error"),
    [
        (("optim.learning_rat=1|2",), "expected; did you mean|optim.learning_rate"),
        (("1e-5|2e-5",), "a key of the config and its value are expected"),
        ((f"{RATE}=1|",), "expected"),
        (("train.steps=10|20",), "train.steps is the same for all candidates"),
        (("evaluate.shots=0|8",), "evaluate.shots is the same"),
        ((f"{RATE}=1|1",), "the same candidate twice"),
        ((f"{RATE}={'|'.join(map(str, range(99)))}",) * 9, "candidates; at most 1,000 are tried"),
        ((f"{RATE}=1|2", f"{RATE}=3|4"), f"sets {RATE} twice"),
    ],
)
def test_what_is_no_candidate_is_refused(grid, error):
    with pytest.raises(DcodError, match=error):
        candidates(grid, KEYS)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 27])
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_rounds_halve_and_stay_within_the_budget(count, factor):
    for budget in (500, 1000, 5000):
        rounds = rungs(count, steps=400, factor=factor, budget=budget)
        assert rounds[0].candidates == count
        assert rounds[-1] == Rung(1, 400)
        total = sum(
            rung.candidates * (rung.steps - before)
            for rung, before in zip(rounds, [0, *(r.steps for r in rounds)], strict=False)
        )
        assert total == spent(rounds) <= budget
        for earlier, later in itertools.pairwise(rounds):
            assert later.candidates == -(-earlier.candidates // factor)
            assert earlier.steps < later.steps
        if count > 1 and (longer := rounds[0].steps + 1) * factor ** (len(rounds) - 2) < 400:
            ends = [longer * factor**i for i in range(len(rounds) - 1)] + [400]
            more = [Rung(r.candidates, end) for r, end in zip(rounds, ends, strict=True)]
            assert spent(more) > budget


def test_a_plan_that_cannot_be_is_refused():
    assert rungs(12, steps=200, factor=3, budget=600) == [
        Rung(12, 17), Rung(4, 51), Rung(2, 153), Rung(1, 200),
    ]  # fmt: skip
    with pytest.raises(DcodError, match=r"tune.budget=200 steps are too few.*at least 2\d\d"):
        rungs(12, steps=200, factor=3, budget=200)
    with pytest.raises(DcodError, match=r"train.steps=9 are too few for 12 candidates in 4 rounds"):
        rungs(12, steps=9, factor=3, budget=1000)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, ""),
        ({"tune.factor": 1}, "tune.factor=1 must be at least 2"),
        ({"tune.budget": -1}, "tune.budget=-1 must not be negative"),
        ({"tune.budget": 9}, "tune.budget=9 steps are too few"),
        ({"train.best_metric": ""}, "tune.grid needs train.best_metric"),
        ({"compare": ("a",)}, "tune.grid and compare are both set"),
        ({"tune.grid": ("seed",)}, "a key of the config and its value"),
    ],
)
def test_settings_are_checked_before_anything_is_read(changes, error):
    base = configs.replace(configs.load_recipe(configs.BASE), {"tune.grid": ("seed=1|2",)})
    base = configs.replace(base, changes)
    found = "\n".join(config_errors(configs.keys(base), loss_config(base)))
    assert found == "" if not error else error in found


def test_a_killed_tuning_goes_on_and_its_recipe_is_the_chosen_run(
    config,
    monkeypatch,
    capsys,
    caplog,
):
    """One rate learns, one does not, one diverges; struck in the second candidate's run."""
    tuned = variant(
        config,
        "tuned",
        tune__grid=(f"{RATE}=1e-9|2e-2|1e30",),
        tune__budget=50,
        train__eval_problems_every=5,
        train__eval_every=5,
        train__save_every=5,
        train__log_every=1,
    )

    def strike(what, **_):
        second = Path(tuned.run_dir, "c2")
        if what == "reading the batch of step 8" and (second / "config.json").exists():
            deadline = time.monotonic() + 60
            while not (second / "checkpoints" / "5").is_dir():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            raise RuntimeError("struck")

    fits, fit = [], loop.fit
    monkeypatch.setattr(
        command,
        "fit",
        lambda run, **how: (fits.append((how["name"], how["until"])), fit(run, **how)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(loop.hosts, "doing", strike)
        with pytest.raises(RuntimeError, match="struck"):
            command.tune(tuned)
    assert fits == [("c1", 10), ("c2", 10)]
    assert command.tune(tuned) == "c2"
    assert fits[2:] == [("c2", 10), ("c3", 10), ("c2", 30)]
    assert f"resuming {tuned.run_dir}/c2 at step 5" in caplog.text
    assert "c3 failed: step" in caplog.text
    stored = json.loads(Path(tuned.run_dir, "tune.json").read_text())
    assert stored["plan"]["rounds"] == [
        {"candidates": 3, "steps": 10},
        {"candidates": 1, "steps": 30},
    ]
    found = [(line["name"], line["step"]) for line in stored["results"]]
    assert found == [("c1", 10), ("c2", 10), ("c3", 10), ("c2", 30)]
    assert stored["results"][-1]["metrics"]["eval/accuracy"] == 0.5
    said = capsys.readouterr().out
    assert "chosen: c2 optim.learning_rate=2e-2" in said
    assert "failed" in said
    assert "50.0%" in said

    again = configs.load(["--config", f"{tuned.run_dir}/best.py"], verb="train")
    assert configs.keys(again) == configs.keys(tuned) | {
        RATE: 2e-2,
        "run_dir": f"{tuned.run_dir}/c2",
        "tune.grid": (),
    }
    alone = configs.replace(again, {"run_dir": f"{tuned.run_dir}/alone"})
    loop.fit(alone)
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(alone))

    other = configs.replace(tuned, {"tune.budget": 60})
    with pytest.raises(DcodError, match=r"tune\.json is of another tuning: its rounds differ"):
        command.tune(other)


def test_without_a_grid_or_held_out_traces_it_says_so(config, tmp_path):
    with pytest.raises(DcodError, match=r"tune.grid is empty"):
        command.tune(config)
    tuned = variant(config, "mine", tune__grid=(f"{RATE}=1e-9|2e-2",))
    Path(tuned.run_dir).mkdir()
    Path(tuned.run_dir, "best.py").write_text("mine = 1")
    with pytest.raises(DcodError, match=r"best\.py exists and was not written by this program"):
        command.tune(tuned)
    results = command._Results(tmp_path / "tune.json", ("c1",), [Rung(1, 10)], "eval/nll")
    with pytest.raises(DcodError, match=r"train.best_metric=eval/nll was not measured"):
        results.add("c1", 10, {"metrics": {}})
    results.add("c1", 10, {"error": "step 2: loss=nan"})
    assert results.failed("c1")
