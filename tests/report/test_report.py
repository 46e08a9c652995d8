"""The report: numbers as the files hold them, nothing loaded or executed, seen in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pages import ALPHABET, HOSTILE, Page, data_of, lines, write_accuracy
from test_report_data import ESCAPES

from dcod_jax import cli
from dcod_jax import config as configs
from dcod_jax.data.dataset import MANIFEST, TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.export.command import MARKER
from dcod_jax.files import to_json
from dcod_jax.losses import weights
from dcod_jax.losses.weights import Tokens
from dcod_jax.models import hf, transformer
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.prepare.command import prepare
from dcod_jax.report import command as report
from dcod_jax.report import data as report_data
from dcod_jax.report import traces as report_traces
from dcod_jax.score.command import score
from dcod_jax.train import command as train
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.optim import make_optimizer
from dcod_jax.train.settings import optim_config
from dcod_jax.train.step import init_state


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs of one `compare`, with dataset, exports, accuracy and metrics, one missing drift."""
    place = tmp_path_factory.mktemp("report")
    for name, seed in (
        ("teacher", 1),
        ("start", 2),
        ("run/sft/export", 3),
        ("run/discord/export", 4),
    ):
        model = place / name
        tiny.write_model(model, seed=seed, vocab_size=len(tiny.SPECIAL) + len(ALPHABET))
        tiny.write_tokenizer(model, alphabet=ALPHABET)
        if name.endswith("export"):
            (model / MARKER).write_text("{}")
    records = tiny.sums(24)
    records[0] = {"id": HOSTILE, "prompt": "1+2?", "completion": HOSTILE, "answer": "3"}
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(place / "run")
    config.data.traces = str(tiny.write_jsonl(place / "traces.jsonl", records))
    config.data.max_length = config.data.seq_len = 192
    config.teacher.path = str(place / "teacher")
    config.student.path = str(place / "start")
    config.teacher.dtype = config.student.compute_dtype = "float32"
    config.train.progress = False
    config.compare = ("sft loss.weights.name=uniform", "discord loss.weights.temperature=0.5")
    config.report.traces = 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcod_jax.parallel.hosts.make_mesh", one_device)
        prepare(config)
        score(config)
    for _, variant in configs.variants(config):
        run = Path(variant.run_dir)
        (run / "config.json").write_bytes(to_json(variant.to_dict()))
        (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines()))
    seconds = {f"{part}_seconds": 2.5 for part in report_data.GOODPUT_PARTS}
    content = {"attempts": [{}, {}, {}], "total": {"goodput": 0.8125, **seconds}}
    (place / "run" / "sft" / "goodput.json").write_text(json.dumps(content))
    write_accuracy(place / "run")
    return config


def one_device(*_, **__):
    return make_mesh(1, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(report_traces, "make_mesh", one_device)


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_traces, "make_mesh", one_device)
        path = report.report(place)
    assert path == Path(place.run_dir) / "report.html"
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- numbers


def test_the_embedded_numbers_are_those_of_the_metrics_file(page, place):
    for run, name in zip(data_of(page)["runs"], ("sft", "discord"), strict=True):
        assert run["name"] == name
        found = (Path(place.run_dir) / name / "metrics.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in found]
        seen = {
            (key, step): value
            for key, series in run["series"].items()
            for step, value in zip(series["steps"], series["values"], strict=True)
        }
        assert seen == {
            (key, line["step"]): value
            for line in written
            for key, value in line.items()
            if key != "step" and "position" not in key
        }
        # What a line does not have is absent: no zero, no null, no other step.
        assert run["series"]["weights/ess"]["steps"] == [10, 15, 20, 25]
        assert run["positions"][0] == {"step": 10, "first": [0], "values": [0.5]}
        assert run["positions"][-1] == {"step": 25, "first": [0, 16], "values": [0.65, 0.3]}
        assert run["config"]["loss.weights.name"] == {"sft": "uniform", "discord": "sigmoid"}[name]


def test_accuracy_is_the_evaluations(page, place):
    for found, name in zip(data_of(page)["evaluations"], ("", "gsm8k"), strict=True):
        path = Path(place.run_dir) / "evaluation" / name / "results.json"
        written = json.loads(path.read_text())
        runs = {"sft": 0, "discord": 1}
        assert found == {"source": str(path), "set": name, "runs": runs, **written}


# ---------------------------------------------------------------- traces and weights


def test_trace_weights_are_the_train_steps(page, place):
    """Weights, log q and log p of every token against a plain forward pass and the formula."""
    found = data_of(page)
    dataset = TraceDataset(Path(place.run_dir) / "dataset" / "train")
    assert [t["id"] for t in found["traces"]] == [t.id for t in dataset.read(range(5))]
    config, params = hf.load_model(Path(place.run_dir) / "discord" / "export", dtype=jnp.float32)
    tokens = np.zeros((5, 192), np.int32)
    for row, trace in enumerate(dataset.read(range(5))):
        tokens[row, : len(trace.token_ids)] = trace.token_ids
    logprobs = jax.jit(
        lambda: jax.nn.log_softmax(transformer.logits(config, params, jnp.asarray(tokens)))
    )()
    for row, trace in enumerate(dataset.read(range(5))):
        shown = found["traces"][row]
        assert len(shown["texts"]) == len(trace.token_ids)
        assert shown["completion"] == np.flatnonzero(trace.completion_mask).tolist()
        np.testing.assert_allclose(shown["teacher"], trace.logprobs, rtol=1e-4)
        places = np.array(shown["completion"])
        q = np.asarray(logprobs)[row, places - 1, trace.token_ids[places]]
        sft, discord = shown["runs"]
        assert (sft["run"], discord["run"]) == (0, 1)
        np.testing.assert_allclose(discord["student"], q, rtol=1e-3, atol=1e-4)
        wanted = 1 / (1 + np.exp(-(q - trace.logprobs) / 0.5))
        np.testing.assert_allclose(discord["weights"], wanted, rtol=1e-3, atol=1e-4)
        assert set(sft["weights"]) == {1.0}
        assert sft["student"] != discord["student"]


def test_a_run_without_export_is_seen_by_its_newest_checkpoint(place, tmp_path):
    mesh = one_device()
    export = Path(place.run_dir) / "discord" / "export"
    model_config, params = hf.load_model(export, dtype=jnp.float32, mesh=mesh)
    optimizer, _ = make_optimizer(optim_config(place), 10)
    state = init_state(params, optimizer, mesh=mesh, model_config=model_config)
    _, variant = list(configs.variants(place))[1]
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(Snapshot(state=state, step=3, config=variant.to_dict()))
    checkpointer.close()
    runs = [
        report_data.Run("a", path, configs.replace(variant, {"run_dir": str(path)}))
        for path in (tmp_path, export.parent)
    ]
    seen, exported = (report_traces.see(run, count=24) for run in runs)
    assert (seen.source, exported.source) == ("checkpoint of step 3", f"export {export}")
    for mine, theirs in zip(seen.weights, exported.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_run_that_was_moved_is_seen_all_the_same(place, tmp_path):
    moved = shutil.copytree(place.run_dir, tmp_path / "moved")
    for stored in moved.glob("*/config.json"):
        stored.write_text(stored.read_text().replace(place.run_dir, "/nowhere"))
    runs = report_data.find_runs([moved])
    found = report.collect(runs, settings=place.report)
    assert not found["notes"]
    assert f"export {moved / 'sft' / 'export'}" in found["runs"][1]["seen"]
    assert len(found["traces"]) == place.report.traces


def test_token_weights_equal_packed_ones(place):
    """One row a trace, or all in one row as a train step packs them: the same weights."""
    cfg = weights.WeightConfig("sigmoid", 0.7, 0.1, 2.0, "prefix", "sequence", 0)
    traces = TraceDataset(Path(place.run_dir) / "dataset" / "train").read(range(4))
    generator = np.random.default_rng(0)
    student = [-generator.gamma(1.0, 1.0, len(t.logprobs)).astype(np.float32) for t in traces]
    found = report_traces.token_weights(cfg, student, traces)
    rows = [np.concatenate(x)[None] for x in (student, [t.logprobs for t in traces])]
    segments = np.concatenate([np.full(len(s), i + 1) for i, s in enumerate(student)])[None]
    mask = np.ones(segments.shape, bool)
    packed = report_traces._weigh(cfg, Tokens(*map(jnp.asarray, (*rows, mask, segments))), 0, None)
    np.testing.assert_allclose(np.concatenate(found), packed[0], rtol=1e-5)


def test_histogram_counts_every_token(page):
    sft, discord = (run["histogram"] for run in data_of(page)["runs"])
    for one in (sft, discord):
        assert sum(one["counts"]) == one["tokens"]
        assert one["traces"] == 24
        assert len(one["edges"]) == len(one["counts"]) + 1
    assert (sft["mean"], sft["ess"], sft["counts"][-1]) == (1.0, 1.0, sft["tokens"])
    assert 0 < discord["mean"] < 1
    assert discord["ess"] < 1


def test_what_is_not_there_is_said_and_left_out(place, tmp_path):
    """No export, no dataset, no evaluation: a page with notes, no zeros."""
    run = tmp_path / "alone"
    run.mkdir()
    stored = json.loads((Path(place.run_dir) / "sft" / "config.json").read_text())
    stored["run_dir"] = str(run)
    (run / "config.json").write_text(json.dumps(stored))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    settings = place.report
    found = report.collect(report_data.find_runs([run]), settings=settings)
    assert found["runs"][0]["histogram"] is None
    assert (found["traces"], found["drifts"], found["evaluations"]) == ([], [], [])
    assert found["runs"][0]["positions"] == []
    assert "neither an export nor a finished checkpoint" in found["notes"][0]
    stored["data"]["dataset"] = str(tmp_path / "none")
    (run / "config.json").write_text(json.dumps(stored))
    found = report.collect(report_data.find_runs([run]), settings=settings)
    assert "no trace dataset" in found["notes"][0]
    del stored["loss"]["head_chunk"]
    (run / "config.json").write_text(json.dumps(stored))
    found = report.collect(report_data.find_runs([run]), settings=settings)
    assert "of another version of dcod_jax, which differs in loss.head_chunk" in found["notes"][0]
    with pytest.raises(DcodError, match="no run; expected"):
        report_data.find_runs([tmp_path / "elsewhere"])


def test_weights_without_the_teachers_logprobs_are_absent(place, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(Path(place.run_dir) / "dataset", dataset)
    config = configs.load_recipe(configs.BASE)
    config.update_from_flattened_dict({"run_dir": str(tmp_path), "data.traces": place.data.traces})
    config.student.path = place.student.path
    config.data.max_length = config.data.seq_len = 192
    config.train.progress = False
    shutil.rmtree(dataset)
    prepare(config)
    assert (dataset / "train" / MANIFEST).is_file()
    config.export.path = str(Path(place.run_dir) / "discord" / "export")
    run = report_data.Run("discord", tmp_path, config)
    seen = report_traces.see(run, count=24)
    assert seen.weights is None
    assert "no teacher log-probs" in seen.missing
    assert report_traces.histogram(seen) is None
    assert report_traces.shown(seen, count=1)[0]["weights"] is None


# ---------------------------------------------------------------- the page


def test_nothing_is_loaded_from_anywhere(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "action", "onload", "onerror"} & attributes.keys(), tag
        assert tag not in ("link", "img", "iframe", "object", "base")
    style = parsed.texts["style"]
    script = parsed.texts["script"]
    for text in (style, script):
        assert not re.search(
            r"url\(|@import|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", text
        )
    urls = re.findall(r"https?://[^\s\"']+", style + script)
    assert urls == ["https://github.com/leeoniya/uPlot"]  # in the library's first comment
    assert "The MIT License" in script  # which its licence asks for
    assert len(page.encode()) < 3_000_000
    [policy] = [a["content"] for t, a in parsed.elements if "http-equiv" in a]
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_traces_text_is_never_markup(page):
    parsed = Page(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert "evil.example" in parsed.texts["data"]
    assert "</script" not in parsed.texts["data"]
    [hostile] = [t for t in data_of(page)["traces"] if t["id"] == HOSTILE]
    assert HOSTILE in "".join(hostile["texts"])  # and %data% in it stayed what it is
    assert HOSTILE not in page


def test_directories_on_the_command_line(place, tmp_path, capsys):
    output = tmp_path / "page.html"
    cli.run("report", ["--runs", place.run_dir, "--output", str(output), "--traces", "0"])
    found = data_of(output.read_text())
    assert [run["name"] for run in found["runs"]] == ["discord", "sft"]
    assert found["runs"][0]["histogram"] is None
    with pytest.raises(SystemExit):
        cli.run("report", [f"--runs={tmp_path}"])
    assert "no run; expected config.json" in capsys.readouterr().err


def test_train_writes_the_page_at_the_end_when_asked(place, monkeypatch):
    written = []
    monkeypatch.setattr(train, "report", written.append)
    monkeypatch.setattr(train, "export", lambda variant: Path(variant.run_dir))
    runs = list(configs.variants(place))
    train.finish(place, runs)
    assert written == []
    asked = configs.replace(place, {"report.at_end": True})
    train.finish(asked, runs)
    assert written == [asked]


browser = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")


def browse(page, tmp_path, *options):
    """What chromium says and prints of a page; no time is waited for after it is loaded."""
    path = tmp_path / "report.html"
    path.write_text(page)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-sync", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options, f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr  # no error, no refused script
    return done.stdout


@pytest.mark.long
@browser
def test_a_browser_runs_nothing_of_a_page_full_of_escapes(page, tmp_path):
    data = data_of(page)
    # Chromium cannot print a page with half a surrogate; it shows one.
    escapes = [escape.replace("\ud800", "") for escape in ESCAPES]
    for trace in data["traces"]:
        trace["id"] = escapes[0]
        trace["texts"] = [escapes[i % len(escapes)] for i in range(len(trace["texts"]))]
    data["notes"] = [*escapes, HOSTILE]
    for run in data["runs"]:
        run["name"] += escapes[1]
    drawn = browse(report.page(data), tmp_path, "--dump-dom")
    assert "<title>dcod_jax report: run</title>" in drawn
    assert 'class="token"' in drawn
    assert drawn.count("<script") == 2
    assert "<svg onload" not in drawn


@browser
def test_curves_are_drawn_in_the_colour_of_their_run(page, tmp_path):
    """Of the second run, whose curves here lie on those of the first."""
    image = pytest.importorskip("PIL.Image")
    browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,3000")
    with image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    columns = (np.abs(pixels - (0xD5, 0x5E, 0x00)).sum(-1) < 12).nonzero()[1]  # --run1
    assert np.unique(columns).size > 300, "no curve reaches over a chart"


@browser
def test_hovering_a_chart_shows_its_values(page, tmp_path):
    """The cursor at the right end of the first chart, which is the training loss."""
    hover = """<script>addEventListener("load", () => {
      const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
      const at = {clientX: box.right - 1, clientY: box.top + 9, bubbles: true};
      for (const kind of ["mouseenter", "mousemove"]) over.dispatchEvent(new MouseEvent(kind, at));
    });</script>"""
    free = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", hover + "</body>")
    drawn = browse(free, tmp_path, "--dump-dom", "--virtual-time-budget=2000")
    [tip] = re.findall(r'<div id="tip"[^>]*>([^<]*)</div>', drawn)
    assert tip.split("\n") == ["step 25", "sft: 0.07692", "discord: 0.07692"]


@browser
def test_a_browser_draws_it_and_runs_nothing_else(page, tmp_path):
    drawn = browse(page, tmp_path, "--dump-dom")
    assert "<title>dcod_jax report: run</title>" in drawn  # nothing ran that a trace brought
    assert drawn.count("<figure") == drawn.count("<canvas") >= 4
    assert 'class="token"' in drawn
    for heading in ("Runs", "Accuracy", "Loss", "Weights", "Traces", "Time", "Settings"):
        assert f"<h2>{heading}</h2>" in drawn
    assert "<h2>Drift</h2>" not in drawn  # there is no drift.json
    assert "70.0 % (60.0 % to 80.0 %)" in drawn
    assert "Level 1" in drawn
    assert "<td>3</td><td>81.25 %</td>" + 6 * "<td>2.5</td>" in drawn  # of three starts
