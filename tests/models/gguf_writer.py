"""Tiny GGUF files written from the torch side, without the code under test."""

from __future__ import annotations

import gguf as package
import numpy as np
from tokenizers import pre_tokenizers

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġt", "12", "he", "the"]
MERGES = ["Ġ t", "1 2", "h e", "t he"]
NAMES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama", "olmo3": "olmo2"}
EXPERTS = ("qwen3_moe", "mixtral", "olmoe")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def permute(rows, heads):
    """llama.cpp's order of q and k rows, as its converter writes it."""
    size = rows.shape[0] // heads
    order = [
        h * size + half * size // 2 + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_tokenizer(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(file, pre="smollm", *, architecture="llama", flags=None):
    """A file of the byte-level tokenizer alone."""
    writer = package.GGUFWriter(file, architecture)
    write_tokenizer(writer, pre)
    for key, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    finish(writer)
    return file


def write_pieces(file, pieces, *, architecture="llama", flags=None, texts=None, kind="llama"):
    """A file of a SentencePiece tokenizer alone; pieces: (token, score, type)."""
    tokens, scores, types = zip(*pieces, strict=True)
    writer = package.GGUFWriter(file, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for name, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>")):
        if token in tokens:
            getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    for key, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    for key, value in (texts or {}).items():
        writer.add_string(key, value)
    finish(writer)
    return file


def add_family(writer, config, rope):
    """What llama.cpp's converter writes for one family only."""
    kind, writes, name = config.model_type, writer.add_key_value, writer.arch
    number, whole = package.GGUFValueType.FLOAT32, package.GGUFValueType.UINT32
    if kind in ("gemma2", "gemma3_text", "phi3", "olmo3"):
        writes(f"{name}.attention.sliding_window", config.sliding_window or 0, whole)
    if kind == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            writes(f"gemma2.{key}", getattr(config, key), number)
    if kind == "olmo3":
        writer.add_sliding_window_pattern([one.startswith("sliding") for one in config.layer_types])
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        writes("olmo2.rope.freq_base_swa", local, number)
    if rope["rope_type"] in ("linear", "yarn"):
        writes(f"{name}.rope.scaling.type", rope["rope_type"], package.GGUFValueType.STRING)
        writes(f"{name}.rope.scaling.factor", rope["factor"], number)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writes(f"{name}.rope.scaling.yarn_attn_factor", 1 + 0.1 * np.log(rope["factor"]), number)
    if kind in EXPERTS:
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        writes(f"{name}.expert_count", experts, whole)
        writes(f"{name}.expert_used_count", config.num_experts_per_tok, whole)
    if kind == "qwen3_moe":
        writes(f"{name}.expert_feed_forward_length", config.moe_intermediate_size, whole)
    if kind == "granite":
        for key, name in {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        }.items():
            writes(f"granite.{key}", getattr(config, name), number)
    if kind == "phi3":
        size = config.hidden_size // config.num_attention_heads
        writes("phi3.rope.dimension_count", int(size * rope["partial_rotary_factor"]), whole)
        if rope["rope_type"] == "longrope":
            length = rope["original_max_position_embeddings"]
            writes("phi3.rope.scaling.original_context_length", length, whole)
            factor = config.max_position_embeddings / length
            attention = (1 + np.log(factor) / np.log(length)) ** 0.5
            writes("phi3.rope.scaling.attn_factor", float(attention), number)
            for name in ("long", "short"):
                factors = np.array(rope[f"{name}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{name}.weight", factors)


def quantised(values, kind):
    """Rows in blocks of a type; of the K types, which the package does not write, random ones."""
    if not kind.name.endswith("_K"):
        return package.quants.quantize(values, kind)
    block, size = package.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (values.size // block, size), np.uint8)
    scales = slice(-2, None) if kind.name == "Q6_K" else slice(0, 4)  # float16
    blocks[:, scales] = np.resize(
        np.full(1, 0.01, np.float16).view(np.uint8), blocks[0, scales].size
    )
    return blocks.reshape(len(values), -1)


def tensors(model):
    """(name, values) of a torch model, of all experts of a layer in one as the converter has it."""
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith("experts.gate_up_proj"):
            for one, part in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield name.replace("gate_up", one) + ".weight", part
        else:
            yield name + ".weight" * ("experts" in name), values


def write_gguf(
    file, pair, *, pre="smollm", quantise=None, extra=None, drop=(), metadata=None, ids=None
):
    """A GGUF of the pair's torch model, written from the torch side only.

    quantise: the type of a tensor, by name.
    """
    quantise = quantise or {}
    config = pair.model.config
    architecture = NAMES.get(config.model_type, config.model_type)
    writer = package.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    add_family(writer, config, rope)
    if rope["rope_type"] == "llama3":
        scaled = pair.model.model.rotary_emb.inv_freq.numpy()
        plain = rope["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, package.GGUFValueType.STRING)
    for key, value in (ids or {}).items():
        writer.add_key_value(key, value, package.GGUFValueType.UINT32)
    write_tokenizer(writer, pre)
    names = package.get_tensor_name_map(
        package.MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, values in tensors(pair.model):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied or target in drop:
            continue
        kind = name.split(".")[-2]
        if architecture in ("llama", "smollm3", "granite") and kind in heads:
            values = permute(values, heads[kind])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if target in quantise:
            kind = package.GGMLQuantizationType[quantise[target]]
            writer.add_tensor(target, quantised(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return file
