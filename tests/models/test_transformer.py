"""The scanned transformer: remat, depth, padding, sharding, cache."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.models import attention, cached, remat, transformer
from dcod_jax.models import config as configs
from dcod_jax.models.layer_kinds import LayerKind, groups
from dcod_jax.models.rope import Rope
from dcod_jax.parallel import mesh as meshes


def _config(**changes):
    raw = {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    return configs.from_hf({**raw, **changes})


# Layers with and without a window by turns, capped scores, scaled embedding, four norms.
WINDOWED = {
    "model_type": "gemma2",
    "head_dim": 8,
    "sliding_window": 20,
    "attn_logit_softcapping": 2.0,
    "num_hidden_layers": 3,
}


def _params(config, seed=0):
    """Random parameters, biases and norm scales included."""
    params = transformer.init_params(config, jax.random.key(seed))
    generator = np.random.default_rng(seed + 1)
    noisy = lambda x: jnp.asarray(np.float32(x + 0.1 * generator.normal(size=x.shape)))  # noqa: E731
    return jax.tree.map(noisy, jax.device_get(params))


def _tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 96, shape), jnp.int32)


def _assert_close(got, expected, *, tolerance=1e-5):
    """Leaves differ by at most tolerance times the largest value of the expected leaf."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))

    jax.tree.map(check, got, expected)


def _loss(config, **options):
    def loss(params, tokens):
        hidden = transformer.hidden_states(config, params, tokens, **options)
        return jnp.sum(jnp.square(jnp.sin(hidden.astype(jnp.float32))))  # nothing cancels

    return loss


def test_remat_changes_no_gradient():
    config = _config()
    params, tokens = _params(config), _tokens(2, 80)
    runs = {
        kept: jax.jit(jax.value_and_grad(_loss(config, remat=kept)))(params, tokens)
        for kept in ("none", "full", "dots:1")  # one layer keeps attention, the other all products
    }
    for kept in ("full", "dots:1"):
        _assert_close(runs[kept], runs["none"])


@pytest.mark.parametrize(("kept", "kernels"), [("full", 4), ("attention", 3), ("dots", 3)])
def test_attention_that_is_kept_is_not_computed_again(monkeypatch, kept, kernels):
    """The TPU kernel and its two backward passes; the forward one again where it is not kept."""
    monkeypatch.setattr(meshes, "platform", lambda _: "tpu")
    config, mesh = _config(), meshes.make_mesh(devices=jax.devices()[:1])
    gradient = jax.jit(jax.grad(_loss(config, remat=kept, mesh=mesh)))
    traced = gradient.trace(transformer.param_shapes(config), _tokens(1, 128))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


def test_unknown_remat_is_refused():
    config = _config()
    for wrong in ("all", "full:3", "dots:0", "dots:x"):
        with pytest.raises(DcodError, match=f"remat='{wrong}' must be none, dots"):
            transformer.hidden_states(config, _params(config), _tokens(1, 4), remat=wrong)
    assert remat.pieces("dots:12", 28) == [("attention", 16), ("dots", 12)]
    assert remat.pieces("dots:40", 28) == remat.pieces("dots", 28) == [("dots", 28)]


def _temporary_bytes(kept, num_layers):
    config = _config(num_hidden_layers=num_layers, intermediate_size=512)
    shapes = transformer.param_shapes(config)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    lowered = jax.jit(jax.grad(_loss(config, remat=kept))).lower(shapes, tokens)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_full_remat_keeps_little_more_than_each_layers_input():
    layer_input = 8 * 64 * 32 * 4
    deep, shallow = _temporary_bytes("full", 10), _temporary_bytes("full", 2)
    assert (deep - shallow) / 8 < 1.6 * layer_input
    every = _temporary_bytes("none", 10)
    assert every > deep + 10 * 10 * layer_input
    half = (_temporary_bytes("none:5", 10) - deep) / (every - deep)
    assert 0.4 < half < 0.6
    products = 10 * 8 * 64 * 2 * 512 * 4  # of gate and up alone
    assert deep + 0.9 * products < _temporary_bytes("dots", 10) < every


@pytest.mark.parametrize("changes", [{}, WINDOWED])
def test_program_does_not_grow_with_depth(changes):
    def size(num_layers):
        config = _config(**{**changes, "num_hidden_layers": num_layers})
        shapes = transformer.param_shapes(config)
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        gradient = jax.jit(jax.grad(_loss(config, remat="full")))
        return len(gradient.lower(shapes, tokens).as_text())

    assert size(24) < 1.02 * size(2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_is_finite_and_has_no_effect(dtype):
    config = _config()
    params = _params(config)
    segment_ids = jnp.array([[1] * 7 + [0] * 5, [0] * 12])  # the second row is nothing but padding
    tokens, other = _tokens(2, 12), _tokens(2, 12, seed=9)
    other = jnp.where(segment_ids > 0, tokens, other)

    @jax.jit
    def run(params, tokens):
        def loss(params):
            hidden = transformer.hidden_states(
                config, params, tokens, segment_ids=segment_ids, compute_dtype=dtype, remat="full"
            )
            return jnp.sum(jnp.where(segment_ids[..., None] > 0, jnp.sin(hidden), 0)), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, hidden), gradients = run(params, tokens)
    assert hidden.dtype == dtype
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, hidden, gradients)))
    (other_value, _), other_gradients = run(params, other)
    assert other_value == value
    jax.tree.map(np.testing.assert_array_equal, other_gradients, gradients)


def test_a_query_that_may_see_nothing_is_finite():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 2, 2, 2, 8))
    key, value = (jax.random.normal(k, (1, 2, 5, 8)) for k in keys[1:])
    visible = jnp.zeros((1, 2, 5), bool)

    def loss(query, key, value):
        return jnp.sum(attention.attend(query, key, value, visible, scale=1.0) ** 2)

    assert jnp.isfinite(loss(query, key, value))
    for window in (None, 3):
        mixed = cached.cached_attention(
            query.reshape(1, 4, 2, 8),
            lambda index: (key.mT, value),
            jnp.full((1, 2), -1),
            (0, jnp.int32(1)),
            scale=1.0,
            window=window,
        )
        assert jnp.isfinite(mixed).all()
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(query, key, value):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("shape", "changes"), [((1, 8, 1), {}), ((2, 2, 2), {**WINDOWED, "num_hidden_layers": 2})]
)
def test_eight_devices_equal_one(shape, changes):
    data, fsdp, tensor = shape
    mesh = meshes.make_mesh(data, fsdp, tensor=tensor)
    config = _config(**changes)
    params, tokens = _params(config), _tokens(8, 16)
    expected = jax.jit(jax.value_and_grad(_loss(config, remat="full")))(params, tokens)
    shardings = meshes.tree_shardings(mesh, transformer.logical_axes(config))
    function = jax.value_and_grad(_loss(config, remat="full", mesh=mesh))
    batch = meshes.sharding(mesh, ("batch", None))
    compiled = jax.jit(function, in_shardings=(shardings, batch), out_shardings=(None, shardings))
    got = compiled(jax.device_put(params, shardings), jax.device_put(tokens, batch))
    _assert_close(got, expected)


def test_fsdp_gathers_each_layers_weights_inside_the_loop():
    mesh = meshes.make_mesh(1, 8)
    config = _config(hidden_size=64, intermediate_size=128)
    shapes = transformer.param_shapes(config)
    shardings = meshes.tree_shardings(mesh, transformer.logical_axes(config))
    batch = meshes.sharding(mesh, ("batch", None))

    def forward(params, tokens):
        return transformer.hidden_states(
            config, params, tokens, compute_dtype=jnp.bfloat16, mesh=mesh
        )

    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    compiled = jax.jit(forward, in_shardings=(shardings, batch)).lower(shapes, tokens).compile()
    program = compiled.as_text()
    gathers = [line for line in program.splitlines() if "all-gather(" in line]
    # one layer's whole up_proj; never the stacked one
    assert any("[64,128]" in line for line in gathers)
    assert not any("[2,64,128]" in line for line in gathers)


def test_fsdp_scatters_each_layers_gradient_inside_the_loop():
    """No device sums up a whole matrix's gradient, of which it keeps an eighth."""
    mesh = meshes.make_mesh(1, 8)
    config = _config(hidden_size=64, intermediate_size=128)
    params, tokens = transformer.param_shapes(config), jax.ShapeDtypeStruct((8, 16), jnp.int32)
    shardings = meshes.tree_shardings(mesh, transformer.logical_axes(config))
    batch = meshes.sharding(mesh, ("batch", None))
    function = jax.grad(_loss(config, remat="full", mesh=mesh))
    jitted = jax.jit(function, in_shardings=(shardings, batch), out_shardings=shardings)
    program = jitted.lower(params, tokens).compile().as_text().splitlines()
    sums = [line for line in program if "all-reduce(" in line]
    assert sum("reduce-scatter(" in line for line in program) >= 7
    assert not any(re.search(r"\[(64|128),(32|64|128)\]", line) for line in sums), sums


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, "num_attention_heads=1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ({"intermediate_size": 49}, "intermediate_size=49"),
        ({"vocab_size": 97}, "vocab_size=97"),
    ],
)
def test_mesh_that_does_not_divide_is_refused(changes, key):
    mesh = meshes.make_mesh(-1, 1, tensor=2)
    config = _config(**changes)
    with pytest.raises(DcodError, match=key):
        transformer.hidden_states(config, _params(config), _tokens(8, 4), mesh=mesh)


@pytest.mark.parametrize(
    ("split", "transposed", "chunk"),  # the cache is read at once, in three chunks
    [(False, False, 256), (True, True, 256), (False, False, 32), (True, False, 32)],
)
def test_cache_reads_only_what_was_written_and_is_not_ahead(monkeypatch, split, transposed, chunk):
    monkeypatch.setattr(cached, "CACHE_CHUNK", chunk)
    config = _config(**(WINDOWED if chunk == 32 else {}))
    params, tokens = _params(config), _tokens(2, 75)
    positions = jnp.broadcast_to(jnp.arange(75), (2, 75))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        expected = transformer.hidden_states(config, exact, tokens, compute_dtype=jnp.float64)
    params = cached.transpose_kernels(params) if transposed else params
    params = cached.split_layers(params) if split else params

    @jax.jit
    def step(tokens, positions, cache):
        return cached.forward_with_cache(
            config, params, tokens, positions=positions, cache=cache, transposed=transposed
        )

    # a cache full of large garbage: unwritten slots must not be seen
    empty = cached.init_cache(config, 2, 96, jnp.float32, split=split)
    cache = jax.tree.map(lambda x: x + 50.0, empty)
    first, cache = step(tokens[:, :25], positions[:, :25], cache)
    np.testing.assert_allclose(first, expected[:, :25], atol=1e-5)
    middle, cache = step(tokens[:, 25:50], positions[:, 25:50], cache)
    np.testing.assert_allclose(middle, expected[:, 25:50], atol=1e-5)
    again, _ = step(tokens[:, :25], positions[:, :25], cache)  # later slots are written, not seen
    np.testing.assert_allclose(again, expected[:, :25], atol=1e-5)
    rest, cache = step(tokens[:, 50:], positions[:, 50:], cache)
    np.testing.assert_allclose(rest, expected[:, 50:], atol=1e-5)
    assert len(cache.keys) == (config.num_layers if split else 1)
    assert all((np.asarray(keys[..., 75:]) == 50.0).all() for keys in cache.keys)
    assert all((np.asarray(v[..., 75:, :]) == 50.0).all() for v in cache.values)


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("F" * 28, [(1, 28)]),
        ("SF" * 13, [(2, 13)]),
        ("SSSSSF" * 4 + "SS", [(6, 4), (1, 2)]),
        ("F" * 21 + "S" * 7, [(1, 21), (1, 7)]),
        ("FFSFSFS", [(1, 1), (2, 3)]),
        ("SFFSSFSFFF", None),
    ],
)
def test_layers_are_scanned_in_groups_that_repeat(pattern, sizes):
    kinds = tuple(LayerKind(8 if one == "S" else None, Rope(10000.0)) for one in pattern)
    config = dataclasses.replace(_config(), num_layers=len(kinds), layer_kinds=kinds)
    found = groups(config.kinds)
    assert sum((kinds * periods for kinds, periods in found), ()) == kinds
    assert sizes is None or [(len(kinds), periods) for kinds, periods in found] == sizes
    with pytest.raises(DcodError, match="layer_kinds has 10 entries for num_layers=3"):
        dataclasses.replace(config, num_layers=3, layer_kinds=kinds[:1] * 10)


def test_a_cache_is_a_whole_number_of_chunks():
    config = _config()
    for wanted in (*range(1, 600), *range(600, 9000, 37)):
        cache = jax.eval_shape(lambda n=wanted: cached.init_cache(config, 1, n, jnp.float32))
        slots = cache.values[0].shape[3]
        assert wanted <= slots <= 1.25 * wanted
        chunk = cached._cache_chunk(slots)
        assert slots % chunk == 0
        assert slots // chunk <= cached.MAX_CACHE_CHUNKS


def test_positions_outside_the_cache_write_nothing():
    config = _config()
    params = _params(config)
    cache = cached.init_cache(config, 1, 4, jnp.bfloat16)
    hidden, after = cached.forward_with_cache(
        config, params, _tokens(1, 2), positions=jnp.array([[-1, 4]]), cache=cache
    )
    assert jnp.isfinite(hidden).all()
    jax.tree.map(np.testing.assert_array_equal, after, cache)
    assert after.keys[0].dtype == jnp.bfloat16


def test_logical_axes_name_every_dimension():
    config = _config()
    shapes, axes = transformer.param_shapes(config), transformer.logical_axes(config)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, shapes)


def test_init_is_deterministic_and_normal():
    config = _config(hidden_size=256, initializer_range=0.02)
    one, two = (transformer.init_params(config, jax.random.key(3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    kernel = one["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(kernel[0], kernel[1])
    assert (
        transformer.init_params(config, jax.random.key(3), dtype=jnp.bfloat16)["norm"][
            "scale"
        ].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 2, "context": 2}])
def test_embedded_tokens_are_never_whole_on_a_device_of_a_mesh_of_two_axes(sizes):
    """Rows go over one axis, positions over the other; both at once would be a gather of all."""
    mesh = meshes.make_mesh(**{"data": 1, **sizes})
    params = {"embed_tokens": {"embedding": jnp.ones((96, 32))}}
    tokens = _tokens(8, 24)

    def loss(params):
        options = {"compute_dtype": jnp.float32, "mesh": mesh, "length": "length"}
        return jnp.square(transformer.embed(params, tokens, **options)).sum()

    layout = {"embed_tokens": {"embedding": meshes.sharding(mesh, ("vocab", "embed"))}}
    text = jax.jit(jax.grad(loss), in_shardings=(layout,)).lower(params).compile().as_text()
    rows = 8 // mesh.shape["data"]
    assert f"f32[{rows},{24 // mesh.shape['context']}," in text
    assert f"f32[{rows},24,32]" not in text
