"""What a server answers: another tokenizer, shifted log-probs and wrong answers are refused."""

import json
import random
import threading

import fake_servers
import numpy as np
import pytest
import tiny
from fake_servers import (
    BOS,
    DIALECTS,
    MODEL,
    make_traces,
    of_each,
    open_server,
    serve,
    tiny_tokenizer,
    vllm_entry,
)
from fuzz import mutated_json

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.errors import DcodError
from dcod_jax.score import server
from dcod_jax.types import Trace


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_another_tokenizer_is_refused_with_the_first_difference(tokenizer, dialect, tmp_path):
    alphabet = tiny.ALPHABET.replace("7", "X").replace("8", "7").replace("X", "8")
    other = tiny_tokenizer(tmp_path, alphabet=alphabet)
    seven = 5 + tiny.ALPHABET.index("7")
    ids = np.array([BOS, 6, 7, seven, seven + 1, 1], np.int32)
    trace = Trace("t", ids, np.arange(6) >= 2)
    with serve(dialect, MODEL, other) as fake:
        teacher = open_server(fake, tokenizer)
        if dialect == "llama_cpp":  # it gets the text, in which its ids are not ours
            assert teacher.score([trace], top_k=0)[0].logprobs is not None
            fake.tokenizer = tokenizer
            fake.change = lambda answer: _text_at(answer, 2, "8")
            place = f"at token 3, where id {seven} is '8' there and '7'"
        else:
            place = f"at token 3, where id {seven} is '8' there and '7'"
        with pytest.raises(DcodError, match=rf"'t': it has another tokenizer.*{place} in ours"):
            teacher.score([trace], top_k=0)


def _text_at(answer, place, text):
    answer["choices"][0]["logprobs"]["tokens"][place] = text
    return answer


def test_llama_cpp_is_refused_where_its_log_probs_are_shifted_or_its_tokens_others(tokenizer):
    traces = make_traces(1, first=4)  # no bos before the text
    with serve("llama_cpp", MODEL, tokenizer) as fake:
        teacher = open_server(fake, tokenizer)
        with pytest.raises(DcodError, match="log-probs are of the position before"):
            teacher.score(traces, top_k=0)
        fake.shifts = False
        scored = teacher.score(traces, top_k=0)[0]
        places = np.flatnonzero(scored.completion_mask)
        ids = scored.token_ids
        wanted = MODEL[ids[places - 1], ids[places]].astype(np.float32)
        np.testing.assert_array_equal(scored.logprobs, wanted)
        inside = Trace("t", np.array([BOS, 6, BOS, 7], np.int32), np.arange(4) >= 2)
        with pytest.raises(DcodError, match="the completion holds the bos token"):
            teacher.score([inside], top_k=0)
        fake.tokens = lambda text: [BOS, *tokenizer.encode(text, add_special_tokens=False)]
        with pytest.raises(DcodError, match="splits the text into 9 tokens, the trace has 8"):
            teacher.score(make_traces(1), top_k=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_mutated_answer_is_scored_or_refused_in_words(tokenizer, dialect, monkeypatch):
    fake, [trace], top_k = fake_of(dialect, tokenizer), make_traces(1), 2 * (dialect != "llama_cpp")
    entry = TeacherEntry("", server="http://h", model="big", dialect=dialect)
    teacher = server.ServedTeacher(entry, "http://h", tokenizer, {}, 0, 1, 0, 1.0)
    dice, refused = random.Random(dialect), []

    def answer(_, path, body, *rest):
        good = json.loads(json.dumps(getattr(fake, dialect)(body)))
        return mutated_json(good, dice) if dice.random() < 0.5 else good

    monkeypatch.setattr(server.ServedTeacher, "_answer", answer)
    for _ in range(MUTATIONS):
        try:
            found = teacher._score_one(trace, top_k, threading.Event())
        except DcodError as error:
            refused.append(str(error))
        else:
            assert np.isfinite(found.logprobs).all()
            assert (found.logprobs <= 0).all()
    assert 0 < len(refused) < MUTATIONS
    assert max(map(len, refused)) < 2000


MUTATIONS = 40


def fake_of(dialect, tokenizer):
    with fake_servers.FakeServer(dialect, MODEL, tokenizer) as server:
        return server


HOSTILE = {
    "no list": (lambda a: [], "not an answer of the dialect vllm"),
    "no choices": (lambda a: {"choices": []}, "not an answer of the dialect vllm"),
    "null": (lambda a: {"choices": [{"prompt_logprobs": None}]}, "list of 8 entries, found None"),
    "an error inside": (lambda a: {"error": {"message": "busy"}}, "KeyError.*busy"),
    "short": (
        lambda a: {"choices": [{"prompt_logprobs": a["choices"][0]["prompt_logprobs"][:-1]}]},
        "list of 8 entries, found 7 entries",
    ),
    "a position is null": (
        vllm_entry(lambda entry: None),
        r"prompt_logprobs\[7\] is null.*--no-enable-prefix-caching",
    ),
    "a page": (lambda a: b"<html>log in", "an answer that is no JSON, '<html>log in'"),
    "another model": (lambda a: a | {"model": "org/small"}, "is by the model 'org/small'"),
    "a model with more to its name": (lambda a: a | {"model": "big-2"}, "is by the model 'big-2'"),
    "own token is missing": (
        vllm_entry(lambda entry: {k: v for k, v in entry.items() if k != "1"}),
        r"prompt_logprobs\[7\] does not have the trace's token 1",
    ),
    "NaN": (of_each(logprob=float("nan")), "at token 7 is nan; expected a finite number"),
    "infinite": (of_each(logprob=float("-inf")), "at token 7 is -inf"),
    "positive": (of_each(logprob=0.5), "at token 7 is 0.5"),
    "text": (of_each(logprob="-0.5"), "at token 7 is -0.5; expected a finite number"),
    "true": (of_each(logprob=True), "at token 7 is True"),
    "digits": (of_each(logprob=-(10**400)), "the probability 0 .log-probability -1000"),
    "vLLM's -inf": (of_each(logprob=-9999.0), "gives token 7 the probability 0"),
    "too few": (
        vllm_entry(lambda entry: dict(sorted(entry.items(), key=lambda e: e[0] != "1")[:2])),
        "2 top tokens at token 7; score.top_k=3 asks for 3.*--max-logprobs",
    ),
    "no distribution": (of_each(logprob=-0.01), "top-3 probabilities at token 7 add up to 2.9"),
    "an id beyond": (
        vllm_entry(lambda entry: entry | {"49": {"logprob": -0.1}}),
        "a token at 7 has the id 49, our tokenizer has 49",
    ),
    "an id that is none": (
        vllm_entry(lambda entry: entry | {"x": {"logprob": -0.1}}),
        "not an answer of the dialect vllm.*ValueError",
    ),
    "an id in two forms": (
        vllm_entry(lambda entry: entry | {"01": {"logprob": -0.1}}),
        "not an answer of the dialect vllm.*no token id: '01'",
    ),
    "a long text": (of_each(decoded_token="\ufffd" * 500), "another tokenizer"),
    "a text that is none": (of_each(decoded_token=7), "another tokenizer.*is '7' there"),
    "too long": (lambda a: a | {"pad": "x" * (1 << 21)}, "an answer of more than .* bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_answer_is_refused_by_trace_and_token(tokenizer, name):
    change, message = HOSTILE[name]
    [trace] = make_traces(1)
    with serve("vllm", MODEL, tokenizer) as fake:
        fake.change = change
        with pytest.raises(DcodError, match=rf"(?s)trace 't0': .*{message}"):
            open_server(fake, tokenizer, retries=0).score([trace], top_k=3)


def sglang_answer(change):
    def spoil(answer):
        change(answer["meta_info"])
        return answer

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.pop("input_token_logprobs"), "KeyError"),
        (lambda info: info["input_token_logprobs"].pop(), "list of 4 entries, found 3"),
        (lambda info: info["input_top_logprobs"].pop(), "input_top_logprobs must be a list of 4"),
        (lambda info: info["input_token_logprobs"][1].pop(), "not an answer.*ValueError"),
        (lambda info: info["input_token_logprobs"][1].__setitem__(1, 48), "the server has 48"),
        (lambda info: info["input_top_logprobs"][2].pop(), "2 top tokens at token 6"),
        (
            lambda info: info["input_top_logprobs"][2].__setitem__(
                0, info["input_top_logprobs"][2][1]
            ),
            "3 top tokens at token 6; score.top_k=3 asks for 3 different ones",
        ),
        (lambda info: info["input_top_logprobs"][2][0].__setitem__(1, True), "has the id True"),
    ],
)
def test_a_wrong_answer_of_sglang_is_refused(tokenizer, change, message):
    with serve("sglang", MODEL, tokenizer) as fake:
        fake.change = sglang_answer(change)
        with pytest.raises(DcodError, match=rf"trace 't0': .*{message}"):
            open_server(fake, tokenizer).score(make_traces(1), top_k=3)
