"""Exact duplicates, and traces that share text with an evaluation set.

Text is compared as lower-case alphanumeric words (Unicode NFKC), so that spacing, punctuation and
typesetting do not hide a copy. A trace overlaps when n consecutive words of one of its messages are
in an evaluation prompt: a completion that restates a benchmark question leaks it as well. An
evaluation prompt shorter than n words is compared as a whole with whole prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from dcod_jax.data.presets import PROMPT_FIELDS
from dcod_jax.data.records import RawTrace
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.problems import read_records
from dcod_jax.files import as_path

MOST = 10_000_000  # n-grams of the evaluation sets
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """ "It's $5.0$!" -> ["it", "s", "5", "0"]."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def prompt_key(trace: RawTrace) -> bytes:
    """Equal for prompts that differ in white space and Unicode form only."""
    return _key(trace.prompt_text())


def trace_key(trace: RawTrace) -> bytes:
    """Equal for traces whose messages, tools and tool calls differ in white space and form only."""
    parts = [text for m in trace.messages for text in (m["role"], m["content"])]
    parts.append(",".join(map(str, trace.supervised())))
    beside = [trace.tools, *(message.get("tool_calls") for message in trace.messages)]
    return _key(*parts, json.dumps(beside, sort_keys=True, default=str) if any(beside) else "")


def _key(*texts: str) -> bytes:
    plain = [" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts]
    joined = "\0".join(plain).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class OverlapIndex:
    """N-grams and short prompts of the evaluation sets, each with its place."""

    size: int
    ngrams: dict[str, str]
    prompts: dict[str, str]

    def find(self, trace: RawTrace) -> str | None:
        """'"shared words" in file:line' of the first overlap, else None."""
        for message in trace.messages if self.ngrams or self.prompts else ():
            if message["role"] == "system":
                continue
            text = words(message["content"])
            if message["role"] != "assistant" and (where := self.prompts.get(" ".join(text))):
                return f"the whole prompt is in {where}"
            for gram in _grams(text, self.size):
                if gram in self.ngrams:
                    return f'"{gram}" is in {self.ngrams[gram]}'
        return None


def _grams(text: Sequence[str], size: int) -> Iterable[str]:
    return (" ".join(text[i : i + size]) for i in range(len(text) - size + 1))


def build_index(files: Sequence[str], *, size: int, prompt_field: str = "") -> OverlapIndex:
    """Index the prompts of JSONL evaluation sets.

    The prompt is `prompt_field` or one of the usual names, or the user messages of `messages`.
    """
    index = OverlapIndex(size, {}, {})
    names = [name for name in (prompt_field, *PROMPT_FIELDS, "messages") if name]
    for where, record in itertools.chain.from_iterable(read_records(as_path(f)) for f in files):
        for prompt in _prompts(record, where, names):
            text = words(prompt)
            if 0 < len(text) < size:
                index.prompts.setdefault(" ".join(text), where)
            for gram in _grams(text, size):
                index.ngrams.setdefault(gram, where)
                if len(index.ngrams) > MOST:
                    raise DcodError(
                        f"{where}: more than {MOST:,} different runs of {size} words, which are "
                        "all held; name fewer prepare.overlap_files, or take columns out"
                    )
    return index


def _prompts(record: dict[str, Any], where: str, names: Sequence[str]) -> list[str]:
    name = next((name for name in names if name in record), None)
    if name is None:
        have = ", ".join(record)
        raise DcodError(f"{where}: no prompt; expected one of {', '.join(names)}, found {have}")
    value: Any = record[name]
    if isinstance(value, list):
        value = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DcodError(f"{where}: {name} must be a string or messages with text")
    return texts
