"""Benchmarks: one train step against a peer, the input pipeline, saving, compiled memory.

    python tools/bench_step.py --what step --peer-python /path/to/peer/bin/python
    python tools/bench_step.py --what input|checkpoint|memory

step: SmolLM2-135M cut to 6 layers (D 576, F 1536, 9/3 heads of 64, tied V 49152), batch 4 x 512,
float32, AdamW, every token supervised. Ours has the DisCorD weights on (`ours`), or plain SFT
(`ours-sft`); the peer is Tunix's PeftTrainer with its default SFT loss on its own llama3 model of
the same shape. Each measurement is a process of its own, the variants take turns for --rounds
rounds, and the table gives medians of CPU-seconds per step after warmup (getrusage; all threads)
and of the peak resident memory (ru_maxrss; compilation included). No XLA flags are set for either.
Ours saves matrix products only and recomputes what is elementwise (student.remat "dots").

The peer lives in an environment of its own:
    python3.11 -m venv peer && peer/bin/pip install google-tunix==0.1.7 "jax==0.10.2"
Without --peer-python only ours is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
BATCH, LENGTH = 4, 512
LEARNING_RATE = 1e-4


def cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_megabytes() -> float:
    """Largest resident memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(run_steps: Callable[[int], Any], *, warmup: int, steps: int) -> dict[str, float]:
    """CPU-seconds and wall seconds per step of run_steps(n), after run_steps(warmup)."""
    run_steps(warmup)
    cpu, wall = cpu_seconds(), time.perf_counter()
    run_steps(steps)
    return {
        "cpu_s": (cpu_seconds() - cpu) / steps,
        "wall_s": (time.perf_counter() - wall) / steps,
        "peak_mb": peak_megabytes(),
    }


# ---------------------------------------------------------------- ours (a process of its own)


def our_config(
    weights: str, *, head_chunk: int, loss: dict[str, Any] | None = None, **shape: int
) -> tuple[Any, Any]:
    """(model config, loss config) of the benchmark; `loss` replaces fields of LossConfig (nll)."""
    from dcod_jax.losses.distill import LossConfig
    from dcod_jax.losses.weights import WeightConfig
    from dcod_jax.models.config import from_hf

    raw = {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPE,
        **shape,
    }
    weight_config = WeightConfig(
        name=weights, temperature=1.0, offset=0.0, clip=2.0, scope="token", normalize="mean",
        warmup_steps=0,
    )  # fmt: skip
    values: dict[str, Any] = {"divergence": "nll"} | (loss or {})
    return from_hf(raw), LossConfig(head_chunk=head_chunk, weights=weight_config, **values)


def our_batch(vocab: int, batch: int = BATCH, length: int = LENGTH, *, top_k: int = 0) -> Any:
    """Random tokens, every position supervised, teacher log-probs around -1; top-k if asked for.

    The top-k hold 0.9 of the mass in equal shares.
    """
    import jax.numpy as jnp
    import numpy as np

    from dcod_jax.types import Batch

    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocab, (batch, length + 1), dtype=np.int32)
    cache = {}
    if top_k:
        first = generator.integers(0, vocab, (batch, length, 1), dtype=np.int32)
        cache = {
            "topk_ids": jnp.asarray((first + np.arange(top_k, dtype=np.int32)) % vocab),
            "topk_logprobs": jnp.full((batch, length, top_k), np.log(0.9 / top_k), jnp.bfloat16),
            "tail_logprobs": jnp.full((batch, length), np.log(0.1), jnp.float32),
        }
    return Batch(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        loss_mask=jnp.ones((batch, length), bool),
        segment_ids=jnp.ones((batch, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length), (batch, length)),
        teacher_logprobs=jnp.asarray(-generator.exponential(1.0, (batch, length)), jnp.float32),
        **cache,
    )


def our_step(args: argparse.Namespace, model_config: Any, loss_config: Any) -> tuple[Any, Any]:
    """(train step, state) on one device, as the train verb makes them.

    With a live teacher the step takes its parameters too; it has the student's shape.
    """
    import jax
    import jax.numpy as jnp

    from dcod_jax.forward import TeacherModel
    from dcod_jax.mesh import make_mesh
    from dcod_jax.models.transformer import init_params
    from dcod_jax.optim import OptimConfig, make_optimizer
    from dcod_jax.train_step import init_state, make_train_step

    mesh = make_mesh(devices=jax.devices()[:1])
    optim = OptimConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, final_fraction=1.0,
        weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=args.clip_norm,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(optim, 1000)
    live = loss_config.teacher == "live"
    step = make_train_step(
        model_config,
        loss_config,
        optimizer,
        schedule,
        batch_size=BATCH,
        microbatches=1,
        mesh=mesh,
        compute_dtype=jnp.float32,
        remat=args.remat,
        valid_vocab=model_config.vocab_size,
        teacher=TeacherModel(model_config, jnp.float32) if live else None,
    )
    params = jax.jit(init_params, static_argnums=0)(model_config, jax.random.key(0))
    return step, init_state(params, optimizer, mesh=mesh, model_config=model_config)


def worker_ours(args: argparse.Namespace) -> dict[str, float]:
    """Our train step as the train verb runs it: metrics of a step fetched after the next starts."""
    import jax

    weights = "uniform" if args.worker == "ours-sft" else "sigmoid"
    model_config, loss_config = our_config(weights, head_chunk=args.head_chunk)
    step, state = our_step(args, model_config, loss_config)
    batch = our_batch(model_config.vocab_size)

    def run_steps(count: int) -> None:
        nonlocal state
        pending = None
        for _ in range(count):
            state, values = step(state, batch)
            if pending is not None:
                jax.device_get(pending)
            pending = values
        losses.append(float(jax.device_get(pending)["loss"]))

    losses: list[float] = []
    return measure(run_steps, warmup=args.warmup, steps=args.steps) | {"loss": losses[-1]}


# ---------------------------------------------------------------- peer (imports nothing of ours)


def worker_tunix(args: argparse.Namespace) -> dict[str, float]:
    """Tunix PeftTrainer, default SFT loss, on its llama3 model of the same shape."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]
    from tunix.sft import peft_trainer, utils  # pyright: ignore[reportMissingImports]

    model_config = llama3.ModelConfig(
        num_layers=SHAPE["num_hidden_layers"],
        vocab_size=SHAPE["vocab_size"],
        embed_dim=SHAPE["hidden_size"],
        hidden_dim=SHAPE["intermediate_size"],
        num_heads=SHAPE["num_attention_heads"],
        head_dim=SHAPE["head_dim"],
        num_kv_heads=SHAPE["num_key_value_heads"],
        rope_theta=100000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama3.Llama3(model_config, rngs=nnx.Rngs(0))
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(LEARNING_RATE), config)
    trainer.is_managed_externally = True  # train() may be called again: warmup, then measured

    def model_input(batch: Any) -> dict[str, Any]:
        mask = batch.input_mask
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    trainer = trainer.with_gen_model_input_fn(model_input)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    example = peft_trainer.TrainingInput(
        input_tokens=jnp.asarray(ids, jnp.int32), input_mask=jnp.ones((BATCH, LENGTH), jnp.bool_)
    )
    return measure(
        lambda count: trainer.train([example] * count), warmup=args.warmup, steps=args.steps
    )


WORKERS = {"ours": worker_ours, "ours-sft": worker_ours, "tunix": worker_tunix}

# ---------------------------------------------------------------- the interleaved comparison


def run_worker(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process, without what this process's environment would add."""
    python = args.peer_python if name == "tunix" else sys.executable
    command = [python, str(Path(__file__).resolve()), "--worker", name]
    for option in ("warmup", "steps", "head_chunk", "remat", "clip_norm"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    environment["JAX_PLATFORMS"] = "cpu"
    if name != "tunix":
        environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def bench_step(args: argparse.Namespace) -> None:
    """Interleaved rounds; medians, and ratios to the peer."""
    names = args.variants.split(",")
    if args.peer_python:
        names.append("tunix")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            results[name].append(run_worker(name, args))
            print(f"round {number + 1} {name}: {results[name][-1]}", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("cpu_s", "peak_mb")}
        for name, runs in results.items()
    }
    base = medians["tunix" if args.peer_python else names[0]]
    print(
        f"\n{'variant':12}{'CPU-s/step':>12}{'peak MB':>10}{'time ratio':>12}{'memory ratio':>14}"
    )
    for name, row in medians.items():
        time_ratio, memory_ratio = row["cpu_s"] / base["cpu_s"], row["peak_mb"] / base["peak_mb"]
        print(
            f"{name:12}{row['cpu_s']:12.2f}{row['peak_mb']:10.0f}"
            f"{time_ratio:12.3f}{memory_ratio:14.3f}"
        )


# ---------------------------------------------------------------- the other questions


MEMORY_LOSSES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("nll", 0, {}),
    ("forward_kl, cached K = 64", 64, {"divergence": "forward_kl"}),
    ("forward_kl, live", 0, {"divergence": "forward_kl", "teacher": "live"}),
)


def compiled_temporaries(args: argparse.Namespace, vocab: int, length: int, loss: Any) -> float:
    """MB of temporaries in the compiled two-layer train step of one of MEMORY_LOSSES."""
    import jax

    _, top_k, values = loss
    model_config, loss_config = our_config(
        "sigmoid", head_chunk=args.head_chunk, loss=values, vocab_size=vocab, num_hidden_layers=2
    )
    step, state = our_step(args, model_config, loss_config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    teacher = [shapes.params] if loss_config.teacher == "live" else []
    batch = our_batch(vocab, BATCH, length, top_k=top_k)
    compiled = step.lower(shapes, batch, *teacher).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def bench_memory(args: argparse.Namespace) -> None:
    """Compiled temporary memory of a two-layer train step as V and T grow, and by loss."""
    print(f"{'V':>8}{'T':>6}{'temporary MB':>14}{'logits would be MB':>20}  loss")
    nll, *others = MEMORY_LOSSES
    cases = [(vocab, length, nll) for vocab in (8192, 49152) for length in (256, 1024)]
    cases += [(49152, 1024, loss) for loss in others]
    for vocab, length, loss in cases:
        temporary = compiled_temporaries(args, vocab, length, loss)
        logits = BATCH * length * vocab * 4 / 2**20
        print(f"{vocab:8}{length:6}{temporary:14.0f}{logits:20.0f}  {loss[0]}", flush=True)


def bench_checkpoint(args: argparse.Namespace) -> None:
    """Seconds for which saving 135M parameters and their Adam moments blocks the loop."""
    import jax

    from dcod_jax.checkpoint import Checkpointer

    model_config, loss_config = our_config("sigmoid", head_chunk=512, num_hidden_layers=30)
    _, state = our_step(args, model_config, loss_config)
    jax.block_until_ready(state)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    with tempfile.TemporaryDirectory(dir=args.directory) as run_dir:
        checkpointer = Checkpointer(run_dir, keep=1)
        for number in range(1, args.rounds + 1):
            start = time.perf_counter()
            checkpointer.save(state, step=number, progress={}, config={})
            blocked = time.perf_counter() - start
            checkpointer.wait()
            total = time.perf_counter() - start
            print(f"save {number}: {size:.2f} GB, blocked {blocked:.3f} s, on disk {total:.1f} s")
        checkpointer.close()


def bench_input(args: argparse.Namespace) -> None:
    """Tokens per second of the packed pipeline (tools/bench_input.py)."""
    import bench_input as pipeline  # beside this file

    pipeline.main([])


WHAT = {
    "step": bench_step,
    "input": bench_input,
    "checkpoint": bench_checkpoint,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=WHAT, default="step")
    parser.add_argument("--peer-python", default="", help="python of the peer's environment")
    parser.add_argument("--variants", default="ours", help="comma-separated: ours,ours-sft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--head-chunk", type=int, default=512)
    parser.add_argument("--remat", default="dots", help="what the layers save: none|dots|full")
    parser.add_argument("--clip-norm", type=float, default=0.0, help="0, as the peer's AdamW")
    parser.add_argument("--directory", default=None, help="where to save (checkpoint)")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    WHAT[args.what](args)


if __name__ == "__main__":
    main()
