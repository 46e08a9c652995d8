"""Duplicates and benchmark overlap are found through spelling, and only where they are."""

import json

import pytest

from dcod_jax.data.records import RawTrace
from dcod_jax.errors import DcodError
from dcod_jax.prepare.overlap import build_index, prompt_key, trace_key, words

QUESTION = "Natalia sold clips to 48 of her friends in April, and then half as many in May."


def trace(prompt: str, completion: str = "It is 4.", *, system: str = "") -> RawTrace:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return RawTrace(messages, first_completion=len(messages) - 1)


def index(tmp_path, *records, size: int = 8, **kwargs):
    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return build_index([str(path)], size=size, **kwargs)


def test_words() -> None:
    assert words("It's $5.0$, Ｆｕｌｌ-width_é!") == ["it", "s", "5", "0", "full", "width", "é"]


def test_an_eval_question_inside_a_longer_prompt_is_found(tmp_path) -> None:
    found = index(tmp_path, {"question": "x"}, {"question": QUESTION})
    text = "Solve: NATALIA sold **clips** to 48 of her friends;  how many?"
    where = found.find(trace(text))
    assert where is not None
    assert "natalia sold clips to 48 of her friends" in where
    assert where.endswith("eval.jsonl:2")
    assert found.find(trace("Natalia sold clips to 49 of her friends in April.")) is None


def test_a_completion_that_restates_the_question_is_found(tmp_path) -> None:
    found = index(tmp_path, {"problem": QUESTION})
    assert found.find(trace("Tell me a known problem.", f"Sure. {QUESTION}"))


def test_words_do_not_run_over_the_border_of_two_messages(tmp_path) -> None:
    found = index(tmp_path, {"prompt": "one two three four five six seven eight"})
    assert found.find(trace("one two three four", "five six seven eight")) is None


def test_a_short_question_is_compared_whole_and_with_prompts_only(tmp_path) -> None:
    found = index(tmp_path, {"messages": [{"role": "user", "content": "What is 2 + 2?"}]})
    assert found.find(trace("what is  2+2")) is not None
    assert found.find(trace("What is 2 + 2 + 3?")) is None
    assert found.find(trace("Hm.", "What is 2 + 2?")) is None


def test_system_messages_are_not_compared(tmp_path) -> None:
    found = index(tmp_path, {"prompt": QUESTION})
    assert found.find(trace("other", system=QUESTION)) is None


def test_a_named_prompt_field_comes_first(tmp_path) -> None:
    found = index(tmp_path, {"q": QUESTION, "prompt": "nothing"}, prompt_field="q")
    assert found.find(trace(QUESTION)) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"eval.jsonl:1: truncated JSON"),
        ('{"text": "x"}', r"eval.jsonl:1: no prompt; expected one of prompt, .*found text"),
        ("[1]", r"eval.jsonl\[0\]: expected a JSON object, got int"),
        ('{"prompt": 5}', r"eval.jsonl:1: prompt must be a string"),
        ('{"messages": []}', r"eval.jsonl:1: messages must be a string or messages"),
    ],
)
def test_a_bad_evaluation_set_is_refused(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(DcodError, match=message):
        build_index([str(path)], size=8)
    with pytest.raises(DcodError, match="no such file"):
        build_index([str(tmp_path / "absent.jsonl")], size=8)


def test_keys_ignore_spacing_only() -> None:
    assert trace_key(trace("2 + 2?", "It is\n4.")) == trace_key(trace(" 2  + 2?", "It is 4."))
    assert trace_key(trace("2 + 2?")) != trace_key(trace("2 + 2?", "It is 4. So."))
    assert trace_key(trace("a", "b c")) != trace_key(trace("a b", "c"))
    assert prompt_key(trace("2 + 2?", "a")) == prompt_key(trace("2 + 2?", "b"))


@pytest.mark.shared
def test_gsm8k_test_questions_do_not_stand_in_its_training_set(shared_data) -> None:
    """The sets are disjoint as published; a copy of a test question is found."""
    found = build_index([str(shared_data / "gsm8k" / "test.jsonl")], size=13)
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:1500]
    rows = [json.loads(line) for line in lines]
    hits = [found.find(trace(row["question"], row["answer"])) for row in rows]
    assert sum(hit is not None for hit in hits) < 30
    test = json.loads((shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[0])
    assert found.find(trace(test["question"]))
