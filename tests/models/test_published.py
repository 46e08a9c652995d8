"""Configs that families publish: parsed, and as many parameters as published.

They are written down from memory of their config.json; counts are those of the files on the hub.
"""

from __future__ import annotations

import pytest

from dcod_jax.models import config as configs
from dcod_jax.models import counts
from dcod_jax.models.layer_kinds import groups


def _raw(model_type, shape, **more):
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads"),
    )
    return {"model_type": model_type, **dict(zip(names, shape, strict=True)), **more}


GEMMA2 = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
    "sliding_window": 4096,
    "sliding_window_size": 4096,
}
LONGROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + pair for pair in range(48)],
}
OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Name -> (config, parameters, (layers in a period, periods) of the scans).
PUBLISHED = {
    "Llama-3.1-70B": (
        _raw("llama", (128256, 8192, 28672, 80, 64, 8), rope_theta=5e5, rope_scaling=LLAMA3),
        70_553_706_496,
        [(1, 80)],
    ),
    "Mistral-7B-v0.1": (
        _raw("mistral", (32000, 4096, 14336, 32, 32, 8), sliding_window=4096),
        7_241_732_096,
        [(1, 32)],
    ),
    "Qwen2.5-72B-Instruct with yarn": (
        _raw("qwen2", (152064, 8192, 29568, 80, 64, 8), rope_theta=1e6, rope_scaling=YARN),
        72_706_203_648,
        [(1, 80)],
    ),
    "Qwen3-8B": (
        _raw("qwen3", (151936, 4096, 12288, 36, 32, 8), head_dim=128, attention_bias=False),
        8_190_735_360,
        [(1, 36)],
    ),
    "gemma-2-27b": (
        _raw(
            "gemma2",
            (256000, 4608, 36864, 46, 32, 16),
            head_dim=128,
            query_pre_attn_scalar=144,
            **GEMMA2,
        ),
        27_227_128_320,
        [(2, 23)],
    ),
    "gemma-3-1b-it": (
        _raw(
            "gemma3_text",
            (262144, 1152, 6912, 26, 4, 1),
            head_dim=256,
            sliding_window=512,
            sliding_window_pattern=6,
            rope_local_base_freq=10000,
            rope_theta=1000000,
            rope_scaling=None,
            eos_token_id=[1, 106],
        ),
        999_885_952,
        [(6, 4), (1, 2)],
    ),
    "Phi-4-mini-instruct": (
        _raw(
            "phi3",
            (200064, 3072, 8192, 32, 24, 8),
            partial_rotary_factor=0.75,
            rope_scaling=LONGROPE,
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            sliding_window=262144,
            tie_word_embeddings=True,
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
        ),
        3_836_021_760,
        [(1, 32)],
    ),
    "OLMo-2-1124-7B": (
        _raw("olmo2", (100352, 4096, 11008, 32, 32, 32), rope_theta=500000),
        7_298_617_344,
        [(1, 32)],
    ),
    "Olmo-3-1025-7B": (
        _raw(
            "olmo3",
            (100278, 4096, 11008, 32, 32, 32),
            rope_theta=500000,
            rope_scaling=OLMO3_YARN,
            max_position_embeddings=65536,
        ),
        7_298_011_136,
        [(4, 8)],
    ),
    "SmolLM3-3B": (
        _raw(
            "smollm3",
            (128256, 2048, 11008, 36, 16, 4),
            no_rope_layers=[1, 1, 1, 0] * 9,
            rope_theta=5000000.0,
            max_window_layers=28,
            use_sliding_window=False,
        ),
        3_075_098_624,
        [(4, 9)],
    ),
    "Qwen3-30B-A3B": (
        _raw(
            "qwen3_moe",
            (151936, 2048, 6144, 48, 32, 4),
            head_dim=128,
            attention_bias=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            rope_theta=1000000.0,
            max_window_layers=48,
            use_sliding_window=False,
            sliding_window=None,
        ),
        30_532_122_624,
        [(1, 48)],
    ),
    "Mixtral-8x7B-v0.1": (
        _raw(
            "mixtral",
            (32000, 4096, 14336, 32, 32, 8),
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        46_702_792_704,
        [(1, 32)],
    ),
    "OLMoE-1B-7B-0924": (
        _raw(
            "olmoe",
            (50304, 2048, 1024, 16, 16, 16),
            clip_qkv=None,
            norm_topk_prob=False,
            num_experts=64,
            num_experts_per_tok=8,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        ),
        6_919_161_856,
        [(1, 16)],
    ),
    "granite-3.1-8b-instruct": (
        _raw(
            "granite",
            (49155, 4096, 12800, 40, 32, 8),
            attention_multiplier=0.0078125,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_scaling=16.0,
            rope_theta=10000000.0,
            tie_word_embeddings=True,
        ),
        8_170_848_256,
        [(1, 40)],
    ),
}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-30B-A3B", 3.3), ("Mixtral-8x7B-v0.1", 12.9), ("OLMoE-1B-7B-0924", 1.3)],
)
def test_a_token_uses_as_many_parameters_as_published(name, billions):
    config = configs.from_hf(PUBLISHED[name][0])
    active = counts.num_params(config, active=True) / 1e9
    assert active == pytest.approx(billions, abs=0.06)  # published to one digit, cut or rounded


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_number_of_parameters(name):
    raw, parameters, scans = PUBLISHED[name]
    config = configs.from_hf(raw)
    assert counts.num_params(config) == parameters
    assert [(len(kinds), periods) for kinds, periods in groups(config.kinds)] == scans
    assert configs.from_hf(configs.to_hf(config, dtype="bfloat16")) == config
