"""A tiny tokenizer, model directories and trace files that several tests start from."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcod_jax.models import config as model_configs
from dcod_jax.models import hf, transformer

ALPHABET = "0123456789+-=;# abcdefghijklmnopqrstuvwxyz?\n"
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(path: Path, *, alphabet: str = ALPHABET, template: str = TEMPLATE) -> Path:
    """Character-level HF tokenizer with a chat template."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    fast.save_pretrained(path)
    return path


def raw_config(**changes) -> dict:
    """config.json of a small Llama over the tiny tokenizer's vocabulary, with some padding."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(SPECIAL) + len(ALPHABET) + 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }


@functools.cache
def _params(raw: str, seed: int) -> dict:
    config = model_configs.from_hf(json.loads(raw))
    return jax.device_get(transformer.init_params(config, jax.random.key(seed)))


def write_model(path: Path, *, seed: int = 0, shard_bytes: int = 1 << 30, **changes) -> Path:
    """HF directory: config, random weights, tokenizer."""
    write_tokenizer(path)
    raw = raw_config(**changes)
    (path / "config.json").write_text(json.dumps(raw))
    config = model_configs.from_hf(raw)
    params = _params(json.dumps(raw), seed)
    hf.save_params(path, config, params, dtype=jnp.float32, max_shard_bytes=shard_bytes)
    return path


def sums(count: int, *, seed: int = 0) -> list[dict]:
    """Distinct addition problems with a worked answer, in the trace format."""
    generator = random.Random(seed)
    pairs = generator.sample([(a, b) for a in range(90) for b in range(90)], count)
    return [
        {
            "id": f"sum-{a}-{b}",
            "prompt": f"{a}+{b}?",
            "completion": f"{a}+{b}={a + b}\n#### {a + b}",
            "answer": str(a + b),
        }
        for a, b in pairs
    ]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
