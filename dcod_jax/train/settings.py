"""loss.* and optim.* of a config as the frozen records that the functions take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.losses.adaptive import TaidConfig
from dcod_jax.losses.distill import LossConfig
from dcod_jax.losses.weights import AUTO, CHOSEN, WeightConfig
from dcod_jax.train.optim import OptimConfig


def loss_config(config: Any) -> LossConfig:
    """loss.* as the frozen record that DistillLoss takes."""
    values = config.loss.to_dict()
    del values["head_chunk"]  # of the vocabulary head (losses/head.py)
    del values["teacher_weights"]  # of the pipeline, which weighs traces (data/pipeline.py)
    if values["weights"]["name"] == AUTO:
        values["weights"] |= CHOSEN
    taid = {key: values.pop(f"taid_{key}") for key in ("start", "end", "alpha", "beta")}
    records = {
        "weights": WeightConfig(**values["weights"]),
        "taid": TaidConfig(**taid, steps=config.train.steps),
    }
    return LossConfig(**values | records)


def student_source(config: Any) -> str:
    """What the student is read from: student.path, else student.config; DcodError without one."""
    if not (config.student.path or config.student.config):
        raise DcodError(
            "no student: set student.path (HF directory or .gguf) or student.config (config.json)"
        )
    return config.student.path or config.student.config


def optim_config(config: Any) -> OptimConfig:
    """optim.* as the frozen record that make_optimizer takes."""
    return OptimConfig(**config.optim.to_dict())


def best_metric(config: Any) -> str:
    """train.best_metric as metrics.jsonl names it; "" where checkpoints are kept by age only."""
    name = config.train.best_metric
    return f"eval/{name.removeprefix('eval/')}" if name else ""


def held_out_errors(flat: dict[str, Any]) -> Iterator[str]:
    """train.best_metric that is not measured or not where a checkpoint is; problems never asked."""
    names = ("best_metric", "eval_problems", "eval_problems_every", "save_every")
    best, path, own, save = (flat[f"train.{name}"] for name in names)
    key = "train.eval_problems_every" if own else "train.eval_every"
    needed = "train.eval_problems, a JSONL file of {prompt, answer}"
    if path and not flat[key]:
        yield (
            f"train.eval_problems={path} is never asked: set train.eval_problems_every, the steps "
            "between two rounds (0: train.eval_every, which is 0 too)"
        )
    if own and not path:
        yield f"train.eval_problems_every={own} needs {needed}"
    if best.endswith("accuracy") and not path:
        yield f"train.best_metric={best} needs {needed}"
    every = flat[key := key if best.endswith("accuracy") else "train.eval_every"]
    if save and every and best and save % every:
        yield (
            f"train.save_every={save} must be a multiple of {key}={every}, or the best checkpoint "
            f"by {best} could not be told; or set train.best_metric=''"
        )
