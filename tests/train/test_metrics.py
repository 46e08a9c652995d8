"""Weight statistics against numpy, absent values, a resumable file, and peak speeds."""

import contextlib
import importlib
import json
import math
import re
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dcod_jax.errors import DcodError
from dcod_jax.plan import chips
from dcod_jax.train import metrics, step
from dcod_jax.train.metrics import MetricsWriter
from dcod_jax.train.telemetry import Telemetry

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
        rel = 0.01 if name in metrics.QUANTILES else 1e-5
        assert got[name] == pytest.approx(value, rel=rel, abs=2e-6), name


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_quantiles_of_a_histogram_are_within_a_percent_of_numpys(scale):
    """Of both signs, of a few equal values, and of 60,000 heavy-tailed ones."""
    generator = np.random.default_rng(8)
    wanted = {"a": 0.0, "b": 0.05, "c": 0.5, "d": 0.95, "e": 1.0}
    for values in (
        np.full((3, 5), 0.7),
        generator.normal(size=(4, 50)),
        generator.lognormal(0, 1, (6, 10_000)),
    ):
        values = np.float32(scale * values)
        mask = generator.random(values.shape) < 0.8
        mask[0, 0] = True
        got = metrics.quantiles(jnp.asarray(values), jnp.asarray(mask), wanted)
        exact = np.quantile(np.float64(values[mask]), list(wanted.values()))
        np.testing.assert_allclose(list(got.values()), exact, rtol=0.011, atol=2e-6 + 1e-3 * scale)


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


def events(folder):
    """(step, tag, value) of each event, and START for a session that begins."""
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime):
        content = file.read_bytes()
        while content:
            [size] = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == SessionLog.START:
                found.append((event.step, "START", None))
            found += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
    return found


def test_tensorboard_has_the_numbers_of_the_file(tmp_path):
    run(tmp_path, steps=2)
    found = events(tmp_path / "tensorboard")
    assert found[0] == (1, "START", None)
    assert (2, "loss", 0.25) in found
    written = [(line["step"], key) for line in lines(tmp_path) for key in line if key != "step"]
    assert [(step, tag) for step, tag, _ in found[1:]] == written


def test_a_full_disk_is_told_with_the_file_and_never_waited_for(small_disk, monkeypatch):
    monkeypatch.setattr(metrics, "SYNC_SECONDS", 0.0)
    writer = MetricsWriter(small_disk)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 14))

    def fill():
        for number in range(10_000):
            writer.write(number, dict.fromkeys(map(str, range(20)), 1.0))

    with pytest.raises(DcodError, match=r"cannot write .*metrics\.jsonl.*No space left"):
        fill()
    (small_disk / "filler").unlink()
    writer.close()


def test_the_error_that_came_first_is_told(tmp_path):
    """What is closed after it fails as well, on a full disk."""

    class Closing:
        def close(self, *_, **__):
            raise OSError("No space left on device")

        __enter__ = lambda self: None  # noqa: E731
        __exit__ = finish = close

    telemetry = object.__new__(Telemetry)
    telemetry.tracer = telemetry.writer = telemetry.bar = telemetry.goodput = Closing()
    with pytest.raises(DcodError, match="checkpoints/40 could not be written"), telemetry:
        raise DcodError("checkpoints/40 could not be written")
    with pytest.raises(OSError, match="No space"), telemetry:
        pass


def test_a_module_that_tensorboard_does_without_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with metrics._without("wave"), pytest.raises(ImportError):
        importlib.import_module("wave")
    wave = importlib.import_module("wave")
    with metrics._without("wave"):
        assert importlib.import_module("wave") is wave


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
    assigned += ["grad_norm", "nonfinite", "tokens/completion", "tokens/total"]
    ours = {f"weights/{name}" for name in statistics([1.0], [1])} | {"loss", "nll", *assigned}
    ours = {name for name in ours if "position_" not in name} | {"weights/position_0000"}
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    missing = {n for n in ours if f"`{n}`" not in page and f"`/{n.split('/')[-1]}`" not in page}
    assert len(assigned) >= 8
    assert not missing
