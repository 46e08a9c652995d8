"""docs/tutorial.md: its commands in their order, on the quickstart's models and a few problems."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from host_runs import of_xla

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash( cloud)?\n(.*?)^```$", PAGE, re.M | re.S)

# What the reduced form changes: sizes, the mesh of one CPU device, the embedded models' own prompt.
REDUCED = {
    "prepare.system_prompt": "",
    "generate.samples": 2,
    "generate.max_new_tokens": 72,
    "generate.batch_size": 64,
    "data.max_length": 128,
    "data.seq_len": 192,
    "data.batch_size": 4,
    "data.eval_fraction": 0.1,
    "student.compute_dtype": "float32",
    "student.remat": "none",
    "teacher.dtype": "float32",
    "loss.head_chunk": 128,
    "optim.warmup_steps": 1,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 2,
    "train.save_every": 2,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "plan.topology": "cpu:1",
    "plan.hbm_gib": 4,
    "plan.largest_batch": False,
    "evaluate.limit": 16,
    "evaluate.max_new_tokens": 72,
    "drift.limit": 4,
    "drift.max_new_tokens": 16,
    "drift.resamples": 100,
    "export.dtype": "float32",
}
PRELUDE = """
set -euo pipefail
dcod() {
  case " $* " in
    *" --config "*) "$PYTHON" -IS "$FORKS" ask "$SOCKET" 0 -m dcod_jax "$@" $REDUCED ;;
    *) "$PYTHON" -IS "$FORKS" ask "$SOCKET" 0 -m dcod_jax "$@" ;;
  esac
}
python() { "$PYTHON" "$@"; }
"""


def gsm8k(path, source, count):
    """Problems of the quickstart in GSM8K's form: question, and an answer that ends in `#### N`."""
    with path.open("w", encoding="utf-8") as out:
        for line in source.read_text().splitlines()[:count]:
            problem = json.loads(line)
            answer = f"The value is {problem['answer']}.\n#### {problem['answer']}"
            out.write(json.dumps({"question": problem["prompt"], "answer": answer}) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory as the page has it after the downloads, and what its commands printed there."""
    place = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ASSETS / "teacher", place / "models" / "Qwen2.5-7B-Instruct")
    shutil.copytree(ASSETS / "student", place / "models" / "Qwen2.5-1.5B-Instruct")
    (place / "data").mkdir()
    gsm8k(place / "data" / "gsm8k_train.jsonl", ASSETS / "prompts.jsonl", 48)
    gsm8k(place / "data" / "gsm8k_test.jsonl", ASSETS / "eval.jsonl", 24)
    commands = [block for cloud, block in BLOCKS if not cloud]
    flags = " ".join(f"--config.{key}={value}" for key, value in REDUCED.items())
    environment = os.environ | of_xla(1)
    environment |= {
        "PYTHON": sys.executable,
        "REDUCED": flags,
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{ROOT}",
        "FORKS": forks.__file__,
        "SOCKET": forks.server(),
    }
    done = subprocess.run(
        ["bash", "-c", PRELUDE + "\n".join(commands)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return place, done.stdout + done.stderr


def test_every_verb_of_the_page_leaves_what_the_page_promises(place):
    directory, output = place
    run = directory / "runs" / "gsm8k"
    promised = [name for name in re.findall(r"`(runs/gsm8k/[^`]*)`", PAGE) if "*" not in name]
    assert promised
    missing = [name for name in promised if not (directory / name).exists()]
    assert not missing
    results = json.loads((run / "evaluation" / "gsm8k" / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "start", "sft", "discord"}
    for row in ("teacher", "start", "sft", "discord"):
        assert f" {row} " in output


def test_the_prompts_hold_the_final_answers(place):
    directory, _ = place
    lines = (directory / "data" / "prompts.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    problem = json.loads((ASSETS / "prompts.jsonl").read_text().splitlines()[0])
    assert (len(lines), first["prompt"], first["answer"]) == (
        48,
        problem["prompt"],
        problem["answer"],
    )


def test_the_page_uses_every_verb_of_the_real_job():
    text = "\n".join(block for cloud, block in BLOCKS if not cloud)
    used = set(re.findall(r"^dcod (\w+)", text, re.M))
    wanted = "doctor plan generate_traces prepare score inspect train evaluate drift report"
    assert used >= set(wanted.split())


def test_every_block_is_what_shellcheck_wants(tmp_path):
    assert len(BLOCKS) > 6
    files = []
    for number, (_, block) in enumerate(BLOCKS):
        files.append(tmp_path / f"block{number}.sh")
        files[-1].write_text("#!/usr/bin/env bash\nset -euo pipefail\n" + block)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [str(checker), "--exclude=SC1091", *map(str, files)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_fenced_block_of_commands_is_checked():
    kinds = set(re.findall(r"^```(\S.*)$", PAGE, re.M))
    assert kinds <= {"bash", "bash cloud", "text", "python"}


@pytest.mark.shared
def test_the_conversion_reads_gsm8ks_own_file(shared_data, tmp_path):
    """The page's conversion on the real training file: every answer is a number."""
    (tmp_path / "data").mkdir()
    shutil.copy(shared_data / "gsm8k" / "train.jsonl", tmp_path / "data" / "gsm8k_train.jsonl")
    block = next(block for _, block in BLOCKS if "gsm8k_train.jsonl" in block and "EOF" in block)
    script = f'python() {{ "{sys.executable}" "$@"; }}\n{block}'
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True)
    lines = (tmp_path / "data" / "prompts.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 7473
    assert all(re.fullmatch(r"-?[\d,.]+", answer) for answer in answers)
