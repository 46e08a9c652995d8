"""Decode throughput of the sampler against Tunix's and transformers' generate, interleaved.

    python tools/bench_generate.py --model models/SmolLM2-135M-Instruct \\
        --peer-python /path/to/peer/bin/python

fixed: as many prompts as rows (--batch-size), each continued by exactly --new-tokens, greedily.
tail: --prompts prompts that end where the model ends them (at most --new-tokens): the peers decode
batch after batch, each until its last row has finished; ours gives a finished row the next prompt.

The model is an HF directory of the Llama family that all three read; prompts are those of
--prompt-file in the model's chat template. Every measurement is a process of its own that loads the
model, generates once to compile, and then generates --repeat times what is measured: prefill,
decoding and everything on the host. The variants take turns for --rounds rounds. The table has
medians of CPU-seconds (getrusage, all threads) and wall seconds, tokens per second of either, and
their ratio to each peer. --cores binds each process to that many cores; on a machine that is not
idle take 1, where the CPU-seconds of a thread that waits for another cannot count. `same` is the
share of completions equal to transformers' (token for token).

Tunix lives in an environment of its own:
    python3.11 -m venv peer && peer/bin/pip install google-tunix==0.1.7 "jax==0.10.2"
Without --peer-python it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("model", "what", "batch_size", "new_tokens", "prompts", "repeat", "cores", "dtype")

# ---------------------------------------------------------------- what a worker does


def measure(generate: Callable[[], list[list[int]]], repeat: int) -> dict[str, Any]:
    """CPU and wall seconds and new tokens of one generate(), after one that compiles."""
    start = time.perf_counter()
    generate()
    first = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu, wall = usage.ru_utime + usage.ru_stime, time.perf_counter()
    for _ in range(repeat):
        completions = generate()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_s": (usage.ru_utime + usage.ru_stime - cpu) / repeat,
        "wall_s": (time.perf_counter() - wall) / repeat,
        "first_s": first,
        "peak_mb": usage.ru_maxrss / 1024,
        "tokens": sum(map(len, completions)),
        "completions": completions,
    }


def batches(prompts: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def cut(ids: Sequence[int], stop: int) -> list[int]:
    """Up to the first stop id, with it; -1 stops nowhere."""
    ids = list(ids)
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def worker_ours(args: argparse.Namespace, prompts: list[list[int]], stop: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    import jax.numpy as jnp

    from dcod_jax.models.hf import load_model
    from dcod_jax.sample.sampler import decoding_params, sample

    config, params = load_model(args.model, dtype=jnp.float32)
    model = decoding_params(config, params, valid_vocab=config.vocab_size, compute_dtype=args.dtype)

    def generate() -> list[list[int]]:
        samples = sample(
            model,
            prompts,
            max_new_tokens=args.new_tokens,
            temperature=0.0,
            seed=0,
            batch_size=args.batch_size,
            eos_ids=(stop,),
        )
        return [s.token_ids for s in samples]

    return measure(generate, args.repeat)


def worker_transformers(
    args: argparse.Namespace, prompts: list[list[int]], stop: int
) -> dict[str, Any]:
    """AutoModelForCausalLM.generate as it comes (sdpa attention, dynamic cache), left-padded."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.cores)
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None if stop < 0 else stop
    pad = max(stop, 0)
    model.generation_config.pad_token_id = pad

    def generate() -> list[list[int]]:
        completions = []
        for batch in batches(prompts, args.batch_size):
            width = max(map(len, batch))
            tokens = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            with torch.no_grad():
                out = model.generate(
                    tokens, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False
                )
            completions += [cut(row, stop) for row in out[:, width:].tolist()]
        return completions

    return measure(generate, args.repeat)


class _Ids:
    """A tokenizer for Tunix's sampler whose texts are JSON lists of ids."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return json.loads(text)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return json.dumps([int(i) for i in ids])

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0  # no prompt holds it: it is the mark of the end of a document


def worker_tunix(args: argparse.Namespace, prompts: list[list[int]], stop: int) -> dict[str, Any]:
    """Tunix's Sampler over its llama3 model with the same weights; cache of exactly the need."""
    import jax.numpy as jnp
    from tunix.generate import sampler as samplers  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import params as loader  # pyright: ignore[reportMissingImports]

    raw = json.loads((Path(args.model) / "config.json").read_text())
    config = llama3.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        weight_tying=raw["tie_word_embeddings"],
    )
    model = loader.create_model_from_safe_tensors(args.model, config, dtype=jnp.dtype(args.dtype))
    width = 1 << (max(map(len, prompts)) - 1).bit_length()  # as its sampler pads
    cache = samplers.CacheConfig(
        cache_size=width + args.new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = samplers.Sampler(model, _Ids(), cache)

    def generate() -> list[list[int]]:
        completions = []
        for batch in batches(prompts, args.batch_size):
            out = sampler(
                [json.dumps(p) for p in batch],
                max_generation_steps=args.new_tokens,
                max_prompt_length=width,
                eos_tokens=[stop],
            )
            completions += [cut([int(i) for i in row], stop) for row in out.tokens]
        return completions

    return measure(generate, args.repeat)


WORKERS = {"ours": worker_ours, "tunix": worker_tunix, "transformers": worker_transformers}

# ---------------------------------------------------------------- the interleaved comparison


def encode_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts, all three get the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.prompt_file, encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file if line.strip()]
    count = args.batch_size if args.what == "fixed" else args.prompts
    if len(texts) < count:
        raise SystemExit(f"{args.prompt_file} has {len(texts)} prompts; {count} are needed")
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for text in texts[:count]
    ]


def run_worker(name: str, args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a fresh process, without what this process's environment would add."""
    python = args.peer_python if name == "tunix" else sys.executable
    command = [python, str(Path(__file__).resolve()), "--worker", name]
    for option in OPTIONS:
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    drop = ("XLA_FLAGS", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    environment |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(args.cores)}
    run = subprocess.run(
        command,
        env=environment,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def compare(args: argparse.Namespace) -> None:
    """Interleaved rounds; medians, throughputs, and the ratios to the peers."""
    prompts = encode_prompts(args)
    raw = json.loads((Path(args.model) / "config.json").read_text())
    job = {"prompts": prompts, "stop": -1 if args.what == "fixed" else raw["eos_token_id"]}
    names = [name for name in args.variants.split(",") if name != "tunix" or args.peer_python]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            run = run_worker(name, args, job)
            results[name].append(run)
            shown = {k: round(v, 2) for k, v in run.items() if k != "completions"}
            print(f"round {number + 1} {name}: {shown}", flush=True)
    lengths = sorted(map(len, prompts))
    print(
        f"\n{args.what}: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, at most "
        f"{args.new_tokens} new, {args.batch_size} rows, {args.dtype}, {args.cores} core(s)"
    )
    print(
        f"{'variant':14}{'tokens':>8}{'CPU-s':>8}{'tok/CPU-s':>11}{'wall s':>8}{'tok/s':>8}"
        f"{'first s':>9}{'peak MB':>9}{'same':>7}"
    )
    rates = {}
    for name, runs in results.items():
        row = {
            k: statistics.median(run[k] for run in runs)
            for k in ("cpu_s", "wall_s", "tokens", "first_s", "peak_mb")
        }
        rates[name] = (row["tokens"] / row["cpu_s"], row["tokens"] / row["wall_s"])
        same = "-"
        if "transformers" in results:
            pairs = zip(
                runs[0]["completions"], results["transformers"][0]["completions"], strict=True
            )
            same = f"{sum(a == b for a, b in pairs)}/{len(prompts)}"
        print(
            f"{name:14}{row['tokens']:8.0f}{row['cpu_s']:8.2f}{rates[name][0]:11.1f}"
            f"{row['wall_s']:8.2f}{rates[name][1]:8.1f}{row['first_s']:9.1f}"
            f"{row['peak_mb']:9.0f}{same:>7}"
        )
    for name in rates:
        if name != "ours" and "ours" in rates:
            cpu, wall = (a / b for a, b in zip(rates["ours"], rates[name], strict=True))
            print(f"ours is {cpu:.2f} x {name} in tokens per CPU-second, {wall:.2f} x in wall time")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="HF directory")
    parser.add_argument("--what", choices=("fixed", "tail"), default="fixed")
    parser.add_argument("--peer-python", default="", help="python of Tunix's environment")
    parser.add_argument("--variants", default="ours,transformers,tunix", help="comma-separated")
    parser.add_argument(
        "--prompt-file",
        default=str(ROOT / "dcod_jax/assets/smollm2/prompts.jsonl"),
        help="JSONL with a `prompt` in each line",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="rows decoded together")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts (tail)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="measured calls of a process")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores of a process")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.worker:
        compare(args)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    job = json.load(sys.stdin)
    print(json.dumps(WORKERS[args.worker](args, job["prompts"], job["stop"])))


if __name__ == "__main__":
    main()
