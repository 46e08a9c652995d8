"""Runs with every kind of teacher: cached equals live, what is adaptive resumes exactly, GKD."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from runs import RECIPE

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.models import hf, transformer
from dcod_jax.train import command
from dcod_jax.train import loop as train
from dcod_jax.train.checkpoint_reader import read_params
from dcod_jax.train.setup import preflight
from dcod_jax.train.telemetry import Telemetry

# Eight devices train in test_train.py, and here where the student samples beside a live teacher.
alone = pytest.mark.usefixtures("one_device")
VOCABULARY = len(tiny.SPECIAL) + len(tiny.ALPHABET)  # K = V: the cache holds everything, in bf16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe whose dataset holds the teacher's whole distribution as top-k."""
    place = tmp_path_factory.mktemp("losses")
    tiny.write_model(place / "student", seed=1)
    tiny.write_model(
        place / "teacher", seed=2, hidden_size=48, num_attention_heads=6, vocab_size=56
    )
    records = [record | {"teacher": "ab"[i % 2]} for i, record in enumerate(tiny.sums(60))]
    tiny.write_jsonl(place / "traces.jsonl", records)
    recipe = RECIPE.format(
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        traces=str(place / "traces.jsonl"),
        dataset=str(place / "dataset"),
    )
    more = f"""    c.score.top_k = {VOCABULARY}
    c.train.steps = 3
    c.train.microbatches = 1
    c.train.eval_every = 3
    c.train.save_every = 3
    c.optim.warmup_steps = 0
    c.optim.schedule = "constant"
    c.on_policy.max_new_tokens = 8
    return c
"""
    (place / "recipe.py").write_text(recipe.replace("    return c\n", more))
    command.make_inputs(load(place, "unused"))
    return place


def load(place, name, *changes):
    words = ["--config", str(place / "recipe.py"), f"--config.run_dir={place / name}"]
    return configs.load([*words, *(f"--config.{c}" for c in changes)], verb="train")


def fit(place, name, *changes):
    """Metric lines of a run, without what a clock gives."""
    train.fit(load(place, name, *changes))
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.startswith("time")} for x in lines]


def params(place, name):
    config, _ = hf.load_config(place / "student")
    return read_params(place / name, transformer.param_shapes(config))[0]


@alone
@pytest.mark.parametrize(
    ("divergence", "tolerance"),
    [
        pytest.param("nll", 2e-5, marks=pytest.mark.long),
        pytest.param("forward_kl", 3e-3, marks=pytest.mark.long),
        ("todi", 6e-3),
    ],
)
def test_a_live_teacher_gives_the_cached_loss(place, divergence, tolerance):
    """To the cache's precision: float32 for the trace token, bfloat16 for the distribution."""
    key = f"loss.divergence={divergence}"
    cached = fit(place, f"cached-{divergence}", key)
    live = fit(place, f"live-{divergence}", key, "loss.teacher=live")
    for ours, theirs in zip(cached, live, strict=True):
        for name in ("loss", "nll", "divergence", "weights/log_ratio", "eval/loss"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                close = {"rtol": tolerance, "atol": tolerance / 10, "err_msg": name}
                np.testing.assert_allclose(ours[name], theirs[name], **close)
    steps = [line for line in cached if "loss" in line]
    if divergence == "nll":
        assert "divergence" not in steps[0]
    else:
        assert steps[0]["divergence"] != pytest.approx(steps[0]["nll"], rel=1e-2)
        assert steps[0]["teacher/captured_mass"] == pytest.approx(1.0, abs=1e-5)
        assert "teacher/captured_mass" not in next(line for line in live if "loss" in line)
    another = ("loss.teacher=live", f"teacher.path={place / 'student'}")
    with pytest.raises(DcodError, match=r"teacher\.path"):  # another teacher is another run
        fit(place, f"live-{divergence}", key, *another)


@alone
@pytest.mark.usefixtures("one_train_step")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            ("loss.weights.temperature=auto", "loss.weights.target_loss=0.999"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            (
                "loss.divergence=taid",
                "loss.weights.temperature=auto",
                "loss.weights.smoothing=0",
                "loss.weights.target_loss=0",
                "loss.weights.target_ess=0.9",
            ),
            marks=pytest.mark.long,
        ),
        (
            "loss.divergence=taid",
            "loss.weights.scope=sequence",
            "loss.weights.unit=spread",
            "loss.weights.temperature=0.3",
        ),
    ],
)
def test_what_the_loss_has_learned_survives_a_restart(place, changes):
    name = "-".join(changes[:2]).replace("=", "-")
    whole = fit(place, f"whole-{name}", *changes, "train.steps=4", "train.save_every=0")
    parts = (*changes, "train.eval_every=2", "train.save_every=2", "train.steps=4")
    fit(place, f"parts-{name}", *parts)
    shutil.rmtree(place / f"parts-{name}" / "checkpoints" / "4")  # as if killed after step 2
    again = fit(place, f"parts-{name}", *parts)
    steps = [[x for x in lines if "loss" in x] for lines in (whole, again)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 4
    jax.tree.map(
        np.testing.assert_array_equal,
        params(place, f"whole-{name}"),
        params(place, f"parts-{name}"),
    )
    temperatures = [line["weights/temperature"] for line in steps[0]]
    assert len(set(temperatures)) > 2
    if changes[0] == "loss.divergence=taid":
        interpolation = [line["taid/interpolation"] for line in steps[0]]
        assert interpolation == sorted(interpolation)
        assert interpolation[0] == pytest.approx(0.4)
        assert interpolation[-1] > 0.4
        with pytest.raises(DcodError, match=r"train\.steps: 4 then, 5 now"):  # taid's schedule
            fit(place, f"parts-{name}", *parts, "train.steps=5")
        in_step = "loss.weights.smoothing=0" in changes
        for line in (
            steps[0] if in_step else ()
        ):  # solved in the step: the target is met in every one of them
            assert line["weights/ess"] == pytest.approx(0.9, rel=0.01)


@pytest.mark.usefixtures("one_train_step")
def test_gkd_samples_from_the_student_counts_its_cost_and_resumes_exactly(place):
    changes = ("loss.divergence=jsd", "loss.teacher=live", "loss.weights.name=uniform")
    changes += ("loss.teacher_weights=a=0.5", "on_policy.fraction=0.5", "seed=8")
    whole = fit(place, "gkd", *changes, "train.steps=4", "train.save_every=0")
    parts = ("train.eval_every=2", "train.save_every=2")
    fit(place, "gkd-parts", *changes, *parts, "train.steps=2")
    again = fit(place, "gkd-parts", *changes, *parts, "train.steps=4")
    steps = [[x for x in lines if "loss" in x] for lines in (whole, again)]
    assert steps[0] == steps[1]
    on = [line["on_policy/batch"] for line in steps[0]]
    assert on[0] == 0 < sum(on)
    generated = [line["on_policy/tokens_generated"] for line in steps[0]]
    assert generated == sorted(generated)
    for before, after, was_on in zip([0, *generated], generated, on, strict=False):
        assert (after > before) == bool(was_on)
    for line in steps[0]:  # the student's own text is of no teacher
        assert line["weights/mean"] == pytest.approx(1, abs=0 if line["on_policy/batch"] else 0.5)
        assert (line["weights/mean"] < 0.9) == (not line["on_policy/batch"])
    offline = fit(place, "gkd-off", *changes[:4], "seed=8", "train.steps=1")
    assert offline[1]["loss"] == steps[0][0]["loss"]  # a batch that is not sampled is this one


def test_a_distribution_that_no_cache_holds_is_refused_before_anything_is_read(place):
    with pytest.raises(DcodError) as caught:
        load(place, "refused", "loss.divergence=todi", "score.top_k=0")
    assert "loss.divergence=todi needs the teacher's distribution" in str(caught.value)
    assert "python -m dcod_jax.score" in str(caught.value)
    for changes, message in (
        (("loss.teacher=live", "teacher.path="), r"loss\.teacher=live needs teacher\.path"),
        (("on_policy.fraction=0.5",), r"needs loss\.teacher=live"),
        (("on_policy.fraction=1.5",), r"must be in \[0, 1\]"),
        (("loss.temperature=2", "loss.divergence=jsd"), r"tempered tail.*loss\.teacher=live"),
        (("loss.weights.temperature=warm",), "expected a number or 'auto'"),
        (("loss.weights.name=dft", "loss.weights.temperature=auto"), "means nothing for"),
    ):
        with pytest.raises(DcodError, match=message):
            load(place, "refused", *changes)


def test_a_live_teacher_with_another_tokenizer_is_refused(place, tmp_path):
    tiny.write_model(tmp_path / "other")
    tiny.write_tokenizer(tmp_path / "other", alphabet=tiny.ALPHABET[::-1])
    config = load(place, "refused", "loss.teacher=live", f"teacher.path={tmp_path / 'other'}")
    with pytest.raises(DcodError, match="has another tokenizer than the student"):
        train.fit(config)
    for loss in (("loss.teacher=live",), ("loss.divergence=jsd", "score.top_k=4")):
        asked = load(place, "refused", *loss, f"teacher.path={tmp_path / 'other'}")
        with pytest.raises(DcodError, match="over other tokens than the student's"):
            preflight(asked)
    preflight(load(place, "refused", f"teacher.path={tmp_path / 'other'}"))  # nll compares texts


def test_weight_on_what_the_student_knows_already_is_warned_of_once(caplog):
    telemetry = Telemetry.__new__(Telemetry)
    telemetry.warned, telemetry.by_trace = False, False
    fine = {"weights/confident_mass": 0.9, "weights/confident_tokens": 0.85, "weights/ess": 0.9}
    telemetry._warn(1, fine)
    # A student that lacks nothing at temperature 1, as measured; then one that forgets (ess 0.9).
    telemetry._warn(1, fine | {"weights/confident_mass": 0.949, "weights/confident_tokens": 0.934})
    assert caplog.messages == []
    forgetting = {"weights/confident_mass": 0.984, "weights/confident_tokens": 0.923}
    telemetry._warn(2, fine | forgetting)
    assert caplog.messages.pop().startswith("step 2: 98% of the weight")
    caplog.clear()
    telemetry.warned = False
    settled = fine | {"weights/confident_tokens": 0.4}
    telemetry._warn(2, settled)
    telemetry._warn(3, settled)
    [message] = caplog.messages
    assert message.startswith("step 2: 90% of the weight")
    caplog.clear()
    telemetry.warned, telemetry.by_trace = False, True
    telemetry._warn(2, settled)
    assert caplog.messages == [], "a weight of whole traces leaves some of them out on purpose"


@pytest.mark.parametrize(("divergence", "noted"), [("todi", True), ("forward_kl", False)])
def test_a_cache_that_misleads_a_far_student_is_noted(place, caplog, divergence, noted):
    preflight(load(place, "noted", f"loss.divergence={divergence}", "score.top_k=4"))
    assert ("loss.divergence=todi depends on the teacher's" in caplog.text) is noted
