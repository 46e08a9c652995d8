"""What a report reads: thinned curves keep their numbers, and files that cannot be shown."""

import json
import math
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from dcod_jax.config import BASE, load_recipe
from dcod_jax.errors import DcodError
from dcod_jax.report import command as report
from dcod_jax.report import data as report_data
from dcod_jax.train.profiling import Goodput


def thinned(pairs, points):
    curve = report_data._Curve(points // 2)
    for pair in pairs:
        curve.add(pair)
        assert len(curve.stretches) <= points // 2 + 1
    return curve.pairs()


def test_long_curves_keep_ends_and_extremes_exactly():
    generator = np.random.default_rng(0)
    curve = [(step, float(v)) for step, v in enumerate(generator.normal(size=100_000))]
    found = thinned(curve, 200)
    assert 100 <= len(found) <= 202
    assert set(found) <= set(curve)
    assert found == sorted(found)
    assert {found[0], found[-1]} == {curve[0], curve[-1]}
    assert max(found, key=lambda x: x[1]) == max(curve, key=lambda x: x[1])
    assert min(found, key=lambda x: x[1]) == min(curve, key=lambda x: x[1])
    assert thinned(curve[:200], 200) == curve[:200]


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


CURVE = {"value": [1.0, 2.0]}
DRIFT = {"reach": 2, "student_alive": [2, 2], "teacher_alive": [2, 1], "accumulated": CURVE}
DRIFT |= {"reference": CURVE, "excess": CURVE, "log_ratio": {"student": CURVE, "teacher": CURVE}}


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("evaluation/results.json", {"accuracy": 1}, "models is missing"),
        ("evaluation/set/results.json", {"models": {"sft": {}}}, "['sft'].accuracy is missing"),
        ("evaluation/results.json", {"models": {"a": {"accuracy": math.nan}}}, "is missing"),
        ("evaluation/results.json", {"models": {"a": {"accuracy": "1"}}}, "accuracy='1' must be"),
        ("evaluation/results.json", {"models": [1]}, "models=[1] must be an object"),
        ("evaluation/results.json", {"models": {"a": {"accuracy": 1, "low": []}}}, "low=[] must"),
        (
            "evaluation/results.json",
            {"models": {"a": {"accuracy": 1, "details": {"pass_at_k": {"1": 3}}}}},
            "details.pass_at_k['1']=3 must be a list",
        ),
        ("evaluation/results.json", [1], "expected a JSON object, found list"),
        ("evaluation/results.json", "[" * 100_000, "not JSON"),
        ("drift.json", {"a": 1}, "models is missing"),
        ("drift.json", {"models": {"sft": {"reach": 1}}}, "['sft'].student_alive is missing"),
        ("drift.json", {"models": {"sft": {**DRIFT, "reach": 7}}}, "sft differ in length"),
        ("drift.json", {"models": {"sft": {**DRIFT, "teacher_alive": [1]}}}, "differ in length"),
        ("drift.json", {"models": {"sft": {**DRIFT, "excess": {"value": ["x"]}}}}, "['value'][0]="),
    ],
)
def test_results_of_another_form_are_left_out_with_a_note(tmp_path, name, content, note):
    run, path = report_data.Run("sft", tmp_path, {}), tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    notes = []
    assert report_data.evaluations([run], notes) == []
    assert report_data.drifts([run], notes, points=10) == []
    [found] = notes
    assert found.startswith(str(path))
    assert note in found
    assert "not shown" in found


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
    for content, lacking in (({"total": {}, "attempts": []}, "total.goodput"), ({}, "attempts")):
        (tmp_path / "goodput.json").write_text(json.dumps(content))
        notes = []
        assert report_data.goodput(run, notes) is None
        assert f"goodput.json: {lacking} is missing" in notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1]", "config.json: expected a JSON object, found list"),
        ("config.json", b"\xff", "config.json: not JSON"),
        ("config.json", b'{"a.b": 3}', "not a run's config"),
        ("config.json", b'{"a": [1, [2]], "": {"": NaN}, "x": {"y": 1e999}}', None),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')  # killed in its second line
    [run] = report_data.find_runs([tmp_path])
    notes = []
    assert report_data.run_record(run, notes, points=10)["series"] == {}
    assert notes == []
    (tmp_path / name).write_bytes(content)
    if message is None:  # odd, and shown
        [run] = report_data.find_runs([tmp_path])
        report.embedded(report_data.run_record(run, notes, points=10))
        return
    with pytest.raises(DcodError, match=message):
        report_data.find_runs([tmp_path])


def test_junk_among_the_metrics_is_left_out_with_a_note(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lines = [
        '{"step": 1, "loss": 2.0, "weights/position_0000": 1.0, "weights/position_x": 1.0}',
        '{"step": 2, "loss": NaN, "nll": 1e999, "a": "text", "b": [1], "weights/ess": 0.5}',
        '{"loss": 3.0}',
        "junk",
        "[1]",
        '{"step": "4", "loss": 3.0}',
        '{"step": 1e400, "loss": 3.0}',
        "[" * 100_000,
        "\xff",
        '{"step": 9, "loss": 4.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    [run], notes = report_data.find_runs([tmp_path]), []
    record = report_data.run_record(run, notes, points=10)
    assert record["series"]["loss"] == {"steps": (1, 9), "values": (2.0, 4.0)}
    assert set(record["series"]) == {"loss", "weights/position_x", "weights/ess"}
    assert record["positions"] == [{"step": 1, "first": [0], "values": [1.0]}]
    [note] = notes
    assert "8 lines, the first one line 2" in note
    report.embedded(record)


def test_a_long_run_is_thinned_as_it_is_read(tmp_path, monkeypatch):
    """Ends and extremes are those of the file."""
    (tmp_path / "config.json").write_text("{}")
    lines = [{"step": n, "loss": n % 7 + 0.5, "weights/position_0000": n} for n in range(1, 400)]
    lines[250] |= {"loss": 99.0, f"rare {250}": 1.0}
    lines[120] |= {"loss": -99.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    [run] = report_data.find_runs([tmp_path])
    plain, notes = report_data.run_record(run, [], points=1000), []
    dense = report_data.run_record(run, [], points=48)["series"]["loss"]["steps"]
    assert max(np.diff(dense)) <= 4 * 399 / 24  # as dense everywhere
    found = report_data.run_record(run, notes, points=6)
    for steps, values in (found["series"]["loss"].values(),):
        assert (steps[0], steps[-1], min(values), max(values)) == (1, 399, -99.0, 99.0)
        assert len(steps) <= 6 + 2
        pairs = zip(*plain["series"]["loss"].values(), strict=True)
        assert set(zip(steps, values, strict=True)) <= set(pairs)
    assert [row["values"] for row in plain["positions"]] == [[1], [200], [399]]
    first, middle, last = (row["values"][0] for row in found["positions"])
    assert (first, last) == (1, 399)
    assert 100 < middle < 300
    monkeypatch.setattr(report_data, "_NAMES", 3)
    assert set(report_data.run_record(run, notes, points=9)["series"]) == {"loss"}
    assert "1 lines, the first one line 251" in notes[0]


ESCAPES = (
    "</script>",
    "</SCRIPT\t><script>document.title='owned'</script>",
    "<!--<script>",
    "--></style></title><svg onload=alert(1)>",
    "]]><![CDATA[",
    "\\u003c/script>",
    "%data% %script% %policy%",
    "\u2028\u2029\ud800\0",
    "<plaintext><textarea><xmp><noscript>",
)


class Tags(HTMLParser):
    """Every tag of a page, and the text of its data element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.tags, self.data, self.inside = [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.inside = ("id", "data") in attrs
        self.tags.append((tag, sorted(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        self.inside = False
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_comment(self, data):
        self.tags.append("comment")

    handle_decl = unknown_decl = handle_comment


def test_nothing_that_a_model_wrote_leaves_the_data_of_the_page():
    plain = Tags(report.page({"title": "a", "texts": ["b"]}))
    for escape in ESCAPES:
        content = {"title": escape, "texts": [escape * 1000], escape: {escape: [None, escape]}}
        page = Tags(report.page(content))
        assert page.tags == plain.tags, escape
        assert json.loads(page.data) == content


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    target, settings = tmp_path / "page.html", load_recipe(BASE).report
    target.write_text("my thesis")
    with pytest.raises(DcodError, match=r"page\.html exists and was not written by this program"):
        report.write([], target, settings=settings)
    assert target.read_text() == "my thesis"
    target.unlink()
    report.write([], target, settings=settings)
    report.write([], target, settings=settings)
    assert target.read_text().startswith("<!DOCTYPE html>")


def test_embedding_round_trips():
    value = {"a": "</script><!-- & \u2028 é", "b": [1.5, None]}
    text = report.embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028é") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        report.embedded(math.nan)
