"""loss.* and optim.* of a config as the frozen records that the functions take."""

from __future__ import annotations

from typing import Any

from dcod_jax.losses.adaptive import TaidConfig
from dcod_jax.losses.distill import LossConfig
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.train.optim import OptimConfig


def loss_config(config: Any) -> LossConfig:
    """loss.* as the frozen record that DistillLoss takes."""
    values = config.loss.to_dict()
    del values["head_chunk"]  # of the vocabulary head (losses/head.py)
    del values["teacher_weights"]  # of the pipeline, which weighs traces (data/pipeline.py)
    taid = {key: values.pop(f"taid_{key}") for key in ("start", "end", "alpha", "beta")}
    records = {
        "weights": WeightConfig(**values["weights"]),
        "taid": TaidConfig(**taid, steps=config.train.steps),
    }
    return LossConfig(**values | records)


def optim_config(config: Any) -> OptimConfig:
    """optim.* as the frozen record that make_optimizer takes."""
    return OptimConfig(**config.optim.to_dict())


def problems_every(config: Any) -> int:
    """Steps between two rounds of train.eval_problems."""
    return config.train.eval_problems_every or config.train.eval_every


def best_metric(config: Any) -> str:
    """train.best_metric as metrics.jsonl names it; "" where checkpoints are kept by age only."""
    name = config.train.best_metric
    return f"eval/{name.removeprefix('eval/')}" if name else ""
