"""Logits and greedy continuations against transformers (torch, CPU, float32)."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dcod_jax.models import cached, hf, transformer

TOLERANCE = 2e-4
IDS = 131  # ids below the smallest vocabulary


def _random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, IDS, shape).astype(np.int32)


def _ours(pair, tokens, **inputs) -> np.ndarray:
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    return np.asarray(transformer.logits(pair.config, pair.params, jnp.asarray(tokens), **arrays))


def test_logits_match_over_several_query_blocks(pair):
    tokens = _random_tokens(2, 150)
    theirs = pair.hf_logits(tokens)
    assert theirs.std() > 0.5  # logits of a size at which the tolerance means something
    np.testing.assert_allclose(_ours(pair, tokens), theirs, atol=TOLERANCE, rtol=0)


def test_logits_match_right_padded(pair):
    tokens = _random_tokens(2, 40)
    mask = np.ones((2, 40), np.int64)
    mask[1, 23:] = 0
    ours = _ours(pair, tokens, segment_ids=mask.astype(np.int32))
    theirs = pair.hf_logits(tokens, attention_mask=mask)
    keep = mask.astype(bool)
    np.testing.assert_allclose(ours[keep], theirs[keep], atol=TOLERANCE, rtol=0)
    assert np.isfinite(ours).all()


def test_logits_match_left_padded_with_positions(pair):
    tokens = _random_tokens(2, 40)
    mask = np.ones((2, 40), np.int64)
    mask[1, :13] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ours = _ours(
        pair, tokens, segment_ids=mask.astype(np.int32), positions=positions.astype(np.int32)
    )
    theirs = pair.hf_logits(tokens, attention_mask=mask, position_ids=positions)
    keep = mask.astype(bool)
    np.testing.assert_allclose(ours[keep], theirs[keep], atol=TOLERANCE, rtol=0)


def test_packed_segments_match_separate_runs(pair):
    tokens = _random_tokens(1, 96)
    lengths = [17, 61, 9]  # and 9 tokens of padding
    segment_ids = np.zeros((1, 96), np.int32)
    positions = np.zeros((1, 96), np.int32)
    spans, start = [], 0
    for number, length in enumerate(lengths, start=1):
        span = slice(start, start + length)
        segment_ids[0, span], positions[0, span] = number, np.arange(length)
        spans.append(span)
        start += length
    ours = _ours(pair, tokens, segment_ids=segment_ids, positions=positions)
    for span in spans:
        theirs = pair.hf_logits(tokens[:, span])
        np.testing.assert_allclose(ours[:, span], theirs, atol=TOLERANCE, rtol=0)


def _hf_greedy(pair, prompt: np.ndarray, count: int) -> list[int]:
    tokens = prompt[None]
    for _ in range(count):
        following = pair.hf_logits(tokens)[0, -1].argmax()
        tokens = np.concatenate([tokens, [[following]]], axis=1)
    return tokens[0, len(prompt) :].tolist()


def test_greedy_continuations_match(pair):
    count, prompts = 32, [_random_tokens(n, seed=n) for n in (11, 4, 7)]
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.zeros((3, max(lengths)), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    config, params = pair.config, pair.params
    cache = cached.init_cache(config, 3, int(max(lengths)) + count, jnp.float32)

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = cached.forward_with_cache(
            config, params, tokens, positions=positions, cache=cache
        )
        return hidden @ transformer.head_weight(config, params).T, cache

    positions = np.broadcast_to(np.arange(padded.shape[1]), padded.shape)
    logits, cache = step(jnp.asarray(padded), jnp.asarray(positions), cache)
    token = jnp.argmax(logits[jnp.arange(3), lengths - 1], axis=-1)
    ours = [np.asarray(token)]
    for index in range(count - 1):
        logits, cache = step(token[:, None], jnp.asarray(lengths + index)[:, None], cache)
        token = jnp.argmax(logits[:, 0], axis=-1)
        ours.append(np.asarray(token))
    for row, prompt in enumerate(prompts):
        assert [int(tokens[row]) for tokens in ours] == _hf_greedy(pair, prompt, count)


def _shrink(model) -> None:
    """Bring what every norm sees to the size of the square root of its eps, about 1e-3."""
    small = {"embed_tokens": 0.01, "o_proj": 2e-3, "down_proj": 2e-3}
    if model.config.model_type == "qwen3":  # q and k have norms of their own
        small |= {"q_proj": 2e-3, "k_proj": 2e-3}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= small.get(name.split(".")[-2], 1.0)
        if model.config.tie_word_embeddings:
            model.model.norm.weight /= small["embed_tokens"]  # logits of the usual size


def test_a_wrong_norm_epsilon_shows(pair, tmp_path):
    """Hidden states so small that eps counts: equal logits, and not with 1.5 times the eps."""
    model = copy.deepcopy(pair.model)
    _shrink(model)
    model.save_pretrained(tmp_path)
    config, params = hf.load_model(tmp_path, dtype=np.float32)
    tokens = _random_tokens(2, 40)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    def ours(eps: float) -> np.ndarray:
        changed = dataclasses.replace(config, rms_norm_eps=eps)
        return np.asarray(transformer.logits(changed, params, jnp.asarray(tokens)))

    expected = theirs()
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours(config.rms_norm_eps), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(ours(1.5 * config.rms_norm_eps) - expected).max() > 100 * TOLERANCE
    norms = {name: m for name, m in model.named_modules() if hasattr(m, "variance_epsilon")}
    assert len(norms) == 1 + config.num_layers * (4 if config.qk_norm else 2)
    for name, norm in norms.items():  # so each norm alone would be caught with another eps
        norm.variance_epsilon *= 1.5
        assert np.abs(theirs() - expected).max() > 10 * TOLERANCE, name
        norm.variance_epsilon /= 1.5
