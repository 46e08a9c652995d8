"""Small files that announce large things: refused before memory is taken or time is spent."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc

import pytest
from gguf_writer import write_gguf
from tiny import write_tokenizer

from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.models import gguf, gguf_tokenizer

U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10


def header(*, tensors=0, fields=0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def array(kind: int, count: int) -> bytes:
    return key("a") + struct.pack("<IIQ", ARRAY, kind, count)


def tensor(shape, *, kind=0, offset=0, dimensions=None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<I{len(shape)}Q", count, *shape)
    return key("token_embd.weight") + sizes + struct.pack("<IQ", kind, offset) + bytes(64)


NESTED = (
    header(fields=1) + key("a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000
)
HOSTILE = {
    "49 bytes, 2^40 of u8": header(fields=1) + array(U8, 1 << 40),
    "2^40 strings": header(fields=1) + array(STRING, 1 << 40) + bytes(1 << 12),
    "2^61 of u64": header(fields=1) + array(U64, 1 << 61) + bytes(1 << 12),
    "3e6 empty strings": header(fields=1) + array(STRING, 3_000_000) + bytes(24_000_000),
    "nested arrays": NESTED,
    "2^60 tensors": header(tensors=1 << 60) + bytes(1 << 12),
    "2^60 fields": header(fields=1 << 60) + bytes(1 << 12),
    "2^64-1 fields": header(fields=(1 << 64) - 1),
    "a string of 2^63": header(fields=1) + struct.pack("<Q", 1 << 63),
    "2^32-1 dimensions": header(tensors=1) + tensor((1,), dimensions=(1 << 32) - 1),
    "dimensions that overflow": header(tensors=1) + tensor((1 << 32, 1 << 32, 1 << 32, 2)),
    "a large tensor": header(tensors=1) + tensor((1 << 20, 1 << 20)),
    "five dimensions": header(tensors=1) + tensor((1, 1, 1, 1, 1)),
    "an offset that overflows": header(tensors=1) + tensor((4,), offset=(1 << 64) - 32),
    "an unknown type": header(tensors=1) + tensor((4,), kind=1000),
    "a key that is no text": header(fields=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(32),
    "the same key twice": header(fields=2) + 2 * (key("a") + struct.pack("<II", U32, 1)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_gguf_header_is_checked_against_the_file(name, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(HOSTILE[name])
    gguf._package()
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(DcodError, match="not a whole GGUF file") as caught:
            gguf.read_gguf(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert peak < 64 << 20
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_metadata_of_a_wrong_kind_is_named(pair, tmp_path):
    good = write_gguf(tmp_path / "good.gguf", pair).read_bytes()
    file = tmp_path / "model.gguf"
    for name in (
        "general.architecture",
        "llama.attention.head_count",
        "llama.embedding_length",
        "llama.block_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.chat_template",
    ):
        # The key's value is taken for four bytes of another type, and what follows for garbage.
        place = good.index(key(name)) + len(key(name))
        # Another type and value; what follows is read as garbage where it is shorter than the own.
        for change in (struct.pack("<II", U32, 1 << 30), struct.pack("<II", STRING, 0)):
            file.write_bytes(good[:place] + change + good[place + len(change) :])
            with pytest.raises(DcodError):
                (
                    gguf_tokenizer.export_tokenizer(file, tmp_path / "tokenizer"),
                    gguf.read_config(file),
                )
    small = good.replace(
        key("llama.block_count") + struct.pack("<II", U32, 2),
        key("llama.block_count") + struct.pack("<II", U32, 10**9),
    )
    file.write_bytes(small)
    with pytest.raises(DcodError, match="num_hidden_layers=1000000000"):
        gguf.read_config(file)
    file.write_bytes(
        good.replace(
            key("tokenizer.ggml.eos_token_id") + struct.pack("<II", U32, 2),
            key("tokenizer.ggml.eos_token_id") + struct.pack("<II", U32, 10**6),
        )
    )
    with pytest.raises(DcodError, match="eos_token has the id 1000000"):
        gguf_tokenizer.export_tokenizer(file, tmp_path / "tokenizer")


# File -> changes of it that nobody means: (key path, value).
TOKENIZER = [
    ("tokenizer.json", "model vocab x", 4_000_000_000),
    ("tokenizer.json", "model vocab x", -1),
    ("tokenizer.json", "model vocab x", 1.5),
    ("tokenizer.json", "model vocab", [["a", 0.0, 3]]),
    ("tokenizer.json", "model vocab", "x"),
    ("tokenizer.json", "model", None),
    ("tokenizer.json", "model", []),
    ("tokenizer.json", "model type", "Nonsense"),
    ("tokenizer.json", "model merges", [["a"]]),
    ("tokenizer.json", "added_tokens 0 id", 4_000_000_000),
    ("tokenizer.json", "added_tokens 0 id", "0"),
    ("tokenizer.json", "added_tokens 0 content", 3),
    ("tokenizer.json", "added_tokens", {}),
    ("tokenizer.json", "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}}),
    ("tokenizer.json", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("tokenizer.json", "decoder", {"type": "Nonsense"}),
    ("tokenizer_config.json", "added_tokens_decoder", {"4000000000": {"content": "x"}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"one": {"content": "x"}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"1": 3}),
    ("tokenizer_config.json", "added_tokens_decoder", []),
    ("tokenizer_config.json", "chat_template", 3),
    ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
    ("tokenizer_config.json", "eos_token", 3),
    ("tokenizer_config.json", "eos_token", {"content": 3}),
    ("tokenizer_config.json", "tokenizer_class", []),
    ("special_tokens_map.json", "eos_token", [1]),
]


def test_a_tokenizer_is_checked_before_the_library_reads_it(tmp_path):
    home = write_tokenizer(tmp_path)
    (home / "special_tokens_map.json").write_text("{}")
    load_tokenizer(home)
    for name, place, value in TOKENIZER:
        file = home / name
        whole = file.read_bytes()
        content = inner = json.loads(whole)
        *parents, last = place.split()
        for parent in parents:
            inner = inner[int(parent) if isinstance(inner, list) else parent]
        inner[last] = value
        file.write_text(json.dumps(content))
        with pytest.raises(DcodError, match=str(home)) as caught:
            load_tokenizer(home)
        assert len(str(caught.value)) < 600, (name, place)
        file.write_bytes(whole)
    with (home / "tokenizer.json").open("wb") as file:
        file.truncate((1 << 26) + 1)
    with pytest.raises(DcodError, match="has 67108865 bytes, more than the 67108864"):
        load_tokenizer(home)
    for junk in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"3", b"null"):
        (home / "tokenizer.json").write_bytes(junk)
        with pytest.raises(DcodError, match=str(home)):
            load_tokenizer(home)
