"""Where the time goes: phases that add up, goodput over killed and stopped starts, traces."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from dcod_jax.config_checks import _profile_errors
from dcod_jax.train import profiling
from dcod_jax.train.profiling import GOODPUT, Goodput, Tracer, totals
from dcod_jax.train.telemetry import Telemetry


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the module, moved by hand: clock[0] = seconds."""
    now = [0.0]
    monkeypatch.setattr(profiling.time, "monotonic", lambda: now[0])
    return now


def test_phases_are_means_over_the_steps_since_the_last_line(tmp_path, clock):
    telemetry = Telemetry.__new__(Telemetry)
    telemetry.goodput, telemetry.peak = Goodput(tmp_path, 0, entered=0.0, enabled=False), None
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
    assert set(telemetry.spent.values()) == {0.0}


class Run:
    """A run whose clock is moved by hand: 5 s to start, 2 a step, 3 a save, 4 an evaluation."""

    def __init__(self, run_dir, clock, start):
        self.run_dir, self.clock, self.step = run_dir, clock, start
        entered = clock[0]
        clock[0] += 5.0
        self.goodput = Goodput(run_dir, start, entered=entered, enabled=True)
        kept = [line for line in self.lines() if line["step"] <= start]  # as MetricsWriter does
        self.write(kept)

    def lines(self):
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(self, lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.run_dir / "metrics.jsonl").write_text(text)

    def steps(self, count):
        for _ in range(count):
            self.step += 1
            if self.step > 1:
                self.clock[0] += 2.0
            self.goodput.started()
            self.write([*self.lines(), {"step": self.step, **self.goodput.line(self.step)}])

    def save(self):
        self.clock[0] += 3.0
        self.goodput.paused("save", 3.0)
        self.goodput.saved(self.step)

    def evaluate(self):
        self.clock[0] += 4.0
        self.goodput.paused("eval", 4.0)


def total(run_dir):
    return json.loads((run_dir / GOODPUT).read_text())["total"]


def test_a_run_without_a_restart(tmp_path, clock):
    run = Run(tmp_path, clock, 0)
    run.steps(1)  # done when it has compiled: start-up
    run.evaluate()
    run.steps(4)
    run.save()
    run.goodput.finish(failed=False)
    assert total(tmp_path) == {
        "wall_seconds": 20.0,
        "startup_seconds": 5.0,
        "eval_seconds": 4.0,
        "save_seconds": 3.0,
        "lost_seconds": 0.0,
        "productive_seconds": 8.0,
        "goodput": 0.4,
    }
    assert run.goodput.text().startswith("goodput 40.0%: 8.0 of 20.0 s in steps that count")
    assert run.lines()[-1]["time/goodput"] == pytest.approx(8 / 17)


def test_what_a_killed_attempt_did_after_its_save_is_lost(tmp_path, clock):
    first = Run(tmp_path, clock, 0)
    first.steps(5)
    first.save()
    first.steps(3)  # killed: 6 s of steps after the save, nothing is written at the end
    clock[0] += 1000.0  # not held: time between the two is no one's
    second = Run(tmp_path, clock, 5)
    second.steps(5)  # its first step, 2 s, is part of its start-up
    second.save()
    second.goodput.finish(failed=False)
    found = total(tmp_path)
    assert found["lost_seconds"] == 6.0
    assert found["startup_seconds"] == 5.0 + 7.0
    assert found["save_seconds"] == 6.0
    assert found["productive_seconds"] == 8.0 + 8.0
    assert found["wall_seconds"] == (5 + 8 + 3 + 6) + (5 + 10 + 3)
    kinds = [a["ended"] for a in json.loads((tmp_path / GOODPUT).read_text())["attempts"]]
    assert kinds == ["killed", "ended"]


def test_an_attempt_killed_at_its_start_does_not_get_the_time_of_the_one_before(tmp_path, clock):
    first = Run(tmp_path, clock, 0)
    first.steps(5)
    first.save()
    first.steps(1)
    Run(tmp_path, clock, 5)  # killed before its first step: metrics.jsonl ends with the first's
    third = Run(tmp_path, clock, 5)
    assert [attempt["elapsed"] for attempt in third.goodput.attempts] == [18.0, 5.0, 5.0]


def test_a_run_killed_before_its_first_save_loses_all_its_steps(tmp_path, clock):
    Run(tmp_path, clock, 0).steps(4)
    again = Run(tmp_path, clock, 0)
    assert totals(again.goodput.attempts)["lost_seconds"] == 6.0


def test_a_run_that_saved_when_it_was_stopped_loses_only_its_start(tmp_path, clock):
    first = Run(tmp_path, clock, 0)
    first.steps(5)
    first.save()
    first.goodput.finish(failed=False)
    second = Run(tmp_path, clock, 5)
    assert totals(second.goodput.attempts)["lost_seconds"] == 0.0
    # Its own save is gone, say damaged: the start from an earlier one loses both attempts' steps.
    second.steps(3)
    second.save()
    second.steps(2)
    third = Run(tmp_path, clock, 0)
    assert totals(third.goodput.attempts)["lost_seconds"] == 8.0 + 4.0 + 4.0


def test_only_one_process_writes(tmp_path, clock):
    Goodput(tmp_path, 0, entered=0.0, enabled=False).saved(1)
    assert not (tmp_path / GOODPUT).exists()


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
