"""The study: its domain, its plan and results file, its intervals, and a reduced form of it."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from make_study_page import STUDIES, fill_page
from study_results import Study

from dcod_jax import config as configs
from dcod_jax.configs.study import study_keys
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.study import domain, letters
from dcod_jax.study.command import study, wanted_starts
from dcod_jax.study.conditions import (
    Results,
    Run,
    arms,
    best_rate,
    conditions,
    from_hex,
    pending,
    read_results,
    schedule,
    settings_of,
    to_hex,
)
from dcod_jax.study.lab import Lab, adjustable_optimizer, start_config, with_rate
from dcod_jax.train.optim import make_optimizer
from dcod_jax.train.settings import loss_config, optim_config
from dcod_jax.types import TrainState

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "dcod_jax" / "configs" / "study.py"
TINY = {
    "study.arms": '("sft loss.weights.name=uniform", "sft+sigmoid loss.weights.name=sigmoid", '
    '"sft+likely loss.weights.name=uniform study.select=likely:0.5")',
    "study.conditions": '("main",)',
    "study.seeds": "2",
    "study.tuning_seeds": "1",
    "study.learning_rates": "(1e-3,)",
    "study.width": "16",
    "study.layers": "1",
    "study.start_steps": "4",
    "study.start_problems": "24",
    "study.traces": "24",
    "study.problems": "16",
    "study.drift_prompts": "16",
    "study.drift_length": "2",
    "generate.batch_size": "16",
    "generate.max_new_tokens": "48",
    "data.batch_size": "2",
    "optim.schedule": "constant",  # as the start's: one program for it and for sft
    "train.steps": "4",
    "train.progress": "false",
}


def recipe(**changes):
    config = configs.load_recipe(RECIPE)
    for key, text in (TINY | changes).items():
        configs.assign(config, key, text)
    configs.check(config)
    return config


# ---------------------------------------------------------------- plan and results file


def fake(run):
    """What a run might have measured; the second rate is the better one for "a" on the average."""
    good = {1e-3: 0.5, 3e-3: 0.75}[run.rate] if run.arm == "a" else 0.5
    first = {1e-3: 0.1, 3e-3: -0.1}[run.rate] if run.seed == 0 else 0.0
    return {"accuracy": {"validation": good + first * (run.arm == "a")}}


def plan_recipe(tmp_path, **changes):
    return recipe(
        **{
            "run_dir": str(tmp_path),
            "study.arms": '("a loss.weights.name=uniform", "b loss.weights.name=dft")',
            "study.conditions": '("main", "noisy study.noise=0.5 study.only=a study.seeds=1")',
            "study.learning_rates": "(1e-3, 3e-3)",
        }
        | changes
    )


def record(results, run, measured):
    results.append(dataclasses.asdict(run) | measured)


def finish(config, results):
    done = []
    for run, _ in pending(config, results):
        record(results, run, fake(run))
        done.append(run)
    return done


def count_runs(config):
    return sum(len(runs) for *_, runs in schedule(config))


def test_the_order_and_the_rates(tmp_path):
    config = plan_recipe(tmp_path, **{"study.tuning_seeds": "2"})
    done = finish(config, Results(tmp_path / "results.jsonl"))
    assert [(r.kind, r.arm) for r in done[:8]] == [("tune", "a")] * 4 + [("tune", "b")] * 4
    assert [(r.seed, r.rate) for r in done[:4]] == [(s, x) for s in (0, 1000) for x in (1e-3, 3e-3)]
    # Seed by seed; the better rate for a, the lower one of two equal ones for b.
    tests = [(r.condition, r.arm, r.seed, r.rate) for r in done[8:]]
    assert tests == [
        ("main", "a", 1, 3e-3),
        ("main", "b", 1, 1e-3),
        ("main", "a", 2, 3e-3),
        ("main", "b", 2, 1e-3),
        ("noisy", "a", 1, 3e-3),
    ]
    assert count_runs(config) == len(done)
    own = plan_recipe(
        tmp_path / "own", **{"study.conditions": '("main", "noisy study.own_rates=true")'}
    )
    runs = finish(own, Results(tmp_path / "own" / "results.jsonl"))
    assert sum(run.kind == "tune" and run.condition == "noisy" for run in runs) == 4
    assert count_runs(own) == len(runs)


def test_a_killed_study_goes_on_and_drops_the_torn_line(tmp_path):
    config, path = plan_recipe(tmp_path), tmp_path / "results.jsonl"
    for run, _ in itertools.islice(pending(config, Results(path)), 1):
        record(Results(path), run, fake(run))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tune", "arm": "b", "con')
    results = Results(path)
    assert len(results.done) == 1
    rest = finish(config, results)
    assert len(rest) + 1 == count_runs(config)
    assert path.read_bytes().startswith(whole)
    keys = [
        tuple(x.get(k) for k in ("kind", "condition", "arm", "seed", "rate"))
        for x in read_results(path)
    ]
    assert len(set(keys)) == len(keys)
    assert not list(pending(config, Results(path)))


def test_other_settings_are_refused(tmp_path):
    finish(plan_recipe(tmp_path), Results(tmp_path / "results.jsonl"))
    more = plan_recipe(tmp_path, **{"study.seeds": "3"})  # what may grow
    assert len(finish(more, Results(tmp_path / "results.jsonl"))) == 2
    other = plan_recipe(tmp_path, **{"train.steps": "5"})
    with pytest.raises(DcodError, match=r"train\.steps: 4 then, 5 now"):
        finish(other, Results(tmp_path / "results.jsonl"))
    with pytest.raises(DcodError, match=r"study\.only names nothing-such"):
        arms(recipe(**{"study.only": "nothing-such"}))
    late = plan_recipe(tmp_path / "late", **{"study.conditions": '("x", "main")'})
    assert finish(late, Results(tmp_path / "late" / "results.jsonl"))  # x has a grid of its own


def test_the_study_keys_are_the_recipes_own(capsys, tmp_path):
    """Checked and explained as all keys are, and absent from every other recipe."""
    assert "study" not in configs.load_recipe(configs.BASE)
    with pytest.raises(SystemExit):
        configs.load(["--help"], verb="study")
    text, notes = capsys.readouterr().out, configs.comments()
    for key in configs.keys(study_keys(), "study."):
        assert f"--config.{key}=" in text
        assert notes[key] in text
    words = ["--config", str(RECIPE)]
    with pytest.raises(DcodError, match=r"unknown key --config\.study\.seed\b.*study\.seeds"):
        configs.load([*words, "--config.study.seed=1"], verb="study")
    with pytest.raises(DcodError, match=r"study\.width=0 must be greater than 0"):
        configs.load([*words, "--config.study.width=0"], verb="study")
    with pytest.raises(DcodError, match=r"study\.noise=-1\.0 must not be negative"):
        configs.load([*words, "--config.study.noise=-1"], verb="study")
    base = configs.load_recipe(configs.BASE)
    base.run_dir = str(tmp_path)
    with pytest.raises(DcodError, match="no section study; begin from --config study"):
        study(base)


def test_the_shipped_recipe_reads():
    config = configs.load_recipe(RECIPE)
    for name, condition in conditions(config).items():
        assert arms(condition), name
    assert conditions(config)["short-solutions"].study.terms == (2, 3)
    assert set(wanted_starts(config)[64, 2]) == {200, 1000, 2000}


@pytest.mark.parametrize("recipe_name", STUDIES)
def test_the_shipped_results_are_of_the_shipped_recipe(recipe_name):
    """A default that changes must be pinned in the recipe, or the tables tell of other runs."""
    config = configs.load_recipe(recipe_name)
    now = {
        (name, arm): settings_of(own)
        for name, condition in conditions(config).items()
        for arm, own in arms(condition).items()
    }
    file, _ = STUDIES[recipe_name]
    written = Results(ROOT / "docs" / "study" / file).settings
    assert len(written.keys() & now.keys()) > 2
    for key in written.keys() & now.keys():
        assert written[key] == now[key], key


# ---------------------------------------------------------------- numbers


def test_bits_go_round():
    correct = np.random.default_rng(0).random(21) < 0.5
    assert np.array_equal(from_hex(to_hex(correct), 21), correct)


def test_the_rate_in_the_state_is_the_rate():
    """Updates of the adjustable optimizer equal those of the package's at the same rate."""
    cfg = optim_config(recipe())
    params = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "scale": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: 0.3 * x + 0.1, params)
    plain, _ = make_optimizer(dataclasses.replace(cfg, learning_rate=2e-3, weight_decay=0.1), 20)
    ours, schedule = adjustable_optimizer(
        dataclasses.replace(cfg, learning_rate=1.0, weight_decay=0.1), 20
    )
    state, own = plain.init(params), ours.init(params)
    own = with_rate(TrainState(jnp.int32(0), params, own, None), 2e-3).opt_state
    for step in range(4):
        assert float(schedule(step)) == pytest.approx(step / cfg.warmup_steps)
        wanted, state = plain.update(gradients, state, params)
        found, own = ours.update(gradients, own, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    assert float(optax.tree.norm(found)) > 0


# ---------------------------------------------------------------- the whole, reduced


PAGE = """# x
<!-- study: accuracy -->
<!-- end -->
<!-- study: differences main, other -->old<!-- end -->
<!-- study: drift -->
<!-- end -->
<!-- study: gains -->
<!-- end -->
<!-- study: cost -->
<!-- end -->
<!-- study: rates --><!-- end -->
<!-- study: progress --><!-- end -->
<!-- study: references --><!-- end -->
"""


def test_reduced_study(tmp_path):
    config = recipe(run_dir=str(tmp_path))
    study(config)
    lines = read_results(tmp_path / "results.jsonl")
    tests = {(x["arm"], x["seed"]): x for x in lines if x["kind"] == "test"}
    names = ("sft", "sft+likely", "sft+sigmoid")
    assert sorted(tests) == [(arm, seed) for arm in names for seed in (1, 2)]
    (reference,) = [x for x in lines if x["kind"] == "reference"]
    assert set(reference["teacher"]) == set(domain.SETS)
    for seed in (1, 2):  # one start for all arms, one for each seed
        assert tests["sft", seed]["start"] == tests["sft+sigmoid", seed]["start"]
    assert len(list((tmp_path / "starts").iterdir())) == 3  # the tuning run's, too
    assert len(lines) == count_runs(config) + 4  # and that one, and the settings of three arms
    chosen = [TraceDataset(path) for path in (tmp_path / "traces").glob("of-start-*")]
    assert [len(one) for one in chosen] == [12] * 3, "half of the traces, by each seed's start"
    for seed in (1, 2):  # the same batches, whatever the loss
        assert tests["sft", seed]["tokens"] == tests["sft+sigmoid", seed]["tokens"] > 0
    assert tests["sft", 1]["curves"]["ess"] == 1 > tests["sft+sigmoid", 1]["curves"]["ess"]
    for line in tests.values():
        assert line["drift"]["reference"] > 0
        for name, packed in line["correct"].items():
            accuracy = from_hex(packed, 16).mean()
            assert accuracy == pytest.approx(line["accuracy"][name], abs=1e-4)
    study(config)
    assert read_results(tmp_path / "results.jsonl") == lines, "a finished study does nothing"
    other = tests["sft", 2] | {"start": tests["sft", 2]["start"] | {"in": "ffff"}}
    left = [other if line is tests["sft", 2] else line for line in lines[:-1]]  # one run missing
    text = "".join(json.dumps(line) + "\n" for line in left)
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(DcodError, match=r"'sft' of condition 'main', seed 2, began from a start"):
        study(config)
    assert (tmp_path / "results.jsonl").read_text() == text

    lines.sort(key=lambda line: line["kind"])  # in a long study the kinds are mixed
    page = fill_page(PAGE, Study(lines))
    assert fill_page(page, Study(lines)) == page
    assert "| main | `sft+sigmoid` | `sft` |" in page
    assert "Not run: other." in page
    assert "old" not in page
    with pytest.raises(DcodError, match="no table 'nothing'"):
        fill_page("<!-- study: nothing -->\n<!-- end -->", Study(lines))


def test_a_domain_without_a_shipped_teacher_trains_its_own(tmp_path, monkeypatch):
    """Once, on worked solutions in every style, at the shipped teacher's size."""
    config = recipe(
        **{
            "study.domain": "letters",
            "study.teacher_steps": "3",
            "study.start_styles": '("steps",)',
        }
    )
    asked = []

    def trained(lab, own, params, *, start, after_step, **_):
        worked = lab.traces(own, start=start).read(range(24))
        texts = [lab.tokenizer.decode(trace.token_ids) for trace in worked]
        asked.append({letters.style_of(text.split("<|assistant|>")[1]) for text in texts})
        after_step(own.train.steps, TrainState(jnp.int32(3), params, None, None))

    monkeypatch.setattr(Lab, "train", trained)
    shipped = Lab(recipe(), tmp_path, {}).teacher.config
    for _ in range(2):
        own = Lab(config, tmp_path, {}).teacher.config
        assert asked == [set(letters.STYLES)]
        assert (own.hidden_size, own.num_layers) == (shipped.hidden_size, shipped.num_layers)
    [file] = (tmp_path / "starts").iterdir()
    assert file.name.endswith("-3.npz")


def test_best_rate_waits_for_the_whole_grid_and_takes_the_mean(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    config = plan_recipe(tmp_path, **{"study.tuning_seeds": "2"})

    def tuned(seed, rate, accuracy):
        assert best_rate(results, "main", "a", config) is None
        run = Run("tune", "main", "a", seed, rate)
        record(results, run, {"accuracy": {"validation": accuracy}})

    tuned(0, 1e-3, 0.9)
    tuned(0, 3e-3, 0.1)
    tuned(1000, 1e-3, 0.1)
    tuned(1000, 3e-3, 0.95)
    assert best_rate(results, "main", "a", config) == 3e-3
    assert json.loads(results.path.read_text().splitlines()[0])["rate"] == 1e-3


@pytest.mark.parametrize(
    "arm",
    [
        "loss.weights.offset=auto",
        "loss.weights.temperature=auto",
        "loss.weights.unit=spread",
        "loss.divergence=forward_kl loss.anchor=0.1 loss.weights.normalize=none",
    ],
)
def test_the_warm_start_of_every_arm_is_plain_training(arm):
    config = configs.with_changes(configs.load_recipe(RECIPE), arm.split())
    plain = loss_config(start_config(config, 7))
    assert (plain.divergence, plain.weights.name, plain.anchor) == ("nll", "uniform", 0)
    assert not plain.weights.automatic
