"""The prompt of a problem: chat and plain form, exemplars, the sets of a config."""

import dataclasses
import json

import pytest
import tiny
from test_problems import ROWS

from dcod_jax import config as configs
from dcod_jax.data import chat
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.benchmarks import BOXED
from dcod_jax.evaluate.grading import grade
from dcod_jax.evaluate.problems import (
    Problem,
    ProblemSet,
    problem_sets,
)
from dcod_jax.evaluate.prompts import (
    EXEMPLARS,
    PromptForm,
    encode_prompts,
    prompt_form,
    read_exemplars,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def problem(question="1+2?", **changes):
    turns = [{"role": "user", "content": question}]
    return dataclasses.replace(Problem("0", turns, "3", {}, "file:1"), **changes)


PAIRS = (("1+1?", "#### 2"), ("2+2?", "#### 4"))


def test_chat_form_shows_exemplars_as_earlier_turns(tokenizer):
    form = PromptForm("chat", PAIRS, "think")
    text = tokenizer.decode(form.prompt(tokenizer, problem()))
    expected = (
        "<user>1+1?\nthink<end><assistant>#### 2<end><user>2+2?\nthink<end><assistant>#### 4<end>"
        "<user>1+2?\nthink<end><assistant>"
    )
    assert text == expected
    led = problem(messages=[{"role": "system", "content": "hm"}, *problem().messages])
    text = tokenizer.decode(PromptForm("chat", PAIRS[:1]).prompt(tokenizer, led))
    assert text.startswith("<system>hm<end><user>1+1?<end>")
    bare = PromptForm().prompt(tokenizer, problem())
    assert bare == chat.encode_prompt(tokenizer, problem().messages)


def test_plain_form_is_text_without_the_template(tmp_path):
    alphabet = tiny.ALPHABET + "QA:"
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path, alphabet=alphabet))
    ids = PromptForm("plain", PAIRS[:1], "think").prompt(tokenizer, problem())
    expected = "Question: 1+1?\nthink\nAnswer: #### 2\n\nQuestion: 1+2?\nthink\nAnswer:"
    assert tokenizer.decode(ids) == expected
    talk = [*problem().messages, {"role": "assistant", "content": "3"}, *problem().messages]
    asked = [problem(messages=talk)]
    with pytest.raises(DcodError, match=r"file:1: .*asks one question"):
        encode_prompts(asked, tokenizer, form=PromptForm("plain"), key="", max_new_tokens=1)


def test_the_built_in_exemplars_are_right_and_no_problem_of_the_set():
    pairs = read_exemplars("", 8)
    assert len(pairs) == 8
    records = [json.loads(line) for line in EXEMPLARS.read_text().splitlines()]
    assert len(records) == 8
    answers = ["17", "7", "50", "1/2", "20", "\\sqrt{12}", "55", "4"]
    assert all(grade(a, b).correct for (_, a), b in zip(pairs, answers, strict=True))
    with pytest.raises(DcodError, match=r"shots=9.* has 8 exemplars"):
        read_exemplars("", 9)


def test_an_exemplar_that_is_a_problem_is_refused():
    config = configs.load_recipe(configs.BASE)
    asked = ProblemSet("x", (problem(read_exemplars("", 3)[2][0]),), "")
    config.evaluate.shots = 2
    assert len(prompt_form(config, asked).exemplars) == 2
    config.evaluate.shots = 3
    with pytest.raises(DcodError, match="is the problem at file:1"):
        prompt_form(config, asked)


def test_the_sets_of_a_config(tmp_path):
    config = configs.load_recipe(configs.BASE)
    config.evaluate.problems = str(tiny.write_jsonl(tmp_path / "p.jsonl", tiny.sums(4)))
    file = tiny.write_jsonl(tmp_path / "m.jsonl", [ROWS["math500"]])
    own = tiny.write_jsonl(tmp_path / "o.jsonl", [{"prompt": "q", "answer": 1, "level": 2}])
    config.evaluate.sets = (f"math500={file}", f"own={own}")
    config.evaluate.limit = 3
    config.evaluate.shots = 1
    first, second, third = problem_sets(config)
    assert (first.name, len(first.problems), first.instruction) == ("", 3, "")
    assert (second.name, second.instruction) == ("math500", BOXED)
    assert (third.name, third.instruction, third.problems[0].difficulty) == ("own", "", "2")
    assert prompt_form(config, second).instruction == BOXED
    config.evaluate.instruction = ""
    assert prompt_form(config, second) == PromptForm("chat", read_exemplars("", 1), "")
    config.prepare.system_prompt = "Hm."
    assert problem_sets(config)[1].problems[0].messages[0] == {"role": "system", "content": "Hm."}


def test_a_problem_with_a_system_message_of_its_own_keeps_it_alone(tmp_path):
    config = configs.load_recipe(configs.BASE)
    turns = [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}]
    own = tiny.write_jsonl(tmp_path / "o.jsonl", [{"messages": turns, "answer": 1}])
    config.evaluate.sets = (f"own={own}",)
    config.prepare.system_prompt = "Hm."
    assert problem_sets(config)[0].problems[0].messages == turns
