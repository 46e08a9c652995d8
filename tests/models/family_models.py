"""Random tiny models of every family, by transformers, and what torch computes with them.

`draw` makes a config from a seed; it draws over every option that the family has.
"""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from dcod_jax.models.config import FAMILIES

VOCAB = 131
MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "flex_olmo")
BIASES = {  # beside those of `draw`
    "attention_bias": ("seed_oss", "helium", "glm", "glm4", "flex_olmo"),
    "mlp_bias": ("seed_oss", "helium"),
    "attention_out_bias": ("seed_oss",),
    "use_bias": ("ernie4_5",),
}
GEMMAS = ("gemma", "gemma2", "vaultgemma", "gemma3_text")
# Early transformers 5 give every layer of OLMo-3 one rope, version 4 and later ones two.
EARLY = "layer_type" not in inspect.signature(Olmo3RotaryEmbedding.forward).parameters
COMPARED = [name for name in FAMILIES if name != "olmo3" or not EARLY]
OLMO3 = pytest.mark.skipif(
    EARLY, reason=f"transformers {transformers.__version__} has one rope for all layers of OLMo-3"
)
SEGMENTS = (17, 61, 9)  # of the packed row; 9 tokens of padding follow
PROMPT, DRAWN = 11, 32


def _ropes(of: random.Random, pairs: int) -> list[dict[str, Any]]:
    """Parameters of every type of rope; longrope switches inside the longest segment."""
    theta = {"rope_theta": of.choice([500.0, 10000.0, 1e6])}
    factors = {
        key: [of.uniform(1, 4) for _ in range(pairs)] for key in ("short_factor", "long_factor")
    }
    original = {"original_max_position_embeddings": 48}
    return [
        {"rope_type": "default", **theta},
        {"rope_type": "linear", "factor": of.choice([2.0, 8.0]), **theta},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **original,
            **theta,
        },
        {
            "rope_type": "yarn",
            "factor": of.choice([2.0, 4.0]),
            **original,
            **theta,
            **of.choice(
                [
                    {},
                    {"attention_factor": 1.3},
                    {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7},
                ]
            ),
        },
        {"rope_type": "longrope", **factors, **original, **theta},
    ]


def _layer_types(of: random.Random, count: int) -> list[str]:
    pattern = [of.choice(["full_attention", "sliding_attention"]) for _ in range(of.choice([2, 3]))]
    types = [pattern[layer % len(pattern)] for layer in range(count)]
    types[of.randrange(count)] = "sliding_attention"
    return types


def draw(model_type: str, seed: int) -> dict[str, Any]:
    """A config dict of the family in the form of transformers 5."""
    of = random.Random(f"{model_type} {seed}")
    heads, layers = of.choice([2, 4, 6]), of.randint(2, 7)
    head_dim = of.choice([8, 12, 16])
    width = of.choice([head_dim * heads, 24 * heads])
    raw: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": of.choice([40, 48]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of.choice([1, heads // 2, heads]),
        "max_position_embeddings": 256,
        "rms_norm_eps": of.choice([1e-6, 1e-5]),
        "tie_word_embeddings": of.random() < 0.5,
        "bos_token_id": 1,
        "eos_token_id": of.choice([2, [2, 5]]),
        "pad_token_id": of.choice([None, 0]),
        "head_dim": head_dim,
    }
    if model_type in ("phi3", "olmo2", "olmo3", "granite", "olmoe", "flex_olmo"):
        raw["hidden_size"] = head_dim * heads
        del raw["head_dim"]
    if model_type == "helium":
        raw["hidden_size"] = head_dim * heads
    if model_type in ("llama", "qwen3", "gemma", "gemma2", "vaultgemma", "gemma3_text"):
        raw["attention_bias"] = of.random() < 0.5
    if model_type in ("olmo2", "olmo3", "smollm3", "granite", "olmoe", "qwen3_moe"):
        raw["attention_bias"] = of.random() < 0.5
    if model_type in ("llama", "smollm3", "granite"):
        raw["mlp_bias"] = of.random() < 0.5
    for key, families in BIASES.items():
        if model_type in families:
            raw[key] = of.random() < 0.5
    activation = of.choice(["silu", "gelu_pytorch_tanh"])
    if model_type not in GEMMAS:
        raw["hidden_act"] = activation
    _draw_windows(of, model_type, raw)
    if model_type in MIXTURES:
        _draw_experts(of, model_type, raw)
    _draw_rope(of, model_type, raw, head_dim)
    if model_type in GEMMAS[1:]:
        raw["query_pre_attn_scalar"] = of.choice([head_dim, 24, 7])
        raw["final_logit_softcapping"] = of.choice([None, 3.0, 30.0])
        raw["hidden_activation"] = activation
        if model_type != "gemma3_text":
            raw["attn_logit_softcapping"] = of.choice([None, 2.0, 50.0])
    if model_type == "granite":
        raw |= {
            "attention_multiplier": of.choice([0.1, 0.3]),
            "embedding_multiplier": of.choice([1.0, 12.0]),
            "residual_multiplier": of.choice([1.0, 0.22]),
            "logits_scaling": of.choice([1.0, 0.5, 3.0]),
        }
    return raw


def _draw_windows(of: random.Random, model_type: str, raw: dict[str, Any]) -> None:
    window, layers = of.randint(3, 40), raw["num_hidden_layers"]
    if model_type in ("mistral", "phi3", "mixtral"):
        raw["sliding_window"] = of.choice([None, window, window])
    elif model_type in ("ministral", "cwm", "gemma2", "vaultgemma", "gemma3_text", "olmo3"):
        raw["sliding_window"] = window
        if of.random() < 0.6:
            raw["layer_types"] = _layer_types(of, layers)
        elif model_type == "gemma3_text":
            raw["sliding_window_pattern"] = of.choice([2, 3])
    elif model_type == "exaone4":
        full = {"sliding_window": None, "layer_types": ["full_attention"] * layers}
        mixed = {"sliding_window": window, "layer_types": _layer_types(of, layers)}
        pattern = {"sliding_window": window, "sliding_window_pattern": of.choice([2, 3])}
        raw |= of.choice([full, mixed, pattern])
    elif model_type in ("qwen2", "qwen3") and of.random() < 0.8:
        raw |= {"use_sliding_window": True, "sliding_window": window}
        raw |= of.choice(
            [{"max_window_layers": layers // 2}, {"layer_types": _layer_types(of, layers)}]
        )
    elif model_type == "qwen3_moe" and of.random() < 0.5:
        raw |= {"use_sliding_window": True, "sliding_window": window}
    elif model_type == "smollm3":
        if of.random() < 0.6:
            raw |= {"use_sliding_window": True, "sliding_window": window}
        raw |= of.choice(
            [
                {"no_rope_layer_interval": of.choice([2, 3])},
                {"no_rope_layers": [of.choice([0, 1]) for _ in range(layers)]},
            ]
        )


def _draw_experts(of: random.Random, model_type: str, raw: dict[str, Any]) -> None:
    experts = of.choice([3, 4, 8])
    raw["num_experts_per_tok"] = of.randint(1, experts)
    raw["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
    if model_type != "mixtral":
        raw["norm_topk_prob"] = of.random() < 0.5
    if model_type == "qwen3_moe":
        raw["moe_intermediate_size"] = of.choice([20, 32])
    if model_type == "olmoe":
        raw["clip_qkv"] = of.choice([None, 0.8, 2.0])


def _draw_rope(of: random.Random, model_type: str, raw: dict[str, Any], head_dim: int) -> None:
    if model_type == "phi3":
        share = of.choice([1.0, 0.75 if head_dim == 16 else 0.5])
        rotated = int(head_dim * share)
        if rotated % 2 == 0:
            raw["partial_rotary_factor"] = share
        ropes = _ropes(of, rotated // 2)
        raw["original_max_position_embeddings"] = 48
        raw["rope_parameters"] = {**of.choice([ropes[0], ropes[4]]), "partial_rotary_factor": share}
        return
    if model_type in ("glm", "glm4"):
        raw["partial_rotary_factor"] = of.choice([1.0, 0.5]) if head_dim % 4 == 0 else 1.0
    ropes = _ropes(of, int(head_dim * raw.get("partial_rotary_factor", 1)) // 2)
    raw["rope_parameters"] = of.choice(ropes)
    if model_type in ("gemma3_text", "olmo3"):
        local = {"rope_type": "default", "rope_theta": of.choice([100.0, 10000.0])}
        nested = {"full_attention": raw["rope_parameters"], "sliding_attention": local}
        raw["rope_parameters"] = nested


def build(raw: dict[str, Any], *, seed: int = 0) -> Any:
    """A float32 torch model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config = AutoConfig.for_model(raw["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    centre = 0.0 if raw["model_type"] in GEMMAS else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(centre + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:  # of a size at which a layer neither swallows nor magnifies differences
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of one text [T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


def gradients(model: Any, texts: list[np.ndarray], *, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Gradient by parameter of the sum of -log q(next token) over some texts.

    It is that of the loss times scale, divided by scale: the same but for rounding.
    """
    model.zero_grad()
    for text in texts:
        tokens = torch.from_numpy(text.astype(np.int64))[None]
        predicted = model(tokens).logits[0, :-1].log_softmax(-1)
        (-scale * predicted.gather(1, tokens[0, 1:, None]).sum()).backward()
    named = model.named_parameters()
    return {name: p.grad.numpy() / scale for name, p in named if p.grad is not None}
