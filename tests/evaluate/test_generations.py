"""Answers sampled and graded: a scripted model, a real one, repetitions found, lines kept."""

import jax
import numpy as np
import pytest
import tiny

from dcod_jax.data import chat
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.data.turns import stop_ids
from dcod_jax.evaluate import generations
from dcod_jax.evaluate.generations import Sampling
from dcod_jax.evaluate.metrics import measure
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.evaluate.statistics import wilson
from dcod_jax.models import transformer
from dcod_jax.models.config import from_hf
from dcod_jax.sample.sampler import Sample, decoding_params


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ask(config, params, tokenizer, problems, **options):
    """One greedy answer to each problem."""
    model = decoding_params(config, params, valid_vocab=len(tokenizer), compute_dtype="float32")
    return generations.answer(
        model,
        tokenizer,
        [(problem, 0) for problem in problems],
        [chat.encode_prompt(tokenizer, problem.messages) for problem in problems],
        indices=range(len(problems)),
        sampling=Sampling(),
        **options,
    )


def test_a_scripted_model_gets_the_grade_it_earned(tmp_path, tokenizer, monkeypatch):
    script = {
        "1+2?": ("#### 3", True),
        "9+2?": ("9+2=11\n#### 11", True),
        "5+5?": ("5+5=10\n#### 12", True),
        "7+7?": ("let me think", False),
    }
    answers = {"1+2?": "3", "9+2?": "11", "5+5?": "10", "7+7?": "14"}
    file = tiny.write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": p, "answer": a} for p, a in answers.items()]
    )
    asked = []

    def scripted(model, prompts, **options):
        asked.append({**options, "valid_vocab": model.form.valid_vocab})
        out = []
        for prompt in prompts:
            text, finished = script[tokenizer.decode(prompt, skip_special_tokens=True)]
            ids = tokenizer.encode(text, add_special_tokens=False)
            out.append(Sample(ids + [1] * finished, [-0.1] * (len(ids) + finished), finished))
        return out

    monkeypatch.setattr(generations, "sample", scripted)
    config = from_hf(tiny.raw_config())
    params = transformer.init_params(config, jax.random.key(0))
    graded = ask(config, params, tokenizer, read_problems(file), max_new_tokens=20, batch_size=2)
    row = measure(graded, seconds=2.0)
    assert asked[0]["temperature"] == 0.0
    assert asked[0]["eos_ids"] == (1,)
    assert asked[0]["valid_vocab"] == len(tokenizer)
    assert (row["problems"], row["correct"], row["accuracy"], row["seconds"]) == (4, 2, 0.5, 2.0)
    assert (row["no_answer"], row["truncated"]) == (0.25, 0.25)
    assert [g.correct for g in graded] == [True, True, False, False]
    assert [g.extracted for g in graded] == ["3", "11", "12", None]
    assert graded[1].completion == "9+2=11\n#### 11"
    assert row["tokens"] == sum(g.tokens for g in graded)
    assert (row["low"], row["high"]) == wilson(2, 4)
    kept = tmp_path / "generations.jsonl"
    kept.write_text("".join(map(generations.to_line, graded)))
    assert generations.read_generations(kept) == graded
    # The last number of an answer that was cut off counts only where a key says so.
    script["1+2?"] = ("1+2=3", False)
    problems = read_problems(file, limit=1)
    for key in ({}, {"grade_truncated": True}):
        (cut,) = ask(config, params, tokenizer, problems, max_new_tokens=9, batch_size=1, **key)
        assert (cut.correct, cut.extracted) == ((True, "3") if key else (False, None))


def test_a_real_model_is_decoded_greedily_from_its_chat_prompt(tmp_path, tokenizer):
    config = from_hf(tiny.raw_config())
    params = transformer.init_params(config, jax.random.key(0))
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+2?", "answer": "3"}])
    problems = read_problems(file)
    (found,) = ask(config, params, tokenizer, problems, max_new_tokens=8, batch_size=1)
    ids = chat.encode_prompt(tokenizer, problems[0].messages)
    step = jax.jit(lambda tokens: transformer.logits(config, params, tokens))
    tokens = np.zeros((1, len(ids) + 8), np.int32)
    tokens[0, : len(ids)] = ids
    for place in range(len(ids), len(ids) + 8):
        tokens[0, place] = np.asarray(step(tokens))[0, place - 1, : len(tokenizer)].argmax()
    expected = tokens[0, len(ids) :].tolist()
    expected = expected[: expected.index(1)] if 1 in expected else expected
    assert found.completion == generations.decode_text(tokenizer, expected)


def test_stop_ids_are_the_models_and_the_tokenizers(tokenizer):
    for given, expected in (([7, 3], (1, 3, 7)), (None, (1,))):
        model_config = from_hf(tiny.raw_config(eos_token_id=given))
        assert stop_ids(model_config, tokenizer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 4 + 4 = 8 and the answer is 8. " * 5, True),
        ("First we add. " + "wait, no. " * 10, True),
        ("ha" * 30, True),
        ("ha" * 29, False),  # 58 characters
        ("0" * 60, True),
        ("We add 1 and 2, which is 3. Then we double it and get 6.\n#### 6", False),
        ("a long sentence that is said three times over and over. " * 3, False),
        ("wait, no. " * 10 + "Now the answer: 5, because of what was said above.", False),
        ("wait, no, I should start again. " * 6 + "wait, no, I sh", True),  # cut off in a loop
        ("", False),
    ],
)
def test_a_loop_at_the_end_is_found(text, expected):
    assert generations.loops(text) is expected


def test_a_loop_of_a_long_unit_in_a_long_text():
    unit = "".join(chr(97 + (k * k) % 23) for k in range(900)) + "."
    assert generations.loops("q" * 50_000 + "." + unit * 4)
    assert not generations.loops("q" * 50_000 + "." + unit * 3)
    assert not generations.loops(unit * 100 + "so it is 4")
