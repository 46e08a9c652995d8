"""Templates render as transformers renders them, and a hostile one is ended at a limit."""

import pytest
from test_chat import CHATML, LLAMA3, MARKED
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from dcod_jax.data import template_process, templates

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "é 你好 \ud800?"},
    {"role": "assistant", "content": "<a> & b", "reasoning_content": "first\n\nthen"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "x"},
]
NAMES = {"add_generation_prompt": False, "bos_token": "<s>", "date_string": "26 Jul 2024"}
# Constructs of the published templates of Llama 3, Qwen 2.5 and 3, Mistral and DeepSeek.
GOOD = [
    CHATML,
    LLAMA3,
    MARKED,
    "{{ bos_token }}\n  {%- if not date_string is defined %}"
    "{% set date_string = strftime_now('%d') %}{% endif %}\n"
    "{{- date_string }}\n{{ messages | tojson(indent=2) }}{{ {'a': '<é>'} | tojson }}",
    "{% set ns = namespace(last=-1, seen='') %}\n{% for m in messages[::-1] %}\n"
    "  {% set index = (messages|length - 1) - loop.index0 %}\n"
    "  {% if ns.last < 0 and m.role == 'user' %}{% set ns.last = index %}{% endif %}\n"
    "  {% set ns.seen = ns.seen ~ m.content.split('?')[-1].lstrip('\\n') %}\n"
    "  {% if loop.index > 3 %}{% break %}{% endif %}\n{% endfor %}\n{{ ns.last }}|{{ ns.seen }}",
    "{% macro turn(m) %}{{ m.role | upper }}{% if m.thinking is defined %}T{{ m.thinking }}"
    "{{ m.reasoning_content | trim }}{% endif %}{% endmacro %}{% for m in messages if m.content %}"
    "{{ turn(m) }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}{{ tools }}{{ documents }}",
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ '%s: %s' | format(m.role, "
    "m['content']) + '-' * 3 }}{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}{% endfor %}",
]


@pytest.mark.parametrize("template", GOOD, ids=range(len(GOOD)))
def test_the_text_is_that_of_transformers(template):
    marks = template == MARKED
    # The first releases of transformers 5 do not give reasoning its other names.
    known = hasattr(chat_template_utils, "_REASONING_FIELDS")
    messages = MESSAGES if known else list(map(template_process._with_reasoning, MESSAGES))
    texts = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=marks, **NAMES
    )
    text, spans = templates.render(template, MESSAGES, NAMES)
    assert text == texts[0][0]
    assert spans == ([tuple(span) for span in texts[1][0]] if marks else [])
    assert len(spans) == 2 * marks


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 3000000000 }}",
    "constant": "{% set x = 'a' * 3000000000 %}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "laughs": "{% set n = namespace(x=['a' * 1000]) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "filter": "{{ 'a' | center(3000000000) }}",
    "format": "{{ '%3000000000d' % 1 }}",
    "method": "{{ '{:3000000000}'.format(1) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "text": "{% for i in range(99999) %}{{ 'abcdefghij' * 10000 }}{% endfor %}",
    "late": "{% if messages|length == 5 %}{{ 'a' * 3000000000 }}{% endif %}",
}
REFUSED = {
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "x" * 2_000_000,
    "syntax": "{% for %}",
    "types": "{{ messages[0]['content']['x']['y'] }}",
    "division": "{{ 1 // 0 }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "exception": "{{ raise_exception('only one system message') }}",
}


@pytest.fixture
def hasty(monkeypatch):
    """Renderers that stop after little time, closed at the end."""
    monkeypatch.setattr(templates, "CPU_SECONDS", 0.3)
    templates._renderer.cache_clear()
    yield
    templates._renderer(templates.os.getpid()).close()
    templates._renderer.cache_clear()


def test_a_hostile_template_ends_at_a_limit(hasty):
    for name, template in HOSTILE.items():
        with pytest.raises(
            templates.TemplateError, match=r"needs more than|has more than"
        ) as caught:
            templates.render(template, MESSAGES, NAMES)
        assert len(str(caught.value)) < 300, name
    assert templates.render(CHATML, MESSAGES, NAMES)[0]  # and the next one is rendered


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_template_is_refused_in_one_line(name):
    with pytest.raises(templates.TemplateError, match="the chat template refuses them: ") as caught:
        templates.render(REFUSED[name], MESSAGES, NAMES)
    assert len(str(caught.value)) < 400


def test_texts_that_are_asked_for_ahead_take_one_exchange(hasty):
    renderer = templates._renderer(templates.os.getpid())
    texts = [(MESSAGES[:count], NAMES) for count in (5, 4, 3)]
    wanted = [templates.render(MARKED, *text) for text in texts]
    templates.render_ahead(MARKED, texts)
    renderer.process.kill()  # and nothing more is asked of it
    assert [templates.render(MARKED, *text) for text in texts] == wanted


def test_a_text_that_ends_the_process_leaves_the_others(hasty):
    """The limits hold for each text of an exchange."""
    for name in ("late", "loops"):
        loops = "{% if messages|length == 5 %}" + HOSTILE[name] + "{% endif %}fine"
        templates.render_ahead(loops, [(MESSAGES[:4], NAMES), (MESSAGES, NAMES)])
        assert templates.render(loops, MESSAGES[:4], NAMES)[0] == "fine"
        with pytest.raises(templates.TemplateError, match="needs more than"):
            templates.render(loops, MESSAGES, NAMES)


def test_a_process_that_is_killed_is_started_again(hasty, monkeypatch):
    """As by a kernel short of memory: the text is asked for once more, and no neighbour is lost."""
    renderer = templates._renderer(templates.os.getpid())
    texts = [(MESSAGES[:count], NAMES) for count in (5, 4)]
    wanted = [templates.render(CHATML, *text) for text in texts]
    renderer.process.kill()
    assert templates.render(CHATML, *texts[0]) == wanted[0]
    renderer.process.kill()
    templates.render_ahead(CHATML, texts)
    assert [templates.render(CHATML, *text) for text in texts] == wanted
    start, started = templates._start, []

    def killed():
        started.append(start())
        started[-1].kill()
        return started[-1]

    renderer.close()
    monkeypatch.setattr(templates, "_start", killed)
    with pytest.raises(templates.TemplateError, match=r"needs more .* ended with -9"):
        templates.render(CHATML, MESSAGES[:3], NAMES)
    assert len(started) == 2
    monkeypatch.undo()
    assert templates.render(CHATML, *texts[0]) == wanted[0]
