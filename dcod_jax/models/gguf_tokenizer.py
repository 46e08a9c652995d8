"""The tokenizer and chat template of a GGUF file in HF form, as llama.cpp reads them.

Byte-level BPE has its merges in the file. SentencePiece has scores; the merges follow from them.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dcod_jax.bounds import array, check, flag, number, optional, text, whole
from dcod_jax.copies import Mirror
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, as_path
from dcod_jax.models.gguf import GgufFile, open_gguf

_SPLIT = (  # of Qwen2 and, with up to three digits at once, Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> Any:
    split = pre_tokenizers.Split(Regex(_SPLIT.replace("DIGITS", digits)), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, level])


_DIGITS = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
]


@dataclasses.dataclass(frozen=True)
class ByteLevel:
    """What the HF tokenizer of a byte-level vocabulary has beside tokens and merges."""

    pre_tokenizer: Any
    normalizer: Any = None
    ignore_merges: bool = False  # a word that is a token needs no merges to it
    begins: bool = False  # with bos, where the file does not say


# By tokenizer.ggml.pre.
BYTE_LEVEL = {
    "smollm": ByteLevel(pre_tokenizers.Sequence(_DIGITS)),
    "qwen2": ByteLevel(_split(""), normalizers.NFC()),
    "llama-bpe": ByteLevel(_split("{1,3}"), ignore_merges=True, begins=True),
}

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types of the format
_SPACE = "▁"
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # its special tokens that keep the space behind
_ID = optional(whole(0, 1 << 24))
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_BOUNDS = {
    "tokens": array(text(1 << 10)),  # each is cut at every place
    "token_type": array(whole(0, 255)),
    **dict.fromkeys(_NAMED.values(), _ID),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), optional(flag())),
}
_OWN = {
    "gpt2": {"merges": array(text())},
    "llama": {"scores": array(number(-4e38, 4e38))},
}
_REST = {"context_length": optional(whole(1, 2**31 - 1)), "chat_template": optional(text())}
_INSTEAD = "use the HF tokenizer of this model"


def export_tokenizer(file: Location, directory: Location) -> PreTrainedTokenizerFast:
    """Write the file's tokenizer and chat template in HF form into directory.

    Raises DcodError for a tokenizer that is not known here exactly: another one would give other
    ids without any sign of it.
    """
    opened = open_gguf(file)
    path, get = opened.path, opened.get
    values = _values(opened)
    tokens, types = values["tokens"], values["token_type"]
    ids = {name: values[key] for name, key in _NAMED.items() if values[key] is not None}
    if wrong := [name for name, index in ids.items() if index >= len(tokens)]:
        raise DcodError(f"{path}: {wrong[0]} has the id {ids[wrong[0]]}, of {len(tokens)} tokens")
    names = {name: tokens[index] for name, index in ids.items()}
    pieces = values["model"] == "llama"
    tokenizer = (_sentencepiece if pieces else _byte_level)(path, values, names.get("unk_token"))
    strips = _strips(opened) if pieces else False
    unknown = ids.get("unk_token") if pieces else None
    added = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind == _CONTROL or index == unknown
        if special or kind == _USER_DEFINED:
            strip = strips and token not in _PHI3_KEEPS
            added.append(AddedToken(token, normalized=False, special=special, rstrip=strip))
    tokenizer.add_tokens(added)
    _add_ends(path, tokenizer, values, names)
    length, template = get(f"{get('general.architecture')}.context_length"), "chat_template"
    rest = {"context_length": length, template: get(f"tokenizer.{template}")}
    check(rest, _REST, source=path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
        **names,
    )
    fast.chat_template = rest[template]
    with Mirror(as_path(directory)) as local:
        fast.save_pretrained(local)
    return fast


def _values(file: GgufFile) -> dict[str, Any]:
    """The checked metadata of the tokenizer, by their names below tokenizer.ggml."""
    model, pre = (file.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "llama" and (model != "gpt2" or pre not in list(BYTE_LEVEL)):
        raise DcodError(
            f"{file.path}: tokenizer.ggml.model={model!r} with tokenizer.ggml.pre={pre!r} is not "
            f"supported (supported: llama, and gpt2 with {', '.join(sorted(BYTE_LEVEL))}); "
            f"{_INSTEAD}"
        )
    bounds = _BOUNDS | _OWN[model]
    values = {key: file.get(f"tokenizer.ggml.{key}") for key in (*bounds, "precompiled_charsmap")}
    check(values, bounds, source=f"{file.path}: tokenizer.ggml")
    if values["precompiled_charsmap"] is not None:
        raise DcodError(
            f"{file.path}: tokenizer.ggml.precompiled_charsmap, a normalisation, is not supported; "
            f"{_INSTEAD}"
        )
    sizes = {key: len(values[key]) for key in ("tokens", "token_type", *_OWN[model])}
    sizes.pop("merges", None)
    different = len(set(values["tokens"]))
    if {different, *sizes.values()} != {len(values["tokens"])}:
        raise DcodError(
            f"{file.path}: tokenizer.ggml has {sizes} entries, {different} of the tokens "
            f"different; download it again"
        )
    return {**values, "model": model, "pre": pre}


def _strips(file: GgufFile) -> bool:
    """Whether special tokens take the space behind them, which Phi-3's do.

    llama.cpp knows Phi-3 by the model's name; a phi3 file of another name does not tell.
    """
    name = str(file.get("general.name") or "").lower()
    if re.search(r"phi[-_ ]?3", name):
        return True
    if file.get("general.architecture") == "phi3":
        raise DcodError(
            f"{file.path}: general.name={name[:80]!r} does not say Phi-3, so that the file does "
            f"not tell whether its special tokens take the space behind them; {_INSTEAD}"
        )
    return False


def _add_ends(path: object, tokenizer: Tokenizer, values: dict[str, Any], names: Any) -> None:
    """The tokens that are put around a text; where the file says nothing, as llama.cpp does."""
    begins = values["add_bos_token"]
    if begins is None:
        begins = values["model"] == "llama" or BYTE_LEVEL[values["pre"]].begins
    ends = []
    for name, wanted in (("bos_token", begins), ("eos_token", values["add_eos_token"])):
        if wanted and name not in names:
            raise DcodError(f"{path}: tokenizer.ggml.add_{name}=true without {name}_id; {_INSTEAD}")
        ends.append([names[name]] if wanted else [])
    if not any(ends):
        return
    before, behind = ends
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{one}:1" for one in before), "$B:1"]
        + [f"{one}:1" for one in behind],
        special_tokens=[(one, tokenizer.token_to_id(one)) for one in {*before, *behind}],
    )


def _byte_level(path: object, values: dict[str, Any], unknown: str | None) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(values["tokens"])}
    pairs, own = [], BYTE_LEVEL[values["pre"]]
    for merge in values["merges"]:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise DcodError(f"{path}: the merge {merge[:80]!r} is not of two tokens that make one")
        pairs.append((left, right))
    more = {"ignore_merges": own.ignore_merges, "fuse_unk": False}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, **more))
    tokenizer.pre_tokenizer = own.pre_tokenizer
    if own.normalizer is not None:
        tokenizer.normalizer = own.normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: object, values: dict[str, Any], unknown: str | None) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(values["tokens"])}
    lacking = [
        byte
        for byte in range(256)
        if f"<0x{byte:02X}>" not in vocabulary and not (byte < 128 and chr(byte) in vocabulary)
    ]
    if lacking:
        raise DcodError(
            f"{path}: {len(lacking)} of 256 bytes have no token, first <0x{lacking[0]:02X}>, so "
            f"that not every text can be encoded; {_INSTEAD}"
        )
    pairs = _merges(path, values)
    model = BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, fuse_unk=True)
    if unknown is not None:
        model.unk_token = unknown
    tokenizer = Tokenizer(model)
    prefix = values["add_space_prefix"] is not False
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    behind = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *behind]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(path: object, values: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, in the order in which SentencePiece joins them.

    It joins the pair of the highest score, of equal ones the first in the text. Scores are equal
    in Llama 2 among runs of a space only, where this makes the longest run first.
    """
    rows = zip(values["tokens"], values["token_type"], values["scores"], strict=True)
    normal = {token: score for token, kind, score in rows if kind == _NORMAL}
    parts = normal.keys() | {token for token in values["tokens"] if len(token) == 1}
    found = []
    of_score: dict[float, list[str]] = collections.defaultdict(list)
    for token, score in normal.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in parts and right in parts]
        found += [(-score, -len(left), -len(right), left, right) for left, right in cuts]
        if cuts:
            of_score[score].append(token)
    for score, tokens in of_score.items():
        if len(tokens) > 1 and any(set(token) != set(tokens[0][0]) for token in tokens):
            raise DcodError(
                f"{path}: {len(tokens)} tokens have the score {score:g}, first {tokens[0]!r} and "
                f"{tokens[1]!r}, so that the order of their merges is not known; {_INSTEAD}"
            )
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]
