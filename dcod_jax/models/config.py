"""ModelConfig: what one decoder-only transformer can be, and its mapping from and to HF configs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from dcod_jax.bounds import array, check, flag, mapping, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.models import layer_kinds
from dcod_jax.models.families import ACTIVATIONS, FAMILIES, KEYS, Family, refuse
from dcod_jax.models.layer_kinds import LayerKind
from dcod_jax.models.layer_types import Raw
from dcod_jax.models.mixtures import ACCEPTS, Mixture
from dcod_jax.models.multimodal import text_config
from dcod_jax.models.rope import LENGTH, THETA


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
        """What the product of the two low-rank maps is multiplied by."""
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
    layer_kinds: tuple[LayerKind, ...]  # one for all layers, or one for each
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": over each head; "projection": over all heads together
    qkv_clip: float | None = None  # q, k and v are cut to this absolute value, before the rope
    norms: str = "pre"  # where a block has norms: a key of blocks.NORMS
    norm_offset: float = 0.0  # norms multiply by this plus their scale
    fused: tuple[str, ...] = ()  # "qkv", "gate_up": files hold these as one tensor
    rope_pairs: str = "halves"  # which dimensions of a head turn together: see layers.apply_rope
    activation: str = "silu"  # of ACTIVATIONS
    attention_scale: float | None = None  # what scores are multiplied by; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores are c · tanh(scores / c)
    final_softcap: float | None = None  # logits likewise
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logits_scale: float = 1.0  # logits are divided by it
    mixture: Mixture | None = None  # in place of one MLP a layer
    lora: Lora | None = None  # of a student in training; files know nothing of it

    def __post_init__(self) -> None:
        if len(self.layer_kinds) not in (1, self.num_layers):
            raise DcodError(
                f"layer_kinds has {len(self.layer_kinds)} entries for num_layers="
                f"{self.num_layers}; give one for all layers, or one for each"
            )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        if len(self.layer_kinds) == self.num_layers:
            return self.layer_kinds
        return self.layer_kinds * self.num_layers

    @property
    def mlp_width(self) -> int:
        """Channels of a layer's MLP, of one expert of a mixture."""
        return self.intermediate_size if self.mixture is None else self.mixture.width

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        default = 1.0 / math.sqrt(self.head_dim)
        return default if self.attention_scale is None else self.attention_scale


# Keys of config.json that have the field's name and value.
_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "pad_token_id"),
)
# Config key -> the only values under which the model computed here is the one HF computes.
# A key that is absent from the file has one of these values in HF.
ACCEPTED: dict[str, tuple[Any, ...] | None] = {
    "hidden_act": ACTIVATIONS,
    "hidden_activation": (*ACTIVATIONS, None),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0, None),
    "resid_pdrop": (0, 0.0, None),
    "embd_pdrop": (0, 0.0, None),
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
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": number(1e-12, 1),
    "initializer_range": number(0, 100),
    "rope_theta": THETA,
    "tie_word_embeddings": flag(),
    "attention_bias": optional(flag()),
    "mlp_bias": optional(flag()),
    "bos_token_id": _ID,
    "pad_token_id": _ID,
    "use_sliding_window": optional(flag()),
    "sliding_window": optional(whole(0, _LAST)),
    "max_window_layers": optional(whole(0, _LAST)),
    "no_rope_layers": optional(array(whole(0, 1), most=4096)),
}
# Those of some families only.
_OWN = {
    "sliding_window_pattern": whole(1, 4096),
    "rope_local_base_freq": THETA,
    "no_rope_layer_interval": whole(1, 4096),
}
# The keys that decide which others are read.
_SHAPE = {
    "model_type": optional(text(64)),
    "architectures": optional(array(text(256), most=64)),
    "layer_types": optional(array(text(64), most=4096)),
    "rope_scaling": optional(mapping()),
    "rope_parameters": optional(mapping()),
}


def _check_supported(raw: Raw, source: str) -> Family:
    check(raw, _SHAPE, source=source)
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise refuse(source, "model_type", model_type, ", ".join(sorted(FAMILIES)))
    family = FAMILIES[model_type]
    mixture = {} if family.mixture is None else ACCEPTS
    for architecture in raw.get("architectures") or ():
        if architecture != family.architecture:
            raise refuse(source, "architectures", architecture, family.architecture)
    for key, accepted in (ACCEPTED | family.accepts | mixture).items():
        if key in raw and accepted is not None and raw[key] not in accepted:
            raise refuse(source, key, raw[key], " or ".join(repr(value) for value in accepted))
    if raw.get("no_rope_layers") is not None and "no_rope_layer_interval" not in family.defaults:
        raise refuse(source, "no_rope_layers", raw["no_rope_layers"], "None")
    return family


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
    raw = text_config(raw, source)
    family = _check_supported(raw, source)
    given = (item for item in raw.items() if item != (family.absent_if_null, None))
    raw = {**family.defaults, **dict(given)}
    own = {key: bound for key, bound in _OWN.items() if key in family.defaults}
    check(raw, BOUNDS | own | {key: KEYS[key].bound for key in family.keys}, source=source)
    _check_heads(raw, source)
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    raw["head_dim"] = raw.get("head_dim") or width // heads
    options: Raw = {}
    for key in family.keys:
        options |= KEYS[key].options(raw.get(key))
    options |= family.options(raw)
    if family.mixture is not None:
        options["mixture"] = family.mixture.read(raw, source)
    return ModelConfig(
        **{key: raw.get(key) for key in _FIELDS},
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        layer_kinds=layer_kinds.read(family, raw, source),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        initializer_range=float(raw["initializer_range"]),
        eos_token_ids=tuple(_stop_ids(raw.get("eos_token_id"), source)),
        **options,
    )


def to_hf(config: ModelConfig, *, dtype: str) -> Raw:
    """The config.json that transformers 5 (and 4) reads back to the same model.

    Raises DcodError where the family's HF class cannot express the options.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise refuse("export", "model_type", config.model_type, ", ".join(sorted(FAMILIES)))
    eos = config.eos_token_ids
    raw: Raw = {
        "architectures": [family.architecture],
        **{key: getattr(config, key) for key in (*_FIELDS, "initializer_range", "rms_norm_eps")},
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": config.activation,
        "attention_dropout": 0.0,
        "use_cache": True,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "dtype": dtype,
        "torch_dtype": dtype,  # read by transformers 4
        **layer_kinds.rope_keys(family, config),
        **layer_kinds.layer_keys(family, config),
        **{key: KEYS[key].value(config) for key in family.keys},
    }
    if family.mixture is not None and config.mixture is not None:
        raw |= family.mixture.to_hf(config.mixture)
    read = from_hf(raw, source=f"export as {config.model_type}")
    config = dataclasses.replace(config, lora=None)
    if read != config:
        names = [field.name for field in dataclasses.fields(config)]
        name = next(name for name in names if getattr(read, name) != getattr(config, name))
        of = f"export as {config.model_type}"
        raise refuse(of, name, getattr(config, name), f"{getattr(read, name)!r}")
    return raw
