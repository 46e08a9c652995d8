"""Odd but legal values of config.json: read as transformers reads them, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings

import family_models as reference
import numpy as np
import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from dcod_jax.errors import DcodError
from dcod_jax.models import config as configs

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 24,
}
ABSENT = "absent"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
FULL, WINDOW = "full_attention", "sliding_attention"
MIXED = [FULL, WINDOW, FULL, WINDOW]


def ropes():
    """Values of rope_scaling, some of them also of rope_parameters."""
    return [
        *(None, {}, {"type": "default"}, {"rope_type": "default"}),
        {"rope_type": "default", "factor": 3.0},
        *({"type": "linear", "factor": factor} for factor in (1.0, 2, 2.0)),
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
        *(LLAMA3, LLAMA3 | {"type": "llama3"}),
        *({"type": "yarn", **YARN}, {"rope_type": "yarn", **YARN}, {"type": "yarn", "factor": 4}),
        {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 16},
        *({"rope_type": "yarn", **YARN, "attention_factor": 1.0, "truncate": False},),
        {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 64},
        {"type": "dynamic", "factor": 2.0},
    ]


def nested(full, window):
    return {"rope_parameters": {FULL: full, WINDOW: window}}


def changes():
    default, yarn = {"rope_type": "default"}, {"rope_type": "yarn", **YARN, "rope_theta": 1e5}
    one = [{key: rope} for key in ("rope_scaling", "rope_parameters") for rope in ropes()]
    one += [{"rope_scaling": LLAMA3, "rope_theta": 500000}, {"rope_theta": 1000}]
    one += [{"rope_parameters": {"rope_theta": 777}, "rope_theta": 5e5}]
    one += [{"rope_parameters": default, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}]
    one += [nested(yarn, yarn), nested({**default, "rope_theta": 1e6}, default)]
    one += [nested(default, default) | {"rope_theta": 5e5, "rope_local_base_freq": 50.0}]
    values = {
        "head_dim": (ABSENT, None, 16, 8.0),
        "num_key_value_heads": (ABSENT, None, 4),
        "max_position_embeddings": (ABSENT, 8),
        "rope_theta rms_norm_eps initializer_range query_pre_attn_scalar": (ABSENT,),
        "tie_word_embeddings": (ABSENT, True, False),
        "attention_bias mlp_bias": (ABSENT, None, True),
        "hidden_act": ("silu", "swish", "gelu", "gelu_pytorch_tanh"),
        "hidden_activation": (None, "gelu", "silu"),
        "eos_token_id": (ABSENT, None, [2, 5], []),
        "bos_token_id pad_token_id": (ABSENT, 0, -1, [1, 2]),
        "torch_dtype dtype": ("bfloat16", None),
        "sliding_window": (ABSENT, None, 0, 8, 100000),
        "layer_types": (None, [], [FULL] * 3, [FULL] * 4, [WINDOW] * 4, MIXED, ["chunked"] * 4),
        "sliding_window_pattern _sliding_window_pattern": (1, 2, None),
        "rope_local_base_freq": (100, 100.0),
        "attn_logit_softcapping final_logit_softcapping": (None, 30.0),
        "partial_rotary_factor": (0.5, 1, 1.0),
        "original_max_position_embeddings": (64,),
        "no_rope_layers": (None, [], [1, 0, 1, 0], [1, 0, 1, 0, 1]),
        "no_rope_layer_interval": (2, None),
        "attention_multiplier embedding_multiplier logits_scaling": (ABSENT, 2),
        "num_experts num_local_experts": (ABSENT, 4),
        "norm_topk_prob": (ABSENT, True),
        "mlp_only_layers": (None, [], [1]),
        "decoder_sparse_step": (1, 2),
        "clip_qkv": (None, 8.0),
        "architectures": (ABSENT, None, []),
        "quantization_config use_bidirectional_attention rope_interleaved": (None, False),
        "shared_expert_intermediate_size use_qk_norm _name_or_path": (ABSENT, "x"),
    }
    one += [{k: value} for keys, some in values.items() for k in keys.split() for value in some]
    window = {"use_sliding_window": True, "sliding_window": 8}
    one += [window | {"max_window_layers": first} for first in (ABSENT, 0, 2, 99)]
    one += [window | {"sliding_window": None}, window | {"use_sliding_window": False}]
    one += [window | {"layer_types": types} for types in (MIXED, [WINDOW] * 4)]
    one += [{"sliding_window": 8, "layer_types": MIXED}, window | {"no_rope_layer_interval": 2}]
    for kind in ("longrope", "su"):
        given = {"rope_scaling": {"type": kind, **FACTORS}}
        one += [given | {"original_max_position_embeddings": 64}]
    return one


def compare(model_type, change, place):
    """None where the config is refused, else whether it is read as transformers reads it."""
    family = configs.FAMILIES[model_type]
    raw = {**SHAPE, "model_type": model_type, "architectures": [family.architecture]}
    if family.mixture:
        experts = "num_local_experts" if model_type == "mixtral" else "num_experts"
        raw |= {experts: 4, "num_experts_per_tok": 2}
    if model_type == "gemma3_text":  # whose four layers would all be windowed
        raw["sliding_window_pattern"] = 2
    raw = {key: value for key, value in (raw | change).items() if value is not ABSENT}
    (place / "config.json").write_text(json.dumps(raw))
    try:
        ours = configs.from_hf(raw, source="some/config.json")
    except DcodError as error:
        return None if "some/config.json" in str(error) else False
    theirs = AutoConfig.from_pretrained(place).to_dict()
    # A mistral with layer_types is a ministral there.
    theirs |= {"model_type": model_type, "architectures": [family.architecture]}
    return configs.from_hf(theirs) == ours


# What transformers 5 refuses and version 4 reads, as we do.
STRICTER = (
    *("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "bos_token_id"),
    *("rope_scaling", "rope_parameters"),  # longrope without the length beside it
)


@pytest.fixture(autouse=True)
def _quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.long)])
def test_odd_values_are_read_as_transformers_reads_them(every, tmp_path):
    grid = [(model_type, change) for change in changes() for model_type in reference.COMPARED]
    found, wrong = [], []
    for model_type, change in grid[::every]:
        try:
            found.append(compare(model_type, change, tmp_path))
        except (ValueError, TypeError, KeyError, StrictDataclassError):
            if change.keys().isdisjoint(STRICTER):
                wrong.append((model_type, change))
            continue
        if found[-1] is False:
            wrong.append((model_type, change))
    assert not wrong
    assert len(found) > 0.95 * len(grid) / every
    assert found.count(True) > 0.6 * len(found)


def test_keys_that_two_versions_of_transformers_read_differently_are_refused(tmp_path):
    rope = {"type": "yarn", **YARN}
    for model_type in ("olmo3", "gemma3_text"):
        with pytest.raises(DcodError, match=r"rope_scaling\.type='yarn' is not supported"):
            configs.from_hf({**SHAPE, "model_type": model_type, "rope_scaling": rope})
    assert compare("cwm", {"rope_parameters": {}}, tmp_path)


def test_a_null_that_a_family_reads_as_its_default(tmp_path):
    assert compare("cwm", {"eos_token_id": None}, tmp_path)


def test_exaone_has_no_positions_in_full_layers_beside_windowed_ones():
    raw = {**SHAPE, "model_type": "exaone4", "layer_types": MIXED, "sliding_window_pattern": "GL"}
    kinds = configs.from_hf({**raw, "sliding_window": 8}).layer_kinds
    assert [(kind.window, kind.rope is None) for kind in kinds] == 2 * [(None, True), (8, False)]
    alike = configs.from_hf({**raw, "sliding_window": None, "layer_types": [FULL] * 4})
    assert [kind.rope is None for kind in alike.layer_kinds] == [False]
    with pytest.raises(DcodError, match="layer_types has 0 entries"):
        configs.from_hf({**raw, "layer_types": None})


@pytest.mark.parametrize(
    ("model_type", "rotates"),
    [
        *(("gemma2", 1), ("gemma3_text", 1), ("vaultgemma", 1), ("cwm", 1)),
        *(("exaone4", 1), ("exaone4", 0)),
    ],
)
def test_a_model_left_with_full_layers_alone_is_computed_by_transformers(model_type, rotates):
    """As init_student may leave it; transformers makes the mask of windows in any case."""
    raw = {**SHAPE, "model_type": model_type, "layer_types": MIXED, "sliding_window": 8}
    whole = configs.from_hf(raw | {"head_dim": 8, "eos_token_id": 2})
    kinds = (dataclasses.replace(whole.kinds[0], rope=whole.kinds[1].rope if rotates else None),)
    small = dataclasses.replace(whole, layer_kinds=kinds, num_layers=2)
    written = configs.to_hf(small, dtype="float32")
    assert written["layer_types"] == [FULL] * 2
    reference.logits(reference.build(written), np.arange(3, 20))
