"""An optimizer whose state holds the learning rate, and the student's architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from dcod_jax.errors import DcodError
from dcod_jax.models.config import ModelConfig
from dcod_jax.train.optim import OptimConfig, Schedule, make_optimizer
from dcod_jax.types import TrainState


def adjustable_optimizer(
    cfg: OptimConfig, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The package's optimizer with its peak rate in the state, and the schedule relative to it."""

    def build(learning_rate: Any) -> optax.GradientTransformation:
        return make_optimizer(dataclasses.replace(cfg, learning_rate=learning_rate), steps)[0]

    optimizer = optax.inject_hyperparams(build)(learning_rate=cfg.learning_rate)
    return optimizer, make_optimizer(dataclasses.replace(cfg, learning_rate=1.0), steps)[1]


def with_rate(state: TrainState, rate: float) -> TrainState:
    """The state of an adjustable optimizer with this peak learning rate."""
    hyper = dict(state.opt_state.hyperparams)
    hyper["learning_rate"] = jnp.full_like(hyper["learning_rate"], rate)
    opt_state = state.opt_state._replace(hyperparams=hyper)
    return dataclasses.replace(state, opt_state=opt_state)


def student_config(teacher: ModelConfig, width: int, layers: int) -> ModelConfig:
    """The teacher's architecture at another width (heads of 16) and depth."""
    if width % 16:
        raise DcodError(f"study.width={width} must be a multiple of 16, the size of a head")
    return dataclasses.replace(
        teacher,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
    )
