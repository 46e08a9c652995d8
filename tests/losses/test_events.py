"""The K ids, the rest and the target against float64, over many planes and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.losses.distributions import LANES, PLANES, _planes, event_logits
from dcod_jax.losses.head import VocabHead
from dcod_jax.parallel.mesh import make_mesh, sharding

EVERY = PLANES * LANES  # each plane has LANES entries, and every bit is used
SHAPE = (8, 1, 3)  # shards, rows, positions
K = 6


def example(vocab, valid, seed=0):
    generator = np.random.default_rng(seed)
    logits = np.float32(generator.normal(size=(*SHAPE, vocab)) * 4)
    ids = np.argsort(generator.random((*SHAPE, valid)), -1)[..., :K]
    ids[..., 0], ids[..., 1] = 0, valid - 1  # the ends, at whatever bit they are
    for row in ids.reshape(-1, K):  # distinct, also after the ends were put in
        row[2:] = [x for x in generator.permutation(valid)[:K] if x not in (0, valid - 1)][: K - 2]
    targets = generator.integers(valid, size=SHAPE)
    targets[:4] = ids[:4, ..., 3]  # some are among the ids
    return jnp.asarray(logits), jnp.int32(ids), jnp.int32(targets)


def by_hand(logits, ids, targets, cotangents, valid):
    """float64: the events' logits, the target's, and the gradient of <cotangents, both>."""
    logits = np.float64(logits)
    events, gradient = np.empty((*SHAPE, K + 2)), np.zeros(logits.shape)
    for at in np.ndindex(SHAPE):
        rest = [v for v in range(valid) if v not in set(ids[at].tolist())]
        highest = logits[at][rest].max()
        shares = np.exp(logits[at][rest] - highest)
        events[at] = [
            *logits[at][ids[at]],
            highest + np.log(shares.sum()),
            logits[at][targets[at]],
        ]
        gradient[at][rest] = cotangents[at][K] * shares / shares.sum()
        gradient[at][ids[at]] += cotangents[at][:K]
        gradient[at][targets[at]] += cotangents[at][K + 1]
    return events, gradient


@functools.partial(jax.jit, static_argnums=(0, 5))
def found(head, logits, ids, targets, cotangents, dtype=jnp.float32):
    def of(logits):
        events, target = event_logits(logits, ids, targets, head, gradient_dtype=dtype)
        return (jnp.concatenate([events, target[..., None]], -1) * cotangents).sum(), events

    (_, events), gradient = jax.value_and_grad(of, has_aux=True)(logits)
    return events, event_logits(logits, ids, targets, head)[1], gradient


CASES = {  # (V, padded entries, mesh: data, fsdp, tensor)
    "one plane": (100, 0, None),
    "one plane, padded": (100, 28, None),
    "every bit": (EVERY, 0, None),
    "a short last plane, padded": (EVERY + 300, 28, None),
    "rows over devices": (EVERY + 300, 28, (4, 2, 1)),
    "vocabulary over devices": (EVERY, 0, (2, 1, 4)),
    "padding is more than a device's piece": (4 * EVERY, EVERY + 28, (2, 1, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_float64(name):
    vocab, padding, mesh = CASES[name]
    valid = vocab - padding
    logits, ids, targets = example(vocab, valid)
    cotangents = np.float32(np.random.default_rng(1).normal(size=(*SHAPE, K + 2)))
    head, inputs = VocabHead(1, valid if padding else None), (logits, ids, targets, cotangents)
    if mesh:
        head = VocabHead(1, head.valid_vocab, make_mesh(mesh[0], mesh[1], tensor=mesh[2]))
        wide = sharding(head.mesh, ("shards", None, None, "vocab"))
        inputs = (jax.device_put(logits, wide), *inputs[1:])
    events, target, gradient = found(head, *inputs)
    wanted, slopes = by_hand(*(np.asarray(x) for x in inputs), valid)
    np.testing.assert_allclose(events, wanted[..., :-1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(target, np.float32(wanted[..., -1]))
    np.testing.assert_allclose(gradient, slopes, rtol=2e-6, atol=1e-7)
    if mesh:
        assert gradient.sharding.is_equivalent_to(wide, 4)


def test_the_rest_keeps_its_value_far_below_the_ids():
    """1 - Σ would be 0 here, and a shift by the largest logit would underflow."""
    logits, ids, targets = example(EVERY, EVERY)
    logits = jnp.put_along_axis(logits - 300.0, ids, 5.0, axis=-1, inplace=False)
    cotangents = np.ones((*SHAPE, K + 2), np.float32)
    events, _, gradient = found(VocabHead(1), logits, ids, targets, cotangents)
    wanted, slopes = by_hand(*(np.asarray(x) for x in (logits, ids, targets, cotangents)), EVERY)
    assert events[..., -1].max() < -250
    np.testing.assert_allclose(events, wanted[..., :-1], rtol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)


def test_every_entry_lies_in_one_plane_and_only_the_ids_are_taken():
    ids = jnp.int32([[0, EVERY - LANES, EVERY - 1, LANES + 1, EVERY]])  # the last one is none
    planes = list(_planes(ids, EVERY, EVERY))
    assert [here.start for here, _ in planes] == list(range(0, EVERY, LANES))
    free = np.concatenate([free for _, free in planes], -1)
    assert np.flatnonzero(~free[0]).tolist() == [0, LANES + 1, EVERY - LANES, EVERY - 1]


def test_a_bfloat16_gradient_is_the_float32_one_rounded_where_nothing_is_added_twice():
    logits, ids, _ = example(EVERY, EVERY)
    targets = jnp.argmin(logits, axis=-1)  # not among the ids
    cotangents = np.float32(np.random.default_rng(1).normal(size=(*SHAPE, K + 2)))
    cotangents[..., -1] = 0.0  # the target's entry belongs to the rest
    narrow, exact = (
        found(VocabHead(1), logits, ids, targets, cotangents, dtype)[-1]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.any(narrow != exact)


def test_no_mask_and_no_masked_copy_as_large_as_the_logits():
    def loss(logits, ids, targets):
        events, target = event_logits(logits, ids, targets, VocabHead(1))
        return (jax.nn.logsumexp(events, -1) - target).sum()

    logits = jax.ShapeDtypeStruct((1, 1, 64, 8192), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.int32)
    targets = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(logits, ids, targets)
    memory = lowered.compile().memory_analysis()
    # The gradient, before and after the ids' part is added, and the words.
    assert memory.temp_size_in_bytes < (1.25 + 1 / PLANES) * logits.size * 4
    for other in ("x8192xi1", "x8192xi32"):
        assert other not in lowered.as_text()
