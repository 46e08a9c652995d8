"""GGUF files: weights against transformers' own reader, and refusals."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from typing import Any

import family_models
import gguf as package
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import _SMALL
from gguf_writer import permute, write_gguf

from dcod_jax.errors import DcodError
from dcod_jax.models import gguf, hf, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.models.gguf_metadata import raw_config
from dcod_jax.models.rope import frequencies
from dcod_jax.models.tensors import flatten, slots, tensor_of

FAMILIES = ["llama", "smollm2", "qwen2-padded-vocab"]


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_weights_are_those_of_the_torch_model(pair, tmp_path):
    config, params = hf.load_model(write_gguf(tmp_path / "model.gguf", pair), dtype=jnp.float32)
    expected = flatten(pair.params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected.pop(path), err_msg=path)
    assert not expected
    tokens = np.arange(3, 43)[None]
    ours = transformer.logits(config, params, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, pair.hf_logits(tokens), atol=2e-4, rtol=0)


FACTORS = {f"{name}_factor": [1.0, 1.5, 2.0] for name in ("short", "long")}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
LONGROPE = {
    "sliding_window": 16,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,  # where transformers 5.0 reads it, which overrides the rope's
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        **FACTORS,
    },
}
# Of these four frequencies the last is divided by the whole factor.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 8.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32
MIXED = ["full_attention", *["sliding_attention"] * 4, "full_attention", "sliding_attention"]
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
        ("gemma", {"head_dim": 16}),
        ("gemma2", GEMMA),
        ("gemma3_text", {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("phi3", {"sliding_window": None}),
        ("phi3", LONGROPE),
        ("olmo2", {}),
        pytest.param(
            "olmo3",
            {"layer_types": MIXED, "sliding_window": 9, "rope_parameters": OLMO3},
            marks=family_models.OLMO3,
        ),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {"rope_parameters": {**YARN, "rope_type": "linear"}, "head_dim": 8}),
        ("smollm3", {"no_rope_layer_interval": 4}),
        ("granite", GRANITE),
        ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True}),
        ("mixtral", EXPERTS),
        ("olmoe", {**EXPERTS, "norm_topk_prob": False}),
    ],
)
def test_files_of_every_family_are_the_torch_model(model_type, more, tmp_path):
    small = {"num_hidden_layers": 7, "rms_norm_eps": 1e-5, "pad_token_id": 0}
    model = family_models.build({**_SMALL, **small, "model_type": model_type, **more})
    model.save_pretrained(tmp_path)
    config, params = hf.load_model(tmp_path, dtype=jnp.float32)
    pair = types.SimpleNamespace(model=model)
    found, ours = hf.load_model(write_gguf(tmp_path / "model.gguf", pair), dtype=jnp.float32)
    free = ("initializer_range", "bos_token_id", "eos_token_ids", "pad_token_id", "layer_kinds")
    for field in dataclasses.fields(config):
        if field.name not in free:
            assert getattr(found, field.name) == getattr(config, field.name), field.name
    for one, other in zip(found.kinds, config.kinds, strict=True):
        assert one.window == other.window
        _assert_same_rope(one.rope, other.rope)
    expected = flatten(params)
    for path, leaf in flatten(ours).items():
        np.testing.assert_allclose(leaf, expected.pop(path), atol=2e-7, err_msg=path)
    assert not expected


def _assert_same_rope(one, other):
    """Up to the float32 in which the file holds its numbers."""
    assert (one is None) == (other is None)
    if one is not None:
        assert one.attention_factor == pytest.approx(other.attention_factor)
        for beyond in (False, True):
            pair = (frequencies(rope, 8, beyond=beyond) for rope in (one, other))
            np.testing.assert_allclose(*pair, rtol=1e-6)


WRONG: dict[str, tuple[Any, ...]] = {
    "attention.head_count": (0, "4", [4], 0.5),
    "attention.key_length": (7, "8", [8]),
    "embedding_length": ("32", [32]),
    "block_count": (0, "x", [1]),
    "rope.freq_base": ("x", [1.0]),
    "rope.dimension_count": ("8", [8]),
    "expert_count": ("x", [4]),
    "rope.scaling.factor": (4.0, "x", [4.0]),  # beside rope_freqs
    "general.architecture": (["llama"], 3, None),
}


def metadata(architecture, **changes):
    """The config of these metadata, beside those that every file has."""
    good = {"embedding_length": 32, "feed_forward_length": 48, "block_count": 1}
    good |= {"attention.head_count": 4, "context_length": 64}
    good["attention.layer_norm_rms_epsilon"] = 1e-5
    own = {"general.architecture": architecture}
    own |= {f"{architecture}.{key}": value for key, value in good.items()}
    own |= {key if "general" in key else f"{architecture}.{key}": changes[key] for key in changes}
    shapes = {"token_embd.weight": (16, 32)}
    shapes |= {"rope_freqs.weight": (4,)} if architecture == "llama" else {}
    raw = raw_config(own.get, shapes, lambda name: [1.0, 1.0, 1.0, 1.0], path="m.gguf")
    return from_hf(raw, source="m.gguf")


@pytest.mark.parametrize("key", WRONG)
def test_metadata_of_a_wrong_kind_are_refused(key):
    assert metadata("llama").head_dim == 8
    for value in WRONG[key]:
        with pytest.raises(DcodError, match=r"m\.gguf"):
            metadata("llama", **{key: value})


def test_a_rope_that_llama_cpp_would_compute_otherwise_is_refused():
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    assert metadata("olmo2", **yarn).kinds[0].rope["original_max_position_embeddings"] == 64
    window = {"attention.sliding_window": 8, "block_count": 5}
    found = metadata("olmo2", **yarn, **window).kinds
    assert [kind.window for kind in found] == [8, 8, 8, None, 8]
    assert [kind.rope.kind for kind in found[2:4]] == ["default", "yarn"]
    for changes, named in (
        (yarn | {"rope.scaling.factor": "4"}, "rope.scaling.factor='4' must be a number"),
        (yarn | {"rope.scaling.factor": 0.5}, "rope.scaling.factor=0.5 must be a number"),
        (
            yarn | {"rope.scaling.yarn_attn_factor": 1.5},
            "yarn_attn_factor=1.5 must be a number from 1.13862 to 1.13864",
        ),
        (yarn | {"rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast=16.0 is not supported"),
        (yarn | {"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor=2.0 is not"),
        (window | {"rope.freq_base_swa": 99.0}, "rope.freq_base_swa=99.0 is not supported"),
        (window | {"attention.sliding_window_pattern": [True]}, "layer_types has 1 entries"),
        (window | {"attention.sliding_window_pattern": [1] * 5}, "pattern[0]=1 must be true or"),
        (window | {"attention.sliding_window_pattern": 4}, "sliding_window_pattern=4 must be"),
    ):
        with pytest.raises(DcodError, match=re.escape(named)):
            metadata("olmo2", **changes)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_texts_end_at_the_ends_of_text_turn_and_message(pair, tmp_path):
    one = write_gguf(tmp_path / "one.gguf", pair)
    assert hf.read_config(one).eos_token_ids == (2,)
    ends = {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 2}
    two = write_gguf(tmp_path / "two.gguf", pair, ids=ends)
    assert hf.read_config(two).eos_token_ids == (2, 4)


def _through_q8_0(weight):
    """Blocks of 32 along a row, each int8 times a float16 scale of largest / 127."""
    blocks = weight.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    values = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)
    return values.reshape(weight.shape)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_quantised_tensors_are_dequantised_and_unpermuted(pair, tmp_path):
    quantised = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    }
    types = dict.fromkeys(quantised, "Q8_0")
    _, params = gguf.read_gguf(write_gguf(tmp_path / "model.gguf", pair, quantise=types))
    state = pair.model.state_dict()
    expected = [_through_q8_0(state[name].numpy()) for name in quantised.values()]
    ours = [
        params["layers"]["self_attn"]["q_proj"]["kernel"][0].T,
        params["layers"]["mlp"]["up_proj"]["kernel"][1].T,
    ]
    for one, other, name in zip(ours, expected, quantised.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
        assert np.abs(other - state[name].numpy()).max() > 1e-4  # it was quantised


def test_every_type_is_read_as_the_package_dequantises_it(tmp_path):
    kinds = "F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()
    names = "attn_q attn_output ffn_gate ffn_up ffn_down".split()
    targets = [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in names]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "model_type": "llama"}
    pair = types.SimpleNamespace(model=family_models.build({**_SMALL, **sizes}))
    quantise = dict(zip(targets, kinds, strict=True))
    file = write_gguf(tmp_path / "model.gguf", pair, quantise=quantise)
    config, params = gguf.read_gguf(file)
    tensors = {one.name: one for one in package.GGUFReader(file).tensors}
    assert {one.tensor_type.name for one in tensors.values()} == {"F32", *kinds}
    for slot in slots(config, "gguf"):
        tensor = tensors[slot.name]
        wanted = package.quants.dequantize(tensor.data, tensor.tensor_type)
        if slot.rope_heads:
            order = permute(np.arange(len(wanted)), slot.rope_heads)
            wanted = wanted[np.argsort(order)]
        ours = tensor_of(flatten(params), slot, dtype=np.float32)
        np.testing.assert_array_equal(ours, wanted, err_msg=slot.name)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"extra": {"rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)}},
            r"are not the factors",
        ),
        ({"extra": {"rope_other.weight": np.ones(4, np.float32)}}, r"rope_other\.weight"),
        ({"drop": ["blk.1.ffn_up.weight"]}, r"blk\.1\.ffn_up\.weight is missing"),
        ({"drop": ["token_embd.weight"]}, r"token_embd\.weight is missing"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type='yarn'"),
        ({"ids": {"llama.expert_count": 4}}, r"llama\.expert_used_count is missing"),
        ({"ids": {"llama.expert_shared_count": 1}}, r"expert_shared_count=1 is not supported"),
        ({"ids": {"llama.expert_used_count": 2}}, r"expert_used_count=2 is not supported"),
    ],
)
def test_refused_weights(pair, tmp_path, options, named):
    file = write_gguf(tmp_path / "model.gguf", pair, **options)
    with pytest.raises(DcodError, match=named):
        gguf.read_gguf(file)


def test_an_end_token_that_is_a_list_is_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
    sizes = "embedding_length feed_forward_length block_count attention.head_count context_length"
    for key in sizes.split():
        writer.add_uint32(f"llama.{key}", 2 if "head" in key else 16)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.eos_token_id", [1, 2])
    writer.add_tensor("token_embd.weight", np.zeros((8, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        DcodError, match=r"eos_token_id='\[\[1, 2\]\]' must be a token id or a list"
    ):
        gguf.read_config(tmp_path / "model.gguf")


def test_unknown_architecture_is_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "model.gguf", "gemma3n")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DcodError, match=r"general\.architecture='gemma3n'"):
        gguf.read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_a_quantisation_that_the_package_does_not_know_is_refused(pair, tmp_path, monkeypatch):
    def unknown(*_):
        raise NotImplementedError

    monkeypatch.setattr(package.quants, "dequantize", unknown)
    file = write_gguf(tmp_path / "model.gguf", pair)
    with pytest.raises(DcodError, match=r"is of type F32, which the gguf package does not"):
        gguf.read_gguf(file)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize("keep", [0, 3, 30, 2000, -100])
def test_truncated_file(pair, tmp_path, keep):
    file = write_gguf(tmp_path / "model.gguf", pair)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DcodError, match="not a whole GGUF file"):
        gguf.read_gguf(file)


def test_absent_file_and_absent_package(tmp_path, monkeypatch):
    with pytest.raises(DcodError, match=r"no such \.gguf file"):
        gguf.read_gguf(tmp_path / "absent.gguf")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DcodError, match=r"pip install '\.\[gguf\]'"):
        gguf.read_gguf(tmp_path / "model.gguf")
