"""Greedy accuracy: problems read, a scripted model graded, intervals against known values."""

import json

import jax
import numpy as np
import pytest
import tiny

from dcod_jax.data import chat
from dcod_jax.data.tokenizer import load_tokenizer, stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import generations
from dcod_jax.evaluate.generations import Generation, paired_difference
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.evaluate.statistics import wilson
from dcod_jax.models import transformer
from dcod_jax.models.config import from_hf
from dcod_jax.sample.sampler import Sample


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path, records):
    return tiny.write_jsonl(path, records)


# ---------------------------------------------------------------- problems


def test_problems_in_the_fields_people_have(tmp_path):
    file = write(
        tmp_path / "problems.jsonl",
        [
            {"id": "a", "prompt": "1+1?", "answer": "2", "template": "sum"},
            {"question": "2+2?", "answer": 4},
            {"problem": "3+3?", "answer": 6.5},
            {"messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "4?"}],
             "answer": "4"},
        ],
    )  # fmt: skip
    plain = read_problems(file)
    assert [p.id for p in plain] == ["a", "1", "2", "3"]
    assert [p.answer for p in plain] == ["2", "4", "6.5", "4"]
    assert plain[0].fields["template"] == "sum"
    assert plain[1].source == f"{file}:2"
    led = read_problems(file, system_prompt="Think.", limit=4)
    assert [p.messages[0]["content"] for p in led] == ["Think.", "Think.", "Think.", "Hm."]
    assert len(read_problems(file, limit=2)) == 2


def test_the_assistants_own_turn_is_not_part_of_the_question(tmp_path):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    file = write(tmp_path / "p.jsonl", [{"messages": turns, "answer": "1"}])
    assert read_problems(file)[0].messages == turns[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "1', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'["prompt"]', "expected a JSON object, got list"),
        (b'{"text": "1", "answer": "1"}', "no prompt.*prepare.prompt_field"),
        (b'{"prompt": "1"}', "no field 'answer'.*prepare.answer_field"),
        (b'{"prompt": " ", "answer": "1"}', "non-empty text"),
        (b'{"prompt": [{"role": "user"}], "answer": "1"}', "non-empty text"),
        (b'{"id": "x", "prompt": "1", "answer": "1"}', "used before at .*:1"),
        (b'{"prompt": "1", "answer": ""}', "no field 'answer' or an empty one"),
        (b'{"prompt": "1", "answer": ["1", "2"]}', "text or a number, got .*several answers"),
        (b'{"prompt": "1", "answer": true}', "text or a number, got True"),
        (b'{"prompt": "1", "answer": NaN}', "text or a number, got nan"),
        (b'{"prompt": "1", "answer": "1", "x": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"id": "x", "prompt": "2", "answer": "2"}\n\n' + line + b"\n")
    with pytest.raises(DcodError, match=f"bad.jsonl:3: .*{message}"):
        read_problems(file)


def test_a_file_as_other_programs_write_it(tmp_path):
    """A byte order mark, CRLF, and fields that are there but null."""
    file = tmp_path / "p.jsonl"
    record = b'{"id": null, "prompt": null, "question": "%d?", "answer": %d}\r\n'
    file.write_bytes(b"\xef\xbb\xbf" + record % (1, 1) + b"\r\n" + record % (2, 2))
    read = read_problems(file)
    assert [(p.id, p.messages[0]["content"], p.answer) for p in read] == [
        ("0", "1?", "1"),
        ("1", "2?", "2"),
    ]


def test_no_file_and_no_problems(tmp_path):
    with pytest.raises(DcodError, match="no such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(DcodError, match="no problems"):
        read_problems(write(tmp_path / "empty.jsonl", []))


# ---------------------------------------------------------------- a scripted model


def test_a_scripted_model_gets_the_grade_it_earned(tmp_path, tokenizer, monkeypatch):
    script = {
        "1+2?": ("#### 3", True),
        "9+2?": ("9+2=11\n#### 11", True),
        "5+5?": ("5+5=10\n#### 12", True),
        "7+7?": ("let me think", False),
    }
    answers = {"1+2?": "3", "9+2?": "11", "5+5?": "10", "7+7?": "14"}
    file = write(tmp_path / "p.jsonl", [{"prompt": p, "answer": a} for p, a in answers.items()])
    asked = []

    def scripted(model, prompts, **options):
        asked.append({**options, "valid_vocab": model.program.valid_vocab})
        out = []
        for prompt in prompts:
            text, finished = script[tokenizer.decode(prompt, skip_special_tokens=True)]
            ids = tokenizer.encode(text, add_special_tokens=False)
            out.append(Sample(ids + [1] * finished, [-0.1] * (len(ids) + finished), finished))
        return out

    monkeypatch.setattr(generations, "sample", scripted)
    config = from_hf(tiny.raw_config())
    result = generations.evaluate(
        config,
        transformer.init_params(config, jax.random.key(0)),
        tokenizer,
        read_problems(file),
        max_new_tokens=20,
        batch_size=2,
        compute_dtype="float32",
        grade_timeout=10.0,
        workers=1,
    )
    assert asked[0]["temperature"] == 0.0
    assert asked[0]["eos_ids"] == (1,)
    assert asked[0]["valid_vocab"] == len(tokenizer)
    assert (result.problems, result.correct, result.accuracy) == (4, 2, 0.5)
    assert (result.no_answer, result.truncated) == (0.25, 0.25)
    assert [g.correct for g in result.generations] == [True, True, False, False]
    assert [g.extracted for g in result.generations] == ["3", "11", "12", None]
    assert result.generations[1].completion == "9+2=11\n#### 11"
    assert result.tokens == sum(g.tokens for g in result.generations)
    assert (result.low, result.high) == wilson(2, 4)
    assert "generations" not in result.summary()
    kept = tmp_path / "generations.jsonl"
    kept.write_text("".join(map(generations.to_line, result.generations)))
    assert tuple(generations.read_generations(kept)) == result.generations


def test_a_real_model_is_decoded_greedily_from_its_chat_prompt(tmp_path, tokenizer):
    config = from_hf(tiny.raw_config())
    params = transformer.init_params(config, jax.random.key(0))
    file = write(tmp_path / "p.jsonl", [{"prompt": "1+2?", "answer": "3"}])
    problems = read_problems(file)
    options = {
        "max_new_tokens": 8,
        "batch_size": 1,
        "compute_dtype": "float32",
        "grade_timeout": 10.0,
        "workers": 1,
    }
    result = generations.evaluate(config, params, tokenizer, problems, **options)
    ids = chat.encode_prompt(tokenizer, problems[0].messages)
    step = jax.jit(lambda tokens: transformer.logits(config, params, tokens))
    tokens = np.zeros((1, len(ids) + 8), np.int32)
    tokens[0, : len(ids)] = ids
    for place in range(len(ids), len(ids) + 8):
        tokens[0, place] = np.asarray(step(tokens))[0, place - 1, : len(tokenizer)].argmax()
    expected = tokens[0, len(ids) :].tolist()
    expected = expected[: expected.index(1)] if 1 in expected else expected
    assert result.generations[0].completion == generations.decode_text(tokenizer, expected)


def test_stop_ids_are_the_models_and_the_tokenizers(tokenizer):
    for given, expected in (([7, 3], (1, 3, 7)), (None, (1,))):
        model_config = from_hf(tiny.raw_config(eos_token_id=given))
        assert stop_ids(model_config, tokenizer) == expected


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval_has_its_published_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def graded(marks: str) -> list[Generation]:
    return [Generation(str(i), "", "", None, mark == "1", True, 1) for i, mark in enumerate(marks)]


def test_paired_difference_knows_what_both_runs_share():
    first = graded("1" * 50 + "0" * 50)
    second = graded("1" * 60 + "0" * 40)
    mean, low, high = paired_difference(first, second)
    assert mean == pytest.approx(0.1)
    # Only ten problems changed: sd of the mean is sqrt(0.1 * 0.9 / 100) = 0.03.
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03), abs=0.012)
    assert paired_difference(first, list(reversed(second)))[0] == pytest.approx(0.1)
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)
    assert paired_difference(second, first)[0] == pytest.approx(-0.1)


def test_paired_difference_refuses_other_problems():
    with pytest.raises(DcodError, match="differ in 1 problems"):
        paired_difference(graded("101"), graded("10"))


def test_results_are_plain_json():
    result = generations.summarize(graded("1101"), seconds=2.0)
    assert json.loads(json.dumps(result.summary()))["accuracy"] == 0.75
