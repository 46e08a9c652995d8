"""bfloat16 against float32 on the real SmolLM2-135M: loss, log-probs and DisCorD weights."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from dcod_jax.losses import adaptive, reduce
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.models import hf
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.train.forward import Forward
from dcod_jax.types import Batch

pytestmark = pytest.mark.long
DIRECTORY = Path(os.environ.get("DCOD_SMOLLM2", "models/SmolLM2-135M-Instruct"))
ROWS, LENGTH = 8, 40
BOUNDS = {
    "loss": 0.02,
    "nll": 0.02,
    "log q, mean": 0.06,
    "log q, largest": 0.4,
    "weight, mean": 0.01,
    "weight, largest": 0.08,
}


def batch_of(tokenizer) -> Batch:
    """Additions with a worked answer, one a row; the teacher's log-probs are drawn."""
    tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
    mask, segments = np.zeros((2, ROWS, LENGTH), bool)
    for row, record in enumerate(tiny.sums(ROWS)):
        prompt = tokenizer(f"Question: {record['prompt']}\nAnswer: ")["input_ids"]
        whole = prompt + tokenizer(record["completion"])["input_ids"]
        assert len(whole) <= LENGTH + 1
        tokens[row, : len(whole)] = whole
        mask[row, len(prompt) - 1 : len(whole) - 1] = True
        segments[row, : len(whole) - 1] = True
    teacher = np.where(mask, -np.random.default_rng(0).exponential(1.0, mask.shape), 0.0)
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        teacher_logprobs=jnp.asarray(teacher, jnp.float32),
    )


def test_bfloat16_stays_within_the_bounds_that_the_page_states():
    """docs/method.md, bfloat16."""
    if not (DIRECTORY / "config.json").exists():
        pytest.skip(f"{DIRECTORY} is absent: python tools/get_smollm2.py, or set DCOD_SMOLLM2")
    config, params = hf.load_model(DIRECTORY, dtype=jnp.float32)
    batch = batch_of(AutoTokenizer.from_pretrained(DIRECTORY))
    mask = np.asarray(batch.loss_mask)
    cfg = LossConfig("nll", WeightConfig("sigmoid", 1.0, 0.0, 2.0, "token", "mean", 0))
    mesh, losses, logprobs, weights = make_mesh(devices=jax.devices()[:1]), [], [], []
    for dtype in ("float32", "bfloat16"):
        forward = Forward(config, DistillLoss(cfg, VocabHead(320, None, mesh)), jnp.dtype(dtype))
        _, (sums, stats, _) = jax.jit(forward)(params, batch, jnp.int32(0), adaptive.initial(), ())
        losses.append([float(reduce.finish(sums, "mean")), float(reduce.mean_nll(sums))])
        logprobs.append(np.asarray(stats.student_logprobs)[mask])
        weights.append(np.asarray(stats.weights)[mask])
    apart = np.abs(np.diff([logprobs, weights], axis=1))[:, 0]  # [2, tokens]
    found = {
        "loss": abs(losses[1][0] / losses[0][0] - 1),
        "nll": abs(losses[1][1] / losses[0][1] - 1),
        "log q, mean": apart[0].mean(),
        "log q, largest": apart[0].max(),
        "weight, mean": apart[1].mean(),
        "weight, largest": apart[1].max(),
    }
    print(f"{mask.sum()} tokens, loss and nll {losses}, apart {found}")
    assert found["loss"] > 0  # two programs, not one
    assert not {name: value for name, value in found.items() if value > BOUNDS[name]}
