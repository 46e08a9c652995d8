"""Every family against transformers: logits, cache, gradients, files, and published configs.

A model is drawn over the options of its family (family_models.py). The suite runs a few that cover
every option together; the long form runs 20 of each family.
"""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import family_models as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from dcod_jax.losses.head import VocabHead, target_logprobs
from dcod_jax.models import cached, hf, transformer
from dcod_jax.models import config as configs
from dcod_jax.models.tensors import flatten, slots, tensor_of

LENGTH = 96
IDS = (3, reference.VOCAB)


def _packed(continued: np.ndarray):
    """(tokens, targets, mask, segments, positions) [2, T]: packed texts, and one padded text."""
    tokens = np.random.default_rng(0).integers(*IDS, (2, LENGTH)).astype(np.int32)
    segments, positions = np.zeros((2, 2, LENGTH), np.int32)
    start = 0
    for number, length in enumerate(reference.SEGMENTS, start=1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    tokens[1, : len(continued)] = continued
    segments[1, : len(continued)] = 1
    positions[1, : len(continued)] = np.arange(len(continued))
    targets = np.roll(tokens, -1, axis=1)
    mask = (segments == np.roll(segments, -1, axis=1)) & (segments > 0)
    mask[1] = False  # the loss is that of the packed row
    return tokens, targets, mask, segments, positions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_and_gradient(config, with_gradient, params, tokens, targets, mask, segments, positions):
    def loss(params):
        hidden = transformer.hidden_states(
            config, params, tokens, segment_ids=segments, positions=positions, remat="full"
        )
        head = VocabHead(LENGTH, softcap=config.final_softcap)

        def nll(logits, targets, aux, shared):
            return -target_logprobs(logits, targets), logits

        weight = transformer.head_weight(config, params)
        return head.loss(hidden, weight, targets, mask, nll)

    if not with_gradient:
        return loss(params)[1], None
    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradient


@functools.partial(jax.jit, static_argnums=0)
def _greedy(config, params, prompt):
    """The continuation, token by token through the cache."""
    count = reference.PROMPT + reference.DRAWN

    def step(carry, position):
        token, cache = carry
        token = jnp.where(position < len(prompt), prompt[jnp.minimum(position, 10)], token)
        hidden, cache = cached.forward_with_cache(
            config, params, token[None, None], positions=position[None, None], cache=cache
        )
        scores = hidden[0, 0] @ transformer.head_weight(config, params).T
        return (jnp.argmax(scores).astype(jnp.int32), cache), token

    cache = cached.init_cache(config, 1, count, jnp.float32)
    _, tokens = jax.lax.scan(step, (prompt[0], cache), jnp.arange(count))
    return tokens


def _files(config, tree):
    """{name of transformers' parameter: tensor} of params or of their gradient."""
    flat, parts = flatten(tree), {}
    for slot in slots(config, "stacked"):
        parts.setdefault(slot.name, []).append(slot)
    return {name: tensor_of(flat, *own, dtype=np.float32) for name, own in parts.items()}


def check(raw, directory, *, with_gradient=True):
    """Everything that must be equal between a torch model of this config and ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about unusual ropes
        model = reference.build(raw)
        model.save_pretrained(directory)
    config, params = hf.load_model(directory, dtype=jnp.float32)
    prompt = np.random.default_rng(1).integers(*IDS, reference.PROMPT).astype(np.int32)
    continued = np.asarray(_greedy(config, params, jnp.asarray(prompt)))
    row = _packed(continued)
    logits, gradient = _logits_and_gradient(config, with_gradient, params, *row)
    texts = np.split(row[0][0], np.cumsum(reference.SEGMENTS))[: len(reference.SEGMENTS)]
    theirs = np.concatenate([reference.logits(model, text) for text in texts])
    assert theirs.std() > 0.2  # of a size at which the tolerance means something
    np.testing.assert_allclose(logits[0, : len(theirs)], theirs, atol=2e-4, rtol=0)
    theirs = reference.logits(model, continued)
    np.testing.assert_allclose(logits[1, : len(continued)], theirs, atol=2e-4, rtol=0)
    # Each token that was drawn with the cache is the one that comes next without it.
    drawn = slice(reference.PROMPT - 1, len(continued) - 1)
    for following in (logits[1], theirs):
        np.testing.assert_array_equal(
            np.argmax(following[drawn], -1), continued[reference.PROMPT :]
        )
    if with_gradient:
        _check_gradient(_files(config, gradient), model, texts)
    _check_export(model, directory, config, params)


def _check_gradient(ours, model, texts):
    theirs = reference.gradients(model, texts)
    assert ours.keys() == theirs.keys()
    sizes = {name: np.abs(expected).max() for name, expected in theirs.items()}
    floor = 1e-3 * max(sizes.values())  # the bias of keys without positions has no gradient
    for name, expected in theirs.items():
        difference = np.abs(ours[name] - expected).max()
        if difference > 1e-4 * max(sizes[name], floor):
            # Nothing but rounding is left of the gradient of a router whose one expert a norm
            # follows. How much that is shows where torch rounds otherwise.
            others = (reference.gradients(model, texts, scale=scale) for scale in (0.7, 1.3, 3.0))
            rounding = max(np.abs(other[name] - expected).max() for other in others)
            assert difference <= 4 * rounding, (name, difference, rounding, sizes[name])


def _check_export(model, directory, config, params):
    ours = directory / "ours"
    hf.save_params(ours, config, params, dtype="float32", max_shard_bytes=1 << 30)
    raw = configs.to_hf(config, dtype="float32")
    (ours / "config.json").write_text(json.dumps(raw))
    if config.model_type not in ("cwm", "olmo3"):  # whose old form cannot say all ropes
        assert configs.from_hf({**raw, "rope_parameters": None}) == config  # transformers 4
    first, second = (load_file(at / hf.SINGLE) for at in (directory, ours))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            ours, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    again, report = loaded
    assert not any(report.values()), report
    tokens = np.arange(3, 103)
    assert np.array_equal(reference.logits(again, tokens), reference.logits(model, tokens))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("model_type", configs.FAMILIES)
def test_twenty_of_each_family_are_those_of_transformers(model_type, seed, tmp_path):
    check(reference.draw(model_type, seed), tmp_path)


# Together they have every option: see `draw`.
@pytest.mark.parametrize(
    ("model_type", "seed", "with_gradient"),
    [
        ("gemma2", 0, True),
        ("phi3", 6, True),
        ("gemma3_text", 5, False),
        pytest.param("olmo3", 0, False, marks=reference.OLMO3),
        ("smollm3", 3, False),
        ("granite", 7, False),
        ("glm4", 1, False),
        ("qwen3_moe", 0, True),
        ("olmoe", 1, False),
    ],
)
def test_models_with_every_option_are_those_of_transformers(
    model_type, seed, with_gradient, tmp_path
):
    check(reference.draw(model_type, seed), tmp_path, with_gradient=with_gradient)
