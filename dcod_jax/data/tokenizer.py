"""Tokenizers: loading, the identity that manifests record, and the tokens that end a completion."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerFast

from dcod_jax.copies import local_directory
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, as_path
from dcod_jax.models.config import ModelConfig

Tokenizer: TypeAlias = PreTrainedTokenizerFast


def load_tokenizer(path: Location, *, chat_template: str = "") -> Tokenizer:
    """The tokenizer of an HF directory, a .gguf file or a hub id, exactly as the file defines it.

    `chat_template` names a Jinja file that replaces the tokenizer's own template.
    """
    source = as_path(path)
    if source.suffix == ".gguf":
        from dcod_jax.models.gguf import export_tokenizer

        with tempfile.TemporaryDirectory() as directory:
            export_tokenizer(source, directory)
            return load_tokenizer(directory, chat_template=chat_template)
    if source.is_dir() and not (source / "tokenizer.json").is_file():
        found = ", ".join(sorted(p.name for p in source.iterdir())[:12]) or "nothing"
        raise DcodError(
            f"{source} has no tokenizer.json (it holds {found}); set student.tokenizer, or "
            "convert with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        # The generic class: family classes rebuild the pre-tokenizer instead of reading it.
        home = local_directory(source, wanted=_is_tokenizer_file)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(home))
    except (OSError, ValueError, RecursionError) as error:
        raise DcodError(
            f"no tokenizer at {path!s}: expected a directory with tokenizer.json, or a hub id "
            f"that can be reached ({str(error).splitlines()[0]})"
        ) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if chat_template:
        try:
            tokenizer.chat_template = as_path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DcodError(f"student.chat_template={chat_template}: {error}") from error
    return tokenizer


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
    return load_tokenizer(path, chat_template=student.chat_template)


def stop_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a completion: those of the model's config and the tokenizer's eos."""
    found = set(config.eos_token_ids)
    eos: Any = tokenizer.eos_token_id
    if eos is not None:
        found.add(int(eos))
    if not found:
        raise DcodError(
            "neither the model's config.json (eos_token_id) nor its tokenizer (eos_token) names a "
            "stop token; add one, or every completion would run to the length limit"
        )
    return tuple(sorted(found))


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The exact text of token ids, special tokens included."""
    return tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False)


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
            "eos": tokenizer.eos_token,
        }
    )


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Content hash of the chat template and of the special tokens it can name."""
    return _digest([chat_template(tokenizer), tokenizer.bos_token, tokenizer.eos_token])


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
