"""The peer of bench_step.py: Tunix's trainers on its own llama3 model of the same shape.

Run by bench_step.py with the peer's python; imports nothing of dcod_jax.

tunix: PeftTrainer with its default SFT loss. tunix-live: DistillationTrainer with LogitStrategy, a
live teacher of the student's shape, temperature 1, alpha 1 (the divergence alone decides; the
strategy computes its cross-entropies for the metrics whatever alpha is).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_measure import BATCH, LEARNING_RATE, LENGTH, SHAPE, measure
from flax import nnx
from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]
from tunix.sft import peft_trainer, utils  # pyright: ignore[reportMissingImports]


def make_model(seed: int) -> Any:
    """Tunix's llama3 in the benchmark's shape, random weights."""
    config = llama3.ModelConfig(
        num_layers=SHAPE["num_hidden_layers"],
        vocab_size=SHAPE["vocab_size"],
        embed_dim=SHAPE["hidden_size"],
        hidden_dim=SHAPE["intermediate_size"],
        num_heads=SHAPE["num_attention_heads"],
        head_dim=SHAPE["head_dim"],
        num_kv_heads=SHAPE["num_key_value_heads"],
        rope_theta=100000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


def model_input(batch: Any) -> dict[str, Any]:
    """What the trainers hand to the model."""
    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def sft_trainer() -> tuple[Any, type[Any]]:
    """(trainer, its input record): PeftTrainer as it comes."""
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = peft_trainer.PeftTrainer(make_model(0), optax.adamw(LEARNING_RATE), config)
    return trainer, peft_trainer.TrainingInput


def live_trainer() -> tuple[Any, type[Any]]:
    """(trainer, its input record): DistillationTrainer with LogitStrategy and a live teacher."""
    from tunix.distillation import (  # pyright: ignore[reportMissingImports]
        distillation_trainer,
        strategies,
    )

    def forward(model: Any, **inputs: Any) -> Any:
        logits, _ = model(
            inputs["input_tokens"],
            positions=inputs["positions"],
            attention_mask=inputs["attention_mask"],
            cache=None,
        )
        return logits

    strategy = strategies.LogitStrategy(
        student_forward_fn=forward,
        teacher_forward_fn=forward,
        labels_fn=lambda **inputs: jax.nn.one_hot(inputs["input_tokens"], SHAPE["vocab_size"]),
        temperature=1.0,
        alpha=1.0,
    )
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = distillation_trainer.DistillationTrainer(
        make_model(0), make_model(1), strategy, optax.adamw(LEARNING_RATE), config
    )
    return trainer, distillation_trainer.TrainingInput


TRAINERS = {"tunix": sft_trainer, "tunix-live": live_trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=TRAINERS, required=True)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    args, _ = parser.parse_known_args()  # options of ours mean nothing here
    trainer, record = TRAINERS[args.worker]()
    trainer.is_managed_externally = True  # train() may be called again: warmup, then measured
    trainer = trainer.with_gen_model_input_fn(model_input)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    example = record(
        input_tokens=jnp.asarray(ids, jnp.int32), input_mask=jnp.ones((BATCH, LENGTH), jnp.bool_)
    )
    result = measure(
        lambda count: trainer.train([example] * count), warmup=args.warmup, steps=args.steps
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
