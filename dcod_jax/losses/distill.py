"""The distillation loss: divergence x teacher x weights on the chunked head, as sums of a batch.

    per token: w · ((1 − α) nll + α d)

Where the teacher's distribution comes from is decided in one function, `_teacher_pair`: cached
top-k (aux), or a live teacher's hidden states and head, whose logits exist for one piece at a time
like the student's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive, distributions, reduce, weights
from dcod_jax.losses.adaptive import LossState, TaidConfig
from dcod_jax.losses.divergences import DIVERGENCES, target_logprobs
from dcod_jax.losses.events import Layout
from dcod_jax.losses.head import TokenLoss, gather_head, head_loss, piece_logits
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.types import Batch

TEACHERS = ("cached", "live")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """loss.* of the configuration; defaults and meanings are in configs/base.py."""

    divergence: str
    head_chunk: int
    weights: WeightConfig
    teacher: str = "cached"
    alpha: float = 1.0
    temperature: float = 1.0
    temperature_squared: bool = True
    beta: float = 0.5
    skew: float = 0.1
    taid: TaidConfig = dataclasses.field(default_factory=TaidConfig)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """What the loss needs of a teacher that runs in the same step; it gets no gradient."""

    hidden: Float[Array, "B T E"]  # final hidden states; E need not be the student's D
    head_weight: Float[Array, "W E"]  # W need not be the student's V


def needs_distribution(cfg: LossConfig) -> bool:
    """Whether the divergence reads more of the teacher than log p of the trace token."""
    return DIVERGENCES[cfg.divergence].value is not None


def needs_cache(cfg: LossConfig) -> bool:
    """Whether the trace dataset must hold the teacher's log-probs."""
    asked = needs_distribution(cfg) or weights.needs_teacher(cfg.weights)
    return asked and cfg.teacher == "cached"


def config_errors(cfg: LossConfig) -> list[DcodError]:
    """What is wrong with the configuration, one error for each key; empty when it is fine."""
    errors = []
    for key, value, known in (
        ("loss.divergence", cfg.divergence, tuple(DIVERGENCES)),
        ("loss.teacher", cfg.teacher, TEACHERS),
    ):
        if value not in known:
            errors.append(f"{key}={value!r} is not known; choose one of {', '.join(known)}")
    if cfg.head_chunk < 1:
        errors.append(f"loss.head_chunk={cfg.head_chunk} must be >= 1")
    for key, value, inside in (
        ("alpha", cfg.alpha, 0 <= cfg.alpha <= 1),
        ("beta", cfg.beta, 0 <= cfg.beta <= 1),
        ("taid_start", cfg.taid.start, 0 <= cfg.taid.start < 1),
        ("taid_end", cfg.taid.end, cfg.taid.start <= cfg.taid.end <= 1),
        ("taid_alpha", cfg.taid.alpha, 0 <= cfg.taid.alpha <= 1),
        ("taid_beta", cfg.taid.beta, 0 <= cfg.taid.beta < 1),
    ):
        if not inside:
            errors.append(f"loss.{key}={value} is out of its range (0 to 1)")
    if not 0 < cfg.skew < 1:
        errors.append(
            f"loss.skew={cfg.skew} must be between 0 and 1; at the ends skew KL is a plain KL "
            "(loss.divergence=forward_kl or reverse_kl) or nothing"
        )
    if not (math.isfinite(cfg.temperature) and cfg.temperature > 0):
        errors.append(f"loss.temperature={cfg.temperature} must be a finite number > 0")
    elif cfg.temperature != 1 and cfg.divergence == "nll":
        errors.append(
            f"loss.temperature={cfg.temperature} is nothing for loss.divergence=nll; set it to 1"
        )
    elif cfg.temperature != 1 and cfg.teacher == "cached":
        errors.append(
            f"loss.temperature={cfg.temperature} needs the teacher's whole distribution (how a "
            "tempered tail is spread is not in a top-k cache): set loss.teacher=live, or "
            "loss.temperature=1"
        )
    return [DcodError(error) for error in errors] + weights.config_errors(cfg.weights)


def compact(batch: Batch) -> Batch:
    """The batch at the head's positions only, [B,C] for [B,T]; a batch without them as it is."""
    if batch.head_positions is None:
        return batch
    length = batch.tokens.shape[1]
    used = batch.head_positions < length
    at = jnp.minimum(batch.head_positions, length - 1)

    def take(x: Array) -> Array:
        picked = jnp.take_along_axis(x, at, axis=1)
        return jnp.where(used, picked, jnp.zeros((), x.dtype))

    return dataclasses.replace(
        batch,
        tokens=take(batch.tokens),
        targets=take(batch.targets),
        loss_mask=take(batch.loss_mask),
        segment_ids=take(batch.segment_ids),
        positions=take(batch.positions),
        teacher_logprobs=take(batch.teacher_logprobs),
        head_positions=None,
    )


def compact_hidden(batch: Batch, hidden: Float[Array, "B T D"]) -> Float[Array, "B C D"]:
    """Hidden states at the head's positions; padding repeats the last one."""
    if batch.head_positions is None:
        return hidden
    at = jnp.minimum(batch.head_positions, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


# ---------------------------------------------------------------- per token


def _teacher_logits(aux: dict[str, Array], shared: dict[str, Any], options: Layout) -> Array:
    """The live teacher's logits of one piece, as wide as the student's."""
    logits = piece_logits(aux["teacher_hidden"], shared["teacher_head"], options.mesh)
    return jax.lax.stop_gradient(distributions.mask_padding(logits, options.valid_vocab))


def _value(
    cfg: LossConfig, log_p: Array, log_q: Array, shared: dict[str, Any]
) -> Float[Array, "*N"]:
    """The divergence of each token from its aligned distributions."""
    entry = DIVERGENCES[cfg.divergence]
    assert entry.value is not None
    knob = 0.0
    if entry.knob:
        knob = (
            shared["interpolation"] if entry.knob == "interpolation" else getattr(cfg, entry.knob)
        )
    value = entry.value(log_p, log_q, knob)
    return value * cfg.temperature**2 if cfg.temperature_squared else value


def _token_loss(cfg: LossConfig, options: Layout, *, weighed: bool) -> TokenLoss:
    """w · ((1−α) nll + α d) per token. Weights are read from aux where a pass before has weighed
    the tokens; else they are formed from the piece's own log q, which costs nothing more.
    """

    def token_loss(
        logits: Array, targets: Array, aux: dict[str, Array], shared: dict[str, Any]
    ) -> tuple[Array, TokenStats]:
        teacher_logprobs = aux["teacher_logprobs"]
        value = None
        if "topk_ids" in aux:
            cache = (aux["topk_ids"], aux["topk_logprobs"], aux["tail_logprobs"])
            log_p, log_q, logprobs = distributions.buckets_and_target(
                *cache, logits, targets, options
            )
            value = _value(cfg, log_p, log_q, shared)
        else:
            logits = distributions.mask_padding(logits, options.valid_vocab)
            logprobs = target_logprobs(logits, targets)
        if "teacher_hidden" in aux:
            teacher_logits = _teacher_logits(aux, shared, options)
            teacher_logprobs = target_logprobs(teacher_logits, targets)
            if needs_distribution(cfg):
                dense = distributions.dense(teacher_logits, logits, cfg.temperature)
                value = _value(cfg, *dense, shared)
        if weighed:
            weight = aux["weights"]
        else:
            raw = weights.token_weights(
                cfg.weights, logprobs, teacher_logprobs, shared["tempering"]
            )
            weight = weights.warm(cfg.weights, raw, shared["step"])
        divergence = loss = -logprobs
        if value is not None:
            divergence = loss = value
            if cfg.alpha != 1:
                loss = (1 - cfg.alpha) * -logprobs + cfg.alpha * divergence
        return weight * loss, TokenStats(logprobs, teacher_logprobs, weight, divergence)

    return token_loss


def _observe(options: Layout) -> TokenLoss:
    """log q and log p of the targets, no loss: the pass before the weights."""

    def observe(
        logits: Array, targets: Array, aux: dict[str, Array], shared: dict[str, Any]
    ) -> tuple[Array, tuple[Array, Array]]:
        logits = distributions.mask_padding(logits, options.valid_vocab)
        logprobs = target_logprobs(logits, targets)
        teacher = aux["teacher_logprobs"]
        if "teacher_hidden" in aux:
            teacher = target_logprobs(_teacher_logits(aux, shared, options), targets)
        return jnp.zeros_like(logprobs), (logprobs, teacher)

    return observe


# ---------------------------------------------------------------- per batch


def _inputs(
    cfg: LossConfig,
    batch: Batch,
    teacher: LiveTeacher | None,
    mesh: Mesh | None,
    vocab: int,
    valid_vocab: int | None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """(aux, shared) of the head: what a piece reads of the teacher, piece by piece and whole."""
    aux: dict[str, Any] = {"teacher_logprobs": batch.teacher_logprobs}
    shared: dict[str, Any] = {}
    if teacher is not None:
        hidden, head = jax.lax.stop_gradient((teacher.hidden, teacher.head_weight))
        rows = head.shape[0]
        if min(rows, vocab) < (valid_vocab or max(rows, vocab)):
            raise DcodError(
                f"teacher and student have {rows} and {vocab} vocabulary rows; both need those of "
                f"the tokenizer ({valid_vocab})"
            )
        # The rows that one of them lacks are padding: probability 0 on both sides.
        head = head[:vocab] if rows >= vocab else jnp.pad(head, ((0, vocab - rows), (0, 0)))
        aux["teacher_hidden"] = hidden
        shared["teacher_head"] = gather_head(head, hidden.dtype, mesh)
    elif needs_distribution(cfg):
        names = ("topk_ids", "topk_logprobs", "tail_logprobs")
        aux |= {name: getattr(batch, name) for name in names}
        if any(aux[name] is None for name in names):
            raise DcodError(
                f"loss.divergence={cfg.divergence} needs the teacher's top-k in the batch: "
                "score the dataset with score.top_k, or set loss.teacher=live"
            )
    return aux, shared


def observe_logprobs(
    cfg: LossConfig,
    hidden: Float[Array, "B C D"],
    head_weight: Float[Array, "V D"],
    batch: Batch,
    *,
    teacher: LiveTeacher | None = None,
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """(log q, log p) of the targets of a compact batch, without gradient: one pass of the head."""
    aux, shared = _inputs(cfg, batch, teacher, mesh, head_weight.shape[0], valid_vocab)
    aux = {name: aux[name] for name in ("teacher_logprobs", "teacher_hidden") if name in aux}
    hidden, head_weight = jax.lax.stop_gradient((hidden, head_weight))
    everywhere = jnp.ones(batch.targets.shape, bool)
    observe = _observe(Layout(valid_vocab, mesh))
    inputs = (hidden, head_weight, batch.targets, everywhere, aux, observe)
    return head_loss(*inputs, shared=shared, chunk=cfg.head_chunk, mesh=mesh)[1]


def distill_loss(
    cfg: LossConfig,
    hidden: Float[Array, "B C D"],
    head_weight: Float[Array, "V D"],
    batch: Batch,
    *,
    step: Int[Array, ""] | int,
    loss_state: LossState | None = None,
    teacher: LiveTeacher | None = None,
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
) -> tuple[Sums, TokenStats]:
    """Sums over the batch, of which `loss` is differentiable, and the per-token statistics.

    batch and hidden are compact (see `compact`). Weights are 0 outside the loss mask. Prefix and
    sequence scopes and the sequence normalisation need log q of other tokens first: one more pass
    over the logits, values only. Token weights do not pay for it.
    """
    loss_state = adaptive.initial() if loss_state is None else loss_state
    aux, shared = _inputs(cfg, batch, teacher, mesh, head_weight.shape[0], valid_vocab)
    shared |= {
        "step": jnp.asarray(step, jnp.int32),
        "tempering": loss_state.tempering,
        "interpolation": adaptive.interpolation(cfg.taid, loss_state),
    }
    weighed = weights.needs_logprob_pass(cfg.weights)
    if weighed:
        logprobs, teacher_logprobs = observe_logprobs(
            cfg, hidden, head_weight, batch, teacher=teacher, mesh=mesh, valid_vocab=valid_vocab
        )
        aux["weights"] = weights.weigh(
            cfg.weights,
            logprobs,
            teacher_logprobs,
            batch.loss_mask,
            batch.segment_ids,
            step,
            loss_state.tempering,
        )
    total, stats = head_loss(
        hidden,
        head_weight,
        batch.targets,
        batch.loss_mask,
        aux,
        _token_loss(cfg, Layout(valid_vocab, mesh, hidden.dtype), weighed=weighed),
        shared=shared,
        chunk=cfg.head_chunk,
        mesh=mesh,
    )
    stats = dataclasses.replace(stats, weights=jnp.where(batch.loss_mask, stats.weights, 0.0))
    return reduce.token_sums(total, stats, batch.loss_mask), stats
