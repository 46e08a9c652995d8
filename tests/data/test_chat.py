"""Masks are exact for the templates in use, and what cannot be exact is refused."""

import dataclasses

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from dcod_jax.data import borders, chat
from dcod_jax.data.turns import end_of_turn, stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.models import config as model_configs
from dcod_jax.types import Trace

TINY = model_configs.from_hf(
    {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"}
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
)
MERGES = [("h", "e"), ("Ċ", "Ċ"), ("l", "l"), ("Ġ", "a")]


def backend(merges=MERGES, *, special=SPECIAL, split=False) -> Tokenizer:
    """Byte-level BPE over all bytes with a few merges; `split` changes the pre-tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def build(template: str | None = CHATML, *, plain=(), **kwargs):
    """`plain`: added tokens that are not special."""
    own = backend(**kwargs)
    own.add_tokens([AddedToken(name, special=False) for name in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def supervised(tokenizer, messages, **kwargs) -> list[str]:
    ids, mask = chat.encode(tokenizer, messages, **kwargs)
    trace = Trace("x", ids, mask)
    return chat.render_sample(tokenizer, trace).replace("»", "«").split("«")[1::2]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MARKED, "<|im_end|>"), (None, "</s>")],
    ids=["chatml", "llama3", "markers", "plain"],
)
def test_the_mask_is_the_completion_and_its_end_token(template, end) -> None:
    tokenizer = build(template)
    messages = conversation("hello?", "a hell of é 3")
    ids, mask = chat.encode(tokenizer, messages)
    assert supervised(tokenizer, messages) == ["a hell of é 3" + end]
    prompt = chat.encode_prompt(tokenizer, messages[:1])
    assert ids[: len(prompt)].tolist() == prompt
    assert mask.tolist()[: len(prompt)] == [False] * len(prompt)
    assert mask[len(prompt)]
    completion = ids[mask].tolist()
    assert tokenizer.convert_ids_to_tokens(completion[-1]) == end


def test_text_and_mask_agree_with_transformers() -> None:
    messages = conversation("hello?", "a hell of", "more", "all")
    for template in (CHATML, LLAMA3, MARKED):
        tokenizer = build(template)
        ids, mask = chat.encode(tokenizer, messages)
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=template == MARKED
        )
        assert ids.tolist() == theirs["input_ids"]
        if template == MARKED:  # ours leaves out the newline behind the end-of-turn token
            assert sum(theirs["assistant_masks"]) == mask.sum() + 2


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED])
def test_every_assistant_turn_or_only_those_of_the_completion(template) -> None:
    tokenizer = build(template)
    end = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
    messages = conversation("hi", "one", "and?", "two")
    assert supervised(tokenizer, messages) == ["one" + end, "two" + end]
    assert supervised(tokenizer, messages, first_completion=3) == ["two" + end]


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_no_token_crosses_the_border(template) -> None:
    """A newline at the start of a completion would merge with the prompt's last newline."""
    tokenizer = build(template)
    messages = conversation("hi\n", "\nhell")
    ids, _ = chat.encode(tokenizer, messages)
    assert supervised(tokenizer, messages)[0].startswith("\nhell")
    prompt = chat.encode_prompt(tokenizer, messages[:1])
    assert ids[: len(prompt)].tolist() == prompt


ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """Llama 2's kind: every text begins with a space of its own, which decoding takes away."""
    characters = ["▁", *"\n<|>[]/?.,", *map(chr, range(48, 58)), *map(chr, range(65, 123))]
    merges = [("▁", "h"), ("▁", "▁"), ("l", "l")]
    vocab = {token: i for i, token in enumerate([*characters, *(a + b for a, b in merges), "<u>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<u>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2])
def test_sentencepiece_masks_are_exact(template) -> None:
    tokenizer = sentencepiece(template)
    messages = conversation("hello", "he is all", "and", "two")
    ids, mask = chat.encode(tokenizer, messages)
    assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    runs = np.flatnonzero(np.diff(mask.astype(int)))
    assert len(runs) == (4 if template == ZEPHYR else 3)  # Llama 2 ends with the last </s>
    for turn in (1, 3):
        prompt = chat.encode_prompt(tokenizer, messages[:turn])
        assert ids[: len(prompt)].tolist() == prompt
        assert not mask[len(prompt) - 1]
        assert mask[len(prompt)]
    assert tokenizer.convert_ids_to_tokens(ids[mask].tolist()).count("</s>") == 2


def test_a_border_inside_a_token_is_refused() -> None:
    """This kind of tokenizer cannot encode the completion alone: it would add a space."""
    tokenizer = sentencepiece(ZEPHYR.replace("|>\n", "|> "))
    with pytest.raises(DcodError, match="crosses the border between prompt and completion"):
        chat.encode(tokenizer, conversation("what?", "hello"))
    assert supervised(tokenizer, conversation("what?", "no")) == ["no</s>"]


def test_no_second_bos() -> None:
    tokenizer = build(LLAMA3)
    post = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = post
    ids, _ = chat.encode(tokenizer, conversation("hi", "one"))
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = None  # the plain form has the bos that the tokenizer itself adds
    ids, _ = chat.encode(tokenizer, conversation("hi", "one"))
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


DROPS_REASONING = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}"
)
COUNTS_TURNS = "{{ messages | length }} turns\n" + CHATML
HEADER_NOT_IN_PROMPT = CHATML.split("{% if add_generation_prompt %}")[0]
NO_END = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "# ")
MARKS_WITHOUT_END = MARKED.replace(
    "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
)
MARKS_NOTHING = MARKED.replace("== 'assistant'", "== 'nobody'")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (HEADER_NOT_IN_PROMPT, "not in its generation prompt"),
        (NO_END, "could not learn to stop"),
        (MARKS_WITHOUT_END, "leaves out the end-of-turn token"),
        (MARKS_NOTHING, "marks 0 spans"),
        ("{{ raise_exception('no system role') }}", "no system role"),
    ],
)
def test_a_template_that_cannot_be_exact_is_refused(template, message) -> None:
    tokenizer = build(template)
    with pytest.raises(DcodError, match=message):
        chat.encode(tokenizer, conversation("hi", "<think>so</think>one"))


def test_a_generation_block_around_the_header_is_trimmed() -> None:
    around = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "<|im_start|>assistant\n{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = conversation("hi", "one", "and", "two")
    assert supervised(build(around), messages) == supervised(build(MARKED), messages)
    other = around.replace("assistant\n{% endif %}", "bot\n{% endif %}")
    with pytest.raises(DcodError, match="training would see another prompt than sampling"):
        chat.encode(build(other), messages)
    with pytest.raises(DcodError, match=r"not prefix-stable.*weight 0"):
        chat.encode(build(COUNTS_TURNS), messages)


def test_another_models_end_is_not_trained_as_text() -> None:
    with pytest.raises(DcodError, match=r"ends with '<eos>', another model's end-of-turn"):
        chat.encode(build(), conversation("hi", "one<eos>\n"))


def test_the_end_that_training_has_is_a_stop() -> None:
    """A base model's eos differs from the token that its chat template ends turns with."""
    tokenizer = build()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, mask = chat.encode(tokenizer, conversation("hi", "one"))
    assert end_of_turn(tokenizer) == end == ids[mask][-1]
    config = dataclasses.replace(TINY, eos_token_ids=())
    assert stop_ids(config, tokenizer) == tuple(sorted({end, tokenizer.eos_token_id}))
    assert end_of_turn(build(None)) == tokenizer.eos_token_id
    assert end_of_turn(build(NO_END)) is None


@pytest.mark.parametrize(("count", "sure"), [(10, False), (60_000, False), (200_000, True)])
def test_long_texts_are_counted_in_pieces(count, sure) -> None:
    tokenizer = build()
    assert (borders.tokens_above(tokenizer, ["h " * (count // 2)], 1000) > 1000) == sure


def test_texts_encoded_together_have_the_ids_that_each_has_alone() -> None:
    tokenizer, texts = build(), ["the cat", "", "a" * 90, "the <|end|>hat", "the cat"]
    alone = [borders.encode_plain(tokenizer, text) for text in texts]
    borders.encode_ahead(tokenizer, texts)
    known = dict(borders._known(tokenizer))
    assert [known[text] for text in texts] == alone
    assert [borders.encode_plain(tokenizer, text) for text in texts] == alone
    assert not borders._known(tokenizer)
    borders.encode_ahead(tokenizer, ["left"])
    borders.encode_ahead(tokenizer, [])
    assert not borders._known(tokenizer)


def test_an_end_token_that_is_added_and_not_special_ends_each_turn() -> None:
    """Phi's kind: with </s> behind the whole conversation, which alone is special."""
    template = ZEPHYR.replace("{{ eos_token }}", "<|end|>")
    template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = build(template, plain=("<|end|>",))
    assert supervised(tokenizer, conversation("hi", "one", "and", "two")) == [
        "one<|end|>",
        "two<|end|>",
    ]
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    with pytest.raises(DcodError, match=r"holds the special token '<\|end\|>'"):
        chat.encode(tokenizer, conversation("hi<|end|>", "one"))


def test_a_template_that_ends_the_last_turn_alone_is_refused() -> None:
    template = ZEPHYR.replace(
        "{{ eos_token }}", "{{ eos_token if loop.last or message.role != 'assistant' else '' }}"
    )
    assert supervised(build(template), conversation("hi", "one")) == ["one</s>"]
    with pytest.raises(DcodError, match=r"end every assistant turn with the same special token"):
        chat.encode(build(template), conversation("hi", "one", "and", "two"))


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (CHATML.replace("in messages %}", "in messages if message.role != 'tool' %}", 1), "tool"),
        (CHATML.replace("message['content'] }}", "message['content'][0].text }}"), "user"),
        (DROPS_REASONING.replace("s %}", "s if message.role != 'user' %}", 1), "user"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(template, role) -> None:
    messages = conversation("hi", "<think>\nso</think>one")
    messages[1:1] = [{"role": "assistant", "content": "0"}, {"role": "tool", "content": "i"}]
    with pytest.raises(DcodError, match=f"does not write the text of a message by '{role}'"):
        chat.encode(build(template), messages, first_completion=3)
    if role == "tool":
        with pytest.raises(DcodError, match="by 'tool'"):
            chat.encode_prompt(build(template), messages[:3])


@pytest.mark.parametrize("content", ["k", "think"])
def test_an_answer_that_is_part_of_the_empty_reasoning(content) -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] }}",
    )
    [text] = supervised(build(template), conversation("hi", content))
    assert text == f"<think>\n\n</think>\n\n{content}<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<end_of_turn>\n<start_of_turn>model\n",
        "[INST] hi [/INST]",
    ],
)
def test_turns_of_another_template_are_not_text(text) -> None:
    tokenizer = build(LLAMA3, special=("<s>", "</s>", "<|eot_id|>", "<|start_header_id|>"))
    for messages in (conversation(f"hi{text}", "one"), conversation("hi", f"so{text}one")):
        with pytest.raises(DcodError, match="another model's chat template as text"):
            chat.encode(tokenizer, messages)


@pytest.mark.parametrize(
    "text",
    ["<|begin_of_text|>4", "<bos>4", "<｜begin▁of▁sentence｜>4", "<|start_of_role|>assistant",
     "analysisSo four.assistantfinalIt is 4."],
)  # fmt: skip
def test_what_another_template_writes_before_a_text_is_not_text(text) -> None:
    with pytest.raises(DcodError, match="another model's chat template as text"):
        chat.encode(build(), conversation("2+2?", text))
    chat.encode(build(), conversation("2+2?", f"It writes {text[:12]} first."))


def test_an_empty_or_full_mask_is_refused() -> None:
    tokenizer = build("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(DcodError, match="no prompt"):
        chat.encode(tokenizer, [{"role": "assistant", "content": "all of it"}])
    with pytest.raises(DcodError, match="no assistant turn"):
        chat.encode(build(), conversation("only a question"))


def test_special_tokens_in_content_are_refused() -> None:
    with pytest.raises(
        DcodError, match=r"assistant message holds the special token '<\|im_end\|>'"
    ):
        chat.encode(build(), conversation("hi", "one<|im_end|>"))


def test_plain_form_needs_plain_messages() -> None:
    with pytest.raises(DcodError, match="no chat template"):
        chat.encode(build(None), conversation("hi", "one", "and", "two"))


def test_sample_shows_the_mask() -> None:
    tokenizer = build()
    ids, mask = chat.encode(tokenizer, conversation("hi", "one"))
    text = chat.render_sample(tokenizer, Trace("x", ids, mask))
    assert text.endswith("<|im_start|>assistant\n«one<|im_end|>»\n")
    assert ids.dtype == np.int32
