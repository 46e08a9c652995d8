"""The whole way with every path in Cloud Storage (a local fake): the numbers of a run on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fake_store import BUCKET, fake_gcs

from dcod_jax.files import as_path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
from dcod_jax.configs.base import get_config as base

def get_config():
    c = base()
    c.run_dir = "{root}/run"
    c.student.path = "{root}/student"
    c.student.compute_dtype = "float32"
    c.teacher.path = "{root}/teacher"
    c.teacher.dtype = "float32"
    c.data.traces = "{root}/tra*.jsonl"
    c.data.eval_fraction = 0.2
    c.data.max_length = 64
    c.data.seq_len = 64
    c.data.batch_size = 8
    c.prepare.shard_records = 16
    c.optim.schedule = "constant"
    c.train.steps = 4
    c.train.log_every = 1
    c.train.eval_every = 2
    c.train.save_every = 2
    c.train.progress = False
    c.export.dtype = "float32"
    c.evaluate.problems = "{root}/problems.jsonl"
    c.evaluate.max_new_tokens = 8
    return c
"""


def train(root, environment, *more):
    command = [sys.executable, "-m", "dcod_jax.train", f"--config={root}/recipe.py", *more]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def outcome(root):
    """What the run left, without clocks and paths."""
    lines = map(json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    weights = (root / "run" / "export" / "model.safetensors").read_bytes()
    graded = (root / "run" / "evaluation" / "student.jsonl").read_text()
    return metrics, weights, graded


@pytest.mark.long
def test_a_run_in_cloud_storage_is_the_run_on_disk(tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    tiny.write_model(local / "student", seed=1)
    tiny.write_model(local / "teacher", seed=2)
    tiny.write_jsonl(local / "traces.jsonl", tiny.sums(60))
    tiny.write_jsonl(local / "problems.jsonl", tiny.sums(6, seed=5))
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    kept |= {"JAX_PLATFORMS": "cpu", "DCOD_CACHE_DIR": str(tmp_path / "cache")}
    with fake_gcs() as environment:
        remote = as_path(f"gs://{BUCKET}/place")
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            (remote / file.relative_to(local).as_posix()).upload(file)
        for root in (local, remote):
            (root / "recipe.py").write_text(RECIPE.format(root=root))
            train(root, kept | environment, "--config.train.steps=2")
            output = train(root, kept | environment)
            assert f"resuming {root}/run at step 2" in output
        assert outcome(remote) == outcome(local)
        assert "all 4 steps are done" in train(remote, kept | environment)
    here = {str(p) for p in ROOT.rglob("gs:*")}
    assert not here  # nothing took the name for a local one
