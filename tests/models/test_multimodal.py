"""Gemma 3 with vision: the text model inside, under the names of both layouts, and nothing else."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dcod_jax.errors import DcodError
from dcod_jax.models import hf
from dcod_jax.models.config import from_hf, to_hf
from dcod_jax.models.tensors import flatten

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place, config = tmp_path_factory.mktemp("gemma"), Gemma3Config(text_config=TEXT)
    config.vision_config = type(config.vision_config)(**VISION)
    config.mm_tokens_per_image = 4
    torch.manual_seed(0)
    made = Gemma3ForConditionalGeneration(config)
    made.save_pretrained(place)
    state = made.model.language_model.state_dict()
    return place, {name: tensor.numpy() for name, tensor in state.items()}


def published(place, to):
    """With the names, and the keys of config.json, that the published directories have."""
    tensors = {}
    for name, tensor in load_file(place / hf.SINGLE).items():
        name = name.removeprefix("language_model.").removeprefix("model.")
        text = not name.startswith(("vision_tower", "multi_modal"))
        name = name.removeprefix("language_model.").removeprefix("model.")
        tensors[f"language_model.model.{name}" if text else name] = tensor
    save_file(tensors, to / hf.SINGLE)
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", **TEXT},
        "vision_config": VISION,
    }
    (to / "config.json").write_text(json.dumps(raw))
    return to


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_the_text_model_is_read_and_the_rest_is_left_out(model, tmp_path, caplog, layout):
    place, state = model
    directory = published(place, tmp_path) if layout == "published" else place
    config, params = hf.load_model(directory, dtype="float32")
    assert "tensors of the vision model are left out" in caplog.text
    assert config.model_type == "gemma3_text"
    assert (config.num_layers, config.vocab_size) == (3, 96)
    assert config.eos_token_ids == ((1, 106) if layout == "published" else (1,))
    assert config.kinds == from_hf({"model_type": "gemma3_text", **TEXT}).kinds
    assert [kind.window for kind in config.kinds] == [8, 8, None]
    flat = flatten(params)
    np.testing.assert_array_equal(flat["embed_tokens.embedding"], state["embed_tokens.weight"])
    for layer in range(3):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            ours = flat[f"layers.{name}.kernel"][layer].T
            np.testing.assert_array_equal(ours, state[f"layers.{layer}.{name}.weight"])
    out = tmp_path / "out"
    hf.save_params(out, config, params, dtype="float32", max_shard_bytes=1 << 30)
    written = load_file(out / hf.SINGLE)
    assert {name.removeprefix("model."): t.tobytes() for name, t in written.items()} == {
        name: tensor.tobytes() for name, tensor in state.items()
    }
    raw = to_hf(config, dtype="float32")
    assert raw["architectures"] == ["Gemma3ForCausalLM"]
    assert "text_config" not in raw


def test_what_the_published_text_config_leaves_out_is_what_transformers_assumes():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    config = from_hf({"model_type": "gemma3", "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262208
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma3Model"]}, "architectures='Gemma3Model'"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type='llama'"),
        ({"text_config": [1]}, "text_config"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "tie_word"),
    ],
)
def test_other_multimodal_configs_are_refused(changes, message):
    with pytest.raises(DcodError, match=message):
        from_hf({"model_type": "gemma3", "text_config": {}, **changes})


def test_a_tensor_of_neither_part_is_refused(model, tmp_path):
    published(model[0], tmp_path)
    tensors = load_file(tmp_path / hf.SINGLE)
    save_file(tensors | {"audio_tower.x": np.zeros(3, np.float32)}, tmp_path / hf.SINGLE)
    with pytest.raises(DcodError, match=r"audio_tower\.x"):
        hf.load_model(tmp_path, dtype="float32")
