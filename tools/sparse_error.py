"""What a cached teacher loses: top-k and tail against the whole distribution, on real traces.

    python tools/get_smollm2.py --layers 20
    python tools/sparse_error.py --traces TRACES.jsonl

For each divergence and K, over the completion tokens of the traces:
value: mean |sparse − dense| / mean dense; gradient: ‖g_sparse − g_dense‖ / ‖g_dense‖ over all
tokens, g in the student's logits. With the K log-probs in float32 and as stored, in bfloat16.
Traces come in an order shuffled with --seed, whole, until --tokens are reached; the last is cut.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from dcod_jax.data import chat
from dcod_jax.data.codec import bytes_per_token
from dcod_jax.data.raw import Fields
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError
from dcod_jax.losses import distributions
from dcod_jax.losses.adaptive import TaidConfig
from dcod_jax.losses.distill import LossConfig
from dcod_jax.losses.distributions import TopK
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.losses.head import VocabHead
from dcod_jax.models.hf import load_model
from dcod_jax.models.transformer import head_weight, hidden_states
from dcod_jax.sample.sampler import bucket_length
from dcod_jax.score.scoring import top_k_logprobs

TOP_K = (8, 16, 32, 64, 128, 256)
DTYPES = ("float32", "bfloat16")
NAMES = [name for name, entry in DIVERGENCES.items() if entry.value is not None]
PIECE = 64  # tokens whose logits and gradients exist at one time


HEAD = VocabHead(PIECE)


def parameters(name: str) -> dict[str, float]:
    """The default of the divergence's parameter; TAID's at the start of a run."""
    field = DIVERGENCES[name].parameter
    if field == "interpolation":
        return {field: TaidConfig().start}
    return {field: LossConfig.__dataclass_fields__[field].default} if field else {}


def values_of(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, ...]:
    """Every divergence of NAMES per token."""
    return tuple(DIVERGENCES[name].value(log_p, log_q, **parameters(name)) for name in NAMES)  # pyright: ignore


def with_gradients(pair: Any, student: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values [names, n], gradients in the student's logits [names, n, V]) of pair(student)."""
    values, pull = jax.vjp(lambda z: values_of(*pair(z)), student)
    ones, zeros = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
    gradients = [
        pull(tuple(ones if i == at else zeros for i in range(len(NAMES))))[0]
        for at in range(len(NAMES))
    ]
    return jnp.stack(values), jnp.stack(gradients)


@jax.jit
def dense(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and gradients with the teacher's whole distribution."""
    return with_gradients(functools.partial(distributions.dense, teacher), student)


@functools.partial(jax.jit, static_argnames=("top_k", "dtype"))
def sparse_minus_dense(
    teacher: jax.Array, student: jax.Array, wanted: Any, *, top_k: int, dtype: str
) -> tuple[jax.Array, ...]:
    """(Σ |value error| [names], Σ gradient error² [names], Σ p and Σ q of the K ids)."""
    ids, logprobs, tail = top_k_logprobs(teacher, HEAD, top_k=top_k)
    cache = TopK(ids, logprobs.astype(dtype), tail)

    def pair(student: jax.Array) -> tuple[jax.Array, jax.Array]:
        return distributions.buckets(cache, student, ids[..., 0], HEAD)[:2]

    values, gradients = with_gradients(pair, student)
    value_error = jnp.abs(values - wanted[0]).sum(axis=1)
    student_tail = pair(student)[1][..., -1]
    mass = [(1 - jnp.exp(x)).sum() for x in (tail, student_tail)]
    return value_error, square_sum(gradients - wanted[1]), *mass


def square_sum(gradients: jax.Array) -> jax.Array:
    return jnp.square(gradients).sum(axis=(1, 2))


# ---------------------------------------------------------------- traces and logits


def encoded(options: argparse.Namespace, tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, completion mask) of shuffled traces with options.tokens completion tokens."""
    fields = Fields(prompt=options.prompt_field, completion=options.completion_field)
    traces = list(read_traces(find_sources(options.traces), fields))
    taken, count = [], 0
    for i in np.random.default_rng(options.seed).permutation(len(traces)):
        ids, mask = chat.encode(
            tokenizer, traces[i].messages, first_completion=traces[i].first_completion
        )
        if len(ids) > options.max_length:
            continue
        left = options.tokens - count
        mask &= np.cumsum(mask) <= left
        taken.append((ids, mask))
        count += int(mask.sum())
        if count == options.tokens:
            return taken
    print(f"the traces hold {count} completion tokens, fewer than --tokens {options.tokens}")
    return taken


def hidden_of(path: str, traces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any]:
    """(hidden states [n, D] that predict the completion tokens, head weight [V, D]), float32."""
    config, params = load_model(path, dtype=jnp.float32)
    run = jax.jit(functools.partial(hidden_states, config, compute_dtype=jnp.float32))
    kept = []
    for ids, mask in traces:
        padded = np.zeros((1, bucket_length(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        segments = jnp.asarray(np.arange(padded.shape[1]) < len(ids), jnp.int32)[None]
        hidden = run(params, jnp.asarray(padded), segment_ids=segments)
        kept.append(np.asarray(hidden[0])[np.flatnonzero(mask) - 1])
    return np.concatenate(kept), head_weight(config, params)


def pieces(models: list[tuple[Any, Any]], vocab: int) -> Iterator[list[jax.Array]]:
    """Teacher's and student's logits [PIECE, V]; the last piece is shorter."""
    for start in range(0, len(models[0][0]), PIECE):
        yield [
            jnp.asarray(hidden[start : start + PIECE]) @ head[:vocab].T for hidden, head in models
        ]


# ---------------------------------------------------------------- report


def measure(models: list[tuple[Any, Any]], vocab: int) -> tuple[Any, dict[Any, Any]]:
    """Mean dense values by NAMES, and {(K, dtype): what sparse_minus_dense gives, relative}."""
    cases = [(top_k, dtype) for top_k in TOP_K for dtype in DTYPES]
    scale: list[Any] = [0.0, 0.0]
    sums: dict[Any, list[Any]] = {case: [0.0] * 4 for case in cases}
    count = len(models[0][0])
    for teacher, student in pieces(models, vocab):
        wanted = dense(teacher, student)
        scale[0] += np.asarray(wanted[0].sum(axis=1), np.float64)
        scale[1] += np.asarray(square_sum(wanted[1]), np.float64)
        for top_k, dtype in cases:
            found = sparse_minus_dense(teacher, student, wanted, top_k=top_k, dtype=dtype)
            for i, part in enumerate(found):
                sums[top_k, dtype][i] += np.asarray(part, np.float64)
    relative = {
        case: (value / scale[0], np.sqrt(gradient / scale[1]), of_p / count, of_q / count)
        for case, (value, gradient, of_p, of_q) in sums.items()
    }
    return scale[0] / count, relative


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def report(dense_values: Any, relative: dict[Any, Any]) -> str:
    """Three Markdown tables: what a cache of K holds, value errors, gradient errors."""
    ks = [f"K = {top_k}" for top_k in TOP_K]
    lines = [row("", *ks), "|" + "---|" * (len(ks) + 1)]
    lines.append(row("bytes a token", *(bytes_per_token(top_k) for top_k in TOP_K)))
    for at, title in ((2, "captured mass"), (3, "the student's mass on the same ids")):
        lines.append(row(title, *(f"{relative[top_k, DTYPES[0]][at]:.4f}" for top_k in TOP_K)))
    for at, title in enumerate(("value", "gradient in the student's logits")):
        lines += ["", f"Relative error of the {title}, percent, float32 / bfloat16 log-probs:", ""]
        lines += [row("", "dense, nats", *ks), "|" + "---|" * (len(ks) + 2)]
        for i, name in enumerate(NAMES):
            cells = [
                " / ".join(f"{100 * relative[top_k, dtype][at][i]:.3g}" for dtype in DTYPES)
                for top_k in TOP_K
            ]
            lines.append(row(f"`{name}`", f"{dense_values[i]:.3f}", *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--student", default="models/SmolLM2-135M-Instruct-20L")
    parser.add_argument("--traces", required=True, help="JSONL, in any form that prepare reads")
    parser.add_argument("--prompt-field", default="", help="as prepare.prompt_field")
    parser.add_argument("--completion-field", default="", help="as prepare.completion_field")
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens to compare")
    parser.add_argument("--max-length", type=int, default=1024, help="longer traces are left out")
    parser.add_argument("--seed", type=int, default=0, help="of the traces' order")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    try:
        tokenizer = load_tokenizer(options.teacher)
        traces = encoded(options, tokenizer)
        if not traces:
            raise DcodError(f"{options.traces} holds no trace of up to {options.max_length} tokens")
        models = [hidden_of(path, traces) for path in (options.teacher, options.student)]
    except DcodError as error:
        sys.exit(f"error: {error}")
    tokens = len(models[0][0])
    print(f"{tokens} completion tokens of {len(traces)} traces", flush=True)
    text = report(*measure(models, len(tokenizer)))
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
