"""Schedules against a plain formula, decay on matrices only, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcod_jax.models import transformer
from dcod_jax.models.config import from_hf
from dcod_jax.train.optim import OptimConfig, decay_mask, make_optimizer, make_schedule


def config(**changes) -> OptimConfig:
    values = {
        "learning_rate": 0.5,
        "schedule": "constant",
        "warmup_steps": 0,
        "final_fraction": 0.1,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip_norm": 0.0,
    }
    return OptimConfig(**values | changes)


def by_hand(schedule, step, *, warmup, steps, peak=0.5, final=0.1):
    if step < warmup:
        return peak * step / warmup
    x = min((step - warmup) / (steps - warmup), 1.0)
    left = {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}[schedule]
    return peak * (final + (1 - final) * left)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_match_the_formula(schedule, warmup):
    made = make_schedule(config(schedule=schedule, warmup_steps=warmup), 20)
    got = [float(made(step)) for step in range(25)]
    wanted = [by_hand(schedule, step, warmup=warmup, steps=20) for step in range(25)]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert got[-1] == pytest.approx(0.5 if schedule == "constant" else 0.05, rel=1e-6)


def test_a_run_of_nothing_but_warmup_is_finite():
    made = make_schedule(config(schedule="cosine", warmup_steps=10), 10)
    assert [float(made(step)) for step in (0, 5)] == [0.0, 0.25]
    assert math.isfinite(float(made(10)))


def tiny_params():
    raw = {
        "model_type": "qwen2",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    return transformer.init_params(from_hf(raw), jax.random.key(0))


def test_weight_decay_reaches_matrices_and_neither_norms_nor_biases():
    params = tiny_params()
    mask = decay_mask(params)
    layers = mask["layers"]
    assert layers["self_attn"]["q_proj"] == {"kernel": True, "bias": False}
    assert layers["input_layernorm"] == {"scale": False}  # [L, D]: rank 2, and yet no matrix
    assert mask["embed_tokens"]["embedding"]
    assert mask["lm_head"]["embedding"]
    assert not mask["norm"]["scale"]
    optimizer, _ = make_optimizer(config(weight_decay=0.1), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    for decays, old, now in zip(*map(jax.tree.leaves, (mask, params, new)), strict=True):
        np.testing.assert_allclose(now, old * (0.95 if decays else 1.0), rtol=1e-6)


def test_adamw_matches_a_plain_loop_with_clipping_on_and_off():
    start = {"kernel": jnp.float32([[1.0, -2.0]]), "scale": jnp.float32([3.0])}
    gradients = {"kernel": jnp.float32([[3.0, 4.0]]), "scale": jnp.float32([12.0])}  # norm 13
    for clip, factor in ((0.0, 1.0), (6.5, 0.5), (100.0, 1.0)):
        cfg = config(clip_norm=clip, weight_decay=0.01, schedule="linear", eps=0.1)
        optimizer, _ = make_optimizer(cfg, 5)
        params, state = start, optimizer.init(start)
        wanted = {name: np.asarray(value, np.float64) for name, value in start.items()}
        first, second = (dict.fromkeys(start, 0.0) for _ in range(2))
        for step in range(3):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            rate = by_hand("linear", step, warmup=0, steps=5)
            for name in start:
                g = np.asarray(gradients[name], np.float64) * factor
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g * g
                m, v = (
                    first[name] / (1 - 0.9 ** (step + 1)),
                    second[name] / (1 - 0.95 ** (step + 1)),
                )
                decay = 0.01 * wanted[name] if name == "kernel" else 0.0
                wanted[name] = wanted[name] - rate * (m / (np.sqrt(v) + 0.1) + decay)
        for name in start:
            np.testing.assert_allclose(params[name], wanted[name], rtol=2e-6)


def test_moments_are_float32():
    optimizer, _ = make_optimizer(config(), 10)
    leaves = jax.tree.leaves(optimizer.init(tiny_params()))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32"), jnp.dtype("int32")}
