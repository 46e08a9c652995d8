"""Automatic temperature and offset meet their targets; TAID's state is the published loop."""

import dataclasses
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
    TaidConfig,
)
from dcod_jax.losses.weights import AUTO, Tokens, WeightConfig
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.types import LossState, TrainState

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
    for target in (0.4, 0.6, 0.75, 0.9, 0.98):
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
    assert hits >= 18  # the others ask for less than there is where the temperature is lowest


def test_the_temperature_may_aim_at_the_mean_weight_instead():
    lagging = {name: r for name, r in ratios().items() if name in ("lags", "from scratch")}
    for target in (0.1, 0.3, 0.45):
        for _, _, mean, _ in solutions(config(target_mean=target), lagging).values():
            assert mean == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
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


@pytest.mark.parametrize("mean", [0.3, 0.5, 0.8])
def test_the_kept_loss_goes_with_the_offset_too(mean):
    cfg = config(offset=AUTO, target_loss=0.9, target_mean=mean)
    for name in ("lags", "from scratch", "agrees but for a few"):
        r = ratios()[name]
        ((temperature, offset, got_mean, _),) = solutions(cfg, {name: r}).values()
        kept = kept_loss(cfg, r[MASK], (surprise() - r)[MASK], temperature, offset)
        assert kept == pytest.approx(0.9, rel=0.01), name
        assert got_mean == pytest.approx(mean, rel=0.01), name


@pytest.mark.parametrize(("ess", "mean"), [(0.9, 0.5), (0.7, 0.3), (0.95, 0.8)])
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
    for target in (0.4, 0.6, 0.8, 0.9, 0.95, 0.99):
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
    assert 12 <= hits < 30  # both happen


@pytest.mark.parametrize("target", [{"target_loss": 0.93}, {"target_ess": 0.8}], ids=str)
def test_the_solver_finds_what_a_bisection_in_float64_finds(target):
    """The tolerance that docs/adaptive.md states, in the logarithm of the temperature."""
    generator = np.random.default_rng(np.random.SeedSequence().entropy)
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
    for (which, student), (_, teacher) in itertools.product(far.items(), teachers.items()):
        student = np.minimum(np.float32(student), 0)
        r = np.float32(student - teacher)
        for target in (0.5, 0.9, 0.99):
            cfg = config(name=name, target_loss=target)
            both = (jnp.asarray(np.float32(x)) for x in (student, teacher))
            state = adaptive.retemper(cfg, adaptive.initial(), Tokens(*both, *WHERE))
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


# ---------------------------------------------------------------- from step to step


@functools.partial(jax.jit, static_argnums=0)
def retemper(cfg, state, r, mask):
    return adaptive.retemper(cfg, state, Tokens(r, jnp.zeros_like(r), mask, WHERE[1]))


def test_weights_begin_uniform_and_the_first_solution_is_taken_whole():
    state = adaptive.initial()
    r = jnp.asarray(ratios()["from scratch"])
    for name, level in (("sigmoid", 0.5), ("power", 1.0)):
        raw = weights.raw(config(name=name), r, state)
        np.testing.assert_allclose(raw, level, rtol=3e-5)
    cfg = config(smoothing=0.9, offset=AUTO, target_ess=0.8, target_mean=0.4)
    wanted = solutions(cfg)["from scratch"]
    after = retemper(cfg, state, r, jnp.asarray(MASK))
    assert float(after.temperature) == pytest.approx(wanted[0], rel=1e-4)
    assert float(after.offset) == pytest.approx(wanted[1], rel=1e-3)
    after = retemper(cfg, after, jnp.asarray(ratios()["lags"]), jnp.asarray(MASK))
    new = solutions(cfg)["lags"]
    log_temperature = 0.9 * math.log(wanted[0]) + 0.1 * math.log(new[0])
    assert float(after.temperature) == pytest.approx(math.exp(log_temperature), rel=1e-3)
    assert float(after.offset) == pytest.approx(0.9 * wanted[1] + 0.1 * new[1], rel=1e-3)


@pytest.mark.parametrize(
    "target",
    [{"target_ess": 0.995}, {"target_loss": 0.9}, {"unit": "spread", "temperature": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_batch_that_cannot_teach_changes_nothing_bit_for_bit(smoothing, target):
    cfg = config(smoothing=smoothing, offset=AUTO, **target)
    r, mask = jnp.asarray(ratios()["lags"]), jnp.asarray(MASK)
    row, column = np.argwhere(MASK)[0]
    useless = {
        "no completion token": (r, jnp.zeros_like(mask)),
        "NaN": (r.at[row, column].set(jnp.nan), mask),
        "-inf": (r.at[row, column].set(-jnp.inf), mask),
    }
    taught = retemper(cfg, adaptive.initial(), r, mask)
    for name, state in itertools.product(useless, (adaptive.initial(), taught)):
        after = retemper(cfg, state, *useless[name])
        jax.tree.map(np.testing.assert_array_equal, after, state)
        again = retemper(cfg, after, r, mask)
        jax.tree.map(np.testing.assert_array_equal, again, retemper(cfg, state, r, mask))
    outside = jnp.where(mask, r, jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal, retemper(cfg, adaptive.initial(), outside, mask), taught
    )


def test_a_loss_without_automatic_numbers_keeps_its_state():
    state = adaptive.initial()
    cfg = config(temperature=1.0)
    r = jnp.zeros((B, T))
    assert adaptive.retemper(cfg, state, Tokens(r, r, *WHERE)) is state


@pytest.mark.parametrize("scope", ["prefix", "sequence"])
def test_the_target_is_met_by_the_scoped_weights(scope):
    """By the tokens' weights; one weight a trace: by the traces', however long they are."""
    cfg = config(scope=scope, target_ess=0.9)
    mask = MASK & ((SEGMENTS > 1) | (np.arange(T) % 4 == 0))  # the first of a row are short
    r, where = jnp.asarray(ratios()["both signs"]) * 4, (jnp.asarray(mask), WHERE[1])
    tokens = Tokens(r, jnp.zeros((B, T)), *where)
    state = jax.jit(adaptive.retemper, static_argnums=0)(cfg, adaptive.initial(), tokens)
    w = np.float64(weights.raw(cfg, weights.scoped_signal(cfg, tokens), state))
    places = [(n == SEGMENTS) & (np.arange(B)[:, None] == row) & mask
              for row, n in itertools.product(range(B), (1, 2, 3))]  # fmt: skip
    w = np.array([w[place][0] for place in places]) if scope == "sequence" else w[mask]
    assert w.mean() ** 2 / np.square(w).mean() == pytest.approx(0.9, rel=0.01)
    unscoped = retemper(config(target_ess=0.9), adaptive.initial(), tokens[0], jnp.asarray(mask))
    assert float(unscoped.temperature) > 1.2 * float(state.temperature)


def spread_by_hand(cfg, batches):
    """The deviation in a window that decays by `smoothing` a step, float64, one unit after another.

    batches: the log-ratios [B,T] of each step."""
    values, ages = [], []
    for age, r in enumerate(reversed(batches)):
        for row, n in itertools.product(range(B), (1, 2, 3)):
            own = np.float64(r[row][(SEGMENTS[row] == n) & MASK[row]])
            units = [own.mean()] if cfg.scope == "sequence" else own
            values.extend(units)
            ages.extend([age] * len(units))
    shares = np.float64(cfg.smoothing) ** np.array(ages)
    mean = np.average(values, weights=shares)
    return math.sqrt(np.average(np.square(np.array(values) - mean), weights=shares))


@pytest.mark.parametrize(
    ("scope", "smoothing"), [("sequence", 0.9), ("sequence", 0.0), ("token", 0.5)]
)
def test_the_unit_is_the_deviation_in_a_window_over_the_stream(scope, smoothing):
    cfg = config(scope=scope, smoothing=smoothing, temperature=0.7, unit="spread")
    generator = np.random.default_rng(np.random.SeedSequence().entropy)
    batches = [np.float32(generator.normal(-3, 0.5 + i, (B, T))) for i in range(4)]
    state = adaptive.initial()
    uniform = np.asarray(weights.raw(cfg, jnp.asarray(batches[0]), state))
    np.testing.assert_allclose(uniform, 0.5, rtol=3e-5)  # no trace was seen yet
    for i, r in enumerate(batches):
        state = retemper(cfg, state, jnp.asarray(r), jnp.asarray(MASK))
        wanted = 0.7 * spread_by_hand(cfg, batches[: i + 1])
        assert float(state.temperature) == pytest.approx(wanted, rel=2e-5)
    shifted = [retemper(cfg, adaptive.initial(), jnp.asarray(r + 50), jnp.asarray(MASK)).temperature
               for r in batches]  # fmt: skip
    assert float(shifted[0]) == pytest.approx(0.7 * spread_by_hand(cfg, batches[:1]), rel=1e-4)
    # Traces that are all alike: differences by rounding must not be taken for a spread.
    same = retemper(cfg, adaptive.initial(), jnp.full((B, T), -0.3), jnp.asarray(MASK))
    assert float(same.temperature) == np.float32(MIN_TEMPERATURE)


@pytest.mark.parametrize("target", [{"target_ess": 0.995}, {"target_loss": 0.9}], ids=str)
def test_the_solution_carries_no_gradient(target):
    cfg = config(offset=AUTO, smoothing=0.5, **target)

    def of(r):
        after = retemper(cfg, adaptive.initial(), r, WHERE[0])
        found = adaptive.solve(cfg, r, -r, jnp.asarray(MASK))  # its brackets depend on r
        return after.temperature + after.offset + found.temperature + found.offset

    assert not np.any(jax.grad(of)(jnp.asarray(ratios()["lags"])))


def test_only_smoothing_zero_needs_the_log_probs_of_the_same_step():
    assert adaptive.same_step(config(smoothing=0.0))
    assert adaptive.same_step(config(smoothing=0.0, temperature=1.0, offset=AUTO))
    assert not adaptive.same_step(config(smoothing=0.5))
    assert not adaptive.same_step(config(smoothing=0.0, temperature=1.0))


# ---------------------------------------------------------------- TAID


def published(cfg, losses):
    """arXiv 2501.16937, Algorithm 1, with plain numbers: s before each step, and at the end."""
    s, momentum, before, out = cfg.start, 0.0, math.inf, []
    for step, loss in enumerate(losses):
        out.append(s)
        if math.isinf(before):
            before = loss
            continue
        momentum = cfg.beta * momentum + (1 - cfg.beta) * (before - loss) / before
        linear = cfg.start + (cfg.end - cfg.start) * step / cfg.steps
        faster = s + cfg.alpha * (1 - s) / (1 + math.exp(-momentum))
        s, before = min(cfg.end, max(linear, faster)), loss
    return [*out, s]


@pytest.mark.parametrize(
    "cfg",
    [
        TaidConfig(steps=40),
        TaidConfig(start=0.2, end=0.9, alpha=0.2, beta=0.5, steps=10_000),
        TaidConfig(start=0.0, end=0.3, alpha=0.5, beta=0.9, steps=30),
    ],
)
def test_taids_interpolation_is_the_published_loop(cfg):
    generator = np.random.default_rng(3)
    losses = np.float32(3 * np.exp(-0.05 * np.arange(30)) * generator.uniform(0.7, 1.3, 30))
    update = jax.jit(lambda *inputs: adaptive.interpolate(cfg, *inputs))
    state, found = adaptive.initial(), []
    for step, loss in enumerate(losses):
        found.append(float(adaptive.interpolation(cfg, state)))
        state = update(state, jnp.float32(loss), jnp.int32(step))
    found.append(float(adaptive.interpolation(cfg, state)))
    wanted = published(cfg, losses.tolist())
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)
    assert np.all(np.diff(found) >= -1e-7)
    assert found[-1] > found[0]


def test_the_state_is_restored_exactly(tmp_path):
    values = (0.1234567, -3.7654321, 0.4321987, -1.0e-9, 2.7182817, 17.3, -0.7654321, 3.1e-7)
    loss_state = LossState(*(jnp.float32(value) for value in values))
    for name, state in (("1", loss_state), ("2", adaptive.initial())):
        whole = TrainState(jnp.int32(4), {"w": jnp.ones(2)}, {"m": jnp.zeros(2)}, state)
        checkpointer = Checkpointer(tmp_path / name)
        checkpointer.save(Snapshot(state=whole, step=4, config={}))
        checkpointer.wait()
        restored = checkpointer.restore(whole).state
        checkpointer.close()
        jax.tree.map(np.testing.assert_array_equal, restored, whole)
        assert isinstance(restored.loss_state, LossState)
        assert all(
            getattr(restored.loss_state, field.name).dtype == jnp.float32
            for field in dataclasses.fields(LossState)
        )
