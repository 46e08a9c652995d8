"""Offline on-policy: the student's samples, scored by teacher and start, in one shipped recipe."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dcod_jax import config as configs
from dcod_jax.data import pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.models import hf
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.train import command, loop
from dcod_jax.train.held_out import reading

ASSETS = Path(__file__).resolve().parents[2] / "dcod_jax" / "assets" / "quickstart"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The config after generate_traces, prepare and score on a few prompts."""
    place = tmp_path_factory.mktemp("opd")
    lines = (ASSETS / "prompts.jsonl").read_text().splitlines(keepends=True)
    (place / "prompts.jsonl").write_text("".join(lines[:24]))
    changes = {
        "run_dir": place / "run",
        "generate.prompts": place / "prompts.jsonl",
        "generate.batch_size": 24,
        "generate.samples": 1,
        "data.batch_size": 8,
        "data.eval_fraction": 0,
        "score.batch_tokens": 4096,
        "train.steps": 1,
        "train.log_every": 1,
        "train.progress": False,
    }
    words = ["--config", "lightning_opd", *(f"--config.{k}={v}" for k, v in changes.items())]
    config = configs.load(words, verb="train")
    command.make_inputs(config)
    return config


def test_the_samples_are_the_starts_own_and_scored_by_both(made):
    dataset = TraceDataset(Path(made.run_dir) / "dataset" / "train")
    traces = dataset.read(range(len(dataset)))
    models = {"teacher": made.teacher.path, "start": made.student.path}
    for name, path in models.items():
        assert dataset.manifest[name]["weights"] == hf.weights_fingerprint(path)
    lines = (Path(made.run_dir) / "traces.jsonl").read_text().splitlines()
    drawn = {record["id"]: record for record in map(json.loads, lines)}
    assert len(traces) == len(drawn) > 12
    for trace in traces:  # what the sampler said of its own tokens, the end of the turn included
        own = drawn[trace.id]["logprobs"]
        np.testing.assert_allclose(trace.start_logprobs[: len(own)], own, rtol=1e-3, atol=1e-4)
    graded = [record["completion"].split()[-1] == record["answer"] for record in drawn.values()]
    assert not all(graded), "wrong answers are kept"
    assert not command._unfinished(made)


def test_the_first_steps_loss_is_the_signed_one_of_the_cache(made, one_device):
    """At the start q = q₀: −Σ log q₀ · clip(log p − log q₀) / n of the first batch, in numpy."""
    loop.fit(made)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    dataset = TraceDataset(Path(made.run_dir) / "dataset" / "train")
    batches = pipeline.train_batches(dataset, seed=made.seed, **reading(made, mesh))
    batch, _ = next(batches)
    mask = batch["loss_mask"]
    start, teacher = (np.float64(batch[f"{n}_logprobs"][mask]) for n in ("start", "teacher"))
    weight = np.clip(teacher - start, -2.0, 2.0)
    assert (weight < 0).any()
    assert (weight > 0).any()
    metrics = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, metrics) if line["step"] == 1)
    assert first["loss"] == pytest.approx(-(weight * start).mean(), rel=1e-3)
    assert first["weights/mean"] == pytest.approx(weight.mean(), rel=1e-3)
