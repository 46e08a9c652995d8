"""Spans of a teacher with another tokenizer: one log-ratio for the tokens of one text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.losses import weights
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import Tokens, WeightConfig
from dcod_jax.types import Batch

B, T, D, V = 3, 24, 8, 29


def config(**changes) -> WeightConfig:
    values = {"name": "sigmoid", "temperature": 0.5, "offset": 0.1, "clip": 2.0, "scope": "token"}
    return WeightConfig(**values | {"normalize": "mean", "warmup_steps": 0} | changes)


def example(singles: bool = False) -> tuple[jax.Array, jax.Array, Batch]:
    """Rows of two traces; prompts and a pause between turns are outside the mask."""
    generator = np.random.default_rng(5)
    segments = np.repeat([[1, 2, 0]], [11, 9, 4], axis=1).repeat(B, axis=0)
    mask = (segments > 0) & (generator.random((B, T)) < 0.8)
    turns = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    turns |= mask & np.pad(np.diff(segments, axis=1) != 0, ((0, 0), (1, 0)))
    starts = turns | (mask & (singles | (generator.random((B, T)) < 0.4)))
    batch = Batch(
        tokens=jnp.zeros((B, T), jnp.int32),
        targets=jnp.asarray(generator.integers(0, V, (B, T)), jnp.int32),
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.zeros((B, T), jnp.int32),
        teacher_logprobs=jnp.asarray(np.where(mask, -3 * generator.random((B, T)), 0), jnp.float32),
        span_ids=jnp.asarray(starts.cumsum(axis=1), jnp.int32),
    )
    hidden = generator.normal(size=(B, T, D)).astype(np.float32)
    head = generator.normal(size=(V, D)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(head), batch


def reference(cfg: WeightConfig, batch: Batch, log_q: np.ndarray) -> np.ndarray:
    """The log-ratio of each token, span by span, in float64."""
    mask, spans = np.asarray(batch.loss_mask), np.asarray(batch.span_ids)
    r = log_q.astype(np.float64) - np.asarray(batch.teacher_logprobs, np.float64)
    out = r.copy()
    for row in range(B):
        for span in np.unique(spans[row]):
            at = (spans[row] == span) & mask[row]
            if cfg.span != "token" and at.any():
                out[row, at] = r[row, at].sum() / (at.sum() if cfg.span == "mean" else 1)
    return np.where(mask, out, 0)


@pytest.mark.parametrize("span", ["mean", "sum", "token"])
def test_each_token_of_a_span_has_the_log_ratio_of_its_text(span):
    _, _, batch = example()
    log_q = -4 * np.random.default_rng(1).random((B, T)).astype(np.float32)
    cfg = config(span=span)
    parts = (batch.teacher_logprobs, batch.loss_mask, batch.segment_ids, batch.span_ids)
    tokens = Tokens(jnp.asarray(log_q), *parts)
    wanted = reference(cfg, batch, log_q)
    found = jnp.where(batch.loss_mask, weights.span_signal(cfg, tokens), 0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    # A mean over the trace is the same whether its spans are joined first or not.
    whole = dataclasses.replace(cfg, scope="sequence")
    plain = weights.scoped_signal(whole, tokens._replace(span_ids=None))
    if span != "sum":
        joined = weights.scoped_signal(whole, tokens)
        np.testing.assert_allclose(joined, plain, rtol=1e-5, atol=1e-6)


def loss_of(cfg, batch, hidden, head):
    loss = DistillLoss(LossConfig("nll", cfg), VocabHead(16))
    sums, stats = loss(hidden, head, batch, step=0)
    return sums.loss, stats


value_and_grad = jax.jit(
    jax.value_and_grad(loss_of, argnums=(2, 3), has_aux=True), static_argnums=0
)


def test_the_loss_joins_spans_across_chunks_of_the_head_and_at_its_positions():
    hidden, head, batch = example()
    cfg = config()
    (loss, stats), gradients = value_and_grad(cfg, batch, hidden, head)
    r = reference(cfg, batch, np.asarray(stats.student_logprobs))
    wanted = np.where(batch.loss_mask, 1 / (1 + np.exp(-(r + 0.1) / 0.5)), 0)
    np.testing.assert_allclose(stats.weights, wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(loss, -(wanted * np.asarray(stats.student_logprobs)).sum(), 1e-5)
    places = np.full((B, 20), T, np.int32)
    for row, mask in enumerate(np.asarray(batch.loss_mask)):
        places[row, : mask.sum()] = np.flatnonzero(mask)
    compact = dataclasses.replace(batch, head_positions=jnp.asarray(places))
    (again, _), others = value_and_grad(cfg, compact, hidden, head)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("span", ["mean", "sum"])
def test_spans_of_one_token_change_no_bit(span):
    hidden, head, batch = example(singles=True)
    plain = dataclasses.replace(batch, span_ids=None)
    (loss, stats), gradients = value_and_grad(config(span=span), batch, hidden, head)
    (other, others), slopes = value_and_grad(config(), plain, hidden, head)
    assert (np.asarray(loss) == np.asarray(other)).all()
    np.testing.assert_array_equal(stats.weights, others.weights)
    for one, two in zip(gradients, slopes, strict=True):
        np.testing.assert_array_equal(one, two)
