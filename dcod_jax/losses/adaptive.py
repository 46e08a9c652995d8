"""What a loss learns on the way: temperature and offset of the weights, and TAID's interpolation.

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
from dcod_jax.losses.weights import AUTO, Scalar, Tempering, Tokens, WeightConfig
from dcod_jax.types import LossState

# Where a temperature is looked for. From MAX on weights are uniform to float32's precision; that is
# also where a run starts, so that the first step is plain (unweighted) training.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 1e6
# The lowest that target_loss may choose: a student that lags nowhere keeps its whole loss at every
# temperature, and must not be sharpened for that.
SHARPEST_FOR_LOSS = 1.0
FAINTEST = 1e-30  # mean weight; a temperature that makes them fainter could make all of them 0
# (points, passes) of a search: a pass evaluates all points at once, and the next one lies between
# two of them. ALONE is for one unknown; NESTED where each point of the temperature has an offset.
ALONE, NESTED_TEMPERATURE, NESTED_OFFSET = (128, 2), (32, 3), (32, 4)
_REACH = 30.0  # sigmoid(±30) is 0 or 1 for every purpose


def initial() -> LossState:
    """State of step 0: uniform weights, TAID not begun, no trace seen."""
    # An array each: the state is donated.
    values = (MAX_TEMPERATURE, 0.0, 0.0, 0.0, jnp.inf, 0.0, 0.0, 0.0)
    return LossState(*(jnp.full((), value, jnp.float32) for value in values))


# ---------------------------------------------------------------- automatic temperature


def _crossing(
    f: Callable[[Array], Array],
    low: Array,
    high: Array,
    target: float,
    *,
    size: tuple[int, int],
    rising: bool | Array | None = None,
) -> Array:
    """x in [low, high] with f(x) = target for a monotone f; the nearer end when there is none.

    Each pass evaluates f at all its points at once, so on several devices it is one sum of a
    vector. Between the last two points f is taken to be linear.
    """
    points, passes = size
    if rising is None:
        ends = jax.vmap(f)(jnp.stack([low, high]))
        rising = ends[1] >= ends[0]
    sign = jnp.where(rising, 1.0, -1.0)

    def narrow(_: Array, bounds: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high = bounds[:2]
        x = low + (high - low) * jnp.linspace(0.0, 1.0, points)
        y = jax.vmap(f)(x)
        reached = sign * y >= sign * target
        above = jnp.where(reached.any(), jnp.argmax(reached), points - 1)
        below = jnp.where(reached.any(), jnp.maximum(above - 1, 0), points - 1)
        return x[below], x[above], y[below], y[above]

    start = (low, high, jnp.zeros_like(low), jnp.zeros_like(low))
    low, high, first, last = jax.lax.fori_loop(0, passes, narrow, start)
    step = last - first
    usable = jnp.isfinite(step) & (step != 0)
    part = jnp.where(usable, (target - first) / jnp.where(usable, step, 1.0), 1.0)
    return low + (high - low) * jnp.clip(part, 0.0, 1.0)


def _totals(*values: Float[Array, "B T"]) -> Float[Array, " N"]:
    """The sum of each; the rows of all are added together, on several devices as one vector."""
    return jnp.stack([value.sum(-1) for value in values]).sum(-1)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What a temperature is sought for: log-ratios, lags and how much each token counts."""

    cfg: WeightConfig
    r: Float[Array, "B T"]
    counts: Float[Array, "B T"]  # 0 outside the mask
    nll: Float[Array, "B T"]

    def sums(self, tempering: Tempering) -> Array:
        """Σ w/n, Σ w²/n, Σ w lag/n, Σ lag/n, Σ nll/n over the n that count."""
        w, lag = weights.raw(self.cfg, self.r, tempering), jnp.maximum(-self.r, 0.0)
        one = jnp.ones_like(lag)
        summed = _totals(*(self.counts * x for x in (w, w * w, w * lag, lag, self.nll, one)))
        return summed[:5] / jnp.maximum(summed[5], jnp.finfo(jnp.float32).tiny)

    def quantity(self, tempering: Tempering) -> Array:
        """What the temperature's target is about."""
        mean, second, lagging, lag, nll = self.sums(tempering)
        tiny = jnp.finfo(jnp.float32).tiny
        if self.cfg.target_loss:
            kept = 1.0 - (lag - lagging / jnp.maximum(mean, tiny)) / jnp.maximum(nll, tiny)
            return jnp.where(mean > FAINTEST, kept, -jnp.inf)
        return jnp.square(mean) / jnp.maximum(second, tiny) if self.cfg.target_ess else mean

    def with_offset(self, temperature: Scalar, size: tuple[int, int]) -> Tempering:
        """The temperature and the offset of the configuration, or that of target_mean."""
        if self.cfg.offset != AUTO:
            return Tempering(temperature, self.cfg.offset)  # pyright: ignore[reportArgumentType]
        lowest = jnp.where(self.counts > 0, self.r, jnp.inf).min()
        highest = jnp.where(self.counts > 0, self.r, -jnp.inf).max()
        low, high = -highest - _REACH * temperature, -lowest + _REACH * temperature

        def mean_at(offset: Array) -> Array:
            return self.sums(Tempering(temperature, offset))[0]

        found = _crossing(mean_at, low, high, self.cfg.target_mean, size=size, rising=True)
        return Tempering(temperature, found)


def solve(
    cfg: WeightConfig,
    r: Float[Array, "B T"],
    nll: Float[Array, "B T"],
    counts: Float[Array, "B T"] | Bool[Array, "B T"],
    temperature: Scalar | None = None,
) -> Tempering:
    """The temperature and offset that meet the targets over the tokens that count.

    r is the scoped log-ratio, nll = -log q; counts: how much each token counts (weights.shares).
    temperature "auto" aims at the kept loss target_loss, else at the effective sample size
    target_ess, else (both 0) at the mean raw weight target_mean, which is also what offset "auto"
    aims at. The last two grow with the temperature where the student lags behind (r < 0). A target
    out of reach gives the nearer end. `temperature`: the one in force, where it is not sought.

    Kept loss: 1 - (Σ lag/n - Σ w lag/Σ w) / (Σ nll/n), lag = max(-r, 0), the share of the plain
    loss left when the weights have discounted the student's lag. With an offset <= 0 it never falls
    as the temperature grows: of any two tokens the one with the greater lag has the smaller slope
    of log w over 1/temperature, r (1 - w) for the sigmoid, so the slope of Σ w lag/Σ w, their
    covariance under w, is never positive.
    """
    r, nll = (jax.lax.stop_gradient(jnp.where(counts > 0, x, 0.0)) for x in (r, nll))
    sample = _Sample(cfg, r, counts.astype(jnp.float32), nll)
    if cfg.temperature != AUTO:
        given = cfg.temperature if temperature is None else temperature
        return sample.with_offset(given, (ALONE[0], ALONE[1] + 1))  # pyright: ignore
    if cfg.target_loss:
        target, rising, least = cfg.target_loss, True, SHARPEST_FOR_LOSS
    else:
        target, rising, least = cfg.target_ess or cfg.target_mean, None, MIN_TEMPERATURE
    low, high = (jnp.log(jnp.float32(end)) for end in (least, MAX_TEMPERATURE))
    found = _crossing(
        lambda x: sample.quantity(sample.with_offset(jnp.exp(x), NESTED_OFFSET)),
        low,
        high,
        target,
        size=NESTED_TEMPERATURE if cfg.offset == AUTO else ALONE,
        rising=rising,
    )
    return sample.with_offset(jnp.exp(found), NESTED_OFFSET)


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
    """The state after this batch: its solution mixed in, log temperature and offset smoothed.

    The first solution is taken as it is, and so is every one with smoothing 0. With unit "spread"
    the temperature is that of the window over the stream. A batch without a completion token, or
    with a log-ratio that is not finite, changes nothing; `useful` says so where it is known.
    """
    if not cfg.automatic:
        return state
    mask = tokens.loss_mask
    scoped = jnp.where(mask, weights.scoped_signal(cfg, tokens), 0.0)
    counts = weights.shares(cfg, tokens)
    first = (state.temperature >= MAX_TEMPERATURE) & (state.offset == 0.0)
    keep = jnp.where(first, 0.0, cfg.smoothing)
    taught = useful
    if taught is None:
        r = weights.token_signal(cfg, *tokens[:2], tokens.extra)
        count, total = _totals(mask.astype(jnp.float32), jnp.where(mask, r, 0))
        taught = (count > 0) & jnp.isfinite(total)
    after = _spread(cfg, state, scoped, counts) if cfg.unit == "spread" else state
    if cfg.unit != "spread" or cfg.offset == AUTO:
        by_tokens = cfg.temperature == AUTO and cfg.target_loss  # the loss is one of tokens
        nll = -tokens.student_logprobs.astype(jnp.float32)
        sought = mask if by_tokens else counts
        found = solve(cfg, scoped, nll, sought, after.temperature if cfg.unit == "spread" else None)

        def mixed(old: Array, new: Scalar) -> Array:
            return keep * old + (1 - keep) * new

        temperature = jnp.exp(mixed(jnp.log(state.temperature), jnp.log(found.temperature)))
        after = dataclasses.replace(
            after,
            temperature=after.temperature if cfg.unit == "spread" else temperature,
            offset=mixed(state.offset, found.offset),
        )
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
