"""The families: how each HF model_type sets the options of ModelConfig, and back.

A family is one entry of FAMILIES; an option that comes from a key of config.json is one entry of
KEYS. Parameters are declared in models/linear.py and layers.py. An option that HF computes for a
family and this model does not needs a check that refuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dcod_jax.bounds import Bound, flag, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.models import layer_types
from dcod_jax.models.layer_types import Raw
from dcod_jax.models.mixtures import MixtureKeys

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json: what it may be, the options that it sets, and its value in return."""

    bound: Bound
    options: Callable[[Any], Raw]
    value: Callable[[Any], Any]  # of a ModelConfig


def _same(field: str, bound: Bound) -> Key:
    """A key whose value is that of one option."""
    return Key(bound, lambda value: {field: value}, lambda config: getattr(config, field))


def _biases(*fields: str) -> Key:
    return Key(
        optional(flag()),
        lambda value: dict.fromkeys(fields, bool(value)),
        lambda config: getattr(config, fields[0]),
    )


def _scale(field: str) -> Key:
    bound = number(1e-6, 1e6)
    return Key(bound, lambda v: {field: float(v)}, lambda config: getattr(config, field))


KEYS: dict[str, Key] = {
    "attention_bias": _biases("qkv_bias", "o_bias"),
    "attention_out_bias": _biases("o_bias"),
    "use_bias": _biases("mlp_bias", "qkv_bias", "o_bias"),
    "mlp_bias": _biases("mlp_bias"),
    "hidden_act": _same("activation", text(64)),
    "hidden_activation": _same("activation", text(64)),
    "attn_logit_softcapping": _same("attention_softcap", optional(number(1e-3, 1e6))),
    "final_logit_softcapping": _same("final_softcap", optional(number(1e-3, 1e6))),
    "query_pre_attn_scalar": Key(
        whole(1, 2**24),
        lambda value: {"attention_scale": value**-0.5},
        lambda config: round(config.attention_scale**-2),
    ),
    "attention_multiplier": _scale("attention_scale"),
    "embedding_multiplier": _scale("embedding_scale"),
    "residual_multiplier": _scale("residual_scale"),
    "logits_scaling": _scale("logits_scale"),
    "clip_qkv": _same("qkv_clip", optional(number(1e-6, 1e6))),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one HF model_type sets the options, and what HF assumes for keys a file leaves out."""

    architecture: str
    defaults: Raw
    absent_if_null: str = ""  # the key whose null HF reads as its default
    keys: tuple[str, ...] = ("hidden_act",)  # of KEYS: those that HF reads for it
    options: Callable[[Raw], Raw] = lambda raw: {}  # those of no key of KEYS, or against one
    accepts: Raw = dataclasses.field(default_factory=dict)  # before config.ACCEPTED; None: all
    # Where the file has no layer_types:
    types: Callable[[Raw], list[str]] = layer_types.every_layer_full
    reads_types: bool = False
    two_ropes: bool = False  # windowed layers have a rope of their own
    local_theta: str | None = None  # the key of its base in the form of transformers 4
    partial_rope: bool = False  # a part of the head may be rotated
    own_length: bool = False  # longrope's original length is beside it, as in Phi-3
    rotates_full: bool = True  # full layers have positions where others have a window
    mixture: MixtureKeys | None = None
    gguf: tuple[str, ...] = ()  # general.architecture of its GGUF files
    gguf_interleaved: bool = False  # its GGUF files hold rotated rows as (pair, half) of a head


_DEFAULTS: Raw = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02}
_DEFAULTS |= {"tie_word_embeddings": False, "rope_theta": 1e4, "max_position_embeddings": 32768}
_LLAMA = {**_DEFAULTS, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {**_DEFAULTS, "num_key_value_heads": 32, "use_sliding_window": False}
_QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_MISTRAL |= {"sliding_window": 4096}
_GEMMA = {**_DEFAULTS, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192}
_GEMMA |= {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA |= {"attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_GEMMA2 = {**_GEMMA, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA2 |= {"query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_OLMO2 = {**_LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False}
_OLMO2 |= {"bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1}
_CWM_ROPE = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0}
_CWM_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GLM = {**_DEFAULTS, "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072}
_GLM |= {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
_GLM |= {"partial_rotary_factor": 0.5, "pad_token_id": 151329}
_GLM |= {"eos_token_id": [151329, 151336, 151338]}
_GEMMA2_KEYS = ("attention_bias", "hidden_activation", "query_pre_attn_scalar")
_GEMMA2_KEYS += ("attn_logit_softcapping", "final_logit_softcapping")
_MUP = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def _gemma_options(raw: Raw) -> Raw:
    return {"norm_offset": 1.0, "embedding_scale": raw["hidden_size"] ** 0.5}


_GLM_FAMILY = Family(
    architecture="GlmForCausalLM",
    defaults=_GLM,
    absent_if_null="eos_token_id",
    keys=("attention_bias", "hidden_act"),
    options=lambda raw: {"rope_pairs": "neighbours", "o_bias": False, "fused": ("gate_up",)},
    accepts={"partial_rotary_factor": None},
    partial_rope=True,
)
_VAULTGEMMA_FAMILY = Family(
    architecture="VaultGemmaForCausalLM",
    defaults=_GEMMA2,
    keys=_GEMMA2_KEYS,
    options=lambda raw: {**_gemma_options(raw), "norms": "pre_feedforward"},
    types=layer_types.full_every(2, at=1),
    reads_types=True,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={**_LLAMA, "attention_bias": False, "mlp_bias": False},
        keys=("attention_bias", "mlp_bias", "hidden_act"),
        gguf=("llama",),
        gguf_interleaved=True,
    ),
    "mistral": Family("MistralForCausalLM", _MISTRAL, types=layer_types.every_layer_alike),
    "ministral": Family(
        "MinistralForCausalLM", _MISTRAL, types=layer_types.every_layer_alike, reads_types=True
    ),
    "cwm": Family(
        architecture="CwmForCausalLM",
        defaults=_MISTRAL
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "head_dim": 128, "sliding_window": 8192}
        | {"mlp_bias": False, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
        | {"rope_parameters": _CWM_ROPE},
        absent_if_null="eos_token_id",
        keys=("mlp_bias", "hidden_act"),
        types=layer_types.full_every(4, at=0),
        reads_types=True,
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        defaults=_DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288}
        | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
        | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        keys=("attention_bias", "attention_out_bias", "mlp_bias", "hidden_act"),
        # Of its own training, 0.1 where the file says nothing; none is computed here.
        accepts={"attention_dropout": None},
    ),
    "ernie4_5": Family(
        architecture="Ernie4_5ForCausalLM",
        defaults=_LLAMA
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0}
        | {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}
        | {"use_bias": False, "pad_token_id": 0},
        keys=("use_bias", "hidden_act"),
        options=lambda raw: {"rope_pairs": "neighbours"},
    ),
    "helium": Family(
        architecture="HeliumForCausalLM",
        defaults=_LLAMA
        | {"rms_norm_eps": 1e-8, "max_position_embeddings": 4096, "rope_theta": 100000.0}
        | {"num_key_value_heads": 20, "head_dim": 128, "pad_token_id": 3}
        | {"attention_bias": False, "mlp_bias": False},
        keys=("attention_bias", "mlp_bias", "hidden_act"),
        options=lambda raw: {"rope_pairs": "neighbours", "o_bias": False},
    ),
    "glm": _GLM_FAMILY,
    "glm4": dataclasses.replace(
        _GLM_FAMILY,
        architecture="Glm4ForCausalLM",
        options=lambda raw: {**_GLM_FAMILY.options(raw), "norms": "glm4"},
    ),
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        defaults=_DEFAULTS
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_key_value_heads": 32}
        | {"sliding_window": 4096, "bos_token_id": 0, "eos_token_id": 2},
        options=lambda raw: {"norms": "post", "qk_norm": "head"},
        types=layer_types.exaone4,
        reads_types=True,
        rotates_full=False,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        options=lambda raw: {"qkv_bias": True},
        types=layer_types.from_max_window_layers,
        reads_types=True,
        gguf=("qwen2",),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "attention_bias": False, "head_dim": 128},
        keys=("attention_bias", "hidden_act"),
        options=lambda raw: {"qk_norm": "head"},
        types=layer_types.from_max_window_layers,
        reads_types=True,
        gguf=("qwen3",),
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults=_GEMMA,
        keys=("attention_bias",),
        # Its first files say "gelu", and mean the form with tanh.
        options=lambda raw: {**_gemma_options(raw), "activation": "gelu_pytorch_tanh"},
        accepts={"hidden_act": ("gelu_pytorch_tanh", "gelu")},
        gguf=("gemma",),
    ),
    "gemma2": dataclasses.replace(
        _VAULTGEMMA_FAMILY,
        architecture="Gemma2ForCausalLM",
        options=lambda raw: {**_gemma_options(raw), "norms": "both"},
        gguf=("gemma2",),
    ),
    "vaultgemma": _VAULTGEMMA_FAMILY,
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=_GEMMA2
        | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"sliding_window_pattern": 6},
        keys=_GEMMA2_KEYS,
        options=lambda raw: {**_gemma_options(raw), "norms": "both", "qk_norm": "head"},
        # transformers' attention leaves this cap out, whatever the file says.
        accepts={"attn_logit_softcapping": (None,)},
        types=layer_types.gemma3,
        reads_types=True,
        two_ropes=True,
        local_theta="rope_local_base_freq",
        gguf=("gemma3",),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=_LLAMA
        | {"rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000}
        | dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 4096),
        options=lambda raw: {"fused": ("qkv", "gate_up")},
        types=layer_types.every_layer_alike,
        accepts={"partial_rotary_factor": None, "original_max_position_embeddings": None},
        partial_rope=True,
        own_length=True,
        gguf=("phi3",),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults=_OLMO2,
        keys=("attention_bias", "hidden_act"),
        options=lambda raw: {"norms": "post", "qk_norm": "projection"},
        gguf=("olmo2",),
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        defaults={**_OLMO2, "rope_theta": 500000.0, "sliding_window": 4096},
        keys=("attention_bias", "hidden_act"),
        options=lambda raw: {"norms": "post", "qk_norm": "projection"},
        types=layer_types.full_every(4, at=3),
        reads_types=True,
        two_ropes=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=_DEFAULTS
        | {"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4}
        | {"attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4}
        | {"use_sliding_window": False, "sliding_window": None}
        | {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
        keys=("attention_bias", "mlp_bias", "hidden_act"),
        types=layer_types.smollm3,
        reads_types=True,
        gguf=("smollm3",),
        gguf_interleaved=True,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=_LLAMA | {"attention_bias": False, "mlp_bias": False} | dict.fromkeys(_MUP, 1.0),
        keys=("attention_bias", "mlp_bias", "hidden_act", *_MUP),
        gguf=("granite",),
        gguf_interleaved=True,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults=_QWEN
        | {"num_key_value_heads": 4, "attention_bias": False, "moe_intermediate_size": 768},
        keys=("attention_bias", "hidden_act"),
        options=lambda raw: {"qk_norm": "head"},
        types=lambda raw: layer_types.from_max_window_layers(raw | {"max_window_layers": 0}),
        mixture=MixtureKeys(experts=128, per_token=8, width="moe_intermediate_size"),
        gguf=("qwen3moe",),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={**_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
        types=layer_types.every_layer_alike,
        mixture=MixtureKeys(
            experts=8, per_token=2, width="intermediate_size", normalized=True, block_sparse=True
        ),
        gguf=("llama",),  # with experts
        gguf_interleaved=True,
    ),
    "flex_olmo": Family(
        architecture="FlexOlmoForCausalLM",
        defaults=_LLAMA
        | {"max_position_embeddings": 4096, "rope_theta": 500000.0, "attention_bias": False}
        | {"bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277},
        keys=("attention_bias", "hidden_act"),
        options=lambda raw: {"norms": "post", "qk_norm": "projection"},
        mixture=MixtureKeys(experts=7, per_token=5, width="intermediate_size"),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        defaults={**_OLMO2, "max_position_embeddings": 4096, "clip_qkv": None},
        keys=("attention_bias", "hidden_act", "clip_qkv"),
        options=lambda raw: {"qk_norm": "projection"},
        mixture=MixtureKeys(experts=64, per_token=8, width="intermediate_size"),
        gguf=("olmoe",),
    ),
}


def refuse(source: str, key: str, value: Any, supported: str) -> DcodError:
    """The error for a value of a config that is not computed here."""
    return DcodError(
        f"{source}: {key}={value!r} is not supported (supported: {supported}); "
        f"use a model without it"
    )
