"""Students whose template writes reasoning in channels, and marks that are special tokens."""

import json
import re

import pytest
from test_trace_forms import chatml_tokenizer, outcome

from dcod_jax.data.turns import end_of_turn
from dcod_jax.errors import DcodError

# The behaviour of gpt-oss's template: `thinking` of the last answer alone, and no tags in content.
HARMONY = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if '<|channel|>' in m.content %}{{ raise_exception('channels in content') }}{%- endif %}"
    "{%- if loop.last and not add_generation_prompt %}"
    "{%- if 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{%- endif %}{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
# Qwen3's: what stands before </think> is reasoning, wherever it is; one opens it in the prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = THINKING.removesuffix("{% endif %}") + "<think>\n{% endif %}"
SAID = "{{ m.content }}"


def turns(lead: str = "", *, said: str = SAID, prompt: str = "") -> str:
    """A template that writes `lead` before an answer, `prompt` behind its generation prompt."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        f"{lead}{{% endif %}}{said}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}[THINK]{{ m.content[0].thinking }}"
    "[/THINK]{{ m.content[1].text }}{% endif %}"
)
# The behaviour of DeepSeek-V3.1's template, of QwQ's without reasoning, of Kimi-K2-Thinking's, of
# Magistral's, and of one whose reasoning is a part in special tokens.
OTHERS = {
    "closed": turns("</think>", prompt="</think>"),
    "unsaid": turns(prompt="<think>\n</think>"),
    "empty": turns("<think></think>"),
    "parts": turns(said=PARTS),
    "opens": turns("<|open|>think<|close|>", said=f"{SAID}<|close|>", prompt="<|open|>think"),
}
USER = {"role": "user", "content": "Two and three?"}
FINAL, THOUGHT = "<|channel|>final<|message|>5", "<|channel|>analysis<|message|>2, 3"
WHOLE = f"{THOUGHT}<|end|><|start|>assistant{FINAL}"
THOUGHTFUL = "<think>\n2, 3\n</think>\n\n5"
MARKED = "<unused94>thought\n2, 3<unused95>5"


def said(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def students():
    found = {}
    for name, template, names in (
        ("harmony", HARMONY, "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>"),
        ("thinking", THINKING, ""),
        ("opened", OPENED, ""),
        *((name, template, "<|open|> <|close|>") for name, template in OTHERS.items()),
        ("gemma", GEMMA, "<start_of_turn> <end_of_turn> <unused94> <unused95>"),
    ):
        found[name] = chatml_tokenizer()
        found[name].add_special_tokens({"additional_special_tokens": names.split()})
        found[name].chat_template = template
    return found


@pytest.mark.parametrize(
    ("student", "talk", "right"),
    [
        ("harmony", [said("5")], f"{FINAL}<|return|>"),
        ("harmony", [said("5", thinking="2, 3")], f"{WHOLE}<|return|>"),
        ("harmony", [said("<think>\n2, 3\n</think>\n\n5")], f"{WHOLE}<|return|>"),
        ("harmony", [said(WHOLE)], f"{WHOLE}<|return|>"),
        ("harmony", [said(f"<|start|>assistant{FINAL}<|return|>")], f"{FINAL}<|return|>"),
        (
            "harmony",
            [said("5", thinking="2, 3", weight=0), USER, said("5", thinking="2, 3")],
            f"{WHOLE}<|return|>",
        ),
        ("harmony", [said(THOUGHT)], {"truncated": 1}),
        ("thinking", [said("Write `</think>`, 5.")], "Write `</think>`, 5.<|im_end|>"),
        ("opened", [said("2, 3\n</think>\n\n5")], "2, 3\n</think>\n\n5<|im_end|>"),
        ("closed", [said("5")], "5<|im_end|>"),
        ("closed", [said("<think>\n\n</think>\n\n5")], "5<|im_end|>"),
        ("unsaid", [said("5")], "5<|im_end|>"),
        ("unsaid", [said("<think></think>5")], "5<|im_end|>"),
        ("empty", [said("5")], "<think></think>5<|im_end|>"),
        ("empty", [said(THOUGHTFUL)], f"{THOUGHTFUL}<|im_end|>"),
        ("parts", [said("5", reasoning="2, 3")], "[THINK]2, 3[/THINK]5<|im_end|>"),
        ("gemma", [said(MARKED)], f"{MARKED}<end_of_turn>"),
        ("gemma", [said(MARKED.partition("<unused95>")[0])], {"truncated": 1}),
        ("gemma", [said(MARKED.removesuffix("5"))], {"truncated": 1}),
    ],
)
def test_the_students_own_form_is_supervised(student, talk, right, students, tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [USER, *talk]}))
    found = outcome(path, students[student], {})
    if isinstance(right, dict):
        assert (found["kept"], found["dropped"]) == ([], right)
    else:
        [[prompt, text]] = found["kept"]
        assert text == right
        assert prompt.endswith(
            (
                "<|start|>assistant",
                "<start_of_turn>assistant\n",
                "<|im_start|>assistant\n",
                "<think>\n",
                "</think>",
            )
        )
        assert "2, 3" not in prompt
        end = students[student].convert_ids_to_tokens(end_of_turn(students[student]))
        assert text.endswith(end)


@pytest.mark.parametrize(
    ("student", "talk", "message"),
    [
        *(
            (student, [said(THOUGHTFUL)], "the generation prompt ends reasoning (")
            for student in ("closed", "unsaid")
        ),
        *(("opens", [said(text)], "template changes the completion") for text in ("5", THOUGHTFUL)),
        ("harmony", [said("5<|end|>")], "special token '<|end|>' as text"),
        ("harmony", [said("4"), USER, said("5")], "writes '<|end|>' behind a completion"),
        ("harmony", [said(f"{WHOLE}<|return|>{FINAL}")], "channel 'final' that is neither"),
        ("harmony", [said(f"{WHOLE}<|return|>6")], "has '6' outside of the messages"),
    ],
)
def test_what_a_form_does_not_allow_is_refused(student, talk, message, students, tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [USER, *talk]}))
    with pytest.raises(DcodError, match=re.escape(message)):
        outcome(path, students[student], {})


def test_an_opened_prompt_needs_more_than_a_word_about_its_end(students, tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [USER, said("Write `</think>`, 5.")]}))
    with pytest.raises(DcodError, match="has no </think>"):
        outcome(path, students["opened"], {})
