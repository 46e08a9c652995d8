"""Compile train steps for TPU slices that are not at hand, and hold them to their targets.

    python3.11 -m venv tpu && tpu/bin/pip install -e . "jax[tpu]==0.10.2"
    tpu/bin/python tools/bench_aot.py                 # rows not yet in build/aot; table
    tpu/bin/python tools/bench_aot.py --rows nll,topk # these rows
    tpu/bin/python tools/bench_aot.py --rows published # a train step of each published model
    tpu/bin/python tools/bench_aot.py --table         # the table of what is there

Student: the shape of Qwen2.5-1.5B; packed rows of 4096 tokens, all of them supervised; libtpu's
default flags. Published models (tests/models/published.json) have rows of 2048 tokens, one a chip,
on v5e:4x4, and from 9e9 parameters on v5e:16x16. Every row is a process of its own and leaves
build/aot/<row>.json; an interrupted run goes on. A row takes 1 to 2 minutes of one core.

peak: GiB that libtpu allocates on a chip, the arguments (args) included. est: the sum of libtpu's
estimated cycles, loops multiplied, at 1.5 GHz, in ms; it leaves out the attention kernels and
collectives, so it ranks programs and is not a step time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
QWEN_1B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
QWEN_7B = QWEN_1B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
VALID_VOCAB = 151665  # entries of the tokenizer that they share

TOP_K = {"loss.divergence": "forward_kl", "score.top_k": 64}
LIVE = {"loss.divergence": "forward_kl", "loss.teacher": "live"}
PLAIN = {"loss.weights.name": "uniform"}
LARGE = {"data.batch_size": 256, "mesh.fsdp": 64, "plan.topology": "v5e:16x16"}
LONG = {"data.seq_len": 32768, "data.max_length": 32768}

SMALL = {"data.seq_len": 2048, "data.max_length": 2048, "data.batch_size": 16}

# Row -> (student, changed keys); the first ones matter most.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nll": (QWEN_1B, {}),
    "nll-plain": (QWEN_1B, PLAIN),
    "nll-bfloat16-sums": (QWEN_1B, {"train.gradient_dtype": "bfloat16"}),
    "topk": (QWEN_1B, TOP_K),
    "live": (QWEN_1B, LIVE),
    "nll-256": (QWEN_1B, {"data.batch_size": 256}),
    "nll-256-micro": (QWEN_1B, {"data.batch_size": 256, "train.microbatches": 4}),
    "7b": (QWEN_7B, LARGE),
    "two-slices": (QWEN_1B, {"data.batch_size": 128, "plan.slices": 2}),
    "nll-chunk-512": (QWEN_1B, {"loss.head_chunk": 512}),
    "nll-2-layers": (QWEN_1B | {"num_hidden_layers": 2}, {}),
    "nll-56-layers": (QWEN_1B | {"num_hidden_layers": 56}, {}),
    "nll-offload": (QWEN_1B, {"student.remat": "offload"}),
    "nll-optim-offload": (QWEN_1B, {"optim.offload": True}),
    "long-1-row": (QWEN_1B, LONG | {"data.batch_size": 1, "mesh.fsdp": 1, "mesh.context": 16}),
    "long-8-rows": (QWEN_1B, LONG | {"data.batch_size": 8, "mesh.fsdp": 4, "mesh.context": 4}),
    "nll-dots-16": (QWEN_1B, {"student.remat": "dots", "data.batch_size": 16}),
    "nll-chunk-1024": (QWEN_1B, {"loss.head_chunk": 1024}),
    "nll-chunk-2048": (QWEN_1B, {"loss.head_chunk": 2048}),
    "nll-chunk-4096": (QWEN_1B, {"loss.head_chunk": 4096}),
    "nll-plain-chunk-4096": (QWEN_1B, PLAIN | {"loss.head_chunk": 4096}),
    "topk-chunk-4096": (QWEN_1B, TOP_K | {"loss.head_chunk": 4096}),
    "live-chunk-4096": (QWEN_1B, LIVE | {"loss.head_chunk": 4096}),
    "7b-chunk-4096": (QWEN_7B, LARGE | {"loss.head_chunk": 4096}),
    "nll-attention-chunk-4096": (
        QWEN_1B,
        {"student.remat": "attention", "loss.head_chunk": 4096},
    ),
    "7b-dots-14-chunk-4096": (
        QWEN_7B,
        LARGE | {"student.remat": "dots:14", "loss.head_chunk": 4096},
    ),
    "nll-dots-10-chunk-4096": (QWEN_1B, {"student.remat": "dots:10", "loss.head_chunk": 4096}),
    "topk-attention-chunk-4096": (
        QWEN_1B,
        TOP_K | {"student.remat": "attention", "loss.head_chunk": 4096},
    ),
    "live-attention-chunk-4096": (
        QWEN_1B,
        LIVE | {"student.remat": "attention", "loss.head_chunk": 4096},
    ),
    "7b-attention-chunk-4096": (
        QWEN_7B,
        LARGE | {"student.remat": "attention", "loss.head_chunk": 4096},
    ),
    "7b-16": (QWEN_7B, SMALL),
    "7b-16-lora": (QWEN_7B, SMALL | {"student.lora.rank": 16}),
    "nll-full-16": (QWEN_1B, {"data.batch_size": 16}),
}


def published() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of the models in tests/models/published.json."""
    rows = {}
    models = json.loads((ROOT / "tests" / "models" / "published.json").read_text())
    for name, model in models.items():
        chips = 256 if model["parameters"] > 9e9 else 16
        counts = (model["config"].get(key, 1) for key in ("num_experts", "num_local_experts"))
        experts = math.gcd(4, max(counts))
        changes = {"data.seq_len": 2048, "data.max_length": 2048, "data.batch_size": chips}
        changes |= {"plan.topology": "v5e:16x16" if chips == 256 else "v5e:4x4"}
        changes |= {"mesh.fsdp": chips // experts, "mesh.expert": experts}
        rows[name.replace(" ", "-")] = (model["config"], changes)
    return rows


OWN = tuple(ROWS)
ROWS |= published()

# Row -> (most GiB at the peak, most ms, row to compare with, most of its ms).
TARGETS: dict[str, tuple[float | None, float | None, str, float | None]] = {
    "nll": (4.5, 1355, "nll-plain", 1.005),
    "topk": (4.7, None, "nll-plain", 1.06),
    "live": (5.6, None, "nll-plain", 1.40),
    "7b": (5.9, None, "", None),
    "nll-chunk-4096": (14.5, 1200, "nll-plain-chunk-4096", 1.005),
    "topk-chunk-4096": (14.5, 1303, "", None),  # 1.03 times Tunix's SFT step
    "live-chunk-4096": (14.5, 1708, "", None),  # 1.35 times
    "7b-dots-14-chunk-4096": (14.5, 1330, "", None),
}


def recipe(name: str, directory: Path) -> Any:
    """The row's config: configs/base.py with the benchmark's sizes and the row's changes."""
    from dcod_jax import config as configs

    student, changes = ROWS[name]
    file = directory / f"{name}.config.json"
    file.write_text(json.dumps(student))
    values = {
        "student.config": str(file),
        "teacher.path": str(file) if "loss.teacher" in changes else "",
        "data.seq_len": 4096,
        "data.max_length": 4096,
        "data.batch_size": 64,
        "mesh.fsdp": 16,
        "plan.topology": "v5e:4x4",
        **changes,
    }
    return configs.replace(configs.load_recipe(configs.BASE), values)


def worker(name: str, directory: Path) -> dict[str, Any]:
    """Compile one row; its numbers."""
    from dcod_jax.plan import estimate, programs

    config = recipe(name, directory)
    target = programs.target(config)
    start = time.process_time()
    traced = programs.train_program(
        config, target.devices, valid_vocab=min(VALID_VOCAB, ROWS[name][0]["vocab_size"])
    )
    try:
        program = programs.compile_program(traced)
    except programs.DoesNotFitError as error:
        return {"row": name, "needed": error.needed}
    (directory / f"{name}.hlo").write_text(program.text)
    numbers = estimate.train_numbers(config, target, traced, program)
    assert target.chip is not None
    vocabulary = student_vocabulary_bytes(name)
    return {
        "row": name,
        **program.memory,
        "estimated_ms": program.summary.cycles / target.chip.clock * 1e3,
        "compile_cpu_seconds": time.process_time() - start,
        # In a loop and as large as the vocabulary matrix: it would be gathered for every chunk.
        "vocabulary_gathers_in_loops": sum(
            c.kind == "all-gather" and c.times > 1 and c.size >= vocabulary
            for c in program.summary.collectives
        ),
        "hlo_bytes": len(program.text),
        **numbers,
    }


def student_vocabulary_bytes(name: str) -> int:
    """Bytes of the vocabulary matrix in bfloat16."""
    student = ROWS[name][0]
    return 2 * student["vocab_size"] * student["hidden_size"]


def compile_row(name: str, directory: Path) -> None:
    """One row in a fresh process; leaves its JSON."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
    command += ["--directory", str(directory)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    environment.pop("LIBTPU_INIT_ARGS", None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr[-3000:]}")
    result = json.loads(run.stdout.strip().splitlines()[-1])
    temporary = directory / f"{name}.json.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(directory / f"{name}.json")


def table(directory: Path) -> list[str]:
    """Markdown lines of the rows that are there, each against its targets."""
    found = {name: directory / f"{name}.json" for name in ROWS}
    done = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    lines = [
        "| row | args | peak | target | est ms | target | of plain | target | step s "
        "| windowed | async | CPU-s |"
    ]
    lines.append("|---" * 12 + "|")
    for name in ROWS:
        if name not in done:
            continue
        row = done[name]
        if "needed" in row:
            lines.append(f"| {name} | | needs {(row['needed'] or 0) / 2**30:.2f}" + " |" * 10)
            continue
        most, milliseconds, other, ratio = TARGETS.get(name, (None, None, "", None))
        relative = ""
        if other and other in done:
            relative = f"{row['estimated_ms'] / done[other]['estimated_ms']:.4f}"
        moved = sum(c["bytes"] for c in row["collectives"])
        beside = sum(c["bytes"] * c["overlapped"] for c in row["collectives"])
        cells = (
            name,
            f"{row['arguments'] / 2**30:.2f}",
            f"{row['peak'] / 2**30:.2f}",
            most or "",
            f"{row['estimated_ms']:.0f}",
            milliseconds or "",
            relative,
            ratio or "",
            f"{row['seconds']:.3f}",
            row["windowed_products"],
            f"{beside / moved:.0%}" if moved else "",
            f"{row['compile_cpu_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(OWN), help="comma-separated")
    parser.add_argument("--again", action="store_true", help="compile rows that are there too")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "aot")
    parser.add_argument("--worker", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.worker:
        print(json.dumps(worker(args.worker, args.directory)))
        return
    rows = (
        [row for row in ROWS if row not in OWN]
        if args.rows == "published"
        else args.rows.split(",")
    )
    for name in [] if args.table else rows:
        if args.again or not (args.directory / f"{name}.json").exists():
            compile_row(name, args.directory)
            print(f"{name}: done", flush=True)
    print("\n".join(table(args.directory)))


if __name__ == "__main__":
    main()
