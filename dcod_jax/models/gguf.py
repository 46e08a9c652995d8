"""GGUF files: weights (dequantised) and tokenizer, through the `gguf` package (extra gguf)."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dcod_jax.copies import Mirror, local_copy
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path
from dcod_jax.models import config as configs
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.tensors import Part, Slot, assemble, slots
from dcod_jax.types import Params

if TYPE_CHECKING:  # an extra
    from gguf import GGUFReader

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> the pre-tokenizer (and normalizer) that the HF tokenizer has.
PRE_TOKENIZERS: dict[str, tuple[Any, Any]] = {
    "smollm": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        None,
    ),
    "qwen2": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
}

# Ids at which llama.cpp ends a text: end of text, of a turn, of a message.
_STOPS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))

_CONTROL, _USER_DEFINED = 3, 4  # token types of the format


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise DcodError(
            "reading a .gguf file needs the extra gguf: pip install 'dcod_jax[gguf]'"
        ) from error


@dataclasses.dataclass(frozen=True)
class _File:
    """An open GGUF file; its tensors are mapped, not read."""

    path: Path
    reader: GGUFReader

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise DcodError(f"{self.path}: metadata key {key} is missing; convert the model again")
        return value


def _open(location: Location) -> _File:
    path = as_path(location)
    if not path.is_file():
        raise DcodError(f"{path}: no such .gguf file; check the path")
    package = _package()
    try:
        return _File(path, package.GGUFReader(local_copy(path)))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DcodError(f"{path}: not a whole GGUF file ({error}); download it again") from error


def _short(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _check_metadata(file: _File, architecture: str) -> None:
    """Refuse metadata that changes the model in a way not computed here."""
    accepted: dict[str, tuple[Any, ...]] = {
        "split.count": (None, 0, 1),
        f"{architecture}.rope.scaling.type": (None, "none"),
        f"{architecture}.rope.scale_linear": (None, 1.0),
        f"{architecture}.expert_count": (None, 0),
        f"{architecture}.attention.sliding_window": (None, 0),
        f"{architecture}.attention.causal": (None, True),
        f"{architecture}.logit_scale": (None, 1.0),
        f"{architecture}.residual_scale": (None, 1.0),
        f"{architecture}.embedding_scale": (None, 1.0),
    }
    for key, values in accepted.items():
        if file.get(key) not in values:
            raise DcodError(
                f"{file.path}: {key}={file.get(key)!r} is not supported (supported: {values[-1]!r} "
                f"or absent); use the HF directory of this model"
            )


def _config(file: _File, names: set[str]) -> ModelConfig:
    architecture = file.get("general.architecture")
    if architecture not in configs.FAMILIES:
        raise DcodError(
            f"{file.path}: general.architecture={architecture!r} is not supported "
            f"(supported: {', '.join(sorted(configs.FAMILIES))})"
        )
    _check_metadata(file, architecture)

    def need(key: str) -> Any:
        return file.need(f"{architecture}.{key}")

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = file.get(f"{architecture}.attention.key_length", width // heads)
    rotary = file.get(f"{architecture}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise DcodError(
            f"{file.path}: {architecture}.rope.dimension_count={rotary} is not supported "
            f"(supported: the head size, {head_dim})"
        )
    stops = [file.get(key) for key in _STOPS if file.get(key) is not None]
    raw = {
        "model_type": architecture,
        "vocab_size": next(
            int(tensor.shape[1])
            for tensor in file.reader.tensors
            if tensor.name == "token_embd.weight"
        ),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(file.get(f"{architecture}.rope.freq_base", 10000.0)),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(stops)) or None,
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }
    return configs.from_hf(raw, source=str(file.path))


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: per head (pair, half) back to HF's (half, pair)."""
    grouped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def read_gguf(file: Location, *, dtype: DTypeLike = jnp.float32) -> tuple[ModelConfig, Params]:
    """(config, params) of a llama, qwen2 or qwen3 GGUF file, dequantised.

    Raises DcodError for another architecture, for metadata that cannot be honoured exactly, and
    for tensors that are missing or unknown (rope_freqs of Llama 3.1 among them).
    """
    opened = _open(file)
    path = opened.path
    config, tensors = _read_head(opened)
    expected = {slot.name: slot for slot in slots(config, "gguf")}
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "missing" if name in expected else "not part of this architecture here"
        raise DcodError(f"{path}: tensor {name} is {state}; use the HF directory of this model")
    dequantize = _package().quants.dequantize
    interleaved = configs.FAMILIES[config.model_type].gguf_interleaved

    def read(slot: Slot, part: Part) -> np.ndarray:
        tensor = tensors[slot.name]
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.shape != slot.shape:
            raise DcodError(
                f"{path}: {slot.name} has shape {values.shape}, the metadata say {slot.shape}"
            )
        if interleaved and slot.rope_heads:
            values = _unpermute(values, slot.rope_heads)
        return values[part]

    return config, assemble(config, "gguf", read, dtype=dtype)


def _read_head(file: _File) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, {tensor name: tensor})."""
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    if "token_embd.weight" not in tensors:
        raise DcodError(
            f"{file.path}: tensor token_embd.weight is missing; is it a language model?"
        )
    return _config(file, set(tensors)), tensors


def read_config(location: Location) -> ModelConfig:
    """The config of a GGUF file; raises DcodError as read_gguf does."""
    return _read_head(_open(location))[0]


def export_tokenizer(file: Location, directory: Location) -> PreTrainedTokenizerFast:
    """Write the file's tokenizer and chat template in HF form into directory.

    Raises DcodError for a tokenizer whose pre-tokenizer is not known here exactly: another one
    would give other ids without any sign of it.
    """
    opened = _open(file)
    path, get = opened.path, opened.get
    model, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise DcodError(
            f"{path}: tokenizer.ggml.model={model!r} with tokenizer.ggml.pre={pre!r} is not "
            f"supported (supported: gpt2 with {', '.join(sorted(PRE_TOKENIZERS))}); "
            f"use the HF tokenizer of this model"
        )
    if get("tokenizer.ggml.add_bos_token", False):
        raise DcodError(f"{path}: tokenizer.ggml.add_bos_token=true is not supported")
    tokens = opened.need("tokenizer.ggml.tokens")
    tokenizer = _bpe(tokens, opened.need("tokenizer.ggml.merges"), pre)
    types = opened.need("tokenizer.ggml.token_type")
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    named = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: get(f"tokenizer.ggml.{key}") for name, key in named.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=get(f"{get('general.architecture')}.context_length"),
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )
    fast.chat_template = get("tokenizer.chat_template")
    with Mirror(as_path(directory)) as local:
        fast.save_pretrained(local)
    return fast


def _bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer, normalizer = PRE_TOKENIZERS[pre]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
