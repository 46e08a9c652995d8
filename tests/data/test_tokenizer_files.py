"""Tokenizers on disk: what is kept of their files, and what is refused."""

import json

import pytest
from test_chat import CHATML, LLAMA3, MERGES, SPECIAL, backend, build, conversation
from tokenizers import (
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from dcod_jax.data import chat
from dcod_jax.data.templates import TemplateChoice
from dcod_jax.data.tokenizer import (
    chat_template,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError


def test_fingerprint_is_of_the_content(tmp_path) -> None:
    first, second = build(), build()
    first.save_pretrained(tmp_path / "a")
    second.pad_token = "<s>"
    second.padding_side = "left"
    second.save_pretrained(tmp_path / "b")
    a, b = (load_tokenizer(tmp_path / name) for name in "ab")
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b)
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(build())
    assert template_fingerprint(a) == template_fingerprint(b)
    others = [
        build(merges=[*MERGES[:-1], ("Ġ", "b")]),
        build(special=(*SPECIAL, "<extra>")),
        build(split=True),
        PreTrainedTokenizerFast(
            tokenizer_object=backend(), bos_token="<s>", eos_token="<|eot_id|>"
        ),
    ]
    others[-1].eos_token = "<|eot_id|>"
    prints = {tokenizer_fingerprint(t) for t in [a, *others]}
    assert len(prints) == 5
    assert template_fingerprint(build(LLAMA3)) != template_fingerprint(a)


def test_load_keeps_the_pre_tokenizer_of_the_file(tmp_path) -> None:
    """A family class in tokenizer_config.json must not rebuild what tokenizer.json says."""
    tokenizer = build()
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert chat_template(loaded) == CHATML


def test_load_refuses_what_is_not_a_tokenizer(tmp_path) -> None:
    with pytest.raises(DcodError, match=r"no tokenizer\.json \(it holds nothing\)"):
        load_tokenizer(tmp_path)
    with pytest.raises(DcodError, match="hub id"):
        load_tokenizer(tmp_path / "absent")
    build().save_pretrained(tmp_path)
    with pytest.raises(DcodError, match=r"student\.chat_template"):
        load_tokenizer(tmp_path, template=TemplateChoice(str(tmp_path / "none.jinja")))
    (tmp_path / "own.jinja").write_text(LLAMA3)
    loaded = load_tokenizer(tmp_path, template=TemplateChoice(str(tmp_path / "own.jinja")))
    assert chat_template(loaded) == LLAMA3


def test_truncation_in_the_file_is_not_obeyed(tmp_path) -> None:
    tokenizer = build()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(tmp_path)
    ids, _ = chat.encode(load_tokenizer(tmp_path), conversation("h" * 50, "e" * 50))
    assert len(ids) > 100
