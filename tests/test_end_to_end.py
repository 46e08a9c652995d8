"""The wheel, installed away from the checkout, runs the quickstart from an empty folder.

The quickstart is cut short: prompts in, two students and a table out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from host_runs import of_xla
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcod_jax.config import load_recipe
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.init_student.prune import chosen_layers, keep_layers
from dcod_jax.models import hf, transformer

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"
ARMS = ("sft", "discord-trace")  # of the recipe's comparison; each compiles a step of its own


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with the package as its wheel holds it, and bin/dcod."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # From a copy: setuptools writes beside the sources.
    patterns = shutil.ignore_patterns(".git", ".venv*", "runs", "models", "build")

    def beside(directory, names):  # of the top alone: a room is called models, too
        return patterns(directory, names) if Path(directory) == ROOT else {"__pycache__"}

    shutil.copytree(ROOT, place / "source", ignore=beside, symlinks=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", str(place / "source")]
    subprocess.run([*build, "--wheel-dir", str(place)], check=True)
    [wheel] = place.glob("dcod_jax-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    rooms = {path.name for path in (ROOT / "dcod_jax").iterdir()} - {"__pycache__"}
    assert rooms <= {path.name for path in (place / "site" / "dcod_jax").iterdir()}
    return place / "site"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, installed):
    """(run directory, command, output) of a run on a few prompts.

    Its programs are those of docs/test_notebook.py, which are compiled once for both.
    """
    place = tmp_path_factory.mktemp("quickstart")
    lines = (ASSETS / "competent" / "prompts.jsonl").read_text().splitlines(keepends=True)
    (place / "prompts.jsonl").write_text("".join(lines[:96]))
    recipe = load_recipe(ROOT / "dcod_jax" / "configs" / "quickstart.py")
    arms = [entry for entry in recipe.compare if entry.split()[0] in ARMS]
    command = [
        str(installed / "bin" / "dcod"),
        "train",
        "--config=quickstart",
        f"--config.run_dir={place / 'run'}",
        f"--config.generate.prompts={place / 'prompts.jsonl'}",
        "--config.generate.batch_size=32",
        f"--config.compare={','.join(arms)}",
        "--config.train.steps=4",
        "--config.train.log_every=1",
        "--config.train.eval_every=2",
        "--config.evaluate.limit=24",
        "--config.evaluate.batch_size=24",
    ]
    (place / "empty").mkdir()
    output = call(command, place / "empty", site=installed, flags=of_xla(1))
    return place / "run", command, output


def call(command, place, *, site=ROOT, flags=None):
    """What the command printed; without `flags`, XLA compiles as it does for users."""
    environment = os.environ | {"PYTHONPATH": f"{site}:{os.environ['PYTHONPATH']}"}
    environment |= flags or {"XLA_FLAGS": "", "NPROC": str(os.cpu_count())}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_one_command_goes_from_prompts_to_a_table_and_two_exports(quickstart):
    run, _, output = quickstart
    for row in ("teacher", "start", *ARMS):
        assert f" {row} " in output
    for name in ARMS:
        assert f"exported {name}: {run / name / 'export'}" in output
    for place in (run / "evaluation", run / "evaluation" / "longer"):
        results = json.loads((place / "results.json").read_text())
        assert results["baseline"] == "sft"
        for name, row in results["models"].items():
            kept = (place / f"{name}.jsonl").read_text().splitlines()
            graded = [json.loads(line)["correct"] for line in kept]
            assert (len(graded), sum(graded)) == (24, row["correct"])
            assert row["low"] <= row["accuracy"] <= row["high"]


def test_the_report_is_written_at_the_end(quickstart):
    run, _, output = quickstart
    assert f"report: {run / 'report.html'}" in output
    assert "PyTorch" not in output
    page = (run / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [one["name"] for one in data["runs"]] == list(ARMS)
    assert data["notes"] == []
    assert all(one["histogram"]["tokens"] for one in data["runs"])
    assert set(data["evaluations"][0]["models"]) == {"teacher", "start", *ARMS}


def check_held_out(run, output, steps, arms=ARMS):
    for name in arms:
        lines = map(json.loads, (run / name / "metrics.jsonl").read_text().splitlines())
        found = {line["step"]: line["eval/nll"] for line in lines if "eval/nll" in line}
        assert sorted(found) == [0, *steps]
        first, last = found[0], found[steps[-1]]
        expected = f"held-out nll {name}: {first:.4f} -> {last:.4f} (steps 0 to {steps[-1]})"
        assert expected in output


def test_the_held_out_loss_is_told_at_the_end(quickstart):
    run, _, output = quickstart
    check_held_out(run, output, [2, 4])


def test_the_two_students_differ_in_weights_and_rate_alone(quickstart):
    run, _, _ = quickstart
    configs = [json.loads((run / name / "config.json").read_text()) for name in ARMS]
    weights = [config["loss"].pop("weights") for config in configs]
    assert [one["name"] for one in weights] == ["uniform", "auto"]
    for config in configs:
        config.pop("run_dir")
        config["optim"].pop("learning_rate")
    assert configs[0] == configs[1]


def test_the_export_is_a_model_that_transformers_loads(quickstart):
    run, _, _ = quickstart
    path = run / "discord-trace" / "export"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    question = [{"role": "user", "content": "3 + 4 - 2 ="}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    config, params = hf.load_model(path, dtype=jnp.float32)
    ours = transformer.logits(config, params, jnp.array([ids], jnp.int32))[0]
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-4)
    start = hf.load_model(ASSETS / "competent" / "model", dtype=jnp.float32)[1]
    moved = np.abs(np.asarray(start["norm"]["scale"]) - np.asarray(params["norm"]["scale"]))
    assert moved.max() > 0


def test_the_installed_package_is_the_one_that_ran(installed):
    code = "import dcod_jax; print(dcod_jax.__file__)"
    output = call([sys.executable, "-c", code], installed.parent, site=installed)
    assert Path(output.strip()) == installed / "dcod_jax" / "__init__.py"
    assert (installed / "dcod_jax" / "configs" / "base.py").is_file()


def test_the_same_command_again_finds_everything_done(quickstart, installed):
    run, command, _ = quickstart
    assert not any((run.parent / "empty").iterdir())
    before = {p: p.stat().st_mtime_ns for p in (run / "dataset").rglob("*") if p.is_file()}
    output = call(command, run.parent, site=installed)
    assert "all 4 steps are done" in output
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.long
def test_it_trains_as_xla_compiles_for_users(quickstart, tmp_path, installed):
    """With no flags of the suite: optimised in full."""
    command = [*quickstart[1], f"--config.run_dir={tmp_path / 'run'}"]
    check_held_out(tmp_path / "run", call(command, tmp_path, site=installed), [2, 4])


def test_the_real_models_recipe_on_a_tiny_one(tmp_path):
    """quickstart_smollm2 with a tiny teacher and the copy of it that tools/get_smollm2.py makes.

    The last of its two entries: each compiles a step of its own.
    """
    *_, entry = load_recipe(ROOT / "dcod_jax" / "configs" / "quickstart_smollm2.py").compare
    name = entry.split()[0]
    teacher = tiny.write_model(tmp_path / "teacher", num_hidden_layers=5, initializer_range=0.3)
    config, params = hf.load_model(teacher, dtype=jnp.float32)
    config, params = keep_layers(config, params, chosen_layers("3", 5))
    student = tiny.write_tokenizer(tmp_path / "student")
    hf.save_params(student, config, params, dtype=jnp.float32, max_shard_bytes=1 << 30)
    raw = tiny.raw_config(num_hidden_layers=3)
    (student / "config.json").write_text(json.dumps(raw))
    words = [
        "-m",
        "dcod_jax.train",
        "--config=quickstart_smollm2",
        f"--config.run_dir={tmp_path / 'run'}",
        f"--config.student.path={student}",
        f"--config.teacher.path={teacher}",
        f"--config.compare={entry}",
        "--config.train.steps=4",
        "--config.train.eval_every=2",
    ]
    done = forks.run(words, cwd=tmp_path, env=os.environ | of_xla(1))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    manifest = json.loads((tmp_path / "run" / "traces.jsonl.manifest.json").read_text())
    assert manifest["sampled"] == 160
    assert 0 < manifest["rejected"]["truncated"] < 120
    check_held_out(tmp_path / "run", output, [2, 4], (name,))
    path = tmp_path / "run" / name / "export"
    assert f"exported {name}: {path}" in output
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 3


def test_the_real_models_prompts_are_distinct():
    prompts = read_problems(ASSETS.parent / "smollm2" / "prompts.jsonl", need_answer=False)
    assert len({prompt.messages[0]["content"].lower() for prompt in prompts}) == len(prompts) == 160
