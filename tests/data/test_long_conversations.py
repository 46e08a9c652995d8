"""Conversations of many turns are rendered by a few of their prompts."""

import numpy as np
import pytest
from test_chat import CHATML, LLAMA3, MARKED, build, conversation

from dcod_jax.data import chat, turns
from dcod_jax.errors import DcodError


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
