"""Weight statistics against numpy, absent values, a resumable file, and peak speeds."""

import contextlib
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.plan import chips
from dcod_jax.train import metrics, step
from dcod_jax.train.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[2]


def statistics(weights, mask, *, raw=None, logprobs=None, positions=None):
    weights = jnp.atleast_2d(jnp.float32(weights))
    fill = {"raw": weights, "logprobs": jnp.full_like(weights, -1.0), "positions": weights * 0}
    given = {"raw": raw, "logprobs": logprobs, "positions": positions}
    rows = {
        name: fill[name] if value is None else jnp.atleast_2d(jnp.float32(value))
        for name, value in given.items()
    }
    result = metrics.weight_statistics(
        rows["raw"], weights, rows["logprobs"], jnp.atleast_2d(jnp.asarray(mask, bool)),
        rows["positions"],
    )  # fmt: skip
    return {key.removeprefix("weights/"): float(value) for key, value in result.items()}


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_statistics_over_completion_tokens_match_numpy(count):
    generator = np.random.default_rng(count)
    mask = np.zeros((4, 20), bool)
    mask.reshape(-1)[generator.permutation(80)[:count]] = True
    weights = np.where(mask, generator.random((4, 20)), 99.0)
    w = weights[mask].astype(np.float32).astype(np.float64)
    got = statistics(weights, mask)
    wanted = {
        "mean": w.mean(),
        "std": w.std(),
        "q05": np.quantile(w, 0.05),
        "q50": np.quantile(w, 0.5),
        "q95": np.quantile(w, 0.95),
        "ess": w.sum() ** 2 / (count * (w**2).sum()),
    }
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_saturation_confidence_and_position_buckets():
    got = statistics(
        [1.0, 3.0, 2.0, 4.0, 9.0],
        [1, 1, 1, 1, 0],
        raw=[0.001, 0.999, 0.5, 0.02, 0.001],
        logprobs=[-0.01, -2.0, -0.2, -0.05, 0.0],
        positions=[0, 15, 16, 2000, 40],
    )
    assert got["saturated_low"] == got["saturated_high"] == 0.25
    assert got["confident_mass"] == pytest.approx(0.5)  # (1 + 4) / 10: q = .99 and .95
    assert got["position_0000"] == 2.0
    assert got["position_0016"] == 2.0
    assert got["position_1024"] == 4.0
    assert math.isnan(got["position_0032"])  # its only token is outside the mask


def test_without_completion_tokens_nothing_is_available():
    got = statistics([1.0, 2.0], [0, 0])
    assert all(math.isnan(value) for value in got.values()), got
    assert metrics.available(got | {"loss": 0.5, "mfu": None, "norm": math.inf}) == {"loss": 0.5}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run(path, *, steps, start=0):
    with contextlib.closing(MetricsWriter(path, start)) as writer:
        for step in range(start, steps + 1):
            if step % 2 == 0:
                writer.write(step, {"eval/nll": 10.0 - step, "time/seconds": start})
            if step > start:
                writer.write(step, {"loss": jnp.float32(step) / 8, "nll": math.nan})


@pytest.mark.parametrize(("killed", "start"), [(3, 0), (6, 4), (7, 4), (9, 9), (4, 4)])
def test_a_restarted_runs_file_equals_an_uninterrupted_one(tmp_path, killed, start):
    run(tmp_path / "whole", steps=10)
    run(tmp_path / "broken", steps=killed)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # killed in mid-line
    run(tmp_path / "broken", steps=10, start=start)

    def without_clock(found):
        return sorted(
            ({k: v for k, v in line.items() if not k.startswith("time/")} for line in found),
            key=lambda line: (line["step"], "loss" in line),
        )

    broken = lines(tmp_path / "broken")
    assert without_clock(broken) == without_clock(lines(tmp_path / "whole"))
    assert [line["step"] for line in broken] == sorted(line["step"] for line in broken)
    assert not any("nll" in line for line in broken), "NaN is absent"
    assert list((tmp_path / "broken" / "tensorboard").iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path / "second", steps=2)
    assert not (tmp_path / "second").exists()


def test_peak_flops_where_known():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert chips.peak_flops("cpu") is None


def test_the_page_names_every_metric_of_a_step():
    code = Path(metrics.__file__).read_text() + Path(step.__file__).read_text()
    assigned = re.findall(r'measured\["([\w/]+)"\]', code)
    assigned += ["grad_norm", "nonfinite"]
    ours = {f"weights/{name}" for name in statistics([1.0], [1])} | {"loss", "nll", *assigned}
    ours = {name for name in ours if "position_" not in name} | {"weights/position_0000"}
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    missing = {n for n in ours if f"`{n}`" not in page and f"`/{n.split('/')[-1]}`" not in page}
    assert len(assigned) >= 8
    assert not missing
