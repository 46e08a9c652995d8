"""The text model inside a multimodal one: its config, and the names of its tensors in the files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dcod_jax.bounds import array, check, flag, mapping, optional, text
from dcod_jax.models.families import FAMILIES, Raw, refuse

GEMMA3 = "gemma3"
_ARCHITECTURE = "Gemma3ForConditionalGeneration"
_TEXT = "gemma3_text"
_KEYS = {
    "text_config": mapping(),
    "architectures": optional(array(text(256), most=64)),
    "tie_word_embeddings": optional(flag()),
}
# What transformers assumes for keys that text_config leaves out, beside the family's defaults.
_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
# Of the whole model: these say for the text what its own config says alone otherwise.
_OF_ALL = ("eos_token_id", "bos_token_id", "pad_token_id", "quantization_config", "auto_map")
# As published ("language_model.model.layers...") and as transformers 4.52 and later keep them.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def text_config(raw: Raw, source: str) -> Raw:
    """The config of the text model: text_config of a multimodal config.json, or raw itself.

    Raises DcodError for another architecture or text model, and for two answers to one question.
    """
    if raw.get("model_type") != GEMMA3:
        return raw
    check(raw, _KEYS, source=source)
    for architecture in raw.get("architectures") or ():
        if architecture != _ARCHITECTURE:
            raise refuse(source, "architectures", architecture, _ARCHITECTURE)
    own: dict[str, Any] = {**_SIZES, "model_type": _TEXT, **raw["text_config"]}
    if own["model_type"] != _TEXT:
        raise refuse(source, "text_config.model_type", own["model_type"], _TEXT)
    own["architectures"] = [FAMILIES[_TEXT].architecture]
    own |= {key: raw[key] for key in _OF_ALL if raw.get(key) is not None}
    tied = [one["tie_word_embeddings"] for one in (raw, own) if "tie_word_embeddings" in one]
    if len(set(tied)) > 1:
        raise refuse(source, "tie_word_embeddings", tied[0], f"{tied[1]}, as in text_config")
    return own | ({"tie_word_embeddings": tied[0]} if tied else {})


def text_names(model_type: str, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({name in a text model's files: name in these}, the vision tensors that are left out).

    A text model's own names stay as they are.
    """
    names = list(names)
    starts = tuple(prefix for prefix, _ in _PREFIXES)
    if model_type != _TEXT or not any(name.startswith(starts) for name in names):
        return {name: name for name in names}, []
    found, vision = {}, []
    for name in names:
        if _VISION.match(name):
            vision.append(name)
            continue
        prefix, own = next((pair for pair in _PREFIXES if name.startswith(pair[0])), ("", ""))
        found[own + name.removeprefix(prefix)] = name
    return found, vision
