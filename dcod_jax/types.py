"""The dimension legend and the records that cross module borders.

Legend: B batch, T time, V vocab, K top-k, D model, N query heads, G kv heads, H head dim,
F mlp, L layers, C completion tokens (of one trace; of a packed row, as a capacity).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]  # nested dict of arrays; the paths are the model's attribute paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, already shifted: position t of every field speaks about predicting targets[t].

    tokens=[5 6 7 8], targets=[6 7 8 0], loss_mask=[F T T F] for prompt [5 6], completion [7 8]:
    the first supervised position is the last prompt token.

    head_positions compacts the vocabulary head to the supervised tokens: the positions of loss_mask
    in order, then T. Without it the head reads every position (C = T).
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"]  # 1, 2, ... within a row; 0 is padding
    positions: Int[Array, "B T"]  # restart at 0 in each segment
    teacher_logprobs: Float[Array, "B T"]  # log p(targets[t]), nats; 0 where loss_mask is False
    # Runs of equal numbers are spans: where the teacher has another tokenizer, the targets that
    # stand for the same text as some of its tokens. A span's log p is spread evenly over them.
    span_ids: Int[Array, "B T"] | None = None
    head_positions: Int[Array, "B C"] | None = None
    topk_ids: Int[Array, "B C K"] | None = None  # the teacher's top-k at the head's positions
    topk_logprobs: Float[Array, "B C K"] | None = None  # bfloat16
    tail_logprobs: Float[Array, "B C"] | None = None  # log of the mass of all other tokens
    trace_weights: Float[Array, "B T"] | None = None  # of each trace in the loss; None: 1
    start_logprobs: Float[Array, "B T"] | None = None  # as teacher_logprobs, of the student's start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossState:
    """float32 scalars that a loss carries from step to step (losses/adaptive.py)."""

    temperature: Float[Array, ""]  # smoothed solution, in force at the next step
    offset: Float[Array, ""]
    interpolation: Float[Array, ""]  # TAID's s; below taid_start before the first step
    momentum: Float[Array, ""]  # TAID's
    previous: Float[Array, ""]  # TAID's loss of the step before; +inf before the first
    seen: Float[Array, ""]  # of the window over traces or tokens: how many, their mean log-ratio
    mean: Float[Array, ""]
    squares: Float[Array, ""]  # and the sum of its squared deviations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a restart needs besides the data iterator; a plain pytree."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    loss_state: LossState


@dataclasses.dataclass(frozen=True)
class Trace:
    """One tokenised trace at rest, unshifted: entry i of every field speaks about token_ids[i].

    logprobs, topk_* and tail_logprobs hold one row per completion token, in order (C rows).
    """

    id: str
    token_ids: np.ndarray  # int32 [n]
    completion_mask: np.ndarray  # bool [n]; True on tokens the teacher wrote
    logprobs: np.ndarray | None = None  # float32 [C], log p(token | prefix), nats
    topk_ids: np.ndarray | None = None  # int32 [C, K], most probable first
    topk_logprobs: np.ndarray | None = None  # bfloat16 [C, K]
    tail_logprobs: np.ndarray | None = None  # float32 [C], log(1 - sum of the K probabilities)
    span_starts: np.ndarray | None = None  # bool [C], see Batch.span_ids; None: each token does
    start_logprobs: np.ndarray | None = None  # float32 [C], log q of the student's start
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)  # answer, source, ...
