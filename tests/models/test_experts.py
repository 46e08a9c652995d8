"""Experts: products over groups of rows, the router's choice, and devices that split them."""

import dataclasses
import functools

import family_models as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dcod_jax.errors import DcodError
from dcod_jax.losses import routing
from dcod_jax.models import cached, experts, hf, lora, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes

RAW = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
MODEL = from_hf(RAW)


def _rows(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


FORMS = {
    "blocks": (experts._product_in_blocks, experts._outer_in_blocks),
    "ragged": (jax.lax.ragged_dot, experts._ragged_outer),
    "tiles": (
        lambda x, kernels, sizes: experts._transposed_tiled(
            x, kernels.swapaxes(1, 2), sizes, interpret=True
        ),
        functools.partial(experts._outer_in_tiles, interpret=True),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(0, 30, 7, 0, 3), (0, 0, 40, 0, 0), (1, 1, 1, 1, 1)])
def test_grouped_products_are_those_of_each_group(form, sizes):
    """40 rows, of which those behind the groups belong to none; channels in two tiles."""
    product, outer = FORMS[form]
    x, gradient, kernels = _rows(40, 530), _rows(40, 520, seed=1), _rows(5, 530, 520, seed=2)
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    wanted = np.concatenate([x[of] @ kernel for of, kernel in zip(groups, kernels, strict=True)])
    given = jnp.asarray(sizes, jnp.int32)
    np.testing.assert_allclose(product(x, kernels, given)[: ends[-1]], wanted, atol=2e-4)
    wanted = np.stack([x[group].T @ gradient[group] for group in groups])
    np.testing.assert_allclose(outer(x, gradient, given, dtype=jnp.float32), wanted, atol=1e-5)


@pytest.mark.parametrize("small", [0, experts._SMALL])
def test_the_gradient_of_a_grouped_product_has_the_kernels_dtype(small, monkeypatch):
    """Of float32 kernels it is not rounded to bfloat16: in blocks, and where products are few."""
    monkeypatch.setattr(experts, "_SMALL", small)
    kernels, rows = _rows(3, 6, 5), _rows(16, 6, seed=1).astype(jnp.bfloat16)
    sizes, upward = jnp.array([5, 0, 11]), _rows(16, 5, seed=2).astype(jnp.bfloat16)

    @jax.jit
    def gradients(rows, kernels):
        return jax.vjp(lambda *of: experts.grouped_matmul(*of, sizes), rows, kernels)[1](upward)

    in_rows, in_kernels = gradients(rows, kernels)
    x, g = (np.asarray(y, np.float32) for y in (rows, upward))
    wanted = np.stack([x[:5].T @ g[:5], np.zeros((6, 5)), x[5:].T @ g[5:]])
    assert in_kernels.dtype == jnp.float32
    np.testing.assert_allclose(in_kernels, wanted, atol=1e-5)
    wanted = np.concatenate([g[:5] @ kernels[0].T, g[5:] @ kernels[2].T])
    assert in_rows.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(in_rows, np.float32), wanted, atol=0.1)


@functools.cache
def _params():
    return transformer.init_params(MODEL, jax.random.key(0))


def _tokens():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 8)).astype(np.int32)
    segments = np.ones((8, 8), np.int32)
    segments[:, 6:] = 0
    segments[1, 3:6] = 2
    return jnp.asarray(tokens), jnp.asarray(segments)


def _value_and_gradient(sizes, params):
    """(hidden states, routing, gradient) on a mesh; the gradient is of both."""
    mesh = meshes.make_mesh(**sizes, devices=jax.devices()[: int(np.prod([*sizes.values()]))])
    layout = meshes.tree_shardings(mesh, transformer.logical_axes(MODEL))
    tokens, segments = _tokens()

    @jax.jit
    def run(params):
        def loss(params):
            hidden, routing = transformer.forward(
                MODEL, params, tokens, segment_ids=segments, mesh=mesh, remat="full"
            )
            hidden = jnp.where(segments[..., None] > 0, hidden, 0)
            total = jnp.square(hidden[..., 0]).sum() + jnp.square(routing.sum(0)[:, 4:8]).sum()
            return total, (hidden, routing)

        gradient, found = jax.grad(loss, has_aux=True)(params)
        return *found, gradient

    return jax.device_get(run(jax.device_put(params, layout)))


@functools.cache
def _on_one_device():
    return _value_and_gradient({"data": 1}, _params())


@pytest.mark.long  # the suite's mesh is that of tests/train/test_train_step_experts.py
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 4, "expert": 2},
        {"data": 1, "fsdp": 2, "expert": 4},
        {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 1, "expert": 2, "context": 2, "tensor": 2},
        {"data": 1, "fsdp": 4, "tensor": 2},
    ],
    ids=str,
)
def test_a_mixture_is_the_same_on_every_mesh(sizes):
    """Hidden states, routing and gradients; context parallelism keeps the order of a row's sums."""
    wanted, got = _on_one_device(), _value_and_gradient(sizes, _params())

    def close(one, other):
        np.testing.assert_allclose(one, other, atol=3e-5 * max(np.abs(other).max(), 1e-3))

    jax.tree.map(close, got, wanted)


def test_a_router_that_sends_every_token_to_the_same_experts_drops_none():
    """Equal logits: all tokens go to the first two of four experts, each with half the weight."""
    block = jax.tree.map(lambda x: x[0], _params()["layers"]["mlp"])
    block = block | {"router": {"kernel": jnp.zeros((32, 4))}}
    layer = jax.tree.map(lambda x: x[0], _params()["layers"]) | {"mlp": block}
    x, real = _rows(2, 40, 32), jnp.ones((2, 40), bool)
    graph = transformer.graphs(MODEL)[1]
    apply = jax.jit(functools.partial(transformer.apply_experts, graph, None))
    got, routing = apply(layer, x, real)
    np.testing.assert_array_equal(routing[:, 0, :4], [[40, 40, 0, 0]] * 2)
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)

    def expert(index):
        gate, up, down = (
            block[name]["experts"][index] for name in ("gate_proj", "up_proj", "down_proj")
        )
        return (jax.nn.silu(normed @ gate) * (normed @ up)) @ down

    np.testing.assert_allclose(got, x + (expert(0) + expert(1)) / 2, atol=1e-5)


def test_rows_of_other_devices_experts_add_nothing_whatever_a_kernel_leaves_there(monkeypatch):
    """A TPU's kernels write the rows of their groups only; forward pass and gradient."""
    mesh = meshes.make_mesh(1, expert=2, devices=jax.devices()[:2])
    graph = transformer.graphs(MODEL)[1]
    layer = jax.tree.map(lambda x: x[0], _params()["layers"])
    axes = transformer.logical_axes(MODEL)["layers"]
    whole = lambda names: meshes.spec(collectives.whole(names[1:]))  # noqa: E731
    specs = jax.tree.map(whole, axes, is_leaf=meshes.is_names)
    tokens, real = ("batch", None, None), jnp.ones((2, 6), bool)

    def values():
        def apply(layer, x, real):
            def added(layer, x):
                return transformer.apply_experts(graph, mesh, layer, x, real)[0]

            y, pull = jax.vjp(added, layer, x)
            return y, pull(y)[1]

        run = collectives.per_shard(apply, mesh, (specs, tokens, tokens[:2]), (tokens, tokens))
        return jax.jit(run)(layer, _rows(2, 6, 32), real)

    def leaves_nothing(*of, product=experts._product, **how):
        y, sizes = product(*of, **how), of[2]
        return jnp.where((jnp.arange(len(y)) < sizes.sum())[:, None], y, jnp.nan)

    wanted = values()
    monkeypatch.setattr(experts, "_product", leaves_nothing)
    jax.tree.map(np.testing.assert_array_equal, values(), wanted)


def test_dots_keeps_the_products_of_the_experts():
    """Nine of a layer's gradient; with "full" its three products are computed once more."""
    tokens, _ = _tokens()

    def products(remat):
        def loss(params):
            return transformer.hidden_states(MODEL, params, tokens, remat=remat).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(_params())
        return str(jaxpr).count("ragged_dot_general[")

    assert [products(remat) for remat in ("none", "dots", "full")] == [9, 9, 12]


def test_decoding_on_a_mesh_is_that_on_one_device():
    """Rows that the mesh does not divide, and experts and their channels split over it."""
    tokens, cache = _tokens()[0][:3], cached.init_cache(MODEL, 3, 8, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(8), (3, 8))
    mesh = meshes.make_mesh(2, expert=2, tensor=2)
    layout = meshes.tree_shardings(mesh, transformer.logical_axes(MODEL))

    def hidden(params, mesh):
        options = {"positions": positions, "cache": cache, "mesh": mesh}
        return cached.forward_with_cache(MODEL, params, tokens, **options)[0]

    run = jax.jit(hidden, static_argnums=1)
    got = run(jax.device_put(_params(), layout), mesh)
    np.testing.assert_allclose(got, run(_params(), None), atol=1e-5)


def test_experts_that_the_mesh_cannot_split_are_refused():
    config = dataclasses.replace(MODEL, mixture=dataclasses.replace(MODEL.mixture, experts=3))
    with pytest.raises(DcodError, match=r"num_experts=3 must be a multiple of mesh\.expert=2"):
        transformer.check_mesh(config, meshes.make_mesh(expert=2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A torch model and its directory."""
    model = reference.build(RAW | {"num_hidden_layers": 3})
    directory = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(directory)
    return model, directory


def test_the_balance_is_the_load_balancing_loss_of_transformers(pair):
    """Over the tokens that are no padding; the softmax of some versions' routers is taken twice."""
    model, directory = pair
    config, params = hf.load_model(directory, dtype=jnp.float32)
    tokens, segments = _tokens()
    ids, mask = (torch.tensor(np.asarray(x)).long() for x in (tokens, segments > 0))
    scores: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda gate, given, _: scores.append(given[0].reshape(-1, 32) @ gate.weight.T)
        )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    theirs = load_balancing_loss_func(tuple(scores), 4, 2, mask)
    forward = jax.jit(transformer.forward, static_argnums=0)
    _, routed = forward(config, params, tokens, segment_ids=jnp.minimum(segments, 1))
    measured = routing.statistics(routed.sum(0), (segments > 0).sum())
    np.testing.assert_allclose(measured["router/balance"], theirs, rtol=1e-5)
    # With the padding in it, it is another number.
    assert abs(load_balancing_loss_func(tuple(scores), 4, 2) - theirs) > 1e-3


def test_files_with_the_experts_in_one_tensor_are_read(pair, tmp_path):
    """As transformers 5 writes them with save_original_format=False."""
    model, directory = pair
    model.save_pretrained(tmp_path, save_original_format=False)
    _, params = hf.load_model(directory, dtype=jnp.float32)
    _, same = hf.load_model(tmp_path, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert same["layers"]["mlp"]["gate_proj"]["experts"].shape == (3, 4, 32, 24)


def test_experts_are_read_into_their_pieces_and_written_back(pair, tmp_path):
    _, directory = pair
    mesh = meshes.make_mesh(2, expert=2, tensor=2)
    _, params = hf.load_model(directory, dtype=jnp.float32)
    config, split = hf.load_model(directory, dtype=jnp.float32, mesh=mesh)
    kernels = split["layers"]["mlp"]["down_proj"]["experts"]
    assert kernels.addressable_shards[0].data.shape == (3, 2, 12, 32)
    jax.tree.map(np.testing.assert_array_equal, split, params)
    hf.save_params(tmp_path, config, split, dtype="float32", max_shard_bytes=1 << 30)
    theirs, ours = (load_file(at / hf.SINGLE) for at in (directory, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)


def test_adapters_are_of_attention_only():
    settings = {"rank": 2, "alpha": 4.0, "rslora": False}
    with pytest.raises(DcodError, match=r"'gate_proj' names no linear map .* no mixture of exp"):
        lora.with_adapter(MODEL, {**settings, "targets": ("q_proj", "gate_proj")})
    adapted = lora.with_adapter(MODEL, {**settings, "targets": (".*_proj",)})
    assert lora.linear_maps(adapted) == [f"self_attn.{name}_proj" for name in "koqv"]


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "per_tok=5 must be at most"),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 5}, "must be the same number"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts=0 must be a whole number from 1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv=-1.0 must be"),
        ("qwen2_moe", {}, "model_type='qwen2_moe' is not supported"),
        ("deepseek_v3", {}, "model_type='deepseek_v3' is not supported"),
    ],
)
def test_mixtures_that_are_not_computed_are_refused(model_type, changes, text):
    shape = {key: value for key, value in RAW.items() if "experts" not in key}
    with pytest.raises(DcodError, match=text):
        from_hf(shape | {"model_type": model_type} | changes)
