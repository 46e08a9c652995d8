"""The distillation loss: divergence x teacher x weights on the vocabulary head, as sums of a batch.

    per token: v · (w · ((1 − α) nll + α d) + anchor · d), v the weight of its trace

Where the teacher's distribution comes from is decided in one place, `DistillLoss._known`: cached
top-k, or a live teacher's hidden states and head, whose logits exist for one piece at a time like
the student's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive, distributions, reduce, weight_errors, weights
from dcod_jax.losses.adaptive import TaidConfig
from dcod_jax.losses.distributions import TopK
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.losses.head import VocabHead, capped, entropy, target_logprobs
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.losses.weights import Tokens, WeightConfig
from dcod_jax.parallel.mesh import constrain
from dcod_jax.types import Batch, LossState


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """loss.* of the configuration; defaults and meanings are in configs/base.py."""

    divergence: str
    weights: WeightConfig
    teacher: str = "cached"
    alpha: float = 1.0
    anchor: float = 0.0
    router_balance: float = 0.0  # joins in train/forward.py, which knows the model
    temperature: float = 1.0
    temperature_squared: bool = True
    beta: float = 0.5
    skew: float = 0.1
    taid: TaidConfig = dataclasses.field(default_factory=TaidConfig)

    @property
    def needs_distribution(self) -> bool:
        """Whether the divergence reads more of the teacher than log p of the trace token."""
        return DIVERGENCES[self.divergence].value is not None

    @property
    def needs_top_k(self) -> bool:  # in the trace dataset
        """Whether the trace dataset must hold the teacher's top-k."""
        return self.needs_distribution and self.teacher == "cached"

    @property
    def needs_cache(self) -> bool:
        """Whether the trace dataset must hold the teacher's log-probs."""
        return self.teacher == "cached" and (self.needs_distribution or self.weights.needs_teacher)

    @property
    def interpolates(self) -> bool:
        """Whether the divergence reads TAID's interpolation from the train state."""
        return DIVERGENCES[self.divergence].parameter == "interpolation"


def config_errors(cfg: LossConfig) -> Iterator[str]:
    """What is wrong across the keys of loss.*; config_checks.py checks each key by itself."""
    if cfg.taid.end < cfg.taid.start:
        yield f"loss.taid_end={cfg.taid.end} must be >= loss.taid_start={cfg.taid.start}"
    if cfg.temperature != 1 and cfg.divergence == "nll":
        yield f"loss.temperature={cfg.temperature} is nothing for loss.divergence=nll; set it to 1"
    elif cfg.temperature != 1 and cfg.teacher == "cached":
        yield (
            f"loss.temperature={cfg.temperature} needs the teacher's whole distribution (how a "
            "tempered tail is spread is not in a top-k cache): set loss.teacher=live, or "
            "loss.temperature=1"
        )
    uneven = cfg.weights.varies and cfg.weights.normalize == "mean"
    if cfg.anchor > 0 and (cfg.divergence == "nll" or uneven):
        yield (
            f"loss.anchor={cfg.anchor} is a share of the divergence outside the weights: it needs "
            "a loss.divergence other than nll, and loss.weights.normalize=none or sequence (the "
            "divisor Σw of mean would scale it)"
        )
    if weights.WEIGHTS[cfg.weights.name].signed and cfg.divergence != "nll":
        yield (
            f"loss.weights.name={cfg.weights.name} weighs the log-prob of the sampled token, and "
            f"loss.divergence={cfg.divergence} is about the others, too; set loss.divergence=nll"
        )
    yield from weight_errors.config_errors(cfg.weights)


def compact(batch: Batch) -> Batch:
    """The batch at the head's positions only, [B,C] for [B,T]; a batch without them as it is."""
    if batch.head_positions is None:
        return batch
    used = batch.head_positions < batch.tokens.shape[1]

    def take(x: Array) -> Array:
        return jnp.where(used, _at_head(batch, x), jnp.zeros((), x.dtype))

    names = ["tokens", "targets", "loss_mask", "segment_ids", "positions", "teacher_logprobs"]
    names += ("trace_weights", "span_ids", "start_logprobs")
    fields = {name: take(x) for name in names if (x := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, **fields, head_positions=None)


def tokens_of(
    small: Batch, logprobs: Array, teacher_logprobs: Array, extra: Array | None
) -> Tokens:
    """What weights read of a compact batch."""
    own = (small.loss_mask, small.segment_ids, small.span_ids)
    return Tokens(logprobs, teacher_logprobs, *own, extra)


def _at_head(batch: Batch, x: Array) -> Array:
    """x [B,T,...] at the head's positions; padding repeats the last one."""
    if batch.head_positions is None:
        return x
    at = jnp.minimum(batch.head_positions, x.shape[1] - 1)
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """What the loss needs of a teacher that runs in the same step; it gets no gradient."""

    hidden: Float[Array, "B T E"]  # final hidden states; E need not be the student's D
    matrix: Float[Array, "W E"]  # of its head; W need not be the student's V


class _Known(NamedTuple):
    """What the loss of a token reads beside its logits, [B,C,...]; None where it does not."""

    teacher_logprobs: Array
    top_k: TopK | None = None
    teacher_hidden: Array | None = None
    start_logprobs: Array | None = None
    weights: Array | None = None
    trace_weights: Array | None = None


class _Shared(NamedTuple):
    """What all pieces of a batch read."""

    teacher_matrix: Array | None  # transposed; None without a live teacher
    step: Array
    loss_state: LossState


@dataclasses.dataclass(frozen=True)
class DistillLoss:
    """The loss of a configuration on a vocabulary head; static under jit."""

    config: LossConfig
    head: VocabHead
    teacher_softcap: float | None = None  # of a live teacher's logits

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        matrix: Float[Array, "V D"],
        batch: Batch,
        *,
        step: Int[Array, ""] | int,
        loss_state: LossState | None = None,
        teacher: LiveTeacher | None = None,
    ) -> tuple[Sums, TokenStats]:
        """Sums over the batch, of which `loss` is differentiable, and statistics [B,C].

        hidden: of the whole rows; the head reads batch.head_positions. matrix: the student's head.
        Weights are 0 outside the loss mask. Those that look at other tokens need log q first: one
        more pass over the logits, values only.
        """
        loss_state = adaptive.initial() if loss_state is None else loss_state
        hidden, small = self._at_head(batch, hidden), compact(batch)
        known, teacher_matrix = self._known(batch, small, teacher, vocab=matrix.shape[0])
        weights_config = self.config.weights
        spans = small.span_ids is not None and weights_config.joins_spans
        if weights_config.across or spans:
            extra = known.start_logprobs
            unread = small.teacher_logprobs  # in the place of log q
            tokens = tokens_of(small, unread, small.teacher_logprobs, extra)
            asked = teacher_matrix is not None and weights_config.needs_teacher
            if weights_config.moves or asked:
                tokens = self._observe(hidden, matrix, small, known, teacher_matrix)
            weight = weights.weigh(weights_config, tokens, step, loss_state)
            known = known._replace(weights=weight)
        shared = _Shared(teacher_matrix, jnp.asarray(step, jnp.int32), loss_state)
        targets, mask = small.targets, small.loss_mask
        token_loss = functools.partial(self._token_loss, gradient_dtype=hidden.dtype)
        total, stats = self.head.loss(
            hidden, matrix, targets, mask, token_loss, aux=known, shared=shared
        )
        stats = dataclasses.replace(stats, weights=jnp.where(mask, stats.weights, 0.0))
        sums = reduce.token_sums(stats, mask, batch.segment_ids)
        return dataclasses.replace(sums, loss=total), stats  # the statistics have no gradient

    def observe(
        self,
        hidden: Float[Array, "B T D"],
        matrix: Float[Array, "V D"],
        batch: Batch,
        *,
        teacher: LiveTeacher | None = None,
    ) -> Tokens:
        """What weights read of the targets at the head's positions, without gradient."""
        small = compact(batch)
        known, teacher_matrix = self._known(batch, small, teacher, vocab=matrix.shape[0])
        hidden = self._at_head(batch, hidden)
        return self._observe(hidden, matrix, small, known, teacher_matrix)

    def learned(
        self, state: LossState, step: Array, small: Batch, sums: Sums, stats: TokenStats
    ) -> LossState:
        """The loss's state after a step on a compact batch."""
        cfg = self.config
        if not adaptive.same_step(cfg.weights):
            read = (stats.student_logprobs, stats.teacher_logprobs, stats.extra)
            useful = (sums.count > 0) & jnp.isfinite(sums.read)
            state = adaptive.retemper(cfg.weights, state, tokens_of(small, *read), useful)
        if not cfg.interpolates:
            return state
        mean = sums.divergence / jnp.maximum(sums.count, 1)
        moved = adaptive.interpolate(cfg.taid, state, mean, step)
        # A batch without completion tokens has no loss to compare with.
        return jax.tree.map(lambda new, old: jnp.where(sums.count > 0, new, old), moved, state)

    # ------------------------------------------------------------ per batch

    def _observe(
        self,
        hidden: Array,
        matrix: Array,
        small: Batch,
        known: _Known,
        teacher_matrix: Array | None,
    ) -> Tokens:
        def statistics(
            logits: Array, targets: Array, known: _Known, teacher_matrix: Array | None
        ) -> tuple[Array, Array, Array | None]:
            logprobs = target_logprobs(self.head.masked(logits), targets)
            teacher_logits = self._teacher_logits(known, teacher_matrix)
            extra = self._extra(logits, known)
            if teacher_logits is None:
                return logprobs, known.teacher_logprobs, extra
            return logprobs, target_logprobs(teacher_logits, targets), extra

        known = known._replace(top_k=None)
        logprobs, teacher_logprobs, extra = self.head.observe(
            hidden, matrix, small.targets, statistics, aux=known, shared=teacher_matrix
        )
        return tokens_of(small, logprobs, teacher_logprobs, extra)

    def _at_head(self, batch: Batch, hidden: Array) -> Array:
        return constrain(_at_head(batch, hidden), self.head.mesh, "batch", None, None)

    def _known(
        self, batch: Batch, small: Batch, teacher: LiveTeacher | None, *, vocab: int
    ) -> tuple[_Known, Array | None]:
        """What is read of the teacher, piece by piece and whole; vocab: rows of the student."""
        known = _Known(small.teacher_logprobs, trace_weights=small.trace_weights)
        if self.config.weights.needs_start:
            if small.start_logprobs is None:
                raise DcodError(
                    f"loss.weights.ratio={self.config.weights.ratio} needs the log-probs of the "
                    "student's start in the batch: score the dataset with score.student=True"
                )
            known = known._replace(start_logprobs=small.start_logprobs)
        if teacher is None and not self.config.needs_distribution:
            return known, None
        if teacher is None:
            ids, logprobs, tail = batch.topk_ids, batch.topk_logprobs, batch.tail_logprobs
            if ids is None or logprobs is None or tail is None:
                raise DcodError(
                    f"loss.divergence={self.config.divergence} needs the teacher's top-k in the "
                    "batch: score the dataset with score.top_k, or set loss.teacher=live"
                )
            return known._replace(top_k=TopK(ids, logprobs, tail)), None
        hidden, matrix = jax.lax.stop_gradient((teacher.hidden, teacher.matrix))
        rows, valid = matrix.shape[0], self.head.valid_vocab
        if min(rows, vocab) < (valid or max(rows, vocab)):
            raise DcodError(
                f"teacher and student have {rows} and {vocab} vocabulary rows; both need those of "
                f"the tokenizer ({valid})"
            )
        # The rows that one of them lacks are padding: probability 0 on both sides.
        matrix = matrix[:vocab] if rows >= vocab else jnp.pad(matrix, ((0, vocab - rows), (0, 0)))
        hidden = self._at_head(batch, hidden)
        return known._replace(teacher_hidden=hidden), self.head.transposed(matrix, hidden.dtype)

    # ------------------------------------------------------------ per token

    def _teacher_logits(self, known: _Known, teacher_matrix: Array | None) -> Array | None:
        """The live teacher's logits of one piece, as wide as the student's; None without one."""
        if known.teacher_hidden is None or teacher_matrix is None:
            return None
        logits = self.head.logits(known.teacher_hidden, teacher_matrix)
        logits = capped(logits, self.teacher_softcap)
        return jax.lax.stop_gradient(self.head.masked(logits))

    def _extra(self, logits: Array, known: _Known) -> Array | None:
        """What the weights read beside log q and log p."""
        reads = self.config.weights.reads
        if {"entropy", "top_entropy"} & reads:
            return entropy(self.head.masked(logits), weights.TOP * ("top_entropy" in reads))
        return known.start_logprobs

    def _divergence(self, log_p: Array, log_q: Array, loss_state: LossState) -> Float[Array, "*N"]:
        """The divergence of each token from its aligned distributions."""
        cfg, entry = self.config, DIVERGENCES[self.config.divergence]
        assert entry.value is not None  # it is only asked for where there is one
        parameters = {}
        if entry.parameter == "interpolation":
            parameters[entry.parameter] = adaptive.interpolation(cfg.taid, loss_state)
        elif entry.parameter:
            parameters[entry.parameter] = getattr(cfg, entry.parameter)
        value = entry.value(log_p, log_q, **parameters)
        return value * cfg.temperature**2 if cfg.temperature_squared else value

    def _token_loss(
        self,
        logits: Array,
        targets: Array,
        known: _Known,
        shared: _Shared,
        gradient_dtype: DTypeLike,
    ) -> tuple[Array, TokenStats]:
        """w · ((1−α) nll + α d) + anchor · d per token. Without weights in `known` they are formed
        here from the piece's own log q, which costs nothing more.
        """
        cfg, teacher_logprobs = self.config, known.teacher_logprobs
        pair: tuple[Array, Array] | None = None
        if known.top_k is not None:
            log_p, log_q, logprobs = distributions.buckets(
                known.top_k, logits, targets, self.head, gradient_dtype=gradient_dtype
            )
            pair = log_p, log_q
        else:
            logits = self.head.masked(logits)
            logprobs = target_logprobs(logits, targets)
        teacher_logits = self._teacher_logits(known, shared.teacher_matrix)
        if teacher_logits is not None:
            teacher_logprobs = target_logprobs(teacher_logits, targets)
            if cfg.needs_distribution:
                pair = distributions.dense(teacher_logits, logits, cfg.temperature)
        weight, extra = known.weights, self._extra(logits, known)
        if weight is None:
            r = weights.token_signal(cfg.weights, logprobs, teacher_logprobs, extra)
            weight = weights.raw(cfg.weights, r, shared.loss_state)
            weight = weights.warm(cfg.weights, weight, shared.step)
        if known.trace_weights is not None:
            weight = weight * known.trace_weights
        divergence = loss = -logprobs
        if pair is not None:
            divergence = loss = self._divergence(*pair, shared.loss_state)
            if cfg.alpha != 1:
                loss = (1 - cfg.alpha) * -logprobs + cfg.alpha * divergence
        loss = weight * loss
        if cfg.anchor:
            trace = 1.0 if known.trace_weights is None else known.trace_weights
            loss += cfg.anchor * trace * divergence
        return loss, TokenStats(logprobs, teacher_logprobs, weight, divergence, loss, extra)
