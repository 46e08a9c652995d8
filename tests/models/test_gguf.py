"""GGUF files: weights against transformers' own reader, and refusals."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import family_models
import gguf as package
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import _SMALL
from gguf_writer import write_gguf

from dcod_jax.errors import DcodError
from dcod_jax.models import gguf, hf, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.models.gguf_metadata import raw_config
from dcod_jax.models.rope import frequencies
from dcod_jax.models.tensors import flatten

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
    "general.architecture": (["llama"], 3, None),
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_of_a_wrong_kind_are_refused(key):
    good: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes = {"token_embd.weight": (16, 32), "rope_freqs.weight": (4,)}

    def read(**changes: Any):
        own = good | changes
        raw = raw_config(own.get, shapes, lambda name: [1.0, 1.0, 1.0, 1.0], path="m.gguf")
        return from_hf(raw, source="m.gguf")

    assert read().head_dim == 8
    for value in WRONG[key]:
        name = key if key.startswith("general") else f"llama.{key}"
        with pytest.raises(DcodError, match=r"m\.gguf"):
            read(**{name: value})


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
    _, params = gguf.read_gguf(write_gguf(tmp_path / "model.gguf", pair, quantise=quantised))
    state = pair.model.state_dict()
    expected = [_through_q8_0(state[name].numpy()) for name in quantised.values()]
    ours = [
        params["layers"]["self_attn"]["q_proj"]["kernel"][0].T,
        params["layers"]["mlp"]["up_proj"]["kernel"][1].T,
    ]
    for one, other, name in zip(ours, expected, quantised.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
        assert np.abs(other - state[name].numpy()).max() > 1e-4  # it was quantised


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
