"""Tokenizers: loading, the identity that manifests record, and the tokens that end a completion."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.hub import cached_file

from dcod_jax.bounds import Bound, array, check, either, flag, mapping, optional, text, whole
from dcod_jax.copies import local_directory
from dcod_jax.data.templates import OWN, TemplateChoice, template_of, with_choice
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    NO_HUB_ID,
    Location,
    Path,
    as_path,
    file_size,
    near,
    read_json,
    scratch,
    why_no_hub_id,
)

Tokenizer: TypeAlias = PreTrainedTokenizerFast
# In tokenizer_config.json of an export: the eos token that its tokenizer was made with.
MADE_WITH_EOS = "eos_before_export"


class _Sized(PreTrainedTokenizerFast):
    """The library's tokenizer with the highest id + 1 as its length: its ids may have holes.

    That is how many rows of a model's vocabulary can be tokens; the rows above are padding.
    """

    def __len__(self) -> int:
        backend = self.backend_tokenizer
        count = backend.get_vocab_size(with_added_tokens=True)
        if count == self.__dict__.get("_counted", (None,))[0]:
            return self.__dict__["_counted"][1]
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.__dict__["_counted"] = count, size
        return size


_Sized.__name__ = PreTrainedTokenizerFast.__name__  # which save_pretrained writes


def load_tokenizer(path: Location, *, template: TemplateChoice = OWN) -> Tokenizer:
    """The tokenizer of an HF directory, a .gguf file or a hub id, exactly as the file defines it.

    `template` may replace the tokenizer's own chat template and set its variables.
    """
    source = as_path(path)
    if source.suffix == ".gguf":
        from dcod_jax.models.gguf_tokenizer import export_tokenizer

        with scratch() as directory:
            export_tokenizer(source, directory)
            return load_tokenizer(directory, template=template)
    if source.is_dir() and not (source / "tokenizer.json").is_file():
        found = ", ".join(sorted(p.name for p in source.iterdir())[:12]) or "nothing"
        raise DcodError(
            f"{source} has no tokenizer.json (it holds {found}); set student.tokenizer, or "
            "convert with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if not source.exists() and why_no_hub_id(str(path)) == NO_HUB_ID:  # offline: the hub's cache
        raise DcodError(
            f"no tokenizer at {path!s}: there is no such directory, and {NO_HUB_ID}; expected a "
            f"directory with tokenizer.json, or a hub id that can be reached{near(source)}"
        )
    try:
        with library_errors():
            home = local_directory(source, wanted=_is_tokenizer_file)
            added = _check_files(home if home.is_dir() else downloaded(home))
            # The generic class: family classes rebuild the pre-tokenizer instead of reading it.
            tokenizer = _Sized.from_pretrained(str(home))
    except _Unreadable as error:
        raise DcodError(
            f"no tokenizer at {path!s}: expected a directory with tokenizer.json, or a hub id "
            f"that can be reached ({str(error).splitlines()[0]})"
        ) from error
    for token, index in added.items():
        if (read := tokenizer.convert_tokens_to_ids(token)) != index:
            raise DcodError(
                f"{path!s}: added_tokens gives {token!r} the id {index}, and the tokenizers "
                f"package reads it as {read}, the next free one; give the ids between to tokens"
            )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if template.given:
        own = None if template.file else chat_template(tokenizer)
        tokenizer.chat_template = with_choice(own, template)
    return tokenizer


# Errors of a library that reads a damaged file; the tokenizers package raises the bare Exception.
_Unreadable = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
    RecursionError,
)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """An error of the tokenizers package, a panic of its Rust code included, as ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ValueError(str(error) or "the tokenizers package failed") from error
        raise


def downloaded(name: Path) -> Path:
    """The local directory with tokenizer.json of a hub id."""
    return as_path(str(cached_file(str(name), "tokenizer.json"))).parent


# What is checked before the library allocates for it. A vocabulary of today has 3e5 ids.
_LONGEST = 1 << 26  # bytes of a file; Gemma 3's tokenizer.json has 33 MB
_ID = whole(0, (1 << 24) - 1)
_ADDED = {"content": text(), "special": optional(flag())}
_NAME = optional(either(text(), mapping({"content": text()})))
_BOUNDS: dict[str, dict[str, Bound]] = {
    "tokenizer.json": {
        "model": mapping(
            {
                "vocab": either(mapping(items=_ID), array(array(fewest=2, most=2))),
                "merges": optional(array(either(text(), array(text(), fewest=2, most=2)))),
            }
        ),
        "added_tokens": optional(array(mapping({"id": _ID, **_ADDED}))),
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": optional(mapping(items=mapping(_ADDED))),
        "chat_template": optional(either(text(), array(mapping({"template": text()})))),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _NAME),
        "tokenizer_class": optional(text()),
    },
    "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token", "pad_token"), _NAME),
    "added_tokens.json": {},
}


def _check_files(home: Path) -> dict[str, int]:
    """The added tokens of tokenizer.json; refuses files that would exhaust the machine."""
    found: dict[str, int] = {}
    for file in filter(lambda file: _is_tokenizer_file(file.name), home.iterdir()):
        if file.is_file() and (size := file_size(file)) > _LONGEST:
            raise DcodError(f"{file}: has {size} bytes, more than the {_LONGEST} of a tokenizer")
    for name, bounds in _BOUNDS.items():
        file = home / name
        if not file.is_file():
            continue
        values = read_json(file)
        check(values, bounds, source=file)
        if name == "tokenizer.json":
            found = {token["content"]: token["id"] for token in values.get("added_tokens") or ()}
        for added in values.get("added_tokens_decoder") or ():
            check({added: int(added) if added.isdecimal() else added}, {added: _ID}, source=file)
    return found


def _is_tokenizer_file(name: str) -> bool:
    """What from_pretrained may read; not the weights."""
    return name.endswith((".json", ".txt", ".model", ".jinja")) and ".safetensors" not in name


def student_tokenizer(student: Any) -> Tokenizer:
    """The tokenizer of config.student: its own key, else the one beside the weights or config."""
    home = student.tokenizer or student.path or student.config
    if not home:
        raise DcodError(
            "no tokenizer: set student.path, student.config or student.tokenizer; traces are "
            "tokenised for the student"
        )
    path = as_path(home)
    path = path.parent if path.name == "config.json" else path
    return load_tokenizer(path, template=template_of(student))


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The exact text of token ids, special tokens included."""
    return tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False)


# The printable characters of byte-level BPE (GPT-2) and the bytes they stand for.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
# Decoders whose tokens are bytes or texts by themselves; SentencePiece's are the first four.
_DECODERS = {"Replace", "ByteFallback", "Strip", "Metaspace", "Fuse", "ByteLevel"}


def steps_of(tokenizer: Tokenizer, part: str) -> list[dict[str, Any]]:
    """The steps of the tokenizer's normalizer, pre_tokenizer or decoder."""
    own: Any = getattr(tokenizer.backend_tokenizer, part)
    step = {} if own is None else json.loads(own.__getstate__())
    waiting, found = [step] if step else [], []
    while waiting:
        step = waiting.pop(0)
        inner = step.get(f"{part.replace('_', '')}s")  # of a Sequence
        waiting, found = [*(inner or ()), *waiting], [*found, *([] if inner else [step])]
    return found


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether each token of the vocabulary is a string of bytes (Qwen, Llama 3, SmolLM2)."""
    return any(step["type"] == "ByteLevel" for step in steps_of(tokenizer, "decoder"))


def adds_space(tokenizer: Tokenizer) -> bool:
    """Whether a first word may get a space before it, as SentencePiece's and some byte-level do."""
    before = (step.get("add_prefix_space") for step in steps_of(tokenizer, "pre_tokenizer"))
    return not is_byte_level(tokenizer) or any(before)


@functools.lru_cache(maxsize=4)
def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens beside the vocabulary, special or not."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}


def token_bytes(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[bytes]:
    """What each token writes; the first word of SentencePiece's begins with a space.

    Raises DcodError where a token does not tell it by itself (WordPiece).
    """
    spelled = _spelled(tokenizer)
    return [spelled[token] for token in token_ids]


@functools.lru_cache(maxsize=4)
def _spelled(tokenizer: Tokenizer) -> list[bytes]:
    """token_bytes of the whole vocabulary."""
    steps = steps_of(tokenizer, "decoder")
    kinds = [str(step["type"]) for step in steps]
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        pattern = step.get("pattern", {})
        if step["type"] == "Replace" and step["content"] == " " and "String" in pattern:
            spaces.append(pattern["String"])
    if not kinds or set(kinds) - _DECODERS or kinds.count("Replace") > len(spaces):
        raise DcodError(
            f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) does not tell which bytes a "
            f"token stands for; known are byte-level BPE and SentencePiece ({', '.join(_DECODERS)})"
        )

    def spell(token: str) -> bytes:
        if "ByteLevel" in kinds and set(token) <= _BYTES.keys():
            return bytes(_BYTES[character] for character in token)
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    added = added_tokens(tokenizer)
    names: list[str | None] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))  # pyright: ignore
    return [added[i].encode() if i in added else spell(name or "") for i, name in enumerate(names)]


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja text in use, or None: the plain form prompt + completion + eos."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise DcodError(
                f"the tokenizer has the chat templates {', '.join(sorted(template))} and no "
                "'default'; write the one you mean to a file and set student.chat_template"
            )
        template = template["default"]
    return template or None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Content hash of all that decides which ids a text gets: equal tokenizers, equal hash.

    It covers vocabulary, merges, normalizer, pre-tokenizer, added tokens, bos and eos; not the
    directory, padding and truncation, the pad token, or the rows of a model's embedding.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(backend["model"])
    if model.get("merges"):
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    return _digest(
        {
            "model": model,
            "normalizer": backend["normalizer"],
            "pre_tokenizer": backend["pre_tokenizer"],
            "added_tokens": sorted(backend["added_tokens"], key=lambda token: token["id"]),
            "bos": tokenizer.bos_token,
            "eos": _made_with_eos(tokenizer),
        }
    )


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Content hash of the chat template and of the special tokens it can name."""
    return _digest([chat_template(tokenizer), tokenizer.bos_token, _made_with_eos(tokenizer)])


def _made_with_eos(tokenizer: Tokenizer) -> str | None:
    """The eos token before an export put the template's end-of-turn token in its place."""
    return tokenizer.init_kwargs.get(MADE_WITH_EOS, tokenizer.eos_token)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
