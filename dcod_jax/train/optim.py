"""AdamW with decay on matrices only, clipping, learning-rate schedules, and steps that are skipped.

Two things are asked of a step: that loss and gradient norm are finite (optim.on_nonfinite=skip),
and that the norm is at most optim.spike_factor times the running quantile of the steps taken. Both
are decided on the device, in the step; the state is part of the optimizer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.train.metrics import quantile_of
from dcod_jax.types import Params

Schedule = Callable[[Any], Array]

# Leaves that are matrices. Rank cannot tell: a stacked norm scale [L,D] has two dimensions.
DECAYED = ("kernel", "experts", "embedding", "lora_a", "lora_b")

# What is left of the way from the peak to the final rate at progress x in [0, 1] after warmup.
DECAYS: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """optim.* of the configuration; defaults and meanings are in configs/base.py."""

    learning_rate: float | Array  # an array where the rate is part of the optimizer's state
    schedule: str
    warmup_steps: int
    final_fraction: float
    weight_decay: float
    b1: float
    b2: float
    eps: float
    clip_norm: float
    offload: bool = False
    on_nonfinite: str = "stop"
    spike_factor: float = 0.0
    max_skipped: int = 20


def make_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Learning rate of step 0, 1, ..., steps-1 (as HF and optax count: step 0 of a warmup is 0).

    peak·step/warmup, then peak·(f + (1-f)·decay(x)), x = (step-warmup)/(steps-warmup), f the
    final fraction; constant stays at the peak.
    """
    decay = DECAYS[cfg.schedule]
    length = max(steps - cfg.warmup_steps, 1)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - cfg.warmup_steps) / length, 0.0, 1.0)
        after = cfg.final_fraction + (1.0 - cfg.final_fraction) * decay(progress)
        warmup = jnp.minimum(step / max(cfg.warmup_steps, 1), 1.0)
        return cfg.learning_rate * (jnp.where(step < cfg.warmup_steps, warmup, after))

    return schedule


def decay_mask(params: Params) -> Params:
    """True on the leaves that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


# ---------------------------------------------------------------- skipped steps


WINDOW = 100  # steps taken, whose gradient norms the quantile is of
FEWEST = 10  # of them before the quantile means anything
QUANTILE = 0.95


class Guarded(NamedTuple):
    """State of an optimizer with a guard."""

    inner: Any
    norms: Float[Array, " W"]  # of the last WINDOW steps taken, in a ring; +inf where none was
    taken: Int[Array, ""]
    skipped: Int[Array, ""]


def limit(state: Guarded, factor: float) -> Float[Array, ""]:
    """The largest gradient norm of a step that is taken; +inf without a factor or a history."""
    if not factor:
        return jnp.float32(jnp.inf)
    count = jnp.minimum(state.taken, WINDOW)
    found = factor * quantile_of(jnp.sort(state.norms), count, QUANTILE)
    return jnp.where(count >= FEWEST, found, jnp.inf)


def guarded(
    optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose update of a step that is skipped is 0 and leaves its state as it was.

    update takes `loss` and `norm`, of the gradient before clipping, as further arguments. factor 0:
    only what is not finite is skipped.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> Guarded:
        none = jnp.zeros((), jnp.int32)
        return Guarded(optimizer.init(params), jnp.full(WINDOW, jnp.inf, jnp.float32), none, none)

    def update(
        updates: optax.Updates,
        state: Guarded,
        params: optax.Params | None = None,
        *,
        loss: Array,
        norm: Array,
        **more: Any,
    ) -> tuple[optax.Updates, Guarded]:
        skip = ~(jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit(state, factor)))
        changes, inner = optimizer.update(updates, state.inner, params, **more)
        taken = Guarded(
            inner, state.norms.at[state.taken % WINDOW].set(norm), state.taken + 1, state.skipped
        )
        changes = jax.tree.map(lambda x: jnp.where(skip, jnp.zeros_like(x), x), changes)
        state = unless_skipped(skip, state, taken)
        return changes, state._replace(skipped=state.skipped + skip)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def unless_skipped(skip: Bool[Array, ""], before: Any, after: Any) -> Any:
    """The tree before a step that was skipped, or after one that was taken: the same bits."""
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), before, after)


def make_optimizer(
    cfg: OptimConfig, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The optimizer and its learning-rate schedule over `steps` optimizer steps."""
    schedule = make_schedule(cfg, steps)
    adamw = optax.adamw(
        schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask
    )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity()
    optimizer = optax.chain(clip, adamw)
    if cfg.on_nonfinite == "skip" or cfg.spike_factor:
        optimizer = guarded(optimizer, cfg.spike_factor)
    return optimizer, schedule
