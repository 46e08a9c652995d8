"""Benchmarks: one train step against a peer, the input pipeline, saving, compiled memory.

    python tools/bench_step.py --what step --peer-python /path/to/peer/bin/python
    python tools/bench_step.py --what input|checkpoint|memory

step: SmolLM2-135M cut to 6 layers (D 576, F 1536, 9/3 heads of 64, tied V 49152), batch 4 x 512,
float32, AdamW. Ours: `ours` is nll with the DisCorD weights on every token, `ours-sft` the same
without weights, `ours-half` the same where half of each row is prompt; `ours-topk` is forward KL to
a cached top-64, `ours-live` to a live teacher of the student's shape, both with the weights on;
`ours-topk-plain` and `ours-live-plain` without. `ours-experts` is `ours-sft` with eight experts of
half the width, two of them for each token: as many active parameters in the layers. The peer is
Tunix: PeftTrainer with its default SFT loss for the nll variants, DistillationTrainer with
LogitStrategy and a live teacher for the others (bench_tunix.py). Each measurement is a process of
its own, the variants take turns for --rounds rounds, and the table gives medians of CPU-seconds per
step after warmup (getrusage; all threads) and of the peak resident memory (ru_maxrss; compilation
included). No XLA flags are set for either. Ours saves matrix products only and recomputes what is
elementwise (student.remat "dots"); logits exist for 256 tokens at a time (loss.head_chunk).

The peer lives in an environment of its own:
    python3.11 -m venv peer && peer/bin/pip install google-tunix==0.1.7 "jax==0.10.2"
Without --peer-python only ours is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_measure import BATCH, LEARNING_RATE, LENGTH, SHAPE, measure

ROOT = Path(__file__).resolve().parents[1]
# ---------------------------------------------------------------- ours (a process of its own)


def our_config(
    weights: str, *, head_chunk: int, loss: dict[str, Any] | None = None, **shape: Any
) -> tuple[Any, Any]:
    """(model config, loss) of the benchmark; `loss` replaces fields of LossConfig (nll)."""
    import jax

    from dcod_jax.losses.distill import DistillLoss, LossConfig
    from dcod_jax.losses.head import VocabHead
    from dcod_jax.losses.weights import WeightConfig
    from dcod_jax.models.config import from_hf
    from dcod_jax.parallel.mesh import make_mesh

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
    model_config, mesh = from_hf(raw), make_mesh(devices=jax.devices()[:1])
    head = VocabHead(head_chunk, model_config.vocab_size, mesh)
    return model_config, DistillLoss(LossConfig(weights=weight_config, **values), head)


def our_batch(
    vocab: int, batch: int = BATCH, length: int = LENGTH, *, top_k: int = 0, prompt: int = 0
) -> Any:
    """Random tokens, supervised behind `prompt`, teacher log-probs around -1; top-k if asked for.

    The top-k hold 0.9 of the mass in equal shares. With a prompt the head is compact, as the
    pipeline hands it over.
    """
    import jax.numpy as jnp
    import numpy as np

    from dcod_jax.types import Batch

    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocab, (batch, length + 1), dtype=np.int32)
    mask = np.arange(length) >= prompt
    cache: dict[str, Any] = {}
    if prompt:
        positions = np.arange(prompt, length, dtype=np.int32)
        cache["head_positions"] = jnp.asarray(np.tile(positions, (batch, 1)))
    if top_k:
        first = generator.integers(0, vocab, (batch, length, 1), dtype=np.int32)
        cache |= {
            "topk_ids": jnp.asarray((first + np.arange(top_k, dtype=np.int32)) % vocab),
            "topk_logprobs": jnp.full((batch, length, top_k), np.log(0.9 / top_k), jnp.bfloat16),
            "tail_logprobs": jnp.full((batch, length), np.log(0.1), jnp.float32),
        }
    return Batch(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        loss_mask=jnp.asarray(np.tile(mask, (batch, 1))),
        segment_ids=jnp.ones((batch, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length), (batch, length)),
        teacher_logprobs=jnp.asarray(-generator.exponential(1.0, (batch, length)), jnp.float32),
        **cache,
    )


def our_step(args: argparse.Namespace, model_config: Any, loss: Any) -> tuple[Any, Any]:
    """(train step, state) on one device, as the train verb makes them.

    With a live teacher the step takes its parameters too; it has the student's shape.
    """
    import jax
    import jax.numpy as jnp

    from dcod_jax.models.transformer import init_params
    from dcod_jax.train.forward import Forward, TeacherModel
    from dcod_jax.train.optim import OptimConfig, make_optimizer
    from dcod_jax.train.step import init_state, make_train_step

    optim = OptimConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, final_fraction=1.0,
        weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=args.clip_norm,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(optim, 1000)
    teacher = TeacherModel(model_config, jnp.float32) if loss.config.teacher == "live" else None
    forward = Forward(model_config, loss, jnp.float32, remat=args.remat, teacher=teacher)
    step = make_train_step(forward, optimizer, schedule, batch_size=BATCH)
    params = jax.jit(init_params, static_argnums=0)(model_config, jax.random.key(0))
    return step, init_state(params, optimizer, mesh=loss.head.mesh, model_config=model_config)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train, and the peer's variant that does the nearest work."""

    peer: str
    weights: str = "sigmoid"
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    top_k: int = 0
    prompt: int = 0
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)


CACHED = {"divergence": "forward_kl"}
LIVE = {"divergence": "forward_kl", "teacher": "live"}
EXPERTS = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": SHAPE["intermediate_size"] // 2,
}
VARIANTS = {
    "ours": Variant("tunix"),
    "ours-sft": Variant("tunix", weights="uniform"),
    "ours-experts": Variant("tunix", weights="uniform", shape=EXPERTS),
    "ours-half": Variant("tunix", prompt=LENGTH // 2),
    "ours-topk": Variant("tunix-live", loss=CACHED, top_k=64),
    "ours-topk-plain": Variant("tunix-live", weights="uniform", loss=CACHED, top_k=64),
    "ours-live": Variant("tunix-live", loss=LIVE),
    "ours-live-plain": Variant("tunix-live", weights="uniform", loss=LIVE),
}


def worker_ours(args: argparse.Namespace) -> dict[str, float]:
    """Our train step as the train verb runs it: metrics of a step fetched after the next starts."""
    import jax

    from dcod_jax.models.transformer import init_params
    from dcod_jax.train.step import compiled_apart

    variant = VARIANTS[args.worker]
    model_config, loss = our_config(
        variant.weights, head_chunk=args.head_chunk, loss=variant.loss, **variant.shape
    )
    step, state = our_step(args, model_config, loss)
    step = compiled_apart(step)
    batch = our_batch(model_config.vocab_size, top_k=variant.top_k, prompt=variant.prompt)
    teacher = ()
    if loss.config.teacher == "live":
        teacher = (jax.jit(init_params, static_argnums=0)(model_config, jax.random.key(1)),)

    def run_steps(count: int) -> None:
        nonlocal state
        pending = None
        for _ in range(count):
            state, values = step(state, batch, *teacher)
            if pending is not None:
                jax.device_get(pending)
            pending = values
        losses.append(float(jax.device_get(pending)["loss"]))

    losses: list[float] = []
    return measure(run_steps, warmup=args.warmup, steps=args.steps) | {"loss": losses[-1]}


# ---------------------------------------------------------------- the interleaved comparison


def run_worker(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process, without what this process's environment would add."""
    ours = name in VARIANTS
    script = "bench_step.py" if ours else "bench_tunix.py"
    python = sys.executable if ours else args.peer_python
    command = [python, str(ROOT / "tools" / script), "--worker", name]
    for option in ("warmup", "steps", "head_chunk", "remat", "clip_norm"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    hidden = ("XLA_FLAGS", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["JAX_PLATFORMS"] = "cpu"
    if ours:
        environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def bench_step(args: argparse.Namespace) -> None:
    """Interleaved rounds; medians, and the ratios of each variant to its peer."""
    names = args.variants.split(",")
    unknown = set(names) - VARIANTS.keys()
    if unknown:
        raise SystemExit(f"--variants {', '.join(unknown)}: expected some of {', '.join(VARIANTS)}")
    if args.peer_python:
        names += dict.fromkeys(VARIANTS[name].peer for name in names)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            results[name].append(run_worker(name, args))
            print(f"round {number + 1} {name}: {results[name][-1]}", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("cpu_s", "peak_mb")}
        for name, runs in results.items()
    }
    print(f"\n{'variant':18}{'CPU-s/step':>12}{'peak MB':>10}{'time':>8}{'memory':>8}  of")
    for name, row in medians.items():
        base = VARIANTS[name].peer if name in VARIANTS and args.peer_python else name
        if not args.peer_python:
            base = names[0]
        time_ratio, memory_ratio = (row[key] / medians[base][key] for key in ("cpu_s", "peak_mb"))
        print(
            f"{name:18}{row['cpu_s']:12.2f}{row['peak_mb']:10.0f}"
            f"{time_ratio:8.3f}{memory_ratio:8.3f}  {base}"
        )


# ---------------------------------------------------------------- the other questions


MEMORY_LOSSES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("nll", 0, {}),
    ("forward_kl, cached K = 64", 64, CACHED),
    ("forward_kl, live", 0, LIVE),
)


def compiled_temporaries(args: argparse.Namespace, vocab: int, length: int, loss: Any) -> float:
    """MB of temporaries in the compiled two-layer train step of one of MEMORY_LOSSES."""
    import jax

    _, top_k, values = loss
    model_config, loss = our_config(
        "sigmoid", head_chunk=args.head_chunk, loss=values, vocab_size=vocab, num_hidden_layers=2
    )
    step, state = our_step(args, model_config, loss)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    teacher = [shapes.params] if loss.config.teacher == "live" else []
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
    """Seconds for which a save of 135M parameters and moments blocks the loop, and of checksums."""
    import jax

    from dcod_jax.train import checksums
    from dcod_jax.train.checkpointer import ITEMS, Checkpointer, Snapshot

    model_config, loss = our_config("sigmoid", head_chunk=512, num_hidden_layers=30)
    _, state = our_step(args, model_config, loss)
    jax.block_until_ready(state)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    with tempfile.TemporaryDirectory(dir=args.directory) as run_dir:
        checkpointer = Checkpointer(run_dir, keep=1)
        for number in range(1, args.rounds + 1):
            start = time.perf_counter()
            checkpointer.save(Snapshot(state=state, step=number, config={}))
            blocked = time.perf_counter() - start
            checkpointer.wait()
            total = time.perf_counter() - start
            home, start = checkpointer.directory, time.perf_counter()
            checksums.write(home / str(number), number)
            made, start = time.perf_counter() - start, time.perf_counter()
            checksums.verify(home, number, ITEMS)
            compared = time.perf_counter() - start
            print(
                f"save {number}: {size:.2f} GB, blocked {blocked:.3f} s, on disk {total:.1f} s; "
                f"checksums made again in {made:.1f} s, compared in {compared:.1f} s"
            )
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
    parser.add_argument("--variants", default="ours", help=f"comma-separated: {','.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--head-chunk", type=int, default=256, help="loss.head_chunk")
    parser.add_argument("--remat", default="dots", help="what the layers save: none|dots|full")
    parser.add_argument("--clip-norm", type=float, default=0.0, help="0, as the peer's AdamW")
    parser.add_argument("--directory", default=None, help="where to save (checkpoint)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker_ours(args)))
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    WHAT[args.what](args)


if __name__ == "__main__":
    main()
