"""Chat templates that strip or open reasoning, show tools, write tool calls or take variables."""

import re

import pytest
from test_chat import CHATML, COUNTS_TURNS, DROPS_REASONING, build, conversation, supervised

from dcod_jax.data import chat
from dcod_jax.data.presets import Fields
from dcod_jax.data.raw import read_messages
from dcod_jax.data.templates import DATE, READY, TemplateChoice, choice_errors
from dcod_jax.data.tokenizer import (
    load_tokenizer,
    template_fingerprint,
)
from dcod_jax.data.turns import reasoning_rule
from dcod_jax.errors import DcodError

OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


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


SYSTEM_IN_THE_LAST_TURN = (  # where that is the user's, as Mistral-7B-Instruct-v0.3
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [COUNTS_TURNS, SYSTEM_IN_THE_LAST_TURN])
def test_a_last_turn_is_behind_the_prompt_that_sampling_sees(template) -> None:
    tokenizer = build(template)
    messages = [{"role": "system", "content": "Be kind."}, *conversation("hi", "one", "and", "two")]
    ids, mask = chat.encode(tokenizer, messages, unsupervised={2})
    assert ids[~mask].tolist() == chat.encode_prompt(tokenizer, messages[:-1])
    assert supervised(tokenizer, messages, unsupervised={2}) == ["two<|im_end|>"]
    assert "Be kind." in tokenizer.decode(ids[~mask])
    blank = re.sub(
        r"{{ (m|message)\W.*?content.*? }}", r"{{ ' ' if \1.role[0] == 'a' }}\g<0>", template
    )
    assert supervised(build(blank), messages, unsupervised={2}) == [" two<|im_end|>"]


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
    other = own.replace("reasoning_content", "reasoning")  # Gemma 4's name for it
    assert reasoning_rule(build(other), "auto").fold("hell", "so") == "<thought>so</thought>hell"
    # A mark before the answer, as Command-A's: no form of reasoning alone, which would be cut off.
    marked = own.replace("</thought>", "</thought><answer>").replace("<|im_end|>", "</answer>")
    assert reasoning_rule(build(marked), "auto").fold("hell", "so") == THOUGHTFUL


def test_a_completion_behind_opened_reasoning_needs_its_end() -> None:
    tokenizer = build(OPENS_THINKING)
    assert supervised(tokenizer, conversation("hi", "so</think>one")) == ["so</think>one<|im_end|>"]
    with pytest.raises(DcodError, match=r"opens <think> .*enable_thinking=false"):
        chat.encode(tokenizer, conversation("hi", "one"))


def test_tools_are_shown_or_refused() -> None:
    tools = [{"name": "add"}]
    ids, _ = chat.encode(build(QWEN3), conversation("hi", "one"), tools=tools)
    assert '[{"name": "add"}]' in build(QWEN3).decode(ids)
    needed = CHATML.replace("{% for", "{% for tool in tools %}{{ tool }}{% endfor %}{% for", 1)
    with pytest.raises(DcodError, match=r"without tools: .*NoneType.*\(student.chat_template\)"):
        chat.encode(build(needed), conversation("hi", "one"))
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
