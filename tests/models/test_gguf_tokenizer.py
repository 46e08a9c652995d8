"""Tokenizers of GGUF files: against transformers, SentencePiece's own rule, and llama.cpp."""

from __future__ import annotations

import itertools
import random

import pytest
from gguf_writer import TOKENS, write_pieces, write_vocabulary
from transformers import AutoTokenizer

from dcod_jax.data.tokenizer import load_tokenizer, token_bytes
from dcod_jax.errors import DcodError
from dcod_jax.models import gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
RUNS = [("▁" * n, -1e9, NORMAL) for n in (2, 4, 3, 8)]
LETTERS = "▁etaonhs12.é"
JOINED = (
    "th he the ▁t ▁the an ▁a nt ant on ▁on es est ▁s 12 hes ▁th ses eé tt ▁the▁t ▁h oon".split()
)
PIECES = [
    *(*SPECIAL, *BYTES, *RUNS),
    *((token, -float(i), NORMAL) for i, token in enumerate([*JOINED, *LETTERS])),
    *((token, -90.0 - i, NORMAL) for i, token in enumerate("<0 x0 A> x0A> < 0 x A >".split())),
    ("nu", 0.0, UNUSED),
    *(("\n\n", -1000.0, USER), ("   ", -1000.0, USER), ("<|end|>", -1000.0, CONTROL)),
]


def spm(pieces, text, *, prefix):
    """SentencePiece's BPE: join the pair of the highest score, the first in the text of equals."""
    scores = {token: score for token, score, kind in pieces if kind == NORMAL}
    ids = {token: i for i, (token, *_) in enumerate(pieces)}
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = itertools.pairwise(parts)
        joined = [(-scores.get(a + b, -1e99), i) for i, (a, b) in enumerate(pairs)]
        if not joined or min(joined)[0] == 1e99:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        index
        for part in parts
        for index in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_as_sentencepiece_joins_them(prefix, tmp_path):
    flags = {"add_space_prefix": prefix}
    tokenizer = load_tokenizer(write_pieces(tmp_path / "m.gguf", PIECES, flags=flags))
    of, letters = (
        random.Random(0),
        [*LETTERS.replace("▁", " "), "the", "  ", "\n", "中", "🙂", "\0"],
    )
    for _ in range(300):
        text = "".join(of.choices(letters, k=of.randint(0, 24)))
        if "\n\n" in text or "   " in text:
            continue
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == spm(PIECES, text, prefix=prefix), repr(text)
        assert tokenizer.backend_tokenizer.decode(ids) == text
        assert b"".join(token_bytes(tokenizer, ids)).decode() == " " * bool(prefix and text) + text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[0] == "<s>"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a\n\nt", ["▁a", "\n\n", "▁t"]),  # a token that the text always holds whole
        ("a    t", ["▁a", "   ", "▁", "▁t"]),
        ("a<|end|>  t", ["▁a", "<|end|>", "▁▁", "▁t"]),
        ("a<s><unk></s>", ["▁a", "<s>", "<unk>", "</s>"]),
        ("<0x0A>", ["▁", "<0", "x0A>"]),  # the text, not the byte
        ("nu", ["▁", "n", "<0x75>"]),  # never made of others
    ],
)
def test_tokens_that_are_no_normal_pieces(text, tokens, tmp_path):
    tokenizer = load_tokenizer(write_pieces(tmp_path / "m.gguf", PIECES))
    assert tokenizer.tokenize(text) == tokens


def test_special_tokens_of_phi3_take_the_space_behind(tmp_path):
    texts = {"general.name": "Phi 3 Mini", "tokenizer.chat_template": "{{ bos_token }}!"}
    file = write_pieces(tmp_path / "m.gguf", PIECES, architecture="phi3", texts=texts)
    tokenizer = load_tokenizer(file)
    ids = tokenizer("<s> a<|end|>\n t", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁", "▁a", "<|end|>", "▁t"]
    assert tokenizer.chat_template == "{{ bos_token }}!"


def _without(*dropped):
    return [piece for piece in PIECES if piece[0] not in dropped]


@pytest.mark.parametrize(
    ("pieces", "options", "named"),
    [
        (PIECES, {"architecture": "phi3"}, "does not say Phi-3"),
        (PIECES, {"kind": "t5"}, r"tokenizer\.ggml\.model='t5'"),
        (PIECES, {"texts": {"tokenizer.ggml.precompiled_charsmap": "x"}}, "precompiled_charsmap"),
        ([*PIECES, ("sa", -3.0, NORMAL)], {}, "2 tokens have the score -3, first '▁t' and 'sa'"),
        (_without("<0x0A>", "<0x0D>"), {}, "2 of 256 bytes have no token, first <0x0A>"),
        (_without("<s>"), {}, "add_bos_token=true without bos_token_id"),
        (_without("</s>"), {"flags": {"add_eos_token": True}}, "without eos_token_id"),
        ([*PIECES, PIECES[-1]], {}, f"{len(PIECES)} of the tokens different"),
        ([*PIECES, ("a" * 1_025, -9.0, NORMAL)], {}, "a text of at most 1024 characters"),
    ],
)
def test_pieces_that_are_refused(pieces, options, named, tmp_path):
    file = write_pieces(tmp_path / "m.gguf", pieces, **options)
    with pytest.raises(DcodError, match=named):
        gguf_tokenizer.export_tokenizer(file, tmp_path / "out")


def test_byte_level_tokenizer(tmp_path):
    gguf_tokenizer.export_tokenizer(write_vocabulary(tmp_path / "m.gguf"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # digits stay apart although the merge "1 2" exists; words merge
    ids = tokenizer("the 12<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "the 12<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("smollm", {}, [4, 5]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1, 4, 5, 2]),
        ("llama-bpe", {}, [1, 7]),
        ("llama-bpe", {"add_bos_token": False}, [7]),
    ],
)
def test_what_is_put_around_a_text(pre, flags, expected, tmp_path):
    file = write_vocabulary(tmp_path / "m.gguf", pre, flags=flags)
    names = {4: "1", 5: "2", 7: "12"}
    ids = load_tokenizer(file)("12")["input_ids"]
    assert ids == [TOKENS.index(names[i]) if i in names else i for i in expected]


def test_qwen2_pre_tokenizer_is_that_of_transformers():
    from transformers import Qwen2Tokenizer

    theirs = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[])
    own = gguf_tokenizer.BYTE_LEVEL["qwen2"]
    assert type(theirs.backend_tokenizer.normalizer) is type(own.normalizer)
    for text in (
        "It's 12,345.60 €\n\n  x=y+2  ",
        "naïve\tCafé's 3rd\r\n",
        "  a  b\n c",
        "数字 42!",
    ):
        expected = theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert own.pre_tokenizer.pre_tokenize_str(text) == expected


def test_unknown_pre_tokenizer_is_refused(tmp_path):
    file = write_vocabulary(tmp_path / "m.gguf", "deepseek-llm")
    with pytest.raises(DcodError, match=r"tokenizer\.ggml\.pre='deepseek-llm'"):
        gguf_tokenizer.export_tokenizer(file, tmp_path / "tokenizer")
