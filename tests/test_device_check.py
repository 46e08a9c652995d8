"""tools/gpu_check.sh and tpu_check.sh, which no device here can run: rehearsed in tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def check(device, out, *options):
    """(lines of the result file, standard output) of a rehearsal."""
    absent = out.parent / "absent"  # what the machine lacks beside the wheels
    absent.mkdir()
    for name in ("array_record", "datasets", "gguf", "grain", "tensorboardX"):
        (absent / f"{name}.py").write_text("raise ImportError(__name__)\n")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(absent)}
    command = [ROOT / "tools" / f"{device}_check.sh", "--rehearse", "--out", out, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout


@pytest.fixture
def device_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import device_check

    return device_check


def test_a_part_that_fails_or_is_not_begun_is_a_line_and_no_end(
    device_check, monkeypatch, tmp_path
):
    """The parts' processes are replaced by one that fails and one that does not end."""
    out = tmp_path / "results.jsonl"
    parts = {name: device_check.Part("versions", limit=1) for name in ("a", "b", "c")}
    monkeypatch.setitem(device_check.PARTS, "gpu", parts)
    programs = iter(["raise SystemExit('broken')", "import time; time.sleep(60)"])
    run = subprocess.run

    def replaced(command, **options):
        return run([sys.executable, "-S", "-c", next(programs)], **options)

    clock = iter([0.0, 0.0, 0.0, 0.0, 400.0, 400.0, 401.0, 501.0])
    monkeypatch.setattr(device_check.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(device_check.subprocess, "run", replaced)
    monkeypatch.setattr(sys, "argv", ["check", "--device", "gpu", "--out", str(out)])
    device_check.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = [(line["part"], line["error"]) for line in lines]
    assert found == [
        ("a", "broken"),
        ("b", "stopped after its 1 s"),
        ("c", "not begun: no time was left"),
    ]


def test_the_rows_that_torch_gets_are_ours(device_check):
    made = device_check.packed(3, 64, 100)
    assert made["ids"].shape == (3, 65)
    assert sum(made["lengths"]) == 3 * 64
    starts = made["positions"] == 0
    assert starts.sum() == len(made["lengths"])
    assert (starts.cumsum(axis=1) == made["segments"]).all()


@pytest.mark.long
def test_every_part_of_the_gpu_check_runs(tmp_path):
    lines, printed = check("gpu", tmp_path / "gpu.jsonl", "--seconds", "3000")
    assert [line for line in lines if "error" in line] == []
    by_part = {line["part"]: line for line in lines}
    assert by_part["parity"]["loss_error"] < 1e-5
    assert by_part["parity"]["gradient_error"] < 1e-5
    kernels = [value for key, value in by_part["parity"].items() if key.startswith("kernel_")]
    assert len(kernels) == 3
    assert max(kernels) < 0.02
    timed = [line for line in lines if "ms" in line]
    assert {"sft", "discord", "topk", "live", "decode", "torch", "torch-decode"} <= set(by_part)
    assert all(line["tokens_per_s"] > 0 for line in timed)
    assert "| sft-long |" in printed
    assert "| torch: rows, checkpointed |" in printed


@pytest.mark.long
def test_the_tpu_check_compares_kernels_and_sums(tmp_path):
    lines, _ = check(
        "tpu", tmp_path / "tpu.jsonl", "--parts", "versions,parity,placed,blocked-plain"
    )
    assert [line for line in lines if "error" in line] == []
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
