"""The token choice against transformers' own logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from dcod_jax.errors import DcodError
from dcod_jax.sample import sampling
from dcod_jax.sample.sampling import choose, make_settings

ROWS, VOCAB = 24, 1000


def random_logits(spread=3.0, seed=0):
    return np.random.default_rng(seed).normal(0, spread, (ROWS, VOCAB)).astype(np.float32)


def their_logits(logits, *, temperature, top_k, top_p, min_p):
    """In the order of transformers' GenerationMixin._get_logits_processor."""
    scores = torch.tensor(logits)
    warpers = [theirs.TemperatureLogitsWarper(temperature)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 1, 1.0, 0.0),
        (1.0, 20, 1.0, 0.0),
        (1.0, 5000, 1.0, 0.0),  # more than there are
        (1.0, 0, 0.9, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 0, 1.0, 0.05),
        (1.0, 0, 1.0, 1.0),
        (0.5, 0, 0.7, 0.0),
        (2.0, 40, 0.8, 0.1),
        (0.7, 200, 0.95, 0.02),
    ],
)
def test_filters_keep_what_transformers_keeps(spread, temperature, top_k, top_p, min_p):
    logits = random_logits(spread)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings = make_settings(**options)
    assert settings.mode == "filtered"
    got = np.asarray(sampling.keep_likely(jnp.asarray(logits) / settings.temperature, settings))
    expected = their_logits(logits, **options)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    kept = np.isfinite(expected)
    assert kept.any(axis=1).all()
    np.testing.assert_allclose(got[kept], expected[kept], rtol=1e-6)


def test_equal_logits_stay_or_go_together():
    """The k-th largest and what equals it stay, as in transformers; so does the edge of top_p."""
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0, 1.0, -0.0]])
    kept = np.isfinite(sampling.keep_likely(logits, make_settings(temperature=1.0, top_k=2)))
    assert kept.tolist() == [[True, True, True, False, True, False]]
    kept = np.isfinite(sampling.keep_likely(logits, make_settings(temperature=1.0, top_p=0.5)))
    assert kept.tolist() == [[True, True, True, False, True, False]]


def test_draws_come_from_the_filtered_softmax():
    logits = jnp.array([2.0, 1.0, 0.5, 0.0, -1.0, 9.0])  # the last one is padding
    settings = make_settings(temperature=0.8, top_k=4, top_p=0.9)
    count = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))
    draw = jax.jit(choose, static_argnames="valid_vocab")
    tokens, logprobs = draw(jnp.tile(logits, (count, 1)), keys, settings, valid_vocab=5)
    expected = torch.softmax(
        torch.from_numpy(
            their_logits(
                np.asarray(logits[None, :5]), temperature=0.8, top_k=4, top_p=0.9, min_p=0.0
            )
        ),
        -1,
    )[0].numpy()
    kept = expected > 0
    assert kept.sum() == 3
    observed = np.bincount(np.asarray(tokens), minlength=5)
    assert (observed[~kept] == 0).all()
    wanted = count * expected[kept]
    assert ((observed[kept] - wanted) ** 2 / wanted).sum() < 13.8  # chi-square, 2 degrees, p = .001
    at_one = np.asarray(jax.nn.log_softmax(logits[:5]))  # the model's own, unfiltered
    np.testing.assert_allclose(logprobs, at_one[np.asarray(tokens)], atol=1e-6)


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.array([[0.0, 3.0, 3.0, 9.0], [-1.0, -2.0, -1.0, 9.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, _ = choose(logits, keys, make_settings(temperature=0.0), valid_vocab=3)
    assert tokens.tolist() == [1, 0]


def test_draws_are_those_of_categorical():
    """The stream of random numbers that recorded results were made with."""
    logits = jnp.asarray(random_logits())
    keys = jax.random.split(jax.random.key(1), ROWS)
    tokens, _ = choose(logits, keys, make_settings(temperature=0.7), valid_vocab=VOCAB)
    expected = jax.vmap(jax.random.categorical)(keys, logits / 0.7)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be >= 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1 must be from 0 to 1"),
        ({"min_p": 2.0}, "min_p=2.0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(DcodError, match=message):
        make_settings(**({"temperature": 1.0} | changes))
