"""The teacher's log-probabilities of trace tokens: batched by length, sharded over the mesh."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.losses.distributions import event_logits
from dcod_jax.losses.head import VocabHead, target_logprobs
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.transformer import head_weight, hidden_states
from dcod_jax.parallel.mesh import batch_shards, constrain, put, sharding
from dcod_jax.sample.sampler import bucket_length
from dcod_jax.types import Params, Trace

TAIL_FLOOR = -100.0  # log of a tail that float32 holds to be empty: small, and never -inf


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """How traces are scored."""

    top_k: int  # 0: the trace token only
    batch_tokens: int  # tokens of a batch, padding included
    head_chunk: int  # tokens whose logits exist at one time
    compute_dtype: str
    valid_vocab: int  # the tokenizer's real size; rows above it are padding
    kernel: str = "auto"  # of attention


def score_settings(
    config: Any, *, compute_dtype: str, valid_vocab: int, top_k: int = 0, kernel: str = "auto"
) -> ScoreSettings:
    """With the batches of score.batch_tokens and the chunks of loss.head_chunk."""
    sizes = config.score.batch_tokens, config.loss.head_chunk
    return ScoreSettings(top_k, *sizes, compute_dtype, valid_vocab, kernel)


@dataclasses.dataclass(frozen=True)
class TraceBatch:
    """Traces scored together as one [rows, length] batch."""

    members: tuple[int, ...]
    rows: int
    length: int


def batches_by_length(
    lengths: Sequence[int], *, batch_tokens: int, shards: int = 1
) -> list[TraceBatch]:
    """Group by length, longest first, into few shapes of about batch_tokens tokens.

    A function of the arguments only: a shard scored again has the same batches.
    [40, 7, 300] at 640 tokens -> [300] as [2, 320]; the other two join as far as rows are left.
    Rows are a multiple of `shards`; one trace longer than batch_tokens still gets its batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        length = bucket_length(lengths[order[start]])
        full = max(batch_tokens // (length * shards), 1)
        needed = -(-(len(order) - start) // shards)
        rows = min(full, 1 << (needed - 1).bit_length()) * shards
        members = tuple(order[start : start + rows])
        batches.append(TraceBatch(members, rows, length))
        start += len(members)
    return batches


def score_traces(
    config: ModelConfig,
    params: Params,
    traces: Sequence[Trace],
    *,
    settings: ScoreSettings,
    mesh: Mesh | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Trace]:
    """The traces with log p(token | prefix) of each completion token, and the top-k if asked for.

    Batches depend on the given traces and the mesh only. `on_tokens(n)` is called with the tokens
    of each batch read. Raises DcodError naming the trace whose result is NaN, infinite or positive.
    """
    if settings.top_k > settings.valid_vocab:
        raise DcodError(
            f"score.top_k={settings.top_k} exceeds the vocabulary of {settings.valid_vocab}"
        )
    for trace in traces:
        _check_trace(config, trace, valid_vocab=settings.valid_vocab)
    scored: list[Trace | None] = [None] * len(traces)
    batches = batches_by_length(
        [len(t.token_ids) - 1 for t in traces],
        batch_tokens=settings.batch_tokens,
        shards=batch_shards(mesh),
    )
    started = ((b, _launch(config, params, traces, b, settings, mesh)) for b in batches)
    # A result is fetched after the next batch was started on the device.
    for (batch, out), _ in itertools.pairwise(
        itertools.chain(started, [(TraceBatch((), 0, 0), ())])
    ):
        arrays = jax.device_get(out)
        for row, i in enumerate(batch.members):
            scored[i] = _with_scores(traces[i], [a[row] for a in arrays])
        on_tokens(sum(len(traces[i].token_ids) for i in batch.members))
    return [t for t in scored if t is not None]


def _check_trace(config: ModelConfig, trace: Trace, *, valid_vocab: int) -> None:
    count = len(trace.token_ids)
    if count < 2 or trace.completion_mask[0] or not trace.completion_mask.any():
        raise DcodError(
            f"trace {trace.id!r}: expected a prompt of at least one token before a completion, got "
            f"{count} tokens, {int(trace.completion_mask.sum())} of them completion"
        )
    if count - 1 > config.max_position_embeddings:
        raise DcodError(
            f"trace {trace.id!r} has {count} tokens, the teacher's max_position_embeddings is "
            f"{config.max_position_embeddings}; lower data.max_length and prepare again"
        )
    if trace.token_ids.min() < 0 or trace.token_ids.max() >= valid_vocab:
        raise DcodError(
            f"trace {trace.id!r}: token ids reach {int(trace.token_ids.max())}, the teacher's "
            f"tokenizer has {valid_vocab}; the dataset was written with another tokenizer"
        )


def _launch(
    config: ModelConfig,
    params: Params,
    traces: Sequence[Trace],
    batch: TraceBatch,
    settings: ScoreSettings,
    mesh: Mesh | None,
) -> tuple[jax.Array, ...]:
    tokens = np.zeros((batch.rows, batch.length), np.int32)
    targets = np.zeros_like(tokens)
    segment_ids = np.zeros_like(tokens)
    for row, i in enumerate(batch.members):
        ids = traces[i].token_ids
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
        segment_ids[row, : len(ids) - 1] = 1
    placed = [
        jnp.asarray(x) if mesh is None else put(x, sharding(mesh, ("batch", None)))
        for x in (tokens, targets, segment_ids)
    ]
    return score_step(config, params, *placed, settings=settings, mesh=mesh)


def _with_scores(trace: Trace, rows: list[np.ndarray]) -> Trace:
    """Keep the completion's entries of [T, ...] results; position t speaks about token t + 1."""
    where = np.flatnonzero(trace.completion_mask) - 1
    kept = [row[where] for row in rows]
    for values in (kept[0], *kept[2:]):
        bad = ~np.isfinite(values) | (values > 0)
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), values.shape)
            raise DcodError(
                f"trace {trace.id!r}: the teacher gave log-probability {values[at]} to completion "
                f"token {at[0]}; expected a finite number <= 0; do its weights hold NaN or inf, or "
                "does it need teacher.dtype=float32?"
            )
    if len(kept) == 1:
        return dataclasses.replace(trace, logprobs=kept[0])
    logprobs, ids, values, tail = kept
    return dataclasses.replace(
        trace,
        logprobs=logprobs,
        topk_ids=ids,
        topk_logprobs=values.astype(ml_dtypes.bfloat16),
        tail_logprobs=tail,
    )


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"))
def score_step(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    settings: ScoreSettings,
    mesh: Mesh | None,
) -> tuple[Any, ...]:
    """(log-probs [B, T],) or with top-k (log-probs, ids [B, T, K], log-probs [B, T, K], tail)."""
    hidden = hidden_states(
        config,
        params,
        tokens,
        segment_ids=segment_ids,
        compute_dtype=jnp.dtype(settings.compute_dtype),
        mesh=mesh,
        kernel=settings.kernel,
    )
    head = VocabHead(settings.head_chunk, settings.valid_vocab, mesh, softcap=config.final_softcap)

    def statistics(logits: Array, targets: Array, aux: Any, shared: Any) -> tuple[Array, ...]:
        logits = head.masked(logits)
        found = (target_logprobs(logits, targets),)
        if not settings.top_k:
            return found
        return found + top_k_logprobs(logits, head, top_k=settings.top_k)

    found = head.observe(hidden, head_weight(config, params), targets, statistics)
    return jax.tree.map(lambda x: constrain(_round_down(x), mesh, *(None,) * x.ndim), found)


def _round_down(x: jax.Array) -> jax.Array:
    """A log-probability that rounding left just above 0 becomes 0; a real mistake stays."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    return jnp.where(x > 1e-3, x, jnp.minimum(x, 0.0))


def top_k_logprobs(
    logits: Float[Array, "*N V"], head: VocabHead, *, top_k: int
) -> tuple[Int[Array, "*N K"], Float[Array, "*N K"], Float[Array, "*N"]]:
    """Most probable tokens, their log-probs, and log(1 - Σ of their probabilities).

    logits: masked, split over the head's mesh. The tail is summed over the other tokens' logits;
    1 - Σ would lose it where Σ is near 1. It is at least TAIL_FLOOR, also where K = V leaves none.
    """
    ids = jax.lax.top_k(logits, top_k)[1]
    events, _ = event_logits(logits, ids, ids[..., 0], head)
    logprobs = jax.nn.log_softmax(events, axis=-1)
    return ids, logprobs[..., :-1], jnp.maximum(logprobs[..., -1], TAIL_FLOOR)
