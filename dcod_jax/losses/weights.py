"""Alignment weights: how much the student's own distribution agrees with each teacher token.

Every weight is a bounded function of one number a token, its signal: the log-ratio
r_t = sg[log q(y_t) - log p(y_t)], log q(y_t) alone, an entropy of q, ... (Weight.reads), float32,
and carries no gradient: stop_gradient lives here. Order: signal -> span -> scope -> bounded weight
-> warmup -> sequence normalisation; the batch normalisation is the divisor in reduce.py. A
temperature or offset that follows the traces is in the train state, where losses/adaptive.py keeps
it. A new weight is one entry of WEIGHTS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.types import LossState

AUTO = "auto"
RATIOS = ("student/teacher", "start/teacher", "student/start")
UNITS = ("nats", "spread")
# What loss.weights.name=auto stands for; evidence: docs/study.md.
CHOSEN = {"name": "sigmoid", "scope": "sequence", "temperature": 0.3}
TOP = 20  # tokens whose entropy `eaft` reads

Scalar = Float[Array, ""] | float


class Tokens(NamedTuple):
    """What weights read of a batch."""

    student_logprobs: Float[Array, "B T"]  # log q(y)
    teacher_logprobs: Float[Array, "B T"]  # log p(y)
    loss_mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    span_ids: Int[Array, "B T"] | None = None  # of a teacher with another tokenizer
    # log q of the start, or an entropy of q: where the weight reads one of them
    extra: Float[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class WeightConfig:
    """loss.weights.* of the configuration; defaults and meanings are in configs/base.py."""

    name: str
    temperature: float | str  # or AUTO
    offset: float | str  # or AUTO
    clip: float
    scope: str
    normalize: str
    warmup_steps: int
    target_loss: float = 0.9
    target_ess: float = 0.0
    target_mean: float = 0.5
    smoothing: float = 0.9
    span: str = "mean"
    ratio: str = "student/teacher"
    unit: str = "nats"
    threshold: float = 0.1

    @property
    def automatic(self) -> bool:
        """Whether temperature or offset follows the traces, from the train state."""
        return self.unit == "spread" or AUTO in (self.temperature, self.offset)

    @property
    def reads(self) -> frozenset[str]:
        """What a token's weight depends on: "student", "teacher", "start", "entropy", ..."""
        own = WEIGHTS[self.name].reads
        return frozenset(self.ratio.split("/") if own == "ratio" else own.split())

    @property
    def needs_teacher(self) -> bool:
        """Whether log p is read."""
        return "teacher" in self.reads

    @property
    def needs_start(self) -> bool:
        """Whether the start's log q is read."""
        return "start" in self.reads

    @property
    def moves(self) -> bool:
        """Whether the weights depend on the student as it is now."""
        return not self.reads <= {"teacher", "start"}

    @property
    def varies(self) -> bool:
        """Whether weights differ between tokens; else scope, warmup and normalize do nothing."""
        return bool(self.reads)

    @property
    def across(self) -> bool:
        """Whether a weight depends on other tokens, so that all are needed before the loss."""
        entry = WEIGHTS[self.name]
        return self.varies and (
            self.scope != "token" or self.normalize == "sequence" or entry.cumulative
        )

    @property
    def joins_spans(self) -> bool:
        """Whether the tokens of a span have one log-ratio, so that log q is needed before it."""
        return self.needs_teacher and self.varies and self.span != "token"


UNIFORM = WeightConfig("uniform", 1.0, 0.0, 1.0, scope="token", normalize="none", warmup_steps=0)


class Tempering(NamedTuple):
    """Temperature and offset in force: the configuration's, or the train state's."""

    temperature: Scalar
    offset: Scalar


Solved = Tempering | LossState | None  # where AUTO numbers come from


def fixed(cfg: WeightConfig, solved: Solved = None) -> Tempering:
    """The configuration's numbers; where they follow the traces, those of `solved`."""
    given: Any = cfg
    if not cfg.automatic:
        return Tempering(given.temperature, given.offset)
    if solved is None:
        raise DcodError("loss.weights: automatic temperature needs the train state's tempering")
    follows = cfg.unit == "spread" or cfg.temperature == AUTO
    temperature = solved.temperature if follows else given.temperature
    return Tempering(temperature, solved.offset if cfg.offset == AUTO else given.offset)


# ---------------------------------------------------------------- registry


@dataclasses.dataclass(frozen=True)
class Weight:
    """One entry of the registry; the texts make docs/losses.md."""

    value: Callable[[WeightConfig, Array, Tempering], Array]  # of the signal
    formula: str
    source: str
    choose: str  # when to choose it
    parameters: tuple[str, ...] = ()  # fields of WeightConfig that `value` reads
    automatic: tuple[str, ...] = ()  # those of them that may be AUTO
    # "ratio" (r, of the two that loss.weights.ratio names), or the arguments of `signal`
    reads: str = "ratio"
    signal: Callable[..., Array] = lambda only: only
    cumulative: bool = False  # the signal is the share of Σ|r| of the trace that lies before t
    signed: bool = False  # weights may be negative


def _clip(cfg: WeightConfig, r: Array) -> Array:
    # exp(min(r, log c)) instead of min(exp(r), c): exp(r) overflows above r = 88.
    return jnp.minimum(jnp.exp(jnp.minimum(r, math.log(cfg.clip))), cfg.clip)


WEIGHTS: dict[str, Weight] = {
    "uniform": Weight(
        lambda cfg, r, t: jnp.ones_like(r),
        "1",
        "the plain loss",
        "a baseline without weights",
        reads="",
    ),
    "sigmoid": Weight(
        lambda cfg, r, t: jax.nn.sigmoid((r + t.offset) / t.temperature),
        "σ((r + offset)/temperature)",
        "DisCorD, arXiv 2605.14071",
        "the default: in (0, 1), ½ where student and teacher agree (temperature 1, offset 0)",
        parameters=("temperature", "offset"),
        automatic=("temperature", "offset"),
    ),
    "clip": Weight(
        lambda cfg, r, t: _clip(cfg, r),
        "min(exp(r), clip)",
        "truncated importance sampling, token by token",
        "the ratio itself is wanted, with a bound on its variance",
        parameters=("clip",),
    ),
    "power": Weight(
        lambda cfg, r, t: _clip(cfg, r / t.temperature),
        "min(exp(r/temperature), clip)",
        "tempered importance ratio",
        "a ratio between uniform (a high temperature) and `clip` (temperature 1)",
        parameters=("temperature", "clip"),
        automatic=("temperature",),
    ),
    "dft": Weight(
        lambda cfg, r, t: jnp.exp(r),
        "sg[q(y)]",
        "DFT, arXiv 2508.05629",
        "there is no teacher to ask; the ablation of the ratio",
        reads="student",
    ),
    "q_power": Weight(
        lambda cfg, q, t: jnp.exp(q / t.temperature),
        "sg[q(y)^α], α = 1/temperature: the gradient of the loss (1 − q^α)/α",
        "arXiv 2510.00526",
        "a strong student: unlikely tokens count less (α = 1 is `dft`); a weak one needs nll",
        parameters=("temperature",),
        reads="student",
    ),
    "q_threshold": Weight(
        lambda cfg, q, t: (q >= math.log(cfg.threshold)).astype(jnp.float32),
        "1 where q(y) ≥ threshold, else 0",
        "arXiv 2510.00526",
        "a strong student and noisy traces: tokens it finds unlikely are left out",
        parameters=("threshold",),
        reads="student",
    ),
    "idft": Weight(
        lambda cfg, x, t: jnp.exp(x),
        "sg[q(y)^γ], γ = min(max(exp(−log q(y) − H(q)), 0.1), 2)",
        "IDFT, arXiv 2602.12222",
        "as `dft`, with less weight on tokens that are less likely than the entropy H(q) says",
        reads="student entropy",
        signal=lambda q, h: q * jnp.exp(jnp.clip(-(q + h), math.log(0.1), math.log(2.0))),
    ),
    "eaft": Weight(
        lambda cfg, x, t: jnp.exp(x / t.temperature),
        "sg[(H/ln 20)^α], H the entropy of q's 20 most probable tokens, α = 1/temperature",
        "EAFT, arXiv 2601.02151; its code divides by 3",
        "tokens on which a sure student is contradicted do harm: a low entropy counts less",
        parameters=("temperature",),
        reads="top_entropy",
        signal=lambda h: jnp.log(jnp.maximum(h / math.log(TOP), 1e-30)),
    ),
    "drift_share": Weight(
        lambda cfg, share, t: 1.5 - 0.5 * share,
        "1 + γ (1 − Σ_{s<t} |r_s| / Σ_s |r_s|), γ = ½",
        "IW-OPD, arXiv 2606.22600",
        "long traces: a token counts less, the more the two drifted apart before it",
        cumulative=True,
    ),
    "advantage": Weight(
        lambda cfg, r, t: -jnp.clip(r, -cfg.clip, cfg.clip),
        "−r, within ±clip; with ratio=start/teacher the bracket of −log q · sg[log p − log q₀]",
        "Lightning OPD, arXiv 2604.13010",
        "the traces are the student's own samples, scored by the teacher (`lightning-opd`)",
        parameters=("clip",),
        signed=True,
    ),
}


# ---------------------------------------------------------------- per token


def token_signal(
    cfg: WeightConfig,
    student_logprobs: Float[Array, "*N"],
    teacher_logprobs: Float[Array, "*N"],
    extra: Float[Array, "*N"] | None = None,
) -> Float[Array, "*N"]:
    """The signal of each token, without gradient; extra: log q of the start, or the entropy."""
    parties = dict.fromkeys(("start", "entropy", "top_entropy"), extra)
    parties |= {"student": student_logprobs, "teacher": teacher_logprobs}
    entry = WEIGHTS[cfg.name]
    names = cfg.ratio.split("/") if entry.reads == "ratio" else entry.reads.split()
    if not names:
        return jnp.zeros(student_logprobs.shape, jnp.float32)
    read = [parties[name] for name in names]
    if any(one is None for one in read):
        raise DcodError(f"{cfg.name} weights read {' and '.join(names)}; one of them is not there")
    read = [jax.lax.stop_gradient(one).astype(jnp.float32) for one in read]  # pyright: ignore
    return read[0] - read[1] if entry.reads == "ratio" else entry.signal(*read)


def raw(cfg: WeightConfig, r: Float[Array, "*N"], tempering: Solved) -> Float[Array, "*N"]:
    """Bounded weight of each log-ratio.

    sigmoid at temperature 1, offset 0: q=0.2, p=0.6 -> q/(q+p) = 0.25.
    """
    return WEIGHTS[cfg.name].value(cfg, r, fixed(cfg, tempering))


def warm(
    cfg: WeightConfig, weights: Float[Array, "*N"], step: Int[Array, ""] | int
) -> Float[Array, "*N"]:
    """w <- 1 + a (w - 1) with a = min(step / warmup_steps, 1); a = 1 without warmup."""
    if cfg.warmup_steps == 0 or not cfg.varies:
        return weights
    a = jnp.minimum(jnp.asarray(step, jnp.float32) / cfg.warmup_steps, 1.0)
    return (1.0 - a) + a * weights  # this order keeps a tiny weight exact at a = 1


# ---------------------------------------------------------------- per segment: nothing crosses it


def segment_cumsum(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Running sum that restarts where the segment id changes.

    values [1 1 1 1], segment_ids [1 1 2 2] -> [1 2 1 2]. A segmented scan, not a difference
    of cumulative sums: the values of another segment cannot even change the rounding.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(combine, (starts, values), axis=1)[1]


def segment_total(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sum over the whole segment, the same number at each of its positions."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)

    def combine(later: tuple[Array, Array], here: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] | here[0], jnp.where(here[0], here[1], later[1])

    running = segment_cumsum(values, segment_ids)
    return jax.lax.associative_scan(combine, (ends, running), axis=1, reverse=True)[1]


def span_signal(cfg: WeightConfig, tokens: Tokens) -> Float[Array, "B T"]:
    """The signal of each token, or its mean or sum over the token's span where there are spans.

    A span is the student's and the teacher's tokens of one text; the ratio of the text is the sum.
    spans [1 1 2], r [-1 -3 -2] -> mean [-2 -2 -2], sum [-4 -4 -2], token [-1 -3 -2].
    """
    r = token_signal(cfg, tokens.student_logprobs, tokens.teacher_logprobs, tokens.extra)
    if tokens.span_ids is None or not cfg.joins_spans:
        return r
    total = segment_total(jnp.where(tokens.loss_mask, r, 0.0), tokens.span_ids)
    if cfg.span == "sum":
        return total
    count = segment_total(tokens.loss_mask.astype(jnp.float32), tokens.span_ids)
    return total / jnp.maximum(count, 1.0)


def scoped_signal(cfg: WeightConfig, tokens: Tokens) -> Float[Array, "B T"]:
    """The signal, or its mean over the segment's completion tokens up to and with t, or over all.

    prefix, all in the mask, one segment: [-1 -3 -2] -> [-1 -2 -2]. Of a cumulative weight the share
    of the segment's Σ|r| that lies before t: [0 1/6 4/6].
    """
    r = span_signal(cfg, tokens)
    if WEIGHTS[cfg.name].cumulative:
        size = jnp.where(tokens.loss_mask, jnp.abs(r), 0.0)
        whole = jnp.maximum(segment_total(size, tokens.segment_ids), jnp.finfo(jnp.float32).tiny)
        return (segment_cumsum(size, tokens.segment_ids) - size) / whole
    if cfg.scope == "token":
        return r
    mean_over = {"prefix": segment_cumsum, "sequence": segment_total}[cfg.scope]
    mask = tokens.loss_mask.astype(jnp.float32)
    # where, not a product: a value outside the mask may be anything, -inf too.
    total = mean_over(jnp.where(tokens.loss_mask, r, 0.0), tokens.segment_ids)
    return total / jnp.maximum(mean_over(mask, tokens.segment_ids), 1.0)


def shares(cfg: WeightConfig, tokens: Tokens) -> Float[Array, "B T"]:
    """How much each token counts where units of the scope are counted; 0 outside the mask.

    A unit is a token, with scope "sequence" a trace: then each of its n tokens is 1/n of it.
    """
    mask = tokens.loss_mask.astype(jnp.float32)
    if cfg.scope != "sequence":
        return mask
    return mask / jnp.maximum(segment_total(mask, tokens.segment_ids), 1.0)


def weigh(
    cfg: WeightConfig, tokens: Tokens, step: Int[Array, ""] | int, tempering: Solved
) -> Float[Array, "B T"]:
    """Final weights before the batch normalisation: scope, warmup, sequence normalisation.

    0 outside loss_mask. With normalize "sequence" the completion tokens of each segment have
    mean weight 1 (all 0 where every weight of the segment underflows).
    """
    bounded = raw(cfg, scoped_signal(cfg, tokens), tempering)
    weights = jnp.where(tokens.loss_mask, warm(cfg, bounded, step), 0.0)
    if cfg.normalize != "sequence" or not cfg.varies:
        return weights
    count = segment_total(tokens.loss_mask.astype(jnp.float32), tokens.segment_ids)
    mean = segment_total(weights, tokens.segment_ids) / jnp.maximum(count, 1.0)
    usable = mean > jnp.finfo(jnp.float32).tiny
    return jnp.where(usable, weights / jnp.where(usable, mean, 1.0), 0.0)
