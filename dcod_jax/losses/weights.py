"""Alignment weights: how much the student's own distribution agrees with each teacher token.

Every weight is a bounded function of the log-ratio r_t = sg[log q(y_t) - log p(y_t)] (of
log q(y_t) alone for `dft`), float32, and carries no gradient: stop_gradient lives here.
Order: log-ratio -> span -> scope -> bounded weight -> warmup -> sequence normalisation; the batch
normalisation is the divisor in reduce.py. A temperature or offset "auto" is in the train state,
where losses/adaptive.py keeps it. A new weight of r or of log q is one entry of WEIGHTS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.types import LossState

AUTO = "auto"

Scalar = Float[Array, ""] | float


class Tokens(NamedTuple):
    """What weights read of a batch."""

    student_logprobs: Float[Array, "B T"]  # log q(y)
    teacher_logprobs: Float[Array, "B T"]  # log p(y)
    loss_mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    span_ids: Int[Array, "B T"] | None = None  # of a teacher with another tokenizer


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

    @property
    def automatic(self) -> bool:
        """Whether temperature or offset is solved for inside the step."""
        return AUTO in (self.temperature, self.offset)

    @property
    def needs_teacher(self) -> bool:
        """Whether the weight reads the teacher's log-probabilities."""
        return WEIGHTS[self.name].needs_teacher

    @property
    def varies(self) -> bool:
        """Whether weights differ between tokens; else scope, warmup and normalize do nothing."""
        return WEIGHTS[self.name].reads != "nothing"

    @property
    def needs_logprob_pass(self) -> bool:
        """Whether a weight depends on other tokens, so that log q is needed before the loss."""
        across = self.scope != "token" or self.normalize == "sequence"
        return across and self.varies

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
    """The configuration's numbers; where it says AUTO, those of `solved`."""
    if solved is None and cfg.automatic:
        raise DcodError("loss.weights: automatic temperature needs the train state's tempering")
    numbers: Any = ((solved if x == AUTO else cfg) for x in (cfg.temperature, cfg.offset))
    return Tempering(next(numbers).temperature, next(numbers).offset)


# ---------------------------------------------------------------- registry


@dataclasses.dataclass(frozen=True)
class Weight:
    """One entry of the registry; the texts make docs/losses.md."""

    value: Callable[[WeightConfig, Array, Tempering], Array]  # of what `reads` names
    formula: str
    source: str
    choose: str  # when to choose it
    parameters: tuple[str, ...] = ()  # fields of WeightConfig that `value` reads
    automatic: tuple[str, ...] = ()  # those of them that may be AUTO
    reads: Literal["ratio", "student", "teacher", "nothing"] = "ratio"  # r, log q, log p, -

    @property
    def needs_teacher(self) -> bool:
        """Whether log p of the trace token is read."""
        return self.reads in ("ratio", "teacher")


def _clip(cfg: WeightConfig, r: Array) -> Array:
    # exp(min(r, log c)) instead of min(exp(r), c): exp(r) overflows above r = 88.
    return jnp.minimum(jnp.exp(jnp.minimum(r, math.log(cfg.clip))), cfg.clip)


WEIGHTS: dict[str, Weight] = {
    "uniform": Weight(
        lambda cfg, r, t: jnp.ones_like(r),
        "1",
        "the plain loss",
        "a baseline without weights",
        reads="nothing",
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
}


def config_errors(cfg: WeightConfig) -> list[str]:
    """What is wrong across the keys of loss.weights, one error for each; empty when it is fine."""
    key, errors = "loss.weights.", []
    for name, value in (("temperature", cfg.temperature), ("offset", cfg.offset)):
        may = [weight for weight, entry in WEIGHTS.items() if name in entry.automatic]
        if value == AUTO and cfg.name not in may:
            errors.append(
                f"{key}{name}='auto' means nothing for {key}name={cfg.name!r}; it is for "
                + ", ".join(may)
            )
        elif isinstance(value, str) and value != AUTO:
            errors.append(f"{key}{name}={value!r} must be a number or 'auto'")
    if cfg.temperature != AUTO:
        return errors
    loss, ess, mean = cfg.target_loss, cfg.target_ess, cfg.target_mean
    both = cfg.offset == AUTO
    if loss and ess:
        errors.append(
            f"{key}target_loss={loss} and {key}target_ess={ess} are two targets for one "
            "temperature; set one of them to 0"
        )
    elif (loss or ess) and not both and mean != WeightConfig.target_mean:
        errors.append(
            f"{key}target_mean={mean} is not read: the temperature aims at "
            f"{'target_loss' if loss else 'target_ess'}. Set {key}target_loss=0 and "
            f"{key}target_ess=0 to aim at it, or {key}offset='auto'"
        )
    elif both and not loss and not ess:
        errors.append(
            f"{key}temperature and offset are both 'auto' but target_loss=0 and target_ess=0 leave "
            "one target for two unknowns; set one of them"
        )
    elif both and 0 < ess <= mean:
        # w in (0, 1): mean(w²) <= mean(w), so (mean w)² / mean(w²) >= mean w = target_mean.
        errors.append(
            f"{key}target_ess={ess} must be above {key}target_mean={mean} where temperature and "
            "offset are both 'auto': weights between 0 and 1 of that mean have no smaller "
            "effective sample size"
        )
    return errors


# ---------------------------------------------------------------- per token


def log_ratio(
    cfg: WeightConfig, student_logprobs: Float[Array, "*N"], teacher_logprobs: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """What the weight is a function of: sg[log q - log p], sg[log q] or sg[log p], per token."""
    student = jax.lax.stop_gradient(student_logprobs).astype(jnp.float32)
    if not cfg.needs_teacher:
        return student
    teacher = jax.lax.stop_gradient(teacher_logprobs).astype(jnp.float32)
    return teacher if WEIGHTS[cfg.name].reads == "teacher" else student - teacher


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


# ---------------------------------------------------------------- per segment


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


def span_log_ratio(cfg: WeightConfig, tokens: Tokens) -> Float[Array, "B T"]:
    """The log-ratio of each token, or its mean or sum over the token's span where there are spans.

    A span is the student's and the teacher's tokens of one text; the ratio of the text is the sum.
    spans [1 1 2], r [-1 -3 -2] -> mean [-2 -2 -2], sum [-4 -4 -2], token [-1 -3 -2].
    """
    r = log_ratio(cfg, tokens.student_logprobs, tokens.teacher_logprobs)
    if tokens.span_ids is None or not cfg.joins_spans:
        return r
    total = segment_total(jnp.where(tokens.loss_mask, r, 0.0), tokens.span_ids)
    if cfg.span == "sum":
        return total
    count = segment_total(tokens.loss_mask.astype(jnp.float32), tokens.span_ids)
    return total / jnp.maximum(count, 1.0)


def scoped_log_ratio(cfg: WeightConfig, tokens: Tokens) -> Float[Array, "B T"]:
    """r itself, or its mean over the segment's completion tokens up to and with t, or over all.

    prefix, all in the mask, one segment: [-1 -3 -2] -> [-1 -2 -2].
    """
    r = span_log_ratio(cfg, tokens)
    if cfg.scope == "token":
        return r
    mean_over = {"prefix": segment_cumsum, "sequence": segment_total}[cfg.scope]
    mask = tokens.loss_mask.astype(jnp.float32)
    # where, not a product: a value outside the mask may be anything, -inf too.
    total = mean_over(jnp.where(tokens.loss_mask, r, 0.0), tokens.segment_ids)
    return total / jnp.maximum(mean_over(mask, tokens.segment_ids), 1.0)


def weigh(
    cfg: WeightConfig, tokens: Tokens, step: Int[Array, ""] | int, tempering: Solved
) -> Float[Array, "B T"]:
    """Final weights before the batch normalisation: scope, warmup, sequence normalisation.

    0 outside loss_mask. With normalize "sequence" the completion tokens of each segment have
    mean weight 1 (all 0 where every weight of the segment underflows).
    """
    bounded = raw(cfg, scoped_log_ratio(cfg, tokens), tempering)
    weights = jnp.where(tokens.loss_mask, warm(cfg, bounded, step), 0.0)
    if cfg.normalize != "sequence" or not cfg.varies:
        return weights
    count = segment_total(tokens.loss_mask.astype(jnp.float32), tokens.segment_ids)
    mean = segment_total(weights, tokens.segment_ids) / jnp.maximum(count, 1.0)
    usable = mean > jnp.finfo(jnp.float32).tiny
    return jnp.where(usable, weights / jnp.where(usable, mean, 1.0), 0.0)
