"""A pruned copy: the same bytes, layers as transformers drops them, heads and channels as masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from dcod_jax.data.dataset import DatasetWriter
from dcod_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.init_student import arguments, prune
from dcod_jax.init_student.command import init_student
from dcod_jax.init_student.prune import mean_activations, texts_of
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.models.mixtures import Mixture
from dcod_jax.types import Trace

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
IDS = np.random.default_rng(0).integers(5, 40, (2, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    return tiny.write_model(place, num_hidden_layers=4, **QWEN)


def make(model, out, *words):
    return init_student(arguments.parse([str(model), str(out), *words]))


def theirs(model, *, drop=()):
    torch.set_num_threads(1)
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in sorted(drop, reverse=True):
        del found.model.layers[layer]
    for place, layer in enumerate(found.model.layers):
        layer.self_attn.layer_idx = place
    found.config.num_hidden_layers = len(found.model.layers)
    found.config.layer_types = found.config.layer_types[: len(found.model.layers)]
    with torch.no_grad():
        return found(torch.tensor(IDS), use_cache=False).logits.numpy()


def test_a_copy_of_everything_has_the_same_bytes(model, tmp_path, capsys):
    out = make(model, tmp_path / "copy", "--heads", "4", "--kv-heads", "2", "--mlp", "64")
    assert (out / hf.SINGLE).read_bytes() == (model / hf.SINGLE).read_bytes()
    assert hf.read_config(out) == hf.read_config(model)
    assert f"wrote {out}:" in capsys.readouterr().out


@pytest.mark.parametrize(("layers", "dropped"), [("0,2-3", [1]), ("even:2", [1, 2])])
def test_dropped_layers_are_those_that_transformers_would_drop(model, tmp_path, layers, dropped):
    out = make(model, tmp_path / "out", "--layers", layers)
    np.testing.assert_allclose(theirs(out), theirs(model, drop=dropped), atol=1e-6)
    kept = [layer for layer in range(4) if layer not in dropped]
    assert f"{len(kept)} of 4: {', '.join(map(str, kept))}" in (out / "README.md").read_text()


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (1, 1), (2, 1)])
def test_heads_and_channels_that_go_are_as_if_masked(heads, groups):
    """The masks are found here, by plain loops over the layers."""
    config = from_hf(tiny.raw_config(**QWEN))
    params = transformer.init_params(config, jax.random.key(3))
    own = params["layers"]["self_attn"]
    own["q_proj"]["bias"] = 0.3 * jax.random.normal(jax.random.key(4), (2, 32))
    own["v_proj"]["bias"] = 0.3 * jax.random.normal(jax.random.key(5), (2, 16))
    smaller, less = prune.keep_heads(config, params, heads, groups)
    smaller, less = prune.keep_channels(smaller, less, 40)
    o, v = (np.array(own[name]["kernel"]) for name in ("o_proj", "v_proj"))
    mlp = {name: np.array(x["kernel"]) for name, x in params["layers"]["mlp"].items()}
    for layer in range(2):
        score = [(o[layer, 8 * n : 8 * n + 8] ** 2).sum() for n in range(4)]
        value = [(v[layer, :, 8 * g : 8 * g + 8] ** 2).sum() for g in range(2)]
        pairs = [value[g] * (score[2 * g] + score[2 * g + 1]) for g in range(2)]
        stay = sorted(range(2), key=lambda g: -pairs[g])[:groups]
        for g in range(2):
            inside = sorted((2 * g, 2 * g + 1), key=lambda n: -score[n])[: heads // groups]
            for n in (2 * g, 2 * g + 1):
                if g not in stay or n not in inside:
                    o[layer, 8 * n : 8 * n + 8] = 0
        gate, up = ((mlp[name][layer] ** 2).sum(0) for name in ("gate_proj", "up_proj"))
        channel = gate * up * (mlp["down_proj"][layer] ** 2).sum(1)
        mlp["down_proj"][layer, np.argsort(-channel)[40:]] = 0
    masked = jax.tree.map(lambda x: x, params)
    masked["layers"]["self_attn"]["o_proj"]["kernel"] = jnp.asarray(o)
    masked["layers"]["mlp"]["down_proj"]["kernel"] = jnp.asarray(mlp["down_proj"])
    logits = jax.jit(transformer.logits, static_argnums=0)
    wanted = logits(config, masked, jnp.array(IDS))
    assert np.abs(wanted - logits(config, params, jnp.array(IDS))).max() > 0.01
    np.testing.assert_allclose(logits(smaller, less, jnp.array(IDS)), wanted, atol=2e-6)


def plain_activations(config, params, texts):
    """By plain numpy, text by text: ([L, N], [L, F])."""
    heads = np.zeros((config.num_layers, config.num_heads))
    channels = np.zeros((config.num_layers, config.intermediate_size))
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def turn(x):  # [T, heads, H]
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for text in texts:
        x = tree["embed_tokens"]["embedding"][text]
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
            maps = {name: m for part in ("self_attn", "mlp") for name, m in layer[part].items()}

            def linear(name, x, maps=maps):
                return x @ maps[name]["kernel"] + maps[name].get("bias", 0)

            h = norm(x, layer["input_layernorm"]["scale"])
            q, k, v = (linear(f"{n}_proj", h).reshape(len(text), -1, 8) for n in "qkv")
            k, v = (np.repeat(y, 2, axis=1) for y in (turn(k), v))
            scores = np.einsum("qnh,knh->nqk", turn(q), k) / np.sqrt(8)
            scores[:, np.triu(np.ones((len(text), len(text)), bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)
            x = x + linear("o_proj", mixed.reshape(len(text), -1))
            h = norm(x, layer["post_attention_layernorm"]["scale"])
            gate = linear("gate_proj", h)
            out = gate / (1 + np.exp(-gate)) * linear("up_proj", h)
            x = x + linear("down_proj", out)
            heads[i] += np.abs(mixed).sum((0, 2)) / 8
            channels[i] += np.abs(out).sum(0)
    count = sum(map(len, texts))
    return heads / count, channels / count


def test_units_are_chosen_by_their_mean_activations_on_traces(model, tmp_path):
    rng = np.random.default_rng(5)
    tokenizer = load_tokenizer(model)
    made = {"tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer)}}
    with DatasetWriter(tmp_path / "data", shard_records=9, manifest=made) as writer:
        for number, length in enumerate((5, 17, 40, 3, 9, 12, 30)):
            ids = rng.integers(5, 49, length, dtype=np.int32)
            writer.write(Trace(str(number), ids, np.arange(length) > 1))
    config, params = hf.load_model(model, dtype="float32")
    texts = texts_of(tmp_path / "data", 6, config, tokenizer)
    assert [len(text) for text in texts] == [5, 17, 40, 9, 12, 30]
    heads, channels = plain_activations(config, params, texts)
    for ours, plain in zip(mean_activations(config, params, texts), (heads, channels), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4)
    words = ("--choose", "activations", "--data", tmp_path / "data", "--traces", 6)
    words += ("--layers", "0,2-3", "--kv-heads", 1, "--heads", 1, "--mlp", 40)
    out = make(model, tmp_path / "out", *map(str, words))
    assert "largest mean activations on 6 traces of" in (out / "README.md").read_text()
    tensors = load_file(out / hf.SINGLE)
    for place, layer in enumerate((0, 2, 3)):
        stay = np.sort(np.argsort(-channels[layer])[:40])
        down = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"])[layer, stay]
        name = f"model.layers.{place}."
        np.testing.assert_array_equal(tensors[f"{name}mlp.down_proj.weight"], down.T)
        group = int(np.argmax(heads[layer].reshape(2, 2).sum(1)))
        head = 2 * group + int(np.argmax(heads[layer, 2 * group : 2 * group + 2]))
        for own, unit in (("q", head), ("k", group), ("v", group)):
            kernel = np.asarray(params["layers"]["self_attn"][f"{own}_proj"]["kernel"])[layer]
            found = tensors[f"{name}self_attn.{own}_proj.weight"]
            np.testing.assert_array_equal(found, kernel[:, 8 * unit : 8 * unit + 8].T)


@pytest.mark.parametrize("words", ["--choose activations", "--data x", "--traces 0"])
def test_activations_need_a_dataset_and_weights_none(words, capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["model", "out", *words.split()])
    assert "--choose activations needs --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "5"), "--layers 5 must be between 2 and the model's 4 layers"),
        (("--layers", "0-4"), "must name layers from 0 to 3 once each"),
        (("--layers", "2,1"), "in ascending order"),
        (("--layers", "some"), "must be N, even:N or a list"),
        (("--heads", "3"), "the model has 4 heads in 2 kv groups"),
        (("--kv-heads", "3"), "at most 2 groups"),
        (("--mlp", "65"), "between 1 and the model's 64 channels"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(model, tmp_path, words, message):
    with pytest.raises(DcodError, match=message):
        make(model, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_channels_of_experts_are_not_pruned(model):
    mixture = Mixture(experts=4, per_token=2, width=24, normalized=True)
    config = dataclasses.replace(from_hf(tiny.raw_config()), mixture=mixture)
    with pytest.raises(DcodError, match=r"has experts.*take --choose weights"):
        texts_of("unread", 1, config, load_tokenizer(model))
    params = transformer.init_params(config, jax.random.key(0))
    with pytest.raises(DcodError, match="--mlp 8: the experts of model_type='llama' are not"):
        prune.keep_channels(config, params, 8)
    smaller, less = prune.keep_layers(config, params, [1])
    assert smaller.num_layers == 1
    kept = less["layers"]["mlp"]["up_proj"]["experts"]
    np.testing.assert_array_equal(kept, params["layers"]["mlp"]["up_proj"]["experts"][1:])


def test_an_existing_directory_and_new_rows_are_refused(model, tmp_path):
    with pytest.raises(DcodError, match="not there yet"):
        make(model, tmp_path, "--layers", "2")
    small = tiny.write_model(tmp_path / "small", vocab_size=20)
    with pytest.raises(DcodError, match="rows are not added here"):
        make(small, tmp_path / "out")
