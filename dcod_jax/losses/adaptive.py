"""What a loss learns on the way: the automatic temperature and offset, and TAID's interpolation.

LossState is part of the train state. The numbers of a step are solved from the log-ratios of the
whole global batch, after its micro-batches were joined, so they depend on neither accumulation nor
devices; they carry no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.losses import weights
from dcod_jax.losses.weights import AUTO, Tempering, WeightConfig

# Where a temperature is looked for. From MAX on weights are uniform to float32's precision; that is
# also where a run starts, so that the first step is plain (unweighted) training.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 1e6
HALVINGS = 40  # of a bisection: the interval of log temperature ends at 2e-11 of its length
_REACH = 30.0  # sigmoid(±30) is 0 or 1 for every purpose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossState:
    """Scalars that a loss carries from step to step; as a pytree it also holds their shardings."""

    temperature: Any  # float32: smoothed solution, in force at the next step
    offset: Any
    interpolation: Any  # TAID's s; below taid_start before the first step
    momentum: Any  # TAID's
    previous: Any  # TAID's loss of the step before; +inf before the first

    @property
    def tempering(self) -> Tempering:
        return Tempering(self.temperature, self.offset)


def initial() -> LossState:
    """Of a run that begins: uniform weights, TAID not begun."""
    values = (MAX_TEMPERATURE, 0.0, 0.0, 0.0, jnp.inf)  # an array each: the state is donated
    return LossState(*(jnp.full((), value, jnp.float32) for value in values))


# ---------------------------------------------------------------- automatic temperature


def _bisect(f: Callable[[Array], Array], low: Array, high: Array, target: float) -> Array:
    """x in [low, high] with f(x) = target for a monotone f; the nearer end when there is none."""
    rising = f(high) >= f(low)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        above = (f(middle) > target) == rising
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, high))
    return 0.5 * (low + high)


def solve(cfg: WeightConfig, r: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> Tempering:
    """The temperature and offset that meet the targets over the completion tokens given.

    temperature "auto" aims at the effective sample size target_ess (with target_ess 0 at the mean
    raw weight target_mean), offset "auto" at the mean raw weight target_mean. r is the scoped
    log-ratio. Both quantities grow with the temperature where the student lags behind (r < 0); a
    target out of reach gives the nearer end of [MIN_TEMPERATURE, MAX_TEMPERATURE].
    """
    r = jax.lax.stop_gradient(jnp.where(loss_mask, r, 0.0))
    count = jnp.maximum(loss_mask.sum(), 1)
    lowest = jnp.where(loss_mask, r, jnp.inf).min()
    highest = jnp.where(loss_mask, r, -jnp.inf).max()

    def moments(tempering: Tempering) -> tuple[Array, Array]:
        w = jnp.where(loss_mask, weights.WEIGHTS[cfg.name](cfg, r, tempering), 0.0)
        return w.sum() / count, jnp.square(w).sum() / count

    def mean(tempering: Tempering) -> Array:
        return moments(tempering)[0]

    def ess(tempering: Tempering) -> Array:
        first, second = moments(tempering)
        return jnp.square(first) / jnp.maximum(second, jnp.finfo(jnp.float32).tiny)

    def with_offset(temperature: Any) -> Tempering:
        if cfg.offset != AUTO:
            return Tempering(temperature, cfg.offset)
        low, high = -highest - _REACH * temperature, -lowest + _REACH * temperature
        found = _bisect(
            lambda offset: mean(Tempering(temperature, offset)), low, high, cfg.target_mean
        )
        return Tempering(temperature, found)

    if cfg.temperature != AUTO:
        return with_offset(cfg.temperature)
    quantity = ess if cfg.target_ess else mean
    target = cfg.target_ess or cfg.target_mean
    log_temperature = _bisect(
        lambda x: quantity(with_offset(jnp.exp(x))),
        jnp.log(jnp.float32(MIN_TEMPERATURE)),
        jnp.log(jnp.float32(MAX_TEMPERATURE)),
        target,
    )
    return with_offset(jnp.exp(log_temperature))


def same_step(cfg: WeightConfig) -> bool:
    """Whether a step needs its own log-probs before its weights: one more forward pass."""
    return cfg.automatic and cfg.smoothing == 0


def retemper(
    cfg: WeightConfig,
    state: LossState,
    student_logprobs: Float[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> LossState:
    """The state with this batch's solution mixed in: log temperature and offset, smoothed.

    The first solution is taken as it is, and so is every one with smoothing 0. A batch without a
    completion token changes nothing.
    """
    if not cfg.automatic:
        return state
    r = weights.log_ratio(cfg, student_logprobs, teacher_logprobs)
    found = solve(cfg, weights.scoped_log_ratio(cfg, r, loss_mask, segment_ids), loss_mask)
    first = (state.temperature >= MAX_TEMPERATURE) & (state.offset == 0.0)
    keep = jnp.where(first, 0.0, cfg.smoothing)
    keep = jnp.where(loss_mask.any() & jnp.isfinite(r).all(where=loss_mask), keep, 1.0)
    old, new = jnp.log(state.temperature), jnp.log(found.temperature)
    return dataclasses.replace(
        state,
        temperature=jnp.where(
            keep == 1.0, state.temperature, jnp.exp(keep * old + (1 - keep) * new)
        ),
        offset=jnp.where(
            keep == 1.0, state.offset, keep * state.offset + (1 - keep) * found.offset
        ),
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
