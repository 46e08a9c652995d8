"""HF config mapping: both forms of rope, round trips, and refusals by key and value."""

from __future__ import annotations

import dataclasses

import family_models as reference
import jax
import numpy as np
import pytest
from transformers import AutoConfig

from dcod_jax.errors import DcodError
from dcod_jax.models import config as configs
from dcod_jax.models import counts, transformer

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
QWEN2, MISTRAL, GEMMA3, OLMO3, PHI3, SMOLLM3, GRANITE = (
    {**LLAMA, "model_type": name, "architectures": [configs.FAMILIES[name].architecture]}
    for name in ("qwen2", "mistral", "gemma3_text", "olmo3", "phi3", "smollm3", "granite")
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 2.0],
    "long_factor": [1.0] * 4,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_config_round_trip(pair):
    raw = configs.to_hf(pair.config, dtype="float32")
    assert configs.from_hf(raw) == pair.config
    assert configs.from_hf({**raw, "rope_parameters": None}) == pair.config  # transformers 4


def test_transformers_reads_the_written_config(pair):
    raw = configs.to_hf(pair.config, dtype="float32")
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    theirs = AutoConfig.for_model(raw["model_type"], **fields)
    assert configs.from_hf(theirs.to_dict()) == pair.config
    original = pair.model.config
    for key in ("head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(theirs, key, None) == getattr(original, key, None) or key == "head_dim"


def test_old_and_new_rope_forms_agree():
    old = configs.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE})
    new = configs.from_hf({**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}})
    assert old == new
    rope = old.layer_kinds[0].rope
    assert (rope.theta, rope.kind, rope["factor"]) == (5e5, "llama3", 8.0)


def test_a_default_rope_beside_gemma_3s_two_is_read_past():
    """As transformers 5.0 to 5.8 write it; of OLMo-3 they read it, and 5.24 reads the two."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ropes = {
        "full_attention": {**yarn, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    alone = configs.from_hf(GEMMA3 | {"rope_parameters": ropes})
    for theta in (None, 10000.0):
        flat = {"rope_type": "default", "rope_theta": theta}
        assert configs.from_hf(GEMMA3 | {"rope_parameters": ropes | flat}) == alone
        for raw, other in (
            (GEMMA3, flat | yarn),
            (GEMMA3, flat | {"full_attention": yarn}),
            (GEMMA3, {"rope_theta": 1e4}),
            (OLMO3, flat),
        ):
            with pytest.raises(DcodError, match="an object for full_attention and for sliding"):
                configs.from_hf(raw | {"rope_parameters": ropes | other})


def test_defaults_are_those_of_transformers():
    for model_type in reference.COMPARED:
        minimal = {
            "model_type": model_type,
            "vocab_size": 131,
            "hidden_size": 256,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        fields = {name: value for name, value in minimal.items() if name != "model_type"}
        theirs = AutoConfig.for_model(model_type, **fields).to_dict()
        assert configs.from_hf(minimal) == configs.from_hf(theirs)


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    [
        (LLAMA, {"model_type": "qwen2_moe"}, "model_type='qwen2_moe'"),
        (LLAMA, {"model_type": "gemma3n_text"}, "model_type='gemma3n_text'"),
        (LLAMA, {"model_type": None}, "model_type=None"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts=8"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (QWEN2, {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor=0.5"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor is"),
        (LLAMA, {"rope_parameters": LONGROPE}, "rope_parameters.short_factor has 3 factors"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters",
        ),
        (
            LLAMA,
            {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}},
            "rope_scaling.low_freq_factor is missing",
        ),
        (
            {**QWEN2, "sliding_window": 64},
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types='sliding_attention'",
        ),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (LLAMA, {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
        (SMOLLM3, {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        (SMOLLM3, {"layer_types": ["full_attention", "chunked"]}, "layer_types='chunked'"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window=0"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        (GEMMA3, {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        (GEMMA3, {"sliding_window_pattern": None}, "sliding_window_pattern is missing"),
        (GEMMA3, {"rope_local_base_freq": 0}, "rope_local_base_freq=0"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters="),
        (GEMMA3, {"final_logit_softcapping": 0}, "final_logit_softcapping=0"),
        (OLMO3, {"rope_theta": 1e6}, "rope_theta=1000000.0"),
        (OLMO3, {"rope_scaling": {**YARN, "truncate": False}}, "truncate=False"),
        (PHI3, {"rope_scaling": YARN}, "short_factor is missing"),  # its old name of longrope
        (PHI3, {"partial_rotary_factor": 0.4}, "is 3 dimensions"),
        (PHI3, {"partial_rotary_factor": 0}, "partial_rotary_factor=0"),
        (PHI3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        (PHI3, {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        (GRANITE, {"logits_scaling": 0}, "logits_scaling=0"),
        (GRANITE, {"residual_multiplier": None}, "residual_multiplier is missing"),
        (LLAMA, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA, {"hidden_size": -32}, "hidden_size=-32"),
        (LLAMA, {"intermediate_size": "48"}, "intermediate_size='48'"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        (LLAMA, {"hidden_size": 30}, "hidden_size=30"),
        (LLAMA, {"head_dim": 7}, "head_dim=7"),
    ],
)
def test_refused_by_name(raw, change, named):
    configs.from_hf(raw)  # without the change it is fine
    with pytest.raises(DcodError) as caught:
        configs.from_hf({**raw, **change}, source="some/config.json")
    assert named in str(caught.value)
    assert "some/config.json" in str(caught.value)


# Key -> values that no file of a model has; every key of BOUNDS is here.
_NUMBERS = [float("nan"), float("inf"), -1, 10**400, "1", True, [1], {}]
_SIZES = [0, 10**9, 1.0, *_NUMBERS]
NONSENSE = {
    **dict.fromkeys(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim".split(),
        _SIZES,
    ),
    "max_position_embeddings": [0, 1 << 31, *_NUMBERS],
    "rms_norm_eps": [0, 2, *_NUMBERS],
    "initializer_range": _NUMBERS,
    "rope_theta": [0, 0.5, None, *_NUMBERS],
    "tie_word_embeddings": ["false", 0, 1, None, "true", []],
    "attention_bias": ["false", 0, 1],
    "mlp_bias": ["false", 0, 1],
    "no_rope_layers": [[2], "1", [True], [None]],
    "bos_token_id": [4_000_000_000, 1.0, [1], *_NUMBERS],
    "eos_token_id": [-3, "x", 4_000_000_000, [2, -1], [[2]], [None], {}, True, 1.5],
    "pad_token_id": _NUMBERS,
    "use_sliding_window": ["false", 1],
    "sliding_window": ["4096", -1, float("nan")],
    "max_window_layers": ["28", [28], -1],
    "model_type": [["llama"], {}, 3, "x" * 1000],
    "architectures": ["LlamaForCausalLM", [3], {"a": 1}, [None]],
    "layer_types": ["full_attention", [1], 3, {}],
    "rope_scaling": ["llama3", [LLAMA3_ROPE], 3],
    "rope_parameters": ["llama3", [1], True],
}
INSIDE_ROPE = {
    "factor": [0, 0.5, *_NUMBERS],
    "low_freq_factor": [0, 4.0, 5.0, *_NUMBERS],
    "high_freq_factor": [0, 1.0, *_NUMBERS],
    "original_max_position_embeddings": [0, 1.5, *_NUMBERS],
    "rope_theta": [0, *_NUMBERS],
    "rope_type": [3, ["llama3"], {}, None],
}


def test_nonsense_is_refused_for_every_key():
    assert {*configs.BOUNDS, "eos_token_id"} <= NONSENSE.keys()
    cases = [{key: value} for key, values in NONSENSE.items() for value in values]
    for rope in ("rope_scaling", "rope_parameters"):
        for key, values in INSIDE_ROPE.items():
            cases += [{rope: {**LLAMA3_ROPE, key: value}} for value in values]
    for change in cases:
        with pytest.raises(DcodError, match=r"some/config\.json: ") as caught:
            configs.from_hf({**LLAMA, **change}, source="some/config.json")
        name = next(iter(change))
        assert name in str(caught.value) or "rope_theta" in str(caught.value), change
        assert len(str(caught.value)) < 400
    with pytest.raises(DcodError, match="eos_token_id"):
        configs.add_stop_ids(configs.from_hf(LLAMA), [-3], source="generation_config.json")


def test_unused_sliding_window_is_no_reason_to_refuse():
    fields = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    plain = configs.from_hf(QWEN2)
    assert configs.from_hf({**QWEN2, **fields}) == plain
    unused = {"use_sliding_window": False, "sliding_window": 64}
    assert configs.from_hf({**QWEN2, **unused}) == plain
    assert configs.from_hf({**QWEN2, "layer_types": ["full_attention"] * 2}) == plain


def test_export_refuses_what_the_family_cannot_express():
    for field in ("qkv_bias", "o_bias"):  # of llama's one key for both
        config = dataclasses.replace(configs.from_hf(LLAMA), **{field: True})
        with pytest.raises(DcodError, match="export as llama: o_bias="):
            configs.to_hf(config, dtype="float32")


def test_num_params_are_those_of_transformers(pair):
    assert counts.num_params(pair.config) == pair.model.num_parameters()


def test_flops_per_row_counts_what_the_compiler_counts():
    raw = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256}
    config = configs.from_hf(raw)
    params = transformer.init_params(config, jax.random.key(0))
    tokens = np.zeros((1, 64), np.int32)
    lowered = jax.jit(lambda p, t: transformer.logits(config, p, t)).lower(params, tokens)
    analysis = lowered.compile().cost_analysis()
    forward = counts.flops_per_row(config, 64, 64) / 3
    # The compiler also counts norms, rotations and softmax, and the whole score square.
    assert forward < analysis["flops"] < 1.25 * forward


def test_qwen2_5_1_5b_costs_what_is_published():
    config = configs.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    )
    assert counts.num_params(config) == 1_543_714_304  # the model card's 1.54B
    assert counts.flops_per_row(config, 4096, 4096) == pytest.approx(4096 * 10.3e9, rel=0.01)
