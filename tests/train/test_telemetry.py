"""Numbers of a run: fetched at log steps, the weights of traces, and a step that was skipped."""

import dataclasses
import json
from pathlib import Path

import fake_traces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.data import pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.scores import add_scores
from dcod_jax.losses import adaptive
from dcod_jax.models import hf, transformer
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.plan.estimate import step_flops
from dcod_jax.prepare.command import prepare
from dcod_jax.report import data as report_data
from dcod_jax.train import checkpoint_reader, loop, metrics, setup, trace_weights
from dcod_jax.train.checkpointer import Snapshot
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.held_out import reading
from dcod_jax.train.telemetry import Telemetry
from dcod_jax.types import TrainState
from tests.train import test_train_step as steps

# ---------------------------------------------------------------- the step


def histograms(jaxpr, *, inside):
    """Cumulated histograms in the branches of conditions, or outside of them; never a sort."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            if inside:
                count += sum(histograms(b.jaxpr, inside=False) for b in equation.params["branches"])
            continue
        assert equation.primitive.name != "sort"
        count += equation.primitive.name == "cumsum" and not inside
        for value in equation.params.values():
            if isinstance(inner := getattr(value, "jaxpr", value), jax.extend.core.Jaxpr):
                count += histograms(inner, inside=inside)
    return count


@pytest.mark.usefixtures("compiled_as_for_users")
def test_statistics_are_computed_on_log_steps_by_one_program():
    """With log_every=2: NaN at step 1, at step 2 what a step that always logs has; equal bits."""
    often, fresh = steps.step_of(optim="adamw", microbatches=2)
    rarely, _ = steps.step_of(optim="adamw", microbatches=2, log_every=2, token_weights=True)
    batch = steps.packed()
    found = [[], []]
    states = [fresh(), fresh()]
    for _ in range(2):
        for run, step in enumerate((often, rarely)):
            states[run], values = step(states[run], batch)
            found[run].append(jax.device_get(values))
    (first, second), (nothing, rare) = found
    always = {"loss", "grad_norm", "nonfinite", "learning_rate"}
    always |= {"tokens/completion", "tokens/total"}
    assert {name for name in nothing if np.isfinite(nothing[name])} == always
    assert {name: float(nothing[name]) for name in always} == {
        name: float(first[name]) for name in always
    }
    assert dict(rare) == pytest.approx(dict(second), nan_ok=True, rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(s.params) for s in states))
    assert rarely._cache_size() == 1
    weights, mask = rare.token_weights, np.asarray(batch.loss_mask)
    assert second.token_weights is None
    assert weights[mask].mean() == pytest.approx(float(rare["weights/mean"]), rel=1e-6)
    traced = [step.trace(fresh(), batch).jaxpr.jaxpr for step in (often, rarely)]
    assert [histograms(one, inside=False) for one in traced] == [1, 0]
    assert [histograms(one, inside=True) for one in traced] == [0, 1]


def test_the_last_step_is_logged_too():
    logged = [[s for s in range(1, 8) if metrics.is_logged(s, 3, last)] for last in (6, 7)]
    assert logged == [[3, 6], [3, 6, 7]]
    traced = jax.jit(lambda step: metrics.is_logged(step, 3, 7))
    assert [s for s in range(1, 8) if traced(s)] == logged[1]


# ---------------------------------------------------------------- weights of traces


def rows_of(lengths):
    """(trace of each position, head positions) of rows with prompts of 2 tokens, and padding."""
    index, places = np.full((len(lengths), 24), -1, np.int32), []
    number = 0
    for row, own in enumerate(lengths):
        at, inside = 0, []
        for length in own:
            index[row, at : at + 2 + length] = number
            inside += range(at + 1, at + 1 + length)
            at, number = at + 2 + length, number + 1
        places.append(inside + [24] * (12 - len(inside)))
    return index, np.array(places)


def test_weights_of_traces_are_means_over_their_own_tokens(monkeypatch, tmp_path):
    """Effective number, shares and names by hand; the same where two processes hold the rows."""
    index, places = rows_of([[3, 5], [4], [1, 2, 2]])
    weights = np.random.default_rng(0).random(places.shape).astype(np.float32)
    weights[places == 24] = 99.0
    found = trace_weights.trace_weights(weights, index, places)
    flat = weights[places < 24]
    pieces = np.split(flat, np.cumsum([3, 5, 4, 1, 2]))
    means = np.array([piece.mean() for piece in pieces])
    assert [row[0] for row in found] == list(range(6))
    np.testing.assert_allclose([row[1] for row in found], means, rtol=1e-6)
    assert [row[2] for row in found] == [3, 5, 4, 1, 2, 2]

    sources = ["a.jsonl:1", "b.jsonl[2]", "a.jsonl:3", "a.jsonl:4", "b.jsonl[5]", "a.jsonl:6"]
    traces = [
        dataclasses.replace(trace, meta={"source": source, "teacher": "big"})
        for trace, source in zip(fake_traces.make_traces(6), sources, strict=True)
    ]
    dataset = TraceDataset(fake_traces.write(tmp_path / "traces", traces))
    numbers, names = trace_weights.summary(found, dataset)
    assert numbers["weights/traces"] == 6
    effective = means.sum() ** 2 / (means**2).sum()
    assert numbers["weights/traces_effective"] == pytest.approx(effective, rel=1e-6)
    of_b = sum(pieces[i].sum() for i in (1, 4)) / flat.sum()
    assert numbers["weights/source/b.jsonl"] == pytest.approx(of_b, rel=1e-5)
    assert numbers["tokens/source/b.jsonl"] == pytest.approx(7 / 17)
    assert numbers["weights/source/a.jsonl"] == pytest.approx(1 - of_b, rel=1e-5)
    assert not [name for name in numbers if "teacher" in name]  # there is one
    order = np.argsort(-means)
    assert [name for name, _ in names["most"]] == [f"trace-{i}" for i in order[:3]]
    assert [name for name, _ in names["least"]] == [f"trace-{i}" for i in order[::-1][:3]]

    everyone = [found[:2], found[2:]]
    monkeypatch.setattr(trace_weights.hosts, "exchange", lambda name, own: everyone)
    assert trace_weights.summary(found[:2], dataset) == (numbers, names)


def test_equal_weights_make_every_trace_count(tmp_path):
    dataset = TraceDataset(fake_traces.write(tmp_path / "traces", fake_traces.make_traces(4)))
    numbers, _ = trace_weights.summary([(i, 0.25, 3) for i in range(4)], dataset)
    assert numbers["weights/traces_effective"] == 4
    none, _ = trace_weights.summary([(i, 0.0, 3) for i in range(4)], dataset)
    assert none == {"weights/traces": 4.0}
    assert trace_weights.summary([], dataset) == ({}, {})


def test_many_sources_are_the_largest_and_others():
    names = [f"file-{i:02}" for i in range(20)]
    tokens = np.arange(20, 0, -1)
    found = trace_weights._shares("tokens/source", names, tokens, tokens)
    assert len(found) == trace_weights.KINDS + 1
    assert found["tokens/source/other"] == pytest.approx(sum(range(1, 9)) / 210)
    assert sum(found.values()) == pytest.approx(1)


# ---------------------------------------------------------------- a run with a skipped step


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Scored traces of two files, and a run that skips what is not finite."""
    place = tmp_path_factory.mktemp("telemetry")
    tiny.write_model(place / "student", seed=1, num_hidden_layers=1)
    for name, part in (("one", slice(12)), ("two", slice(12, 32))):
        tiny.write_jsonl(place / f"{name}.jsonl", tiny.sums(32)[part])
    config = configs.load_recipe(configs.BASE)
    values = {
        "student.path": str(place / "student"),
        "student.compute_dtype": "bfloat16",  # the default, on CPU too
        "data.traces": str(place / "*.jsonl"),
        "data.dataset": str(place / "dataset"),
        "data.max_length": 32,
        "data.seq_len": 64,
        "optim.learning_rate": 3e-3,
        "optim.schedule": "constant",
        "optim.on_nonfinite": "skip",
        "train.steps": 6,
        "train.log_every": 3,
        "train.save_every": 3,
        "train.progress": False,
    }
    config = configs.replace(config, values)
    prepare(config)
    made = {"teacher": fake_traces.TEACHER, "settings": {"top_k": 2}}
    add_scores(place / "dataset" / "train", score_shard=fake_traces.fake_scores, **made)
    return config


def spoiled(monkeypatch, *, first, bad=2):
    """From now on the batch of step `bad` holds a NaN; steps are counted from `first`."""
    number, to_device = first - 1, loop.pipeline.to_device

    def put(batch, mesh):
        nonlocal number
        number += 1
        made = to_device(batch, mesh)
        if number != bad:
            return made
        spoiled = made.teacher_logprobs.at[0].set(jnp.nan)
        return dataclasses.replace(made, teacher_logprobs=spoiled)

    monkeypatch.setattr(loop.pipeline, "to_device", put)


def lines(config, name="metrics.jsonl"):
    text = Path(config.run_dir, name).read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in found]


def params_of(config):
    like = transformer.param_shapes(hf.load_config(config.student.path)[0])
    return checkpoint_reader.read_params(config.run_dir, like)[0]


def test_mfu_counts_the_head_where_it_is_compiled_and_a_live_teachers_forward_pass(config):
    """A live teacher that is the student: 3 + 1 forward passes, of the head for 32 of 64."""
    place = Path(config.student.path).parent
    sizes = {"data.head_tokens": 32, "data.batch_size": 16}
    config = configs.replace(config, sizes | {"run_dir": str(place / "mfu")})
    student = setup.load_student(config)
    dataset, _ = setup.open_datasets(config, student)
    batches = pipeline.train_batches(dataset, seed=0, **reading(config, make_mesh()))
    batch, _ = next(batches)
    assert batch["head_positions"].shape == (16, 32)
    run = Snapshot(state=TrainState(jnp.int32(0), {}, (), adaptive.initial()), step=0)
    checkpoints = Checkpoints(config, best_metric="")
    with Telemetry(config, run, student, dataset, checkpoints, name="", entered=0.0) as telemetry:
        model = student.config
        linear = sum(p.size for p in jax.tree.leaves(transformer.param_shapes(model)["layers"]))
        linear -= 2 * model.hidden_size  # scales of the norms
        attention = 4 * model.hidden_size * 65 / 2
        head = 32 * 2 * model.vocab_size * model.hidden_size
        assert telemetry.flops == 3 * 16 * (64 * (2 * linear + attention) + head)
    changes = {"loss.teacher": "live", "teacher.path": config.student.path}
    live = step_flops(configs.replace(config, changes), model, 32)
    assert live == pytest.approx(telemetry.flops * 4 / 3)


@pytest.mark.usefixtures("one_train_step")
def test_a_run_with_a_skipped_step_goes_on_tells_of_it_and_resumes(config, caplog, monkeypatch):
    place = Path(config.student.path).parent
    whole = configs.replace(config, {"run_dir": str(place / "whole")})
    fetched, device_get = [], jax.device_get
    with monkeypatch.context() as patch:
        spoiled(patch, first=1)
        patch.setattr(
            jax,
            "device_get",
            lambda x: (isinstance(x, list) and fetched.append(len(x))) or device_get(x),
        )
        loop.fit(whole)
    assert fetched == [3, 3]  # arrays: of three steps at once, at log steps only
    [told] = [message for message in caplog.messages if "skipped" in message]
    assert told.startswith("step 2 was skipped: loss=nan")
    found = lines(whole)
    assert [line["step"] for line in found] == [3, 6]
    assert [line["skipped_total"] for line in found] == [1, 1]
    assert all(np.isfinite(line["loss"]) for line in found)
    names = lines(whole, metrics.TRACES)
    assert [line["step"] for line in names] == [3, 6]
    assert {name for line in names for name, _ in line["most"]} <= {
        trace["id"] for trace in tiny.sums(32)
    }
    for line in found:
        assert 1 <= line["weights/traces_effective"] <= line["weights/traces"]
        shares = [v for key, v in line.items() if key.startswith("weights/source/")]
        assert (len(shares), sum(shares)) == (2, pytest.approx(1))

    stopped = configs.replace(config, {"run_dir": str(place / "stopped"), "train.steps": 3})
    for run, first in ((stopped, 1), (configs.replace(stopped, {"train.steps": 6}), 4)):
        with monkeypatch.context() as patch:
            spoiled(patch, first=first)
            loop.fit(run)
    assert lines(stopped) == found
    assert lines(stopped, metrics.TRACES) == names
    jax.tree.map(np.testing.assert_array_equal, params_of(stopped), params_of(whole))

    notes = []
    run = report_data.Run("whole", Path(whole.run_dir), whole)
    record = report_data.run_record(run, notes, points=10)
    [note] = report_data.skipped(record)
    assert note.startswith("whole: 1 steps were skipped")
    assert report_data.weighed(run, notes) == names[-1]
    assert not notes
    Path(whole.run_dir, metrics.TRACES).write_text('{"step": 3, "most": [["a"]]}\n')
    assert report_data.weighed(run, notes) is None
    assert "most[0]=['a'] must" in notes[0]
