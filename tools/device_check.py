"""What one GPU or one TPU VM shows of this code: parity, step time and memory, decoding.

    tools/gpu_check.sh [--out FILE] [--parts NAME,…] [--seconds 520]
    tools/tpu_check.sh [--out FILE] …
    tools/gpu_check.sh --rehearse                     # tiny shapes on this machine's CPU

Models are random, in the shapes of SmolLM2-135M, Qwen2.5-0.5B and -1.5B. Each part is a process of
its own with a time limit of its own; what it measures is a line of JSON in --out as soon as it is
known, so that a run that is cut off keeps what it had. Parts begin only before --seconds are over.
The table at the end has, for each train step: milliseconds (the median of 5 steps after 2), tokens
a second, MFU (attention counted inside traces only; docs/scaling.md) and the allocator's peak.
`torch` rows are transformers' model on the same tokens (tools/device_check_torch.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_check_jax as ours
from device_check_jax import SHAPES, packed, step

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: what runs, with what, and after how many seconds it is stopped."""

    run: str  # a key of WORKERS
    limit: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# The first parts matter most: a run that is cut off has them.
GPU_PARTS = {
    "versions": Part("versions", 40),
    "parity": Part("parity", 90),
    "sft": Part("step", 70, step("1.5b", 8, 2048, "sft", student_remat="dots")),
    "discord": Part("step", 70, step("1.5b", 8, 2048, "discord", student_remat="dots")),
    "torch": Part("torch", 130, {"model": "1.5b", "rows": 8, "length": 2048}),
    "live": Part("step", 80, step("1.5b", 8, 2048, "live", student_remat="dots")),
    "decode": Part("decode", 80, {"model": "1.5b", "rows": 64, "prompt": 128, "new": 512}),
    "torch-decode": Part("torch", 90, {"model": "1.5b", "rows": 64, "prompt": 128, "new": 512}),
    "sft-long": Part("step", 70, step("1.5b", 4, 8192, "sft", student_remat="full")),
    "torch-long": Part("torch", 130, {"model": "1.5b", "rows": 4, "length": 8192}),
    "topk": Part("step", 70, step("1.5b", 8, 2048, "topk", student_remat="dots")),
    "sft-full": Part("step", 70, step("1.5b", 8, 2048, "sft", student_remat="full")),
    "sft-none": Part("step", 70, step("1.5b", 8, 2048, "sft", student_remat="none")),
    "sft-scanned": Part(
        "step", 70, step("1.5b", 8, 2048, "sft", student_remat="dots", student_attention="scanned")
    ),
    "discord-long": Part("step", 70, step("1.5b", 4, 8192, "discord", student_remat="full")),
    "sft-0.5b": Part("step", 60, step("0.5b", 8, 2048, "sft", student_remat="dots")),
    "torch-0.5b": Part("torch", 90, {"model": "0.5b", "rows": 8, "length": 2048}),
    "sft-135m": Part("step", 60, step("135m", 8, 2048, "sft", student_remat="dots")),
    "torch-135m": Part("torch", 90, {"model": "135m", "rows": 8, "length": 2048}),
}
_BLOCKED: dict[str, Any] = {"student_attention": "blocked"}
_PLAIN: dict[str, Any] = {"train_gradient_sums": "plain"}
TPU_PARTS = {
    "versions": Part("versions", 60),
    "parity": Part("parity", 120),
    "placed": Part("step", 120, step("0.5b", 2, 4096, "discord")),
    "plain": Part("step", 120, step("0.5b", 2, 4096, "discord", **_PLAIN)),
    "blocked": Part("step", 120, step("0.5b", 2, 4096, "discord", **_BLOCKED)),
    "blocked-plain": Part("step", 120, step("0.5b", 2, 4096, "discord", **_BLOCKED, **_PLAIN)),
    "dots": Part("step", 120, step("0.5b", 1, 4096, "discord", student_remat="dots")),
    "decode": Part("decode", 120, {"model": "0.5b", "rows": 64, "prompt": 128, "new": 512}),
}
PARTS = {"gpu": GPU_PARTS, "tpu": TPU_PARTS}


def rehearsed(options: dict[str, Any]) -> dict[str, Any]:
    """The part in tiny shapes that a CPU takes."""
    small = {"model": "tiny", "rows": 2, "length": 64, "prompt": 8, "new": 8}
    return {key: small.get(key, value) for key, value in options.items()} | {"rehearse": True}


def worker_torch(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    from device_check_torch import run  # beside this file; imports torch

    shape = SHAPES[options["model"]]
    length = options["length"] if "length" in options else options["prompt"]
    made = packed(options["rows"], length, shape["vocab_size"])
    return {"variants": run(shape, made, options, report=lambda line: _write(options, line))}


WORKERS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "versions": ours.worker_versions,
    "parity": ours.worker_parity,
    "step": ours.worker_step,
    "decode": ours.worker_decode,
    "torch": worker_torch,
}

# ---------------------------------------------------------------- the parts, one after another


def _write(options: dict[str, Any], record: dict[str, Any]) -> None:
    """One line at the end of the result file, on disk before the next is measured."""
    with open(options["out"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"part": options["part"], **record}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def work(name: str, args: argparse.Namespace) -> None:
    """One part in this process; its result or its error is a line of the file."""
    part = PARTS[args.device][name]
    options = part.options | {"part": name, "out": str(args.out)}
    if args.rehearse:
        options = rehearsed(options)
    with tempfile.TemporaryDirectory() as directory:
        record = WORKERS[part.run](options, Path(directory))
    _write(options, {key: value for key, value in options.items() if key != "out"} | record)


def run_part(name: str, args: argparse.Namespace, seconds: float) -> None:
    """One part in a process that is killed after its limit; a failure is a line, and no end."""
    part = PARTS[args.device][name]
    command = [sys.executable, str(Path(__file__).resolve()), "--device", args.device]
    command += ["--work", name, "--out", str(args.out), *(["--rehearse"] if args.rehearse else [])]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": args.cache,
    }
    if args.rehearse:
        environment["JAX_PLATFORMS"] = "cpu"
    start = time.monotonic()
    limit = min(part.limit, seconds)
    try:
        done = subprocess.run(
            command, env=environment, timeout=limit, capture_output=True, text=True, check=False
        )
        error = "" if done.returncode == 0 else (done.stderr.strip() or "killed")[-1500:]
    except subprocess.TimeoutExpired:
        error = f"stopped after its {limit:.0f} s"
    took = time.monotonic() - start
    if error:
        _write({"part": name, "out": str(args.out)}, {"error": error, "took_s": took})
    print(f"{name}: {took:.0f} s{' ' + error.splitlines()[-1] if error else ''}", flush=True)


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Markdown of the result file: a row for each measurement, errors by their last line."""
    columns = ("ms", "tokens_per_s", "mfu", "peak_gib", "planned_gib", "compile_s", "loss")
    rows = ["| part | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in lines:
        if "error" in line:
            cells = [line["error"].splitlines()[-1][:90], *[""] * (len(columns) - 1)]
        elif "ms" in line:
            values = [line.get(column) for column in columns]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
        else:
            continue
        label = line["part"] + (f": {line['variant']}" if "variant" in line else "")
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=None, help="the file of results (JSON lines)")
    parser.add_argument("--parts", default="", help="some parts, comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=520.0, help="of the whole run")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on this CPU")
    parser.add_argument("--cache", default="", help="directory of compiled programs; default: none")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = (args.out or Path(f"{args.device}_check.jsonl")).resolve()
    if args.work:
        work(args.work, args)
        return
    names = args.parts.split(",") if args.parts else list(PARTS[args.device])
    if unknown := set(names) - set(PARTS[args.device]):
        parser.error(
            f"--parts: {', '.join(sorted(unknown))} is not of {', '.join(PARTS[args.device])}"
        )
    args.out.unlink(missing_ok=True)
    end = time.monotonic() + args.seconds
    for name in names:
        left = end - time.monotonic()
        if left < 20:
            _write({"part": name, "out": str(args.out)}, {"error": "not begun: no time was left"})
            continue
        run_part(name, args, left)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    for line in lines:
        if line["part"] in ("versions", "parity"):
            print(json.dumps(line))
    print("\n".join(table(lines)))
    print(f"results: {args.out}")


if __name__ == "__main__":
    main()
