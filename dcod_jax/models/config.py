"""ModelConfig: what one decoder-only transformer can be, and its mapping from and to HF configs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from dcod_jax.bounds import array, check, flag, mapping, number, optional, text, whole
from dcod_jax.errors import DcodError

Raw = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 rope scaling: long wavelengths are stretched by factor, middle ones blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of low rank beside frozen linear maps: x·W + scale·(x·A)·B (Hu, arXiv 2106.09685).

    scale is alpha / rank, with rslora alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]  # linear maps of a layer: names or regular expressions
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, name: str) -> bool:
        """Whether a map, "self_attn.q_proj" or for short "q_proj", has an adapter."""
        names = (name, name.rpartition(".")[2])
        return any(re.fullmatch(target, one) for target in self.targets for one in names)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a model; hashable, so it can be a static argument under jit."""

    model_type: str
    vocab_size: int  # rows of the embedding, padding included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    lora: Lora | None = None  # of a student in training; files know nothing of it


@dataclasses.dataclass(frozen=True)
class Family:
    """How one HF model_type sets the options, and what HF assumes for keys a file leaves out."""

    architecture: str
    options: Callable[[Raw], dict[str, bool]]
    defaults: Raw
    gguf_interleaved: bool = False  # its GGUF files hold rotated rows as (pair, half) of a head


_DEFAULTS: Raw = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}

# A family is one entry here; its parameters are declared in models/layers.py. An option that HF
# computes for it and this model does not (a sliding window) also needs a check that refuses it, and
# a line in to_hf where HF's default is not the value computed here.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        options=lambda raw: {
            "qkv_bias": raw["attention_bias"],
            "o_bias": raw["attention_bias"],
            "qk_norm": False,
        },
        defaults={
            **_DEFAULTS,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        gguf_interleaved=True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        options=lambda raw: {"qkv_bias": True, "o_bias": False, "qk_norm": False},
        defaults=_DEFAULTS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        options=lambda raw: {
            "qkv_bias": raw["attention_bias"],
            "o_bias": raw["attention_bias"],
            "qk_norm": True,
        },
        defaults={**_DEFAULTS, "attention_bias": False, "head_dim": 128},
    ),
}

# Config key -> the only values under which the model computed here is the one HF computes.
# A key that is absent from the file has one of these values in HF.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "original_max_position_embeddings": (None,),
    "quantization_config": (None,),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (False, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "no_rope_layers": (None,),
    "auto_map": (None,),
}

# Key -> what it must be, once the family's defaults are in. The upper ends are far above any model
# of today and low enough that no loop or table over such a size exhausts the machine.
_LAST = 2**31 - 1
_ID = optional(whole(0, 2**24 - 1))
BOUNDS = {
    "vocab_size": whole(1, 2**24),
    "hidden_size": whole(1, 2**20),
    "intermediate_size": whole(1, 2**22),
    "num_hidden_layers": whole(1, 4096),
    "num_attention_heads": whole(1, 2**14),
    "num_key_value_heads": optional(whole(1, 2**14)),
    "head_dim": optional(whole(1, 2**14)),
    "max_position_embeddings": whole(1, _LAST),
    "rms_norm_eps": number(1e-12, 1),
    "initializer_range": number(0, 100),
    "rope_theta": number(1, 1e12),
    "tie_word_embeddings": flag(),
    "attention_bias": optional(flag()),
    "bos_token_id": _ID,
    "pad_token_id": _ID,
    "use_sliding_window": optional(flag()),
    "sliding_window": optional(whole(0, _LAST)),
    "max_window_layers": optional(whole(0, _LAST)),
}
# The keys that decide which others are read.
_SHAPE = {
    "model_type": optional(text(64)),
    "architectures": optional(array(text(256), most=64)),
    "layer_types": optional(array(text(64), most=4096)),
    "rope_scaling": optional(mapping()),
    "rope_parameters": optional(mapping()),
}
_SCALING = {
    "factor": number(1, 1e6),
    "low_freq_factor": number(1e-3, 1e6),
    "high_freq_factor": number(1e-3, 1e6),
    "original_max_position_embeddings": whole(1, _LAST),
}


def _refuse(source: str, key: str, value: Any, supported: str) -> DcodError:
    return DcodError(
        f"{source}: {key}={value!r} is not supported (supported: {supported}); "
        f"use a model without it"
    )


def _check_supported(raw: Raw, source: str) -> Family:
    check(raw, _SHAPE, source=source)
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise _refuse(source, "model_type", model_type, ", ".join(sorted(FAMILIES)))
    family = FAMILIES[model_type]
    for architecture in raw.get("architectures") or ():
        if architecture != family.architecture:
            raise _refuse(source, "architectures", architecture, family.architecture)
    for key, accepted in ACCEPTED.items():
        if key in raw and raw[key] not in accepted:
            raise _refuse(source, key, raw[key], " or ".join(repr(value) for value in accepted))
    return family


def _check_full_attention(raw: Raw, source: str) -> None:
    """Refuse sliding-window attention where HF would use it (by layer_types, else by window)."""
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        other = [name for name in layer_types if name != "full_attention"]
        if other:
            raise _refuse(source, "layer_types", other[0], "full_attention in every layer")
        return
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    if raw.get("use_sliding_window") and window and (first or 0) < raw["num_hidden_layers"]:
        raise _refuse(source, "use_sliding_window", True, "false")


def _rope(raw: Raw, source: str) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from rope_scaling + rope_theta (old) or rope_parameters (new)."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise _refuse(source, key, rope, "one flat rope for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    inner = rope.get("rope_theta")
    check({"rope_theta": inner}, {"rope_theta": optional(BOUNDS["rope_theta"])}, source=source)
    theta = float(raw["rope_theta"] if inner is None else inner)
    partial = rope.get("partial_rotary_factor")
    if partial not in ACCEPTED["partial_rotary_factor"]:
        raise _refuse(source, f"{key}.partial_rotary_factor", partial, "1.0")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _refuse(source, f"{key}.rope_type", kind, "default, llama3")
    values = {"original_max_position_embeddings": raw["max_position_embeddings"], **rope}
    check({key: values}, {key: mapping(_SCALING)}, source=source)
    factor, low, high, length = (values[name] for name in _SCALING)
    if low >= high:
        raise DcodError(
            f"{source}: {key}: low_freq_factor={low} must be below {high}, the high one"
        )
    return theta, RopeScaling(float(factor), float(low), float(high), length)


def add_stop_ids(config: ModelConfig, value: Any, *, source: str) -> ModelConfig:
    """The config with further ids that end a text, as generation_config.json names them.

    (2,) and [2, 0] -> (2, 0). Raises DcodError for anything but ids.
    """
    merged = tuple(dict.fromkeys((*config.eos_token_ids, *_stop_ids(value, source))))
    return dataclasses.replace(config, eos_token_ids=merged)


def _stop_ids(value: Any, source: str) -> Sequence[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if len(ids) > 1024 or any(_ID.fault(token) or token is None for token in ids):
        raise DcodError(
            f"{source}: eos_token_id={str(value)[:80]!r} must be a token id or a list of them"
        )
    return ids


def _check_heads(raw: Raw, source: str) -> None:
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    kv_heads, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim")
    if heads % kv_heads:
        raise DcodError(
            f"{source}: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if head_dim is None and width % heads:
        raise DcodError(
            f"{source}: hidden_size={width} must be a multiple of num_attention_heads={heads} "
            f"where head_dim is not given"
        )
    if (head_dim or width // heads) % 2:
        raise DcodError(
            f"{source}: head_dim={head_dim or width // heads} must be even for rotary positions"
        )


def from_hf(raw: Raw, source: str = "config.json") -> ModelConfig:
    """ModelConfig of an HF config dict, in the form of transformers 4 or 5.

    Raises DcodError naming the key and its value for whatever is not computed here exactly.
    """
    family = _check_supported(raw, source)
    raw = {**family.defaults, **raw}
    check(raw, BOUNDS, source=source)
    _check_full_attention(raw, source)
    _check_heads(raw, source)
    theta, scaling = _rope(raw, source)
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=width,
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or width // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(raw["rms_norm_eps"]),
        tie_word_embeddings=raw["tie_word_embeddings"],
        **{name: bool(value) for name, value in family.options(raw).items()},
        max_position_embeddings=raw["max_position_embeddings"],
        initializer_range=float(raw["initializer_range"]),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(_stop_ids(raw.get("eos_token_id"), source)),
        pad_token_id=raw.get("pad_token_id"),
        lora=None,
    )


def to_hf(config: ModelConfig, *, dtype: str) -> Raw:
    """The config.json that transformers 5 (and 4) reads back to the same model.

    Raises DcodError where the family's HF class cannot express the options.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _refuse("export", "model_type", config.model_type, ", ".join(sorted(FAMILIES)))
    wanted = family.options({"attention_bias": config.o_bias})
    options = {name: getattr(config, name) for name in wanted}
    if options != wanted:
        raise _refuse(f"export as {config.model_type}", "options", options, family.architecture)
    eos = config.eos_token_ids
    raw: Raw = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,  # read by transformers 4
    }
    if "attention_bias" in family.defaults:
        raw["attention_bias"] = config.o_bias
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
        raw["rope_scaling"] = scaling
        raw["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    return raw


def rope_frequencies(config: ModelConfig) -> list[float]:
    """Inverse frequencies [H/2] of the rotary table, llama3 scaling applied (arXiv 2407.21783).

    With wavelength w = 2π/f and original length n: f where w < n/high, f/factor where
    w > n/low, and in between ((1−s)/factor + s)·f with s = (n/w − low)/(high − low).
    """
    half = range(0, config.head_dim, 2)
    plain = [config.rope_theta ** (-index / config.head_dim) for index in half]
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    frequencies = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            frequencies.append(frequency)
        elif wavelength > length / low:
            frequencies.append(frequency / scaling.factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            frequencies.append(((1 - smooth) / scaling.factor + smooth) * frequency)
    return frequencies
