"""Masks are exact for the templates in use, and what cannot be exact is refused."""

import dataclasses
import json

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

from dcod_jax.data import borders, chat, turns
from dcod_jax.data.presets import Fields
from dcod_jax.data.raw import read_messages
from dcod_jax.data.templates import DATE, READY, TemplateChoice, choice_errors
from dcod_jax.data.tokenizer import (
    chat_template,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.data.turns import end_of_turn, reasoning_rule, stop_ids
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
OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (COUNTS_TURNS, "not prefix-stable"),
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


@pytest.mark.parametrize("template", [DROPS_REASONING, OPENS_THINKING])
def test_reasoning_that_a_template_strips_or_opens_is_trained_as_it_is_sampled(template) -> None:
    tokenizer = build(template)
    messages = conversation("hi", "<think>\nso</think>one")
    ids, _ = chat.encode(tokenizer, messages)
    prompt = chat.encode_prompt(tokenizer, messages[:1])
    assert ids[: len(prompt)].tolist() == prompt
    text = tokenizer.decode(ids)
    assert text.count("<think>\nso</think>one<|im_end|>") == 1
    assert text.count("<think>") == 1
    earlier = conversation("hi", "<think>so</think>one", "and", "<think>so</think>two")
    with pytest.raises(DcodError, match=r"changes the completion|not prefix-stable"):
        chat.encode(tokenizer, earlier)
    assert len(supervised(tokenizer, earlier, first_completion=3)) == 1
    assert len(supervised(tokenizer, earlier, unsupervised=[1])) == 1


QWEN3 = (  # drops the reasoning of turns before the last question, as Qwen3 does
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% if tools %}<|im_start|>system\n"
    "{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is defined else "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '') %}"
    "{% if loop.index0 > ns.last and thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
    "enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
THOUGHTFUL = "<think>\nso\n</think>\n\nhell"


def test_only_supervised_turns_must_survive_the_template() -> None:
    tokenizer = build(QWEN3)
    messages = conversation("hi", THOUGHTFUL, "and", THOUGHTFUL)
    with pytest.raises(DcodError, match=r"changes the completion.*chatml or deepseek_r1.*weight 0"):
        chat.encode(tokenizer, messages)
    assert supervised(tokenizer, messages, first_completion=3) == [THOUGHTFUL + "<|im_end|>"]
    assert supervised(tokenizer, messages, unsupervised={1}) == [THOUGHTFUL + "<|im_end|>"]
    assert supervised(build(READY["chatml"]), messages) == [THOUGHTFUL + "<|im_end|>"] * 2


@pytest.mark.parametrize("template", [QWEN3, CHATML, None])
def test_reasoning_takes_the_form_of_the_template(template) -> None:
    rule = reasoning_rule(build(template), "auto")
    assert rule.fold("hell", "so") == THOUGHTFUL
    own = QWEN3.replace("<think>\n", "<thought>").replace("\n</think>\n\n", "</thought>")
    assert reasoning_rule(build(own), "auto").fold("hell", "so") == "<thought>so</thought>hell"


def test_a_completion_behind_opened_reasoning_needs_its_end() -> None:
    tokenizer = build(OPENS_THINKING)
    assert supervised(tokenizer, conversation("hi", "so</think>one")) == ["so</think>one<|im_end|>"]
    with pytest.raises(DcodError, match=r"opens <think> .*enable_thinking=false"):
        chat.encode(tokenizer, conversation("hi", "one"))


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


def test_tools_are_shown_or_refused() -> None:
    tools = [{"name": "add"}]
    ids, _ = chat.encode(build(QWEN3), conversation("hi", "one"), tools=tools)
    assert '[{"name": "add"}]' in build(QWEN3).decode(ids)
    with pytest.raises(DcodError, match="the chat template does not show them"):
        chat.encode(build(), conversation("hi", "one"), tools=tools)


CALLS = (  # Qwen2.5's form of a turn with tool calls
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content or not m.tool_calls %}"
    "{{ '\n' + m.content }}{% endif %}{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ '\n' }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("call", ["<tool_call>", "<|im_start|>"])
def test_tool_calls_are_written_by_the_template_or_refused(call) -> None:
    """Also where the template begins them with a special token."""
    asked = {"name": "add", "arguments": '{"a": [1, 2]}'}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": asked}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "so", "function_call": asked},
        {"role": "assistant", "content": "It is 3."},
    ]
    turns = read_messages(messages, "messages", Fields()).messages
    tokenizer = build(CALLS.replace("<tool_call>", call, 1))
    calls = f'{call}\n{{"name": "add", "arguments": {{"a": [1, 2]}}}}\n</tool_call><|im_end|>'
    assert supervised(tokenizer, turns) == [calls, f"so\n{calls}", "It is 3.<|im_end|>"]
    with pytest.raises(DcodError, match="has tool calls, and the chat template does not write"):
        chat.encode(build(), turns)
    last = "{% if m.tool_calls and loop.last %}<think></think>{% endif %}"  # as Qwen3 does
    otherwise = build(
        tokenizer.chat_template.replace("{% for call in", f"{last}{{% for call in", 1)
    )
    if call == "<tool_call>":
        assert supervised(otherwise, [*turns[:3], turns[4]]) == [calls, "It is 3.<|im_end|>"]
    else:
        with pytest.raises(DcodError, match="otherwise when other turns follow"):
            chat.encode(otherwise, [*turns[:3], turns[4]])
    spelled = {"name": "<|im_end|>", "arguments": {}}
    turns[1]["tool_calls"][0]["function"] = spelled
    with pytest.raises(DcodError, match=r"tool call holds the special token '<\|im_end\|>'"):
        chat.encode(tokenizer, turns)
    for wrong in ([1], [{"function": {"name": "f", "arguments": "no"}}], {"name": "f"}):
        messages[1]["tool_calls"] = wrong
        with pytest.raises(DcodError, match=r"messages\[1\]: tool call 0 must have a name"):
            read_messages(messages, "messages", Fields())
    with pytest.raises(DcodError, match="has tool calls, and the role 'user'"):
        read_messages([{"role": "user", "content": "", "function_call": asked}], "m", Fields())


def test_marks_of_reasoning_may_be_special_tokens() -> None:
    tokenizer = build()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    whole = "<think>so</think>4"
    turns = conversation("2+2?", whole, "again?", whole)
    assert supervised(tokenizer, turns) == [f"{whole}<|im_end|>"] * 2
    with pytest.raises(DcodError, match="the user message holds the special token '<think>'"):
        chat.encode(tokenizer, conversation("Use <think>.", whole))


def test_another_models_end_is_not_trained_as_text() -> None:
    with pytest.raises(DcodError, match=r"ends with '<eos>', another model's end-of-turn"):
        chat.encode(build(), conversation("hi", "one<eos>\n"))


def test_variables_and_date_go_with_the_template(tmp_path) -> None:
    tokenizer = build(QWEN3 + "{{ strftime_now('%d %B %Y') if add_generation_prompt }}")
    tokenizer.save_pretrained(tmp_path)
    plain = load_tokenizer(tmp_path)
    prompt = plain.decode(chat.encode_prompt(plain, conversation("hi")))
    assert prompt.endswith("assistant\n26 July 2024")
    choice = TemplateChoice("", ("enable_thinking=false", "n=3"), "2026-01-31")
    chosen = load_tokenizer(tmp_path, template=choice)
    prompt = chosen.decode(chat.encode_prompt(chosen, conversation("hi")))
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n31 January 2026")
    assert template_fingerprint(chosen) != template_fingerprint(plain)
    chosen.save_pretrained(tmp_path)  # the choice is in the text, and is not written twice
    again = load_tokenizer(tmp_path, template=choice)
    assert template_fingerprint(again) == template_fingerprint(chosen)
    theirs = chosen.apply_chat_template(
        conversation("hi"), enable_thinking=True, add_generation_prompt=True, tokenize=False
    )
    assert "<think>" not in theirs  # a caller's own value is stronger


@pytest.mark.parametrize(
    ("variables", "date", "message"),
    [(("x",), DATE, "name=value"), (("1=2",), DATE, "name=value"), ((), "2026-02-30", "a day")],
)
def test_a_choice_that_cannot_be_is_refused(variables, date, message) -> None:
    [error] = choice_errors({"teacher.template_kwargs": variables}, date)
    assert message in error
    assert error.startswith("teacher.template_kwargs") == bool(variables)
    assert choice_errors({"student.template_kwargs": ("a=b", "c=")}, DATE) == []


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


def test_sample_shows_the_mask() -> None:
    tokenizer = build()
    ids, mask = chat.encode(tokenizer, conversation("hi", "one"))
    text = chat.render_sample(tokenizer, Trace("x", ids, mask))
    assert text.endswith("<|im_start|>assistant\n«one<|im_end|>»\n")
    assert ids.dtype == np.int32


def _many(count: int) -> list[dict]:
    return [m for n in range(count) for m in conversation(f"a{n}?", f"<think>so</think>{n}")]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED], ids=["chatml", "llama3", "markers"])
def test_a_conversation_of_many_turns_is_rendered_by_few_of_its_prompts(template, monkeypatch):
    tokenizer, rendered, render = build(template), [], chat.render_chat
    messages = _many(70)

    def counted(*args, **kwargs):
        rendered.append(args)
        return render(*args, **kwargs)

    monkeypatch.setattr(chat, "render_chat", counted)
    ids, mask = chat.encode(tokenizer, messages)
    assert len(rendered) < 30
    for module in (chat, turns):
        monkeypatch.setattr(module, "probes", list)
    right, whole = chat.encode(tokenizer, messages)
    assert len(rendered) > 90
    np.testing.assert_array_equal(ids, right)
    np.testing.assert_array_equal(mask, whole)


def test_many_prompts_of_a_template_that_alters_earlier_turns_are_refused(monkeypatch) -> None:
    content = "{{ message['content'] }}"
    later = CHATML.replace(content, content.replace("] }}", "] if loop.last else 'x' }}"))
    with pytest.raises(DcodError, match="not prefix-stable"):
        chat.encode(build(later), _many(40))
    monkeypatch.setattr(chat, "MOST_RENDERED", 1000)
    with pytest.raises(DcodError, match=r"40 supervised turns.*weight 0"):
        chat.encode(build(later), _many(40))
