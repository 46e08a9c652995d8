"""GGUF files: weights (dequantised) and tokenizer, through the `gguf` package (extra gguf)."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dcod_jax.bounds import array, check, optional, text, whole
from dcod_jax.copies import Mirror, local_copy
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path
from dcod_jax.models import config as configs
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.gguf_metadata import LONG, SHORT, raw_config
from dcod_jax.models.tensors import Part, Slot, assemble, shardings_of, slots
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

_CONTROL, _USER_DEFINED = 3, 4  # token types of the format

# What a header may announce, far above any model of today: each item costs memory when it is read.
_MOST = {"GGUF.kv_count": 1 << 16, "GGUF.tensor_count": 1 << 17, "items of an array": 1 << 21}
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS of the format


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise DcodError(
            "reading a .gguf file needs the extra gguf: pip install 'dcod_jax[gguf]'"
        ) from error


def _reader() -> type[GGUFReader]:
    """The package's reader, with every announced size checked before something is read by it."""
    package = _package()
    kinds = package.GGUFValueType

    class Reader(package.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it announces {end} bytes and has {len(self.data)}")
            return super()._get(int(offset), dtype, count, override_order)

        def _push_field(self, field: Any, skip_sum: bool = False) -> Any:
            _check_count(field.name, int(field.parts[-1][0]) if field.name in _MOST else 0)
            return super()._push_field(field, skip_sum)

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if kinds(raw_type) != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            _check_count("items of an array", int(count[0]))
            kind = kinds(item[0])
            if kind == kinds.ARRAY:
                raise ValueError("it has an array of arrays")
            if kind == kinds.STRING:
                return super()._get_field_parts(orig_offs, raw_type)
            # One view of all values, where the package makes a view of each.
            values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count[0])
            return 12 + values.nbytes, [item, count, values], [2], [kinds.ARRAY, kind]

        def _get_tensor_info_field(self, orig_offs: Any) -> Any:
            field = super()._get_tensor_info_field(orig_offs)
            dimensions, place = field.parts[3].tolist(), int(field.parts[5][0])
            elements = math.prod(dimensions)
            if len(dimensions) > _MOST_DIMENSIONS or max(elements // 8, place) > len(self.data):
                raise ValueError(f"tensor {field.name} announces {dimensions[:5]} at byte {place}")
            return field

    return Reader


_ID = optional(whole(0, 1 << 24))
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_TOKENIZER = {
    "tokens": array(text()),
    "merges": array(text()),
    "token_type": array(whole(0, 255)),
    **dict.fromkeys(_NAMED.values(), _ID),
}
_REST = {"context_length": optional(whole(1, 2**31 - 1)), "chat_template": optional(text())}


def _check_count(name: str, count: int) -> None:
    if count > _MOST.get(name, count):
        raise ValueError(f"it announces {count} {name}; at most {_MOST[name]} are read")


@dataclasses.dataclass(frozen=True)
class _File:
    """An open GGUF file; its tensors are mapped, not read."""

    path: Path
    reader: GGUFReader

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise DcodError(f"{self.path}: metadata key {key} is no text ({error})") from error


def _open(location: Location) -> _File:
    path = as_path(location)
    if not path.is_file():
        raise DcodError(f"{path}: no such .gguf file; check the path")
    reader = _reader()
    try:
        return _File(path, reader(local_copy(path)))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DcodError(f"{path}: not a whole GGUF file ({error}); download it again") from error


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: per head (pair, half) back to HF's (half, pair)."""
    grouped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def read_gguf(
    file: Location, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """(config, params) of a GGUF file, dequantised, sharded over mesh if one is given.

    Raises DcodError for another architecture or quantisation, for metadata that cannot be honoured
    exactly, and for tensors that are missing or unknown (rope_freqs of Llama 3.1 among them).
    """
    opened = _open(file)
    path = opened.path
    config, tensors = _read_head(opened)
    expected = {slot.name: slot for slot in slots(config, "gguf")}
    longrope = any(kind.rope and kind.rope.switches_at for kind in config.layer_kinds)
    beside = {LONG, SHORT} if longrope else set()
    for name in sorted(expected.keys() ^ (tensors.keys() - beside)):
        state = "missing" if name in expected else "not part of this architecture here"
        raise DcodError(f"{path}: tensor {name} is {state}; use the HF directory of this model")
    interleaved = configs.FAMILIES[config.model_type].gguf_interleaved

    def read(slot: Slot, part: Part) -> np.ndarray:
        tensor, permuted = tensors[slot.name], interleaved and slot.rope_heads
        shape = tuple(map(int, tensor.shape[::-1]))
        if shape != slot.file_shape:
            raise DcodError(
                f"{path}: {slot.name} has shape {shape}, the metadata say {slot.file_shape}"
            )
        if len(shape) > 1 and not permuted:  # of whole rows, which are quantised by themselves
            values = _dequantised(tensor, path, rows=part[0])
            part = (slice(None), *part[1:])
        else:
            values = _dequantised(tensor, path)
        if permuted:
            values = _unpermute(values, slot.rope_heads)
        if slot.name.endswith("norm.weight"):  # such files hold what norms multiply by
            values = values - np.float32(config.norm_offset)
        return values[part]

    shardings = shardings_of(config, mesh)
    return config, assemble(config, "gguf", read, dtype=dtype, shardings=shardings)


def _dequantised(tensor: Any, path: Path, *, rows: slice = slice(None)) -> np.ndarray:
    quants = _package().quants
    try:
        return np.asarray(quants.dequantize(tensor.data[rows], tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise DcodError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which the gguf package "
            f"does not dequantise; use the HF directory of this model, or another quantisation"
        ) from error


def _read_head(file: _File) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, {tensor name: tensor})."""
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    if "token_embd.weight" not in tensors:
        raise DcodError(
            f"{file.path}: tensor token_embd.weight is missing; is it a language model?"
        )
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}

    def factors(name: str) -> list[float]:
        return _dequantised(tensors[name], file.path).tolist()

    raw = raw_config(file.get, shapes, factors, path=file.path)
    return configs.from_hf(raw, source=str(file.path)), tensors


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
    values = {key: get(f"tokenizer.ggml.{key}") for key in _TOKENIZER}
    check(values, _TOKENIZER, source=f"{path}: tokenizer.ggml")
    tokens, types = values["tokens"], values["token_type"]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise DcodError(
            f"{path}: tokenizer.ggml has {len(tokens)} tokens, {len(set(tokens))} of them "
            f"different, and {len(types)} token types; download it again"
        )
    tokenizer = _bpe(path, tokens, values["merges"], pre)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    ids = {name: values[key] for name, key in _NAMED.items() if values[key] is not None}
    if wrong := [name for name, index in ids.items() if index >= len(tokens)]:
        raise DcodError(f"{path}: {wrong[0]} has the id {ids[wrong[0]]}, of {len(tokens)} tokens")
    length, template = get(f"{get('general.architecture')}.context_length"), "chat_template"
    rest = {"context_length": length, template: get(f"tokenizer.{template}")}
    check(rest, _REST, source=path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
        **{name: tokens[index] for name, index in ids.items()},
    )
    fast.chat_template = rest[template]
    with Mirror(as_path(directory)) as local:
        fast.save_pretrained(local)
    return fast


def _bpe(path: Path, tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise DcodError(f"{path}: the merge {merge[:80]!r} is not of two tokens that make one")
        pairs.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer, normalizer = PRE_TOKENIZERS[pre]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
