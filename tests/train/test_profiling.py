"""Where the time goes: phases that add up, and traces."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from dcod_jax.config_checks import _profile_errors
from dcod_jax.train import telemetry as telemetries
from dcod_jax.train.telemetry import Telemetry, Tracer


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the module, moved by hand: clock[0] = seconds."""
    now = [0.0]
    monkeypatch.setattr(telemetries.time, "monotonic", lambda: now[0])
    return now


def test_phases_are_means_over_the_steps_since_the_last_line(clock):
    telemetry = Telemetry.__new__(Telemetry)
    telemetry.peak = None
    telemetry._begin_line(0)
    for _ in range(2):
        for part, seconds in (("data_wait", 1.0), ("dispatch", 0.25), ("device", 3.0)):
            with telemetry.timed(part):
                clock[0] += seconds
        with telemetry.timed("eval"):
            clock[0] += 7.0
        clock[0] += 100.0  # in no phase
    line = telemetry._pace(2)
    assert line["time/step_seconds"] == 104.25  # without eval
    assert line["time/data_wait_seconds"] == 1.0
    assert line["time/dispatch_seconds"] == 0.25
    assert line["time/device_seconds"] == 3.0
    assert (line["time/eval_seconds"], line["time/save_seconds"]) == (14.0, 0.0)
    assert set(telemetry.spent.values()) == {0.0}


@pytest.mark.parametrize("text", ["", "1:1", "3:8"])
def test_steps_that_can_be_traced(text):
    assert _profile_errors(text, 8) == []


@pytest.mark.parametrize("text", ["3", "0:2", "5:4", "3:9", "a:b", "3:", "1:2:3"])
def test_steps_that_cannot_be_traced_are_refused(text):
    [message] = _profile_errors(text, 8)
    assert f"profile.steps={text!r} must be first:last" in message
    assert "train.steps=8" in message


def steps_in(directory):
    """Numbers of the train steps that the trace annotates, one for each start of a step."""
    [trace] = directory.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    own = {event["name"] for event in events if event.get("name", "").startswith("own ")}
    found = sorted(
        int(event["args"]["step_num"])
        for event in events
        if event.get("name") == "train" and "step_num" in event.get("args", {})
    )
    assert own == {f"own {step}" for step in found}  # nothing of another step is in it
    return found


def drive(tracer, count, start=0):
    work = jax.jit(lambda x: x @ x)
    value = jnp.ones((8, 8))
    for number in range(start + 1, count + 1):
        with tracer.step(number), jax.profiler.TraceAnnotation(f"own {number}"):
            value = work(value)
        tracer.after(number, value)
    tracer.close()


def test_a_trace_holds_exactly_its_steps(tmp_path, caplog):
    caplog.set_level("INFO")
    drive(Tracer("3:5", tmp_path, first=1), 8)
    assert steps_in(tmp_path / "profile") == [3, 4, 5]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert caplog.text.count("tensorboard --logdir") == 1


def test_a_run_that_ends_inside_the_steps_still_leaves_its_trace(tmp_path):
    drive(Tracer("4:9", tmp_path, first=1), 5)
    assert steps_in(tmp_path / "profile") == [4, 5]


def test_steps_before_a_resumed_start_are_said_not_to_be_traced(tmp_path, caplog):
    caplog.set_level("INFO")
    drive(Tracer("1:3", tmp_path, first=4), 6, start=3)
    assert not (tmp_path / "profile").exists()
    assert "are before this start at step 4: no trace" in caplog.text


def test_a_trace_in_a_store_is_sent_there(tmp_path):
    from dcod_jax.files import as_path

    root = as_path("memory://profiled")
    drive(Tracer("1:2", root, first=1), 3)
    assert len(list((root / "profile").rglob("*.xplane.pb"))) == 1
