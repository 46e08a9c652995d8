"""Automatic temperature and offset meet their targets; TAID's state is the published loop."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.losses import adaptive, weights
from dcod_jax.losses.adaptive import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    SHARPEST_FOR_LOSS,
)
from dcod_jax.losses.weights import AUTO, Tokens, WeightConfig

B, T = 4, 96
MASK = np.random.default_rng(1).random((B, T)) < 0.7
SEGMENTS = np.repeat([[1, 2, 3]], B, 0).repeat(T // 3, 1)
WHERE = (jnp.asarray(MASK), jnp.asarray(SEGMENTS))


def config(**changes) -> WeightConfig:
    values = {
        "name": "sigmoid",
        "temperature": AUTO,
        "offset": 0.0,
        "clip": 2.0,
        "scope": "token",
        "normalize": "mean",
        "warmup_steps": 0,
        "target_loss": 0.0,
        "target_ess": 0.0,
        "smoothing": 0.0,
    }
    return WeightConfig(**values | changes)


@functools.cache
def ratios() -> dict[str, np.ndarray]:
    """Log-ratios as they come: a student that lags, that agrees, that starts from nothing, ..."""
    generator = np.random.default_rng(0)
    shape = (B, T)
    agrees = generator.normal(0, 0.4, shape)
    made = {
        "lags": generator.normal(-2, 1.5, shape),
        "agrees but for a few": np.where(
            generator.random(shape) < 0.25, -generator.exponential(5, shape), agrees
        ),
        "both signs": generator.normal(0, 2, shape),
        "from scratch": -generator.uniform(4, 20, shape),
        "nearly the same": generator.normal(-0.2, 0.05, shape),
    }
    return {name: np.float32(r) for name, r in made.items()}


@functools.cache
def surprise() -> np.ndarray:
    """-log p of the teacher: most of its tokens are sure, a few of them it did not expect."""
    generator = np.random.default_rng(2)
    noise = generator.random((B, T)) < 0.05
    return np.float32(np.where(noise, 9, generator.exponential(0.1, (B, T))))


@functools.partial(jax.jit, static_argnums=0)
def solve_all(cfg, rs, nlls, mask):
    return jax.vmap(lambda r, nll: adaptive.solve(cfg, r, nll, mask))(rs, nlls)


def stacked(rs):
    r = jnp.stack(list(rs.values()))
    return r, surprise() - r


def solutions(cfg, rs=None):
    """name -> (temperature, offset, mean weight, effective sample size); the last two in float64"""
    rs = ratios() if rs is None else rs
    found = solve_all(cfg, *stacked(rs), jnp.asarray(MASK))
    out = {}
    for i, (name, r) in enumerate(rs.items()):
        temperature, offset = (
            float(jnp.broadcast_to(x, len(rs))[i]) for x in (found.temperature, found.offset)
        )
        out[name] = (temperature, offset, *moments(cfg, r[MASK], temperature, offset))
    return out


def log_weights(cfg, r, temperature, offset):
    x = (np.float64(r) + offset) / temperature
    return -np.logaddexp(0, -x) if cfg.name == "sigmoid" else np.minimum(x, math.log(cfg.clip))


def moments(cfg, r, temperature, offset):
    w = np.exp(log_weights(cfg, r, temperature, offset))
    return w.mean(), w.mean() ** 2 / np.square(w).mean()


def kept_loss(cfg, r, nll, temperature, offset=0.0):
    """What is left of the mean nll when the weights have discounted the student's lag; float64."""
    logs = log_weights(cfg, r, temperature, offset)
    share = np.exp(logs - logs.max())  # no underflow, however far behind the student is
    share /= share.sum()
    lag = np.where(r < 0, -np.float64(r), 0.0)
    return 1 - np.sum((1 / len(lag) - share) * lag) / np.mean(np.float64(nll))


@pytest.mark.parametrize("name", ["sigmoid", "power"])
def test_the_temperature_hits_the_effective_sample_size_and_is_monotone_in_it(name):
    before = dict.fromkeys(ratios(), (0.0, 0.0))
    hits = 0
    for target in (0.4, 0.75, 0.98):
        cfg = config(name=name, target_ess=target)
        for which, (temperature, offset, _, ess) in solutions(cfg).items():
            assert temperature >= before[which][0] * (1 - 1e-4), (which, target)
            assert offset == 0
            lowest = moments(cfg, ratios()[which][MASK], MIN_TEMPERATURE, 0)[1]
            if lowest < target:
                assert ess == pytest.approx(target, rel=0.01), (which, target)
                assert temperature > before[which][0]
                hits += 1
            before[which] = (temperature, ess)
    assert hits >= 10  # the others ask for less than there is where the temperature is lowest


def test_the_temperature_may_aim_at_the_mean_weight_instead():
    lagging = {name: r for name, r in ratios().items() if name in ("lags", "from scratch")}
    for target in (0.1, 0.3, 0.45):
        for _, _, mean, _ in solutions(config(target_mean=target), lagging).values():
            assert mean == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_offset_hits_the_mean_weight_at_any_fixed_temperature(temperature):
    offsets = []
    for target in (0.2, 0.5, 0.8):
        cfg = config(temperature=temperature, offset=AUTO, target_mean=target)
        found = solutions(cfg)
        for temperature_used, _, mean, _ in found.values():
            assert temperature_used == temperature
            assert mean == pytest.approx(target, rel=0.01)
        offsets.append([offset for _, offset, *_ in found.values()])
    assert np.all(np.diff(offsets, axis=0) > 0)


@pytest.mark.parametrize("mean", [0.3, 0.8])
def test_the_kept_loss_goes_with_the_offset_too(mean):
    cfg = config(offset=AUTO, target_loss=0.9, target_mean=mean)
    for name in ("lags", "from scratch", "agrees but for a few"):
        r = ratios()[name]
        ((temperature, offset, got_mean, _),) = solutions(cfg, {name: r}).values()
        kept = kept_loss(cfg, r[MASK], (surprise() - r)[MASK], temperature, offset)
        assert kept == pytest.approx(0.9, rel=0.01), name
        assert got_mean == pytest.approx(mean, rel=0.01), name


@pytest.mark.parametrize(("ess", "mean"), [(0.7, 0.3), (0.95, 0.8)])
def test_both_together_hit_both(ess, mean):
    cfg = config(offset=AUTO, target_ess=ess, target_mean=mean)
    for name, (_, _, got_mean, got_ess) in solutions(cfg).items():
        assert got_ess == pytest.approx(ess, rel=0.01), name
        assert got_mean == pytest.approx(mean, rel=0.01), name


def test_out_of_reach_is_the_nearer_end_and_stays_finite():
    same = {"same": np.zeros((B, T), np.float32), "ahead": np.full((B, T), 50, np.float32)}
    for temperature, *_ in solutions(config(target_ess=0.995), same).values():
        assert MIN_TEMPERATURE * 0.99 <= temperature <= MAX_TEMPERATURE * 1.01
    far = {"far": np.where(np.arange(T) % 2, -1e4, 0).astype(np.float32)[None].repeat(B, 0)}
    ((temperature, _, _, ess),) = solutions(config(target_ess=0.9), far).values()
    assert ess == pytest.approx(0.9, rel=0.01)
    assert 1e2 < temperature < 1e5


# ---------------------------------------------------------------- the kept loss


@pytest.mark.parametrize("name", ["sigmoid", "power"])
def test_the_temperature_hits_the_kept_loss_and_is_monotone_in_it(name):
    before = dict.fromkeys(ratios(), 0.0)
    hits = 0
    for target in (0.4, 0.8, 0.95):
        cfg = config(name=name, target_loss=target)
        for which, (temperature, offset, *_) in solutions(cfg).items():
            r = ratios()[which]
            r, nll = r[MASK], (surprise() - r)[MASK]
            assert temperature >= before[which] * (1 - 1e-4), (which, target)
            assert offset == 0
            at_floor = kept_loss(cfg, r, nll, SHARPEST_FOR_LOSS)
            if at_floor < target:
                kept = kept_loss(cfg, r, nll, temperature)
                assert kept == pytest.approx(target, rel=1e-3), (which, target)
                hits += 1
            else:  # it may not be sharper than the fixed temperature that is the default
                assert temperature == pytest.approx(SHARPEST_FOR_LOSS, rel=1e-5), (which, target)
            before[which] = temperature
    assert 5 <= hits < 15  # both happen


@pytest.mark.parametrize("target", [{"target_loss": 0.93}, {"target_ess": 0.8}], ids=str)
def test_the_solver_finds_what_a_bisection_in_float64_finds(target):
    """The tolerance that docs/adaptive.md states, in the logarithm of the temperature."""
    generator = np.random.default_rng(5)
    rs = {f"{i}": np.float32(generator.normal(-2, 1.5, (B, T)) * 2.0**i) for i in range(4)}
    for which, (temperature, *_) in solutions(config(**target), rs).items():
        r = rs[which]

        def above(x, r=r):
            t = math.exp(x)
            if "target_loss" in target:
                return kept_loss(config(), r[MASK], (surprise() - r)[MASK], t) > 0.93
            return moments(config(), r[MASK], t, 0.0)[1] > 0.8

        low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
        if "target_loss" in target:
            low = math.log(SHARPEST_FOR_LOSS)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if above(middle) else (middle, high)
        assert math.log(temperature) == pytest.approx(high, abs=2e-5), which


@pytest.mark.parametrize("name", ["sigmoid", "power"])
@pytest.mark.parametrize("offset", [0.0, -2.0])
def test_the_kept_loss_never_falls_as_the_temperature_grows(name, offset):
    generator = np.random.default_rng(4)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 300)
    cfg = config(name=name)
    for trial in range(60):
        scale = 10.0 ** generator.uniform(-3, 3)
        r = scale * generator.standard_t(1.5, 1 + 3 * trial) + generator.normal(0, scale)
        r = np.clip(r, -1e4, 1e4)
        nll = np.maximum(-r, 0) + generator.exponential(1, r.shape)
        kept = [kept_loss(cfg, r, nll, temperature, offset) for temperature in grid]
        assert np.diff(kept).min() >= -1e-9, trial


def test_unexpected_tokens_do_not_hide_what_the_student_gives_up():
    """With nll in the place of lag, 5 % noise of large nll and weight near 1 would do so."""
    noise, hard = (np.arange(MASK.sum()) % 20 == at for at in (3, 7))
    r = np.where(noise, 2.0, np.where(hard, -3.0, -0.05))
    nll = np.where(noise, 9.0, 0.0) - r
    full = [np.zeros((B, T), np.float32) for _ in range(2)]
    for array, values in zip(full, (r, nll), strict=True):
        array[MASK] = values
    cfg = config(target_loss=0.9)
    found = adaptive.solve(cfg, *(jnp.asarray(x) for x in full), jnp.asarray(MASK))
    temperature = float(found.temperature)
    assert kept_loss(cfg, r, nll, temperature) == pytest.approx(0.9, rel=1e-3)
    assert temperature > 2
    w = np.exp(log_weights(cfg, r, 1.0, 0.0))
    assert np.sum(w * nll) / w.sum() > nll.mean()  # the plain loss seems to lose nothing at all
    assert kept_loss(cfg, r, nll, 1.0) < 0.8


def test_giving_up_more_raises_the_temperature():
    """Where the effective sample size lets it fall: the tokens given up weigh nothing any more."""
    temperatures = {"target_loss": [], "target_ess": []}
    for depth in (2.0, 5.0, 12.0, 50.0):
        r = np.where(np.arange(T) % 20 == 3, -depth, -0.1 - 0.02 * (np.arange(T) % 7))
        rs = {"gives up": np.float32(r)[None].repeat(B, 0)}
        for name, found in temperatures.items():
            found.append(solutions(config(**{name: 0.94}), rs)["gives up"][0])
    assert np.all(np.diff(temperatures["target_loss"]) > 0)
    assert temperatures["target_loss"][-1] > 100
    assert temperatures["target_ess"][-1] < 10 * temperatures["target_ess"][0]


@pytest.mark.parametrize("name", ["sigmoid", pytest.param("power", marks=pytest.mark.long)])
def test_the_kept_loss_is_solved_at_the_ends_of_float32(name):
    generator = np.random.default_rng(6)
    shape = (B, T)
    far = {
        "-1e4 or 0": np.where(np.arange(T) % 2, -1e4, 0)[None].repeat(B, 0),
        "all at -1e4": np.full(shape, -1e4),
        "anything": np.where(
            generator.random(shape) < 0.5, 0, -(10 ** generator.uniform(-6, 4, shape))
        ),
        "one token at -1e4": np.where(np.arange(B * T).reshape(shape) == MASK.argmax(), -1e4, 0),
        "equal to the teacher": np.zeros(shape),
        "ahead": np.full(shape, 1e4),
    }
    teachers = {"sure": np.zeros(shape), "lost": np.full(shape, -1e4)}
    retemper = jax.jit(adaptive.retemper, static_argnums=0)
    for (which, student), (_, teacher) in itertools.product(far.items(), teachers.items()):
        student = np.minimum(np.float32(student), 0)
        r = np.float32(student - teacher)
        for target in (0.5, 0.9, 0.99):
            cfg = config(name=name, target_loss=target)
            both = (jnp.asarray(np.float32(x)) for x in (student, teacher))
            state = retemper(cfg, adaptive.initial(), Tokens(*both, *WHERE))
            temperature = float(state.temperature)
            assert SHARPEST_FOR_LOSS * 0.999 <= temperature <= MAX_TEMPERATURE * 1.001, which
            w = np.asarray(weights.raw(cfg, jnp.asarray(r), state))[MASK]
            assert np.isfinite(w).all(), which
            assert w.sum() > 0, which
            kept = kept_loss(cfg, r[MASK], -np.minimum(student, -1e-30)[MASK], temperature)
            assert kept >= target * 0.99 or temperature > 0.99 * MAX_TEMPERATURE, which


@pytest.mark.shared
def test_targets_are_hit_on_real_traces(shared_data):
    """Real Qwen2.5 answers; log-probs of byte bigrams, the student's learnt elsewhere (GSM8K)."""

    def table(text):
        codes = np.frombuffer(text.encode(), np.uint8)
        counts = np.full((256, 256), 0.1)
        np.add.at(counts, (codes[:-1], codes[1:]), 1)
        return np.log(counts / counts.sum(1, keepdims=True))

    path = shared_data / "qwen25_math_traces" / "math_cot_100.jsonl"
    answers = [json.loads(line)["code"][0] for line in path.read_text().splitlines()]
    problems = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:300]
    teacher = table("".join(answers))
    student = table("".join(json.loads(line)["answer"] for line in problems))
    rows = [np.frombuffer(a.encode()[: T + 1], np.uint8) for a in answers if len(a) > T + 1][:B]
    rows = np.stack(rows)
    r = np.float32((student - teacher)[rows[:, :-1], rows[:, 1:]])
    assert r[MASK].std() > 0.5
    for target in (0.7, 0.9):
        ((*_, ess),) = solutions(config(target_ess=target), {"real": r}).values()
        assert ess == pytest.approx(target, rel=0.01)
    nll = -np.float32(student[rows[:, :-1], rows[:, 1:]])
    for name in ("sigmoid", "power"):
        cfg, temperatures = config(name=name), np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 200)
        kept = [kept_loss(cfg, r[MASK], nll[MASK], temperature) for temperature in temperatures]
        assert np.diff(kept).min() > -1e-9
        for target in (0.9, 0.95, 0.99):
            cfg = config(name=name, target_loss=target)
            found = adaptive.solve(cfg, jnp.asarray(r), jnp.asarray(nll), jnp.asarray(MASK))
            kept = kept_loss(cfg, r[MASK], nll[MASK], float(found.temperature))
            assert kept == pytest.approx(target, rel=1e-3)
    cfg = config(offset=AUTO, target_ess=0.8, target_mean=0.4)
    ((_, _, mean, ess),) = solutions(cfg, {"real": r}).values()
    assert (ess, mean) == (pytest.approx(0.8, rel=0.01), pytest.approx(0.4, rel=0.01))
