"""Tiny random HF models of every family: random biases and norm weights, so parity can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dcod_jax.models import hf
from dcod_jax.models.config import ModelConfig
from dcod_jax.types import Params

_SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-tied-mha": {
        **_SMALL,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "llama3-rope": {
        **_SMALL,
        "model_type": "llama",
        "head_dim": 16,
        "eos_token_id": [2, 5],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-attention-bias": {**_SMALL, "model_type": "llama", "attention_bias": True},
    "smollm2": {
        **_SMALL,
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen2-padded-vocab": {
        **_SMALL,
        "model_type": "qwen2",
        "vocab_size": 192,  # the tests use ids below 131 only
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 64,
    },
    "qwen3": {
        **_SMALL,
        "model_type": "qwen3",
        "head_dim": 16,
        "num_attention_heads": 6,
        "hidden_size": 48,
        "attention_bias": True,
        "rope_theta": 1000000.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model on both sides, and the directory it was written to by transformers."""

    family: str
    model: Any
    directory: Path
    config: ModelConfig
    params: Params

    def hf_logits(self, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            return self.model(torch.from_numpy(tokens.astype(np.int64)), **tensors).logits.numpy()


def build_hf_model(raw: dict[str, Any], *, seed: int = 0) -> Any:
    """A float32 torch model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config = AutoConfig.for_model(raw["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if name.endswith("bias") else 0.2) * noise)
    return model.eval()


@pytest.fixture(scope="session", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = build_hf_model(FAMILIES[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    config, params = hf.load_model(directory, dtype=np.float32)
    return Pair(request.param, model, directory, config, params)
