"""AdamW with decay on matrices only, global-norm clipping, and the learning-rate schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dcod_jax.train.guard import guarded
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
    max_skipped: int = 0


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
