"""Every kernel against attention written out in float64 NumPy: values and gradients.

The TPU kernel runs interpreted. Rows are packed and padded, heads grouped, with and without a
window, and split over the axes of a mesh.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.models import attention, transformer
from dcod_jax.models.layer_kinds import LayerKind
from dcod_jax.models.rope import Rope
from dcod_jax.parallel import mesh as meshes
from tests.train.test_train_step import MODEL

B, N, G, H = 2, 4, 2, 16


@functools.cache
def example(length: int):
    """(query, key, value, cotangent of the result, segment_ids)."""
    generator = np.random.default_rng(length)
    shapes = [(B, heads, length, H) for heads in (N, G, G, N)]
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    cuts = (length // 3, length - length // 8)
    segments = np.ones((B, length), np.int32)
    segments[0, cuts[0] :] = 2
    segments[0, cuts[1] :] = 0
    segments[1, 7:] = 2
    return *arrays, segments


@functools.cache
def written_out(length: int, window: int | None, softcap: float | None = None):
    """(result, gradients of query, key and value) in float64, one head and one row at a time."""
    cap, slope = (lambda x: x), (lambda x: 1.0)
    if softcap is not None:
        cap = lambda x: softcap * np.tanh(x / softcap)  # noqa: E731
        slope = lambda x: 1 - np.tanh(x / softcap) ** 2  # noqa: E731
    query, key, value, cotangent, segments = example(length)
    query, key, value, cotangent = (np.float64(x) for x in (query, key, value, cotangent))
    result, dquery, dkey, dvalue = (np.zeros_like(x) for x in (query, query, key, value))
    at = np.arange(length)
    order = at[:, None] >= at[None, :]
    if window is not None:
        order &= at[:, None] - at[None, :] < window
    for row in range(B):
        visible = order & (segments[row][:, None] == segments[row][None, :])
        for head in range(N):
            group = head // (N // G)
            q, k, v = query[row, head], key[row, group], value[row, group]
            products = q @ k.T / np.sqrt(H)
            scores = np.where(visible, cap(products), -np.inf)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            result[row, head] = probs @ v
            dprobs = cotangent[row, head] @ v.T
            dscores = probs * (dprobs - (dprobs * probs).sum(-1, keepdims=True)) / np.sqrt(H)
            dscores = dscores * slope(products)
            dquery[row, head] = dscores @ k
            dkey[row, group] += dscores.T @ q
            dvalue[row, group] += probs.T @ cotangent[row, head]
    return result, dquery, dkey, dvalue


def computed(length: int, window: int | None, *, kind: str, softcap=None, mesh=None):
    *arrays, cotangent, segments = example(length)
    pieces = meshes.parts(mesh, "length")

    @jax.jit
    def run(query, key, value):
        def function(*heads):
            order = attention._order(length, pieces)
            options = {"window": window, "softcap": softcap, "mesh": mesh, "kind": kind}
            ids = jnp.asarray(segments)[:, order]
            mixed = attention.attention(*(x[:, :, order] for x in heads), ids, **options)
            return mixed[:, :, np.argsort(order)]

        mixed, pull = jax.vjp(function, query, key, value)
        return mixed, *pull(jnp.asarray(cotangent))

    return jax.device_get(run(*arrays))


@pytest.mark.parametrize(
    ("kind", "window", "softcap"),
    [
        ("splash", 37, 2.0),
        ("scanned", 37, 2.0),
        ("blocked", 37, 2.0),
        ("blocked", None, None),
    ],
)
def test_every_kernel_is_the_written_out_one(kind, window, softcap):
    got = computed(300, window, kind=kind, softcap=softcap)  # the TPU kernel pads to its tiles
    for a, b in zip(got, written_out(300, window, softcap), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


def test_the_gradient_of_blocks_of_queries_is_not_a_sum_of_padded_rows():
    query, key, value, _, segments = (jnp.asarray(x) for x in example(300))

    def summed(query):
        return attention.attention(query, key, value, segments, mesh=None, kind="blocked").sum()

    program = str(jax.make_jaxpr(jax.grad(summed))(query))
    assert "split[" in program
    assert f"f32[{B},{G},{N // G},300,{H}] = pad" not in program


@pytest.mark.parametrize(
    ("kind", "window", "softcap", "sizes"),
    [
        ("splash", None, None, {"data": 2, "context": 2, "tensor": 2}),
        ("splash", 150, 2.0, {"data": 1, "context": 2, "fsdp": 2, "tensor": 2}),
        ("blocked", 37, 2.0, {"data": 1, "context": 4, "tensor": 2}),
        ("scanned", None, None, {"slices": 2, "context": 4, "tensor": 1}),
    ],
)
def test_split_over_a_mesh_it_is_the_written_out_one(kind, window, softcap, sizes):
    got = computed(512, window, kind=kind, softcap=softcap, mesh=meshes.make_mesh(**sizes))
    for a, b in zip(got, written_out(512, window, softcap), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


def test_the_kernel_is_that_of_the_meshs_devices(monkeypatch):
    mesh = meshes.make_mesh()
    for platform, kind in {"tpu": "splash", "gpu": "cudnn", "cpu": "blocked"}.items():
        monkeypatch.setattr(meshes, "platform", lambda _, platform=platform: platform)
        assert attention.choose("auto", mesh) == kind
    assert attention.choose("auto", None) == "blocked"
    with pytest.raises(DcodError, match=re.escape("attention='flash' must be one of auto, splash")):
        attention.choose("flash", None)


def test_tiles_fit_the_row_with_at_most_an_eighth_of_padding():
    lengths = (1, 128, 300, 900, 1000, 1500, 2048, 4096, 4224, 32768)
    blocks = [attention.splash_block(length) for length in lengths]
    assert blocks == [128, 128, 128, 128, 1024, 512, 1024, 1024, 512, 1024]
    assert attention.splash_block(4224, exact=True) == 128
    assert attention.splash_block(3072, exact=True) == 1024


def test_a_piece_is_an_early_and_a_late_chunk():
    row = jnp.arange(16)[None]
    shuffled = attention._shuffle(row, 4)
    np.testing.assert_array_equal(shuffled[0, :4], [0, 1, 14, 15])
    np.testing.assert_array_equal(shuffled[0], attention._order(16, 4))
    np.testing.assert_array_equal(attention._natural(shuffled, 4), row)


def test_a_length_that_cannot_be_split_is_refused_with_the_arithmetic():
    mesh = meshes.make_mesh(context=4)
    heads = jnp.zeros((2, 2, 20, 8))
    text = "a row of 20 positions must be a multiple of 8 to be split over mesh.context=4"
    with pytest.raises(DcodError, match=re.escape(text)):
        attention.attention(heads, heads, heads, jnp.ones((2, 20), jnp.int32), mesh=mesh)
    with pytest.raises(DcodError, match="window of 0"):
        attention.attention(heads, heads, heads, jnp.ones((2, 20), jnp.int32), window=0)


def test_hidden_states_of_any_length_come_back_whole_and_in_order():
    """21 positions over 4 pieces: padded to 24, shuffled, and put back; with window and cap."""
    tokens = jax.random.randint(jax.random.key(1), (2, 21), 0, 61)
    mesh = meshes.make_mesh(2, context=4)

    kinds = (LayerKind(5, Rope(10000.0)), LayerKind(None, None))
    model = dataclasses.replace(MODEL, num_layers=2, layer_kinds=kinds, attention_softcap=1.0)

    @jax.jit
    def both(tokens):
        params = transformer.init_params(model, jax.random.key(0))
        run = functools.partial(transformer.hidden_states, model, params, tokens)
        return run(), run(mesh=mesh)

    expected, got = both(tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)
