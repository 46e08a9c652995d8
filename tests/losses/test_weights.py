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
from dcod_jax.losses.weight_errors import config_errors
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
    """Log-probabilities of the target under student, teacher and start, V = 5."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 5, SEGMENTS.shape)[..., None]

    def of_target():
        logits = generator.normal(size=(*SEGMENTS.shape, 5)) * 2
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return jnp.float32(np.take_along_axis(logprobs, target, -1)[..., 0])

    return of_target(), of_target(), of_target()


def weigh(cfg, student, teacher, step, *, mask=MASK, segments=SEGMENTS, extra=None):
    where = (jnp.asarray(mask), jnp.asarray(segments))
    return weights.weigh(cfg, Tokens(student, teacher, *where, extra=extra), step, None)


def token_weights(cfg, student, teacher):
    return weights.raw(cfg, weights.token_signal(cfg, student, teacher), None)


def allowed(cfg) -> bool:
    return not list(config_errors(cfg))


def signal_by_hand(cfg, q, p, extra):
    """What a weight is a function of, of one token; extra: log q of the start, or an entropy."""
    if cfg.name in ("dft", "q_power", "q_threshold"):
        return q
    if cfg.name == "idft":
        return q * min(max(math.exp(-q - extra), 0.1), 2.0)
    if cfg.name == "eaft":
        return math.log(extra / math.log(20))
    parties = {"student": q, "teacher": p, "start": extra}
    above, below = cfg.ratio.split("/")
    return p if cfg.name == "confident" else parties[above] - parties[below]


def weight_by_hand(cfg, x):
    return {
        "uniform": lambda: 1.0,
        "sigmoid": lambda: 1 / (1 + math.exp(-(x + cfg.offset) / cfg.temperature)),
        "clip": lambda: min(math.exp(x), cfg.clip),
        "power": lambda: min(math.exp(x / cfg.temperature), cfg.clip),
        "q_power": lambda: math.exp(x) ** (1 / cfg.temperature),
        "q_threshold": lambda: float(math.exp(x) >= cfg.threshold),
        "eaft": lambda: math.exp(x) ** (1 / cfg.temperature),
        "drift_share": lambda: 1 + 0.5 * (1 - x),
        "advantage": lambda: min(max(-x, -cfg.clip), cfg.clip),
    }.get(cfg.name, lambda: math.exp(x))()


def by_hand(cfg, student, teacher, extra, step):
    """The definition, one token after another, float64."""
    out = np.zeros(student.shape)
    for row, segment in itertools.product(range(student.shape[0]), range(1, 4)):
        places = [t for t in range(SEGMENTS.shape[1]) if SEGMENTS[row, t] == segment]
        places = [t for t in places if MASK[row, t]]
        own = [[float(x[row, t]) for x in (student, teacher, extra)] for t in places]
        r = [signal_by_hand(cfg, *one) for one in own]
        values = []
        for i in range(len(places)):
            window = {"token": r[i : i + 1], "prefix": r[: i + 1], "sequence": r}[cfg.scope]
            x = sum(window) / len(window)
            if cfg.name == "drift_share":
                x = sum(map(abs, r[:i])) / sum(map(abs, r))
            a = 1.0 if cfg.warmup_steps == 0 else min(step / cfg.warmup_steps, 1.0)
            values.append(1 + a * (weight_by_hand(cfg, x) - 1))
        if cfg.normalize == "sequence" and values:
            average = sum(values) / len(values)
            values = [v / average if average else 0.0 for v in values]
        for t, value in zip(places, values, strict=True):
            out[row, t] = value
    return out


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *((name, "student/teacher") for name in (*NAMES, "confident")),
        *itertools.product(("sigmoid", "advantage"), ("start/teacher", "student/start")),
    ],
)
def test_all_scopes_normalisations_and_warmups_match_a_plain_loop(name, ratio, monkeypatch):
    """Those of the registry, and a guest that reads log p alone: w = p."""
    guest = weights.Weight(lambda cfg, p, t: jnp.exp(p), "sg[p(y)]", "", "", reads="teacher")
    monkeypatch.setitem(weights.WEIGHTS, "confident", guest)
    student, teacher, extra = tables()
    extra = -extra if name in ("idft", "eaft") else extra  # an entropy is positive
    seen = 0
    asked = [*itertools.product(SCOPES, NORMALIZATIONS, ((10, 3),))]
    asked += [("token", "none", own) for own in ((0, 0), (10, 0), (10, 25))]
    for scope, normalize, (warmup, step) in asked:
        cfg = config(
            name=name, scope=scope, normalize=normalize, warmup_steps=warmup, temperature=1.7,
            offset=0.3, ratio=ratio,
        )  # fmt: skip
        if not allowed(cfg):
            continue
        seen += 1
        got = weigh(cfg, student, teacher, step, extra=extra)
        wanted = by_hand(cfg, student, teacher, extra, step)
        np.testing.assert_allclose(got, wanted, rtol=5e-6, atol=2e-7, err_msg=str(cfg))
        assert not np.any(np.asarray(got)[~MASK])
    assert seen >= (1 if name == "advantage" else 6)


def test_uniform_is_exactly_one_whatever_else_is_set():
    student, teacher, _ = tables()
    for scope, normalize, warmup in itertools.product(SCOPES, NORMALIZATIONS, (0, 7)):
        cfg = config(name="uniform", scope=scope, normalize=normalize, warmup_steps=warmup)
        assert not cfg.across
        got = weigh(cfg, student, teacher, 3)
        np.testing.assert_array_equal(got, MASK.astype(np.float32))


def test_warmup_ends_at_exactly_the_weight():
    tiny = jnp.float32([-20.0, -60.0])
    cfg = config(warmup_steps=5)
    raw = token_weights(cfg, tiny, jnp.zeros(2))
    np.testing.assert_array_equal(weights.warm(cfg, raw, 5), raw)
    np.testing.assert_array_equal(weights.warm(cfg, raw, 0), jnp.ones(2))


def test_sigmoid_at_temperature_one_is_q_over_q_plus_p():
    student, teacher, _ = tables()
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
    student, teacher, _ = tables()
    for scope, normalize in itertools.product(SCOPES, NORMALIZATIONS):
        cfg = config(scope=scope, normalize=normalize, name="power")
        before = weigh(cfg, student, teacher, 0)
        changed = jnp.where(SEGMENTS == 1, -123.456, student)
        after = weigh(cfg, changed, teacher, 0)
        others = SEGMENTS != 1
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_masked_positions_may_hold_anything():
    student, teacher, _ = tables()
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
    one["extra"] = jnp.minimum(-rows[1], math.log(20))  # an entropy
    if not allowed(cfg):
        return
    got = np.asarray(weigh(cfg, *rows, 2, **one))
    assert np.isfinite(got).all(), (cfg, got)
    assert (got >= (-cfg.clip if name == "advantage" else 0)).all()
    bound = 4.0001 if normalize == "sequence" else max(1.5, cfg.clip)
    assert (got <= bound).all(), (cfg, got)


def test_no_gradient_flows_through_weights():
    for name, scope in itertools.product(NAMES, SCOPES):
        cfg = config(
            name=name, scope=scope, normalize="none" if name == "advantage" else "sequence"
        )

        def total(three, cfg=cfg):
            return weigh(cfg, *three[:2], 0, extra=three[2]).sum()

        for gradient in jax.grad(total)(tables()):
            assert not np.any(gradient), cfg


# ---------------------------------------------------------------- one weight a trace

TRACE = {"scope": "sequence", "temperature": 0.3}


def test_a_traces_weight_is_one_number_and_equal_traces_weigh_the_same():
    student, teacher, _ = tables()
    got = np.asarray(weigh(config(**TRACE), student, teacher, 0))
    own = [got[(segment == SEGMENTS) & (np.arange(2)[:, None] == row) & MASK]
           for row, segment in itertools.product(range(2), range(1, 4))]  # fmt: skip
    assert all(len(set(one.tolist())) == 1 for one in own if len(one))
    assert len({one[0] for one in own if len(one)}) == sum(map(bool, map(len, own)))
    # The same log-ratios in another order, and twice as many of them: the same mean.
    segments, mask = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2]]), np.ones((1, 9), bool)
    r = jnp.float32([[-1.0, -0.25, 0.5, 0.5, -0.25, -1.0, -1.0, 0.5, -0.25]])
    equal = np.asarray(
        weigh(config(**TRACE), r, jnp.zeros_like(r), 0, mask=mask, segments=segments)
    )
    assert len(set(equal.ravel().tolist())) == 1


def test_one_trace_weighs_one_after_normalisation():
    """Where a batch has one trace alone, its weight is no scale of the step."""
    student, teacher, _ = tables()
    mask = MASK & (SEGMENTS == 1) & (np.arange(2)[:, None] == 0)
    raw = weigh(config(**TRACE), student, teacher, 0, mask=mask)
    w = np.float64(raw)[mask]
    np.testing.assert_allclose(w / (w.sum() / mask.sum()), 1.0, rtol=1e-6)
    own = weigh(config(**TRACE, normalize="sequence"), student, teacher, 0, mask=mask)
    np.testing.assert_allclose(np.asarray(own)[mask], 1.0, rtol=1e-6)
