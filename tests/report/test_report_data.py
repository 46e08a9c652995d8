"""What a report reads: thinned curves keep their numbers, and files that cannot be shown."""

import json
import math
import time

import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.report import command as report
from dcod_jax.report import data as report_data
from dcod_jax.train.profiling import Goodput


def test_long_curves_keep_ends_and_extremes_exactly():
    generator = np.random.default_rng(0)
    curve = [(step, float(v)) for step, v in enumerate(generator.normal(size=100_000))]
    found = report_data.thin(curve, 200)
    assert 150 <= len(found) <= 202
    assert set(found) <= set(curve)
    assert found == sorted(found)
    assert {found[0], found[-1]} == {curve[0], curve[-1]}
    assert max(found, key=lambda x: x[1]) == max(curve, key=lambda x: x[1])
    assert min(found, key=lambda x: x[1]) == min(curve, key=lambda x: x[1])
    assert report_data.thin(curve[:200], 200) == curve[:200]


def test_drift_is_the_drift_file_at_fewer_lengths(tmp_path):
    def curve(scale):
        return {k: [scale * n for n in range(1, 51)] for k in ("value", "low", "high")}

    row = {"reach": 37, "student_alive": list(range(50)), "teacher_alive": list(range(50))}
    row |= {"accumulated": curve(1.0), "reference": curve(1.0)}
    row |= {"excess": curve(2.0), "log_ratio": {"student": curve(1.0), "teacher": curve(3.0)}}
    row["excess"]["low"][36] = None
    (tmp_path / "drift.json").write_text(json.dumps({"models": {"a": row}}))
    run = report_data.Run("a", tmp_path, None)
    [found] = report_data.drifts([run], [], points=10)
    thin = found["models"]["a"]
    assert thin["lengths"] == [1, 6, 11, 16, 21, 26, 31, 36, 37, 41, 46, 50]
    at = thin["lengths"].index(37)
    assert (thin["excess"]["value"][at], thin["excess"]["low"][at]) == (74.0, None)
    assert thin["log_ratio"]["teacher"]["value"][0] == 3.0
    [whole] = report_data.drifts([run], [], points=50)
    assert whole["models"]["a"]["excess"] == row["excess"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    """By the directory above, and where that is the same too by the whole path."""
    for place in ("a/x/sft", "a/x/discord", "a/y/sft", "b/y/sft"):
        run = tmp_path / place
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text("")
    found = report_data.find_runs([tmp_path / "a/x", tmp_path / "a/y", tmp_path / "b/y/sft"])
    assert [run.name for run in found] == [
        "discord",
        "x/sft",
        str(tmp_path / "a/y/sft"),
        str(tmp_path / "b/y/sft"),
    ]


def test_a_model_belongs_to_the_run_beside_its_results(tmp_path):
    """Two comparisons with runs of the same names, and a run of its own."""
    for place in ("a/sft", "b/discord", "b/sft", "c"):
        run = tmp_path / place
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text("")
        home = run if place == "c" else run.parent
        (home / "evaluation").mkdir(exist_ok=True)
        (home / "evaluation" / "results.json").write_text('{"models": {}}')
    runs = report_data.find_runs([tmp_path / name for name in "abc"])
    found = report_data.evaluations(runs, [])
    assert [one["runs"] for one in found] == [{"sft": 0}, {"discord": 1, "sft": 2}, {"student": 3}]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("evaluation/results.json", {"accuracy": 1}, "it has no models"),
        ("evaluation/set/results.json", {"models": {"sft": {}}}, "sft has no accuracy"),
        ("drift.json", {"a": 1}, "it has no models"),
        ("drift.json", {"models": {"sft": {"reach": 1}}}, "sft has no student_alive, teacher_al"),
    ],
)
def test_results_of_another_form_are_left_out_with_a_note(tmp_path, name, content, note):
    run, path = report_data.Run("sft", tmp_path, {}), tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    notes = []
    assert report_data.evaluations([run], notes) == []
    assert report_data.drifts([run], notes, points=10) == []
    [found] = notes
    assert f"{path} is not shown: {note}" in found


def test_goodput_is_what_the_loop_wrote(tmp_path):
    for start in (0, 2):  # killed after step 3, of which the checkpoint of step 2 was kept
        clock = Goodput(tmp_path, start, entered=time.monotonic() - 5, enabled=True)
        clock.paused("eval", 0.25)
        clock.started()
        clock.saved(2)
    clock.finish(failed=False)
    written = json.loads((tmp_path / "goodput.json").read_text())
    notes = []
    found = report_data.goodput(report_data.Run("sft", tmp_path, {}), notes)
    assert found is not None
    assert not notes
    assert found["starts"] == 2
    assert found["goodput"] == written["total"]["goodput"]
    seconds = found["seconds"]
    assert seconds["eval"] == 0.5
    assert seconds["wall"] == pytest.approx(sum(seconds.values()) - seconds["wall"])
    assert seconds["wall"] > seconds["startup"] > 9


def test_goodput_of_another_form_is_left_out_with_a_note(tmp_path):
    run, notes = report_data.Run("sft", tmp_path, {}), []
    assert report_data.goodput(run, notes) is None
    assert notes == []
    for content, lacking in (({"total": {}}, "productive_seconds"), ({}, "total")):
        (tmp_path / "goodput.json").write_text(json.dumps(content))
        notes = []
        assert report_data.goodput(run, notes) is None
        assert f"goodput.json is not shown: it has no '{lacking}'" in notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1]", "config.json: expected a JSON object, got list"),
        ("config.json", b"\xff", "config.json: not JSON"),
        ("metrics.jsonl", b'{"step": 1}\n{"loss": 1}\n', "metrics.jsonl:2: expected .* with step"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{}\n', "metrics.jsonl:2: expected a JSON object"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')  # killed in its second line
    [run] = report_data.find_runs([tmp_path])
    assert report_data.run_record(run, points=10)["series"] == {}
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DcodError, match=message):
        report_data.run_record(*report_data.find_runs([tmp_path]), points=10)


def test_embedding_round_trips():
    value = {"a": "</script><!-- & \u2028 é", "b": [1.5, None]}
    text = report.embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028é") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        report.embedded(math.nan)
