"""The metadata of a GGUF file as an HF config: what llama.cpp computes from them, by family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dcod_jax.bounds import array, check, flag, number, optional
from dcod_jax.errors import DcodError
from dcod_jax.models import rope
from dcod_jax.models.config import BOUNDS
from dcod_jax.models.families import FAMILIES, Raw
from dcod_jax.models.layer_types import FULL, SLIDING

# (general.architecture, whether it has experts) -> model_type
ARCHITECTURES = {
    (name, family.mixture is not None): key
    for key, family in FAMILIES.items()
    for name in family.gguf
}
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FREQS = "rope_freqs.weight"  # what llama.cpp divides each frequency by
BESIDE = {"longrope": {LONG, SHORT}, "llama3": {FREQS}}  # tensors that say a rope of this kind

# Key below the architecture -> the HF key of the same meaning, where HF has one for the family.
_SAME = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_REQUIRED = (
    *("embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
    *("context_length", "attention.layer_norm_rms_epsilon"),
)
_SIZES = "hidden_size num_hidden_layers num_attention_heads head_dim rope_theta".split()
# Key -> the values under which the model computed here is llama.cpp's.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": (None, "linear", "none"),
    "rope.scaling.factor": (None, 0.0, 1.0),
    "rope.scaling.attn_factor": (None, 1.0),
    "rope.scaling.yarn_ext_factor": (None, 1.0),
    "rope.scaling.yarn_beta_fast": (None, 32.0),
    "rope.scaling.yarn_beta_slow": (None, 1.0),
    "rope.scale_linear": (None, 1.0),
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0.0),
    "expert_shared_count": (None, 0),
    "expert_group_count": (None, 0, 1),
    "expert_gating_func": (None, 0, 1),  # softmax
    "expert_weights_scale": (None, 0.0, 1.0),
}
# Those of _SAME that are refused with any other value where the family has no such key.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    **dict.fromkeys(("attention.sliding_window_pattern", "attention.scale"), (None,)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (None, 1.0)),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"), (None, 0)),
    "attention.sliding_window": (None, 0),
    "rope.freq_base_swa": (None,),
}
_NORMALIZED = ("qwen3_moe", "mixtral")  # whose experts' weights llama.cpp makes add up to 1


def _short(value: Any) -> Any:
    """The shortest decimal of a float32: 9.999999747378752e-06 -> 1e-05; no number stays as is."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def raw_config(
    get: Callable[[str], Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Callable[[str], list[float]],
    *,
    path: object,
) -> Raw:
    """The config.json of a file with these metadata and tensors (name -> shape).

    factors reads a tensor of BESIDE. Raises DcodError for another architecture, a
    missing key, and metadata that cannot be honoured exactly.
    """
    architecture, model_type = _model_type(get, path)
    family, ropes = FAMILIES[model_type], _ropes(architecture, get, shapes, factors, path)
    values = _values(architecture, model_type, get, scaled=bool(ropes), path=path)
    stops = [get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    stops = [stop for at, stop in enumerate(stops) if stop is not None and stop not in stops[:at]]
    raw = {
        "rope_theta": 10000.0,
        **values,
        "model_type": model_type,
        "num_key_value_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "vocab_size": next(iter(shapes["token_embd.weight"]), 0),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops or None,
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        **ropes,
    }
    check(raw, {key: BOUNDS[key] for key in _SIZES}, source=path)
    head_dim = raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"]
    if architecture == "llama" and FREQS in shapes:
        given = factors(FREQS) if shapes[FREQS] == (head_dim // 2,) else []
        raw["rope_scaling"] = _llama3(given, head_dim, raw["rope_theta"], path)
    if "query_pre_attn_scalar" in family.keys:
        raw["query_pre_attn_scalar"] = _query_scalar(raw, head_dim)
    if "attention_multiplier" in family.keys:
        raw.setdefault("attention_multiplier", head_dim**-0.5)
    if family.mixture is not None:
        raw["norm_topk_prob"] = model_type in _NORMALIZED
    if model_type == "phi3":
        raw["sliding_window"] = raw["sliding_window"] or None
    if model_type == "olmo3":
        _olmo3(raw, path)
    rotated = get(f"{architecture}.rope.dimension_count")
    if rotated is not None and rotated != head_dim:
        if not family.partial_rope or not isinstance(rotated, int):
            raise DcodError(
                f"{path}: {architecture}.rope.dimension_count={rotated!r} is not supported "
                f"(supported: the head size, {head_dim})"
            )
        raw["partial_rotary_factor"] = rotated / head_dim
    return raw


def _model_type(get: Callable[[str], Any], path: object) -> tuple[str, str]:
    """(general.architecture, model_type)."""
    architecture = get("general.architecture")
    experts = bool(get(f"{architecture}.expert_count"))
    if not isinstance(architecture, str) or (architecture, experts) not in ARCHITECTURES:
        names = [f"{name}{' with experts' * some}" for name, some in sorted(ARCHITECTURES)]
        raise DcodError(
            f"{path}: general.architecture={architecture!r}{' with experts' * experts} is not "
            f"supported (supported: {', '.join(names)})"
        )
    windowed = architecture == "olmo2" and get("olmo2.attention.sliding_window")
    return architecture, "olmo3" if windowed else ARCHITECTURES[architecture, experts]


def _values(
    architecture: str, model_type: str, get: Callable[[str], Any], *, scaled: bool, path: object
) -> Raw:
    """The values of the HF keys that the file has; scaled: its ropes are read elsewhere."""
    family = FAMILIES[model_type]
    own = {*family.defaults, *family.keys, *(_SAME[key] for key in _REQUIRED), "rope_theta"}
    own |= {"num_key_value_heads", "head_dim"}
    own |= {"sliding_window"} if model_type == "phi3" else set()
    own |= {"sliding_window_pattern"} if model_type == "olmo3" else set()
    own -= {"sliding_window"} if model_type == "mixtral" else set()  # llama.cpp has it not
    required = list(_REQUIRED)
    if model_type in ("gemma3_text", "phi3"):  # what the absent key means has changed
        required.append("attention.sliding_window")
    if family.mixture is not None:
        own |= {"num_experts", "num_experts_per_tok"}
        required += ["expert_used_count"]
        required += ["expert_feed_forward_length"] * (family.mixture.width in family.defaults)
    values = {key: _short(get(f"{architecture}.{key}")) for key in _SAME}
    for key in required:
        if values[key] is None:
            raise DcodError(
                f"{path}: metadata key {architecture}.{key} is missing; convert the model again"
            )
    accepted = _ACCEPTED | {key: one for key, one in _NEUTRAL.items() if _SAME[key] not in own}
    if family.mixture is not None:
        accepted["expert_weights_norm"] = (None, model_type in _NORMALIZED)
    if scaled:
        del accepted["rope.scaling.type"], accepted["rope.scaling.factor"]
    if model_type == "phi3":
        del accepted["rope.scaling.attn_factor"]
    if model_type == "olmo3":  # its graph has one base for both of its ropes
        accepted["rope.freq_base_swa"] = (None, get("olmo2.rope.freq_base"))
    accepted = {f"{architecture}.{key}": one for key, one in accepted.items()}
    for key, one in {"split.count": (None, 0, 1), **accepted}.items():
        if get(key) not in one:
            raise DcodError(
                f"{path}: {key}={get(key)!r} is not supported (supported: {one[-1]!r} or absent); "
                f"use the HF directory of this model"
            )
    found = {name: values[key] for key, name in _SAME.items() if values[key] is not None}
    return {name: value for name, value in found.items() if name in own}


def _query_scalar(raw: Raw, head_dim: int) -> int:
    """llama.cpp knows the 27B models of Gemma 2 and 3 by their depth."""
    large = {"gemma2": 46, "gemma3_text": 62}.get(raw["model_type"])
    if raw["num_hidden_layers"] == large:
        return raw["hidden_size"] // raw["num_attention_heads"]
    return head_dim


def _ropes(
    architecture: str,
    get: Callable[[str], Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Callable[[str], list[float]],
    path: object,
) -> Raw:
    """rope_scaling of longrope, linear scaling and yarn; {} for any other."""
    scaling = f"{architecture}.rope.scaling"
    if architecture == "phi3" and {LONG, SHORT} <= shapes.keys():
        length = get(f"{scaling}.original_context_length")
        attention = get(f"{scaling}.attn_factor")
        return {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": factors(SHORT),
                "long_factor": factors(LONG),
                **({} if attention is None else {"attention_factor": _short(attention)}),
            },
            **({} if length is None else {"original_max_position_embeddings": length}),
        }
    kind, factor = get(f"{scaling}.type") or "linear", get(f"{scaling}.factor")
    kinds = ("linear",) if architecture == "gemma3" else ("linear", "yarn")
    if kind not in kinds or factor in (None, 0.0) or FREQS in shapes:
        return {}
    check({f"{scaling}.factor": factor}, {f"{scaling}.factor": number(1, 1e6)}, source=path)
    found: Raw = {"rope_type": kind, "factor": _short(factor)}
    if kind == "yarn":
        length = get(f"{scaling}.original_context_length")
        found["original_max_position_embeddings"] = length or get(f"{architecture}.context_length")
        usual = 1 + 0.1 * math.log(factor)  # which llama.cpp takes, whatever the file says
        key = f"{scaling}.yarn_attn_factor"
        check({key: get(key)}, {key: optional(number(usual - 1e-5, usual + 1e-5))}, source=path)
    return {"rope_scaling": found}


def _olmo3(raw: Raw, path: object) -> None:
    """The layer types and the two ropes of OLMo-3, whose files are OLMo-2's with a window."""
    windowed = raw.pop("sliding_window_pattern", None)
    key = "olmo2.attention.sliding_window_pattern"
    check({key: windowed}, {key: optional(array(flag(), most=4096))}, source=path)
    if windowed is not None:
        raw["layer_types"] = [SLIDING if one else FULL for one in windowed]
    plain = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    raw["rope_parameters"] = {FULL: plain | raw.pop("rope_scaling", {}), SLIDING: plain}


def _llama3(given: list[float], head_dim: int, theta: float, path: object) -> Raw:
    """The rope of Llama 3.1 and later, whose factors these are; they differ in the largest only."""
    length, source = 8192, f"{path}: {FREQS}"
    size = {"head_dim": head_dim, "max_position_embeddings": length}
    largest = _short(max(given, default=1.0))
    scaling = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": length}
    plain, scaled = (
        np.array(rope.frequencies(rope.read(one, size, fraction=1.0, source=source), head_dim))
        for one in ({"rope_theta": theta}, {"rope_theta": theta, **scaling})
    )
    if len(given) != len(plain) or not np.allclose(plain / scaled, given, rtol=1e-4):
        raise DcodError(
            f"{path}: {FREQS} are not the factors of Llama 3.1 (of {length} positions, wavelengths "
            f"up to a fourth of them kept); use the HF directory of this model"
        )
    return scaling
