"""Weights against a plain float64 loop, their identities, and their range at extreme log-probs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcod_jax.losses import weights
from dcod_jax.losses.weights import Tokens, WeightConfig

NAMES = tuple(weights.WEIGHTS)
SCOPES = ("token", "prefix", "sequence")
NORMALIZATIONS = ("mean", "none", "sequence")
# Two rows: documents of several lengths, prompt tokens in and between, padding at the end.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]])
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 0, 0, 1, 1]], bool)


def config(**changes) -> WeightConfig:
    values = {
        "name": "sigmoid",
        "temperature": 1.0,
        "offset": 0.0,
        "clip": 2.0,
        "scope": "token",
        "normalize": "mean",
        "warmup_steps": 0,
    }
    return WeightConfig(**values | changes)


def tables(seed: int = 0):
    """Log-probabilities of the target under student and teacher, V = 5."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 5, SEGMENTS.shape)[..., None]

    def of_target():
        logits = generator.normal(size=(*SEGMENTS.shape, 5)) * 2
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return jnp.float32(np.take_along_axis(logprobs, target, -1)[..., 0])

    return of_target(), of_target()


def weigh(cfg, student, teacher, step, *, mask=MASK, segments=SEGMENTS):
    where = (jnp.asarray(mask), jnp.asarray(segments))
    return weights.weigh(cfg, Tokens(student, teacher, *where), step, None)


def token_weights(cfg, student, teacher):
    return weights.raw(cfg, weights.log_ratio(cfg, student, teacher), None)


def by_hand(cfg, student, teacher, step):
    """The definition, one token after another, float64."""
    out = np.zeros(student.shape)
    for row, segment in itertools.product(range(student.shape[0]), range(1, 4)):
        places = [t for t in range(SEGMENTS.shape[1]) if SEGMENTS[row, t] == segment]
        places = [t for t in places if MASK[row, t]]
        r = []
        for t in places:
            q, p = float(student[row, t]), float(teacher[row, t])
            r.append({"dft": q, "confident": p}.get(cfg.name, q - p))
        values = []
        for i in range(len(places)):
            window = {"token": r[i : i + 1], "prefix": r[: i + 1], "sequence": r}[cfg.scope]
            x = sum(window) / len(window)
            w = {
                "uniform": 1.0,
                "sigmoid": 1 / (1 + math.exp(-(x + cfg.offset) / cfg.temperature)),
                "clip": min(math.exp(x), cfg.clip),
                "power": min(math.exp(x / cfg.temperature), cfg.clip),
                "dft": math.exp(x),
                "confident": math.exp(x),
            }[cfg.name]
            a = 1.0 if cfg.warmup_steps == 0 else min(step / cfg.warmup_steps, 1.0)
            values.append(1 + a * (w - 1))
        if cfg.normalize == "sequence" and values:
            average = sum(values) / len(values)
            values = [v / average for v in values]
        for t, value in zip(places, values, strict=True):
            out[row, t] = value
    return out


@pytest.mark.parametrize("name", [*NAMES, "confident"])
def test_all_scopes_normalisations_and_warmups_match_a_plain_loop(name, monkeypatch):
    """Those of the registry, and a guest that reads log p alone: w = p."""
    guest = weights.Weight(lambda cfg, p, t: jnp.exp(p), "sg[p(y)]", "", "", reads="teacher")
    monkeypatch.setitem(weights.WEIGHTS, "confident", guest)
    student, teacher = tables()
    for scope, normalize, (warmup, step) in itertools.product(
        SCOPES, NORMALIZATIONS, ((0, 0), (10, 0), (10, 3), (10, 25))
    ):
        cfg = config(
            name=name, scope=scope, normalize=normalize, warmup_steps=warmup, temperature=1.7,
            offset=0.3,
        )  # fmt: skip
        got = weigh(cfg, student, teacher, step)
        wanted = by_hand(cfg, student, teacher, step)
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-7, err_msg=str(cfg))
        assert not np.any(np.asarray(got)[~MASK])


def test_uniform_is_exactly_one_whatever_else_is_set():
    student, teacher = tables()
    for scope, normalize, warmup in itertools.product(SCOPES, NORMALIZATIONS, (0, 7)):
        cfg = config(name="uniform", scope=scope, normalize=normalize, warmup_steps=warmup)
        assert not cfg.needs_logprob_pass
        got = weigh(cfg, student, teacher, 3)
        np.testing.assert_array_equal(got, MASK.astype(np.float32))


def test_warmup_ends_at_exactly_the_weight():
    tiny = jnp.float32([-20.0, -60.0])
    cfg = config(warmup_steps=5)
    raw = token_weights(cfg, tiny, jnp.zeros(2))
    np.testing.assert_array_equal(weights.warm(cfg, raw, 5), raw)
    np.testing.assert_array_equal(weights.warm(cfg, raw, 0), jnp.ones(2))


def test_sigmoid_at_temperature_one_is_q_over_q_plus_p():
    student, teacher = tables()
    q, p = (np.exp(np.asarray(x, np.float64)) for x in (student, teacher))
    got = token_weights(config(), student, teacher)
    np.testing.assert_allclose(got, q / (q + p), rtol=1e-6)
    agree = token_weights(config(), student, student)
    np.testing.assert_array_equal(agree, jnp.full_like(student, 0.5))


def test_sigmoid_is_todis_reverse_side_coefficient_at_the_observed_token():
    # arXiv 2505.16297: the reverse side of vocabulary entry v has sg[σ(log q_v - log p_v)].
    generator = np.random.default_rng(1)
    student, teacher = (jax.nn.log_softmax(generator.normal(size=(7, 5)) * 3) for _ in range(2))
    target = generator.integers(0, 5, (7, 1))
    coefficient = jax.nn.sigmoid(student - teacher)
    at_target = np.take_along_axis(np.asarray(coefficient), target, 1)[:, 0]
    q, p = (jnp.take_along_axis(x, target, 1)[:, 0] for x in (student, teacher))
    np.testing.assert_allclose(token_weights(config(), q, p), at_target, rtol=1e-6)


def test_nothing_crosses_a_packing_border_not_even_in_rounding():
    student, teacher = tables()
    for scope, normalize in itertools.product(SCOPES, NORMALIZATIONS):
        cfg = config(scope=scope, normalize=normalize, name="power")
        before = weigh(cfg, student, teacher, 0)
        changed = jnp.where(SEGMENTS == 1, -123.456, student)
        after = weigh(cfg, changed, teacher, 0)
        others = SEGMENTS != 1
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_masked_positions_may_hold_anything():
    student, teacher = tables()
    dirty = jnp.where(MASK, student, -jnp.inf)
    for scope, normalize in itertools.product(SCOPES, NORMALIZATIONS):
        cfg = config(scope=scope, normalize=normalize)
        clean = weigh(cfg, student, teacher, 0)
        np.testing.assert_array_equal(weigh(cfg, dirty, teacher, 0), clean)


logprob = st.floats(-1e4, 0.0, width=32, allow_subnormal=False)


@settings(max_examples=150, deadline=None)
@given(
    student=st.lists(logprob, min_size=4, max_size=4),
    teacher=st.lists(logprob, min_size=4, max_size=4),
    name=st.sampled_from(NAMES),
    scope=st.sampled_from(SCOPES),
    normalize=st.sampled_from(NORMALIZATIONS),
    temperature=st.sampled_from((0.01, 1.0, 50.0)),
    warmup=st.sampled_from((0, 4)),
)
def test_extreme_logprobs_give_finite_bounded_weights(
    student, teacher, name, scope, normalize, temperature, warmup
):
    cfg = config(
        name=name, scope=scope, normalize=normalize, temperature=temperature, warmup_steps=warmup
    )
    rows = (jnp.float32([student]), jnp.float32([teacher]))
    one = {"mask": np.ones((1, 4), bool), "segments": np.ones((1, 4), np.int32)}
    got = np.asarray(weigh(cfg, *rows, 2, **one))
    assert np.isfinite(got).all(), (cfg, got)
    assert (got >= 0).all()
    bound = 4.0001 if normalize == "sequence" else max(1.0, cfg.clip)
    assert (got <= bound).all(), (cfg, got)


def test_no_gradient_flows_through_weights():
    student, teacher = (jnp.asarray(x) for x in tables())
    for name, scope, normalize in itertools.product(NAMES, SCOPES, NORMALIZATIONS):
        cfg = config(name=name, scope=scope, normalize=normalize)

        def total(pair, cfg=cfg):
            return weigh(cfg, *pair, 0).sum()

        for gradient in jax.grad(total)((student, teacher)):
            assert not np.any(gradient), cfg
