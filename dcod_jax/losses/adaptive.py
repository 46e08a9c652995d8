"""What a loss learns on the way: the automatic temperature and offset, and TAID's interpolation.

The numbers of a step are solved from the log-ratios of the whole global batch, after its
micro-batches were joined, so they depend on neither accumulation nor devices. They carry no
gradient, and the train state keeps them (types.LossState).
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
HALVINGS = 40  # of a bisection: the interval of log temperature ends at 2e-11 of its length
_REACH = 30.0  # sigmoid(±30) is 0 or 1 for every purpose


def initial() -> LossState:
    """State of step 0: uniform weights, TAID not begun."""
    values = (MAX_TEMPERATURE, 0.0, 0.0, 0.0, jnp.inf)  # an array each: the state is donated
    return LossState(*(jnp.full((), value, jnp.float32) for value in values))


# ---------------------------------------------------------------- automatic temperature


def _bisect(
    f: Callable[[Array], Array],
    low: Array,
    high: Array,
    target: float,
    *,
    rising: bool | Array | None = None,
) -> Array:
    """x in [low, high] with f(x) = target for a monotone f; the nearer end when there is none."""
    rising = f(high) >= f(low) if rising is None else rising

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        above = (f(middle) > target) == rising
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, high))
    return 0.5 * (low + high)


def kept_loss(
    w: Float[Array, "B T"],
    r: Float[Array, "B T"],
    nll: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Share of the plain loss left when the weights have discounted the student's lag.

    1 - (Σ lag/n - Σ w lag/Σ w) / (Σ nll/n), lag = max(-r, 0), over the mask; -inf where the
    weights are too faint. With an offset <= 0 it never falls as the temperature grows: of any two
    tokens the one with the greater lag has the smaller slope of log w over 1/temperature, r (1 - w)
    for the sigmoid, so the slope of Σ w lag/Σ w, their covariance under w, is never positive.
    """
    count = jnp.maximum(loss_mask.sum(), 1)
    w, lag, nll = (jnp.where(loss_mask, x, 0.0) for x in (w, jnp.maximum(-r, 0.0), nll))
    tiny = jnp.finfo(jnp.float32).tiny
    lost = lag.sum() / count - (w * lag).sum() / jnp.maximum(w.sum(), tiny)
    kept = 1.0 - lost / jnp.maximum(nll.sum() / count, tiny)
    return jnp.where(w.sum() > FAINTEST * count, kept, -jnp.inf)


def solve(
    cfg: WeightConfig,
    r: Float[Array, "B T"],
    nll: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> Tempering:
    """The temperature and offset that meet the targets over the completion tokens given.

    r is the scoped log-ratio, nll = -log q. temperature "auto" aims at the kept loss target_loss,
    else at the effective sample size target_ess, else (both 0) at the mean raw weight target_mean,
    which is also what offset "auto" aims at. The last two grow with the temperature where the
    student lags behind (r < 0). A target out of reach gives the nearer end.
    """
    r = jax.lax.stop_gradient(jnp.where(loss_mask, r, 0.0))
    nll = jax.lax.stop_gradient(nll)
    count = jnp.maximum(loss_mask.sum(), 1)
    lowest = jnp.where(loss_mask, r, jnp.inf).min()
    highest = jnp.where(loss_mask, r, -jnp.inf).max()

    def raw(tempering: Tempering) -> Array:
        return jnp.where(loss_mask, weights.raw(cfg, r, tempering), 0.0)

    def mean(tempering: Tempering) -> Array:
        return raw(tempering).sum() / count

    def ess(tempering: Tempering) -> Array:
        second = jnp.square(raw(tempering)).sum() / count
        return jnp.square(mean(tempering)) / jnp.maximum(second, jnp.finfo(jnp.float32).tiny)

    def kept(tempering: Tempering) -> Array:
        return kept_loss(raw(tempering), r, nll, loss_mask)

    def with_offset(temperature: Scalar) -> Tempering:
        if cfg.offset != AUTO:
            return Tempering(temperature, cfg.offset)  # pyright: ignore[reportArgumentType]
        low, high = -highest - _REACH * temperature, -lowest + _REACH * temperature

        def mean_at(offset: Array) -> Array:
            return mean(Tempering(temperature, offset))

        return Tempering(temperature, _bisect(mean_at, low, high, cfg.target_mean))

    if cfg.temperature != AUTO:
        return with_offset(cfg.temperature)  # pyright: ignore[reportArgumentType]
    if cfg.target_loss:
        quantity, target, rising, least = kept, cfg.target_loss, True, SHARPEST_FOR_LOSS
    else:
        quantity = ess if cfg.target_ess else mean
        target, rising, least = cfg.target_ess or cfg.target_mean, None, MIN_TEMPERATURE
    low, high = (jnp.log(jnp.float32(end)) for end in (least, MAX_TEMPERATURE))
    log_temperature = _bisect(
        lambda x: quantity(with_offset(jnp.exp(x))), low, high, target, rising=rising
    )
    return with_offset(jnp.exp(log_temperature))


def same_step(cfg: WeightConfig) -> bool:
    """Whether a step needs its own log-probs before its weights: one more forward pass."""
    return cfg.automatic and cfg.smoothing == 0


def retemper(cfg: WeightConfig, state: LossState, tokens: Tokens) -> LossState:
    """The state with this batch's solution mixed in: log temperature and offset, smoothed.

    The first solution is taken as it is, and so is every one with smoothing 0. A batch without a
    completion token, or with a log-ratio that is not finite, changes nothing.
    """
    if not cfg.automatic:
        return state
    mask = tokens.loss_mask
    r = weights.log_ratio(cfg, tokens.student_logprobs, tokens.teacher_logprobs)
    scoped = weights.scoped_log_ratio(cfg, tokens)
    found = solve(cfg, scoped, -tokens.student_logprobs.astype(jnp.float32), mask)
    first = (state.temperature >= MAX_TEMPERATURE) & (state.offset == 0.0)
    keep = jnp.where(first, 0.0, cfg.smoothing)
    useful = mask.any() & jnp.isfinite(r).all(where=mask)

    def mixed(old: Array, new: Scalar) -> Array:
        return keep * old + (1 - keep) * new

    temperature = jnp.exp(mixed(jnp.log(state.temperature), jnp.log(found.temperature)))
    offset = mixed(state.offset, found.offset)
    return dataclasses.replace(
        state,
        temperature=jnp.where(useful, temperature, state.temperature),
        offset=jnp.where(useful, offset, state.offset),
    )


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
