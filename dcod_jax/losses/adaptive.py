"""What a loss learns on the way: the temperature of the weights, and TAID's interpolation.

The numbers of a step come from the log-ratios of the whole global batch, after its micro-batches
were joined, so they depend on neither accumulation nor devices. They carry no gradient, and the
train state keeps them (types.LossState).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.losses import weights
from dcod_jax.losses.weights import Tokens, WeightConfig
from dcod_jax.types import LossState

# Where a temperature is looked for. From MAX on weights are uniform to float32's precision; that is
# also where a run starts, so that the first step is plain (unweighted) training.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 1e6
# The lowest that target_loss may choose: a student that lags nowhere keeps its whole loss at every
# temperature, and must not be sharpened for that.
SHARPEST_FOR_LOSS = 1.0
FAINTEST = 1e-30  # mean weight; a temperature that makes them fainter could make all of them 0
# A pass of the search evaluates all points at once, and the next one lies between two of them.
POINTS, PASSES = 128, 2


def initial() -> LossState:
    """State of step 0: uniform weights, TAID not begun, no trace seen."""
    # An array each: the state is donated.
    values = (MAX_TEMPERATURE, 0.0, 0.0, jnp.inf, 0.0, 0.0, 0.0)
    return LossState(*(jnp.full((), value, jnp.float32) for value in values))


# ---------------------------------------------------------------- automatic temperature


def _crossing(
    f: Callable[[Array], Array], low: Array, high: Array, target: float, *, rises: bool
) -> Array:
    """x in [low, high] with f(x) = target for a monotone f; the nearer end when there is none.

    rises: f is known to rise. Each pass evaluates f at all its points at once, so on several
    devices it is one sum of a vector. Between the last two points f is taken to be linear.
    """
    sign = jnp.float32(1.0)
    if not rises:
        ends = jax.vmap(f)(jnp.stack([low, high]))
        sign = jnp.where(ends[1] >= ends[0], 1.0, -1.0)

    def narrow(_: Array, bounds: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high = bounds[:2]
        x = low + (high - low) * jnp.linspace(0.0, 1.0, POINTS)
        y = jax.vmap(f)(x)
        reached = sign * y >= sign * target
        above = jnp.where(reached.any(), jnp.argmax(reached), POINTS - 1)
        below = jnp.where(reached.any(), jnp.maximum(above - 1, 0), POINTS - 1)
        return x[below], x[above], y[below], y[above]

    start = (low, high, jnp.zeros_like(low), jnp.zeros_like(low))
    low, high, first, last = jax.lax.fori_loop(0, PASSES, narrow, start)
    step = last - first
    usable = jnp.isfinite(step) & (step != 0)
    part = jnp.where(usable, (target - first) / jnp.where(usable, step, 1.0), 1.0)
    return low + (high - low) * jnp.clip(part, 0.0, 1.0)


def _totals(*values: Float[Array, "B T"]) -> Float[Array, " N"]:
    """The sum of each; the rows of all are added together, on several devices as one vector."""
    return jnp.stack([value.sum(-1) for value in values]).sum(-1)


def solve(
    cfg: WeightConfig,
    r: Float[Array, "B T"],
    nll: Float[Array, "B T"],
    counts: Float[Array, "B T"] | Bool[Array, "B T"],
) -> Float[Array, ""]:
    """The temperature that meets the target over the tokens that count.

    r is the scoped log-ratio, nll = -log q; counts: how much each token counts (weights.shares).
    The target is the kept loss target_loss, else (0) the effective sample size target_ess, which
    grows with the temperature where the student lags behind (r < 0). A target out of reach gives
    the nearer end.

    Kept loss: 1 - (Σ lag/n - Σ w lag/Σ w) / (Σ nll/n), lag = max(-r, 0), the share of the plain
    loss left when the weights have discounted the student's lag. With an offset <= 0 it never falls
    as the temperature grows: of any two tokens the one with the greater lag has the smaller slope
    of log w over 1/temperature, r (1 - w) for the sigmoid, so the slope of Σ w lag/Σ w, their
    covariance under w, is never positive.
    """
    r, nll = (jax.lax.stop_gradient(jnp.where(counts > 0, x, 0.0)) for x in (r, nll))
    shares, lag = counts.astype(jnp.float32), jnp.maximum(-r, 0.0)
    tiny = jnp.finfo(jnp.float32).tiny

    def reached(log_temperature: Array) -> Array:
        w = weights.raw(cfg, r, jnp.exp(log_temperature))
        one = jnp.ones_like(lag)
        summed = _totals(*(shares * x for x in (w, w * w, w * lag, lag, nll, one)))
        mean, second, lagging, behind, plain = summed[:5] / jnp.maximum(summed[5], tiny)
        if not cfg.target_loss:
            return jnp.square(mean) / jnp.maximum(second, tiny)
        kept = 1.0 - (behind - lagging / jnp.maximum(mean, tiny)) / jnp.maximum(plain, tiny)
        return jnp.where(mean > FAINTEST, kept, -jnp.inf)

    least = SHARPEST_FOR_LOSS if cfg.target_loss else MIN_TEMPERATURE
    low, high = (jnp.log(jnp.float32(end)) for end in (least, MAX_TEMPERATURE))
    target, rises = cfg.target_loss or cfg.target_ess, cfg.target_loss > 0
    return jnp.exp(_crossing(reached, low, high, target, rises=rises))


def same_step(cfg: WeightConfig) -> bool:
    """Whether a step needs its own log-probs before its weights: one more forward pass."""
    return cfg.automatic and cfg.smoothing == 0


def _spread(
    cfg: WeightConfig, state: LossState, r: Float[Array, "B T"], shares: Float[Array, "B T"]
) -> LossState:
    """The state with this batch in the decaying window over the stream's units (weights.shares).

    Count, mean and squared deviations of the scoped log-ratio, those of earlier steps times
    `smoothing` for each step since; temperature <- cfg.temperature · deviation.
    """
    count, total = _totals(shares, shares * r)
    mean = total / count
    squares = (shares * jnp.square(r - mean)).sum()
    before = cfg.smoothing * state.seen
    seen, shift = before + count, mean - state.mean
    squares += cfg.smoothing * state.squares + jnp.square(shift) * before * count / seen
    deviation = jnp.float32(cfg.temperature) * jnp.sqrt(squares / seen)
    return dataclasses.replace(
        state,
        temperature=jnp.clip(deviation, MIN_TEMPERATURE, MAX_TEMPERATURE),
        seen=seen,
        mean=state.mean + shift * count / seen,
        squares=squares,
    )


def retemper(
    cfg: WeightConfig, state: LossState, tokens: Tokens, useful: Bool[Array, ""] | None = None
) -> LossState:
    """The state after this batch: its solution mixed in, the log of the temperature smoothed.

    The first solution is taken as it is, and so is every one with smoothing 0. With unit "spread"
    the temperature is that of the window over the stream. A batch without a completion token, or
    with a log-ratio that is not finite, changes nothing; `useful` says so where it is known.
    """
    if not cfg.automatic:
        return state
    mask = tokens.loss_mask
    scoped = jnp.where(mask, weights.scoped_signal(cfg, tokens), 0.0)
    counts = weights.shares(cfg, tokens)
    taught = useful
    if taught is None:
        r = weights.token_signal(cfg, *tokens[:2], tokens.extra)
        count, total = _totals(mask.astype(jnp.float32), jnp.where(mask, r, 0))
        taught = (count > 0) & jnp.isfinite(total)
    if cfg.unit == "spread":
        after = _spread(cfg, state, scoped, counts)
    else:
        nll = -tokens.student_logprobs.astype(jnp.float32)
        found = solve(cfg, scoped, nll, mask if cfg.target_loss else counts)  # a loss is of tokens
        keep = jnp.where(state.temperature >= MAX_TEMPERATURE, 0.0, cfg.smoothing)
        mixed = keep * jnp.log(state.temperature) + (1 - keep) * jnp.log(found)
        after = dataclasses.replace(state, temperature=jnp.exp(mixed))
    return jax.tree.map(lambda new, old: jnp.where(taught, new, old), after, state)


# ---------------------------------------------------------------- TAID


@dataclasses.dataclass(frozen=True)
class TaidConfig:
    """loss.taid_*: the schedule of the interpolation (arXiv 2501.16937, Algorithm 1)."""

    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    steps: int = 1  # of the whole run


def interpolation(cfg: TaidConfig, state: LossState) -> Array:
    """s of the coming step."""
    return jnp.maximum(state.interpolation, cfg.start)


def interpolate(
    cfg: TaidConfig, state: LossState, loss: Float[Array, ""], step: Int[Array, ""]
) -> LossState:
    """s after a step whose mean TAID loss was `loss`: faster the more the loss falls, never back.

    m <- β m + (1−β) (J_before − J)/J_before;  s <- min(end, max(linear, s + α σ(m) (1 − s))).
    The first step only notes its loss.
    """
    begun = jnp.isfinite(state.previous)
    s = interpolation(cfg, state)
    before = jnp.where(begun, state.previous, 1.0)
    change = (before - loss) / (before + 1e-15)
    momentum = cfg.beta * state.momentum + (1 - cfg.beta) * change
    linear = cfg.start + (cfg.end - cfg.start) * step.astype(jnp.float32) / cfg.steps
    faster = s + cfg.alpha * jax.nn.sigmoid(momentum) * (1 - s)
    return dataclasses.replace(
        state,
        interpolation=jnp.where(begun, jnp.minimum(cfg.end, jnp.maximum(linear, faster)), s),
        momentum=jnp.where(begun, momentum, state.momentum),
        previous=loss.astype(jnp.float32),
    )
