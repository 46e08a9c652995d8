"""Tokenizers of several kinds over every text, built here: byte-level BPE and SentencePiece."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "<bos>{% for m in messages %}{% if m['role'] == 'assistant' %}[A] {{ m['content'] | trim }} "
    "<eos>{% else %}[U] {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
SPECIAL = {CHATML: ["<|im_end|>", "<|im_start|>"], TURNS: ["<eos>", "<bos>"]}


def fast(inner: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    end, other = SPECIAL[template]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=end,
        additional_special_tokens=[other],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(merges: list[tuple[str, str]], *, template: str = CHATML, normalizer=None):
    """BPE over bytes with these merges of GPT-2's characters (a space is Ġ)."""
    vocab = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.normalizer = normalizer
    return fast(inner, template)


def chain(text: str) -> list[tuple[str, str]]:
    """Merges that make one token of a text, from the left: he, hel, hell, hello."""
    letters = [bytes_to_unicode()[byte] for byte in text.encode()]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def sentencepiece(words: list[str], *, template: str = TURNS, prefix: bool = True):
    """BPE with byte fallback over ▁-joined words, as Llama 2's; a space before the first word."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    merges = []
    for word in words:
        for i, letter in enumerate(word):
            vocab.setdefault(letter, len(vocab))
            if i:
                vocab.setdefault(word[: i + 1], len(vocab))
                if (word[:i], letter) not in merges:
                    merges.append((word[:i], letter))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=False))
    steps = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    inner.decoder = decoders.Sequence(parts)
    return fast(inner, template)
