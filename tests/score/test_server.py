"""Traces scored by a server: exact, in each dialect; what it says is checked, and asked again."""

import dataclasses
import json
import math
import random
import threading
import time
import types

import fake_servers
import ml_dtypes
import numpy as np
import pytest
import tiny
from fake_servers import serve
from fuzz import mutated_json
from other_tokenizers import byte_level

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.score import scoring, server
from dcod_jax.types import Trace

BOS = 2  # <user>: the tiny template begins with it, as SmolLM2's does with <|im_start|>
DIALECTS = ("vllm", "sglang", "llama_cpp", "llama_server")
MODEL = fake_servers.table(49)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    found = load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found.bos_token = "<user>"
    return found


def make_traces(count=5, *, first=BOS) -> list[Trace]:
    """Prompts that begin with <user>; the last trace has two turns."""
    generator = np.random.default_rng(7)
    traces = []
    for number in range(count):
        ids = np.concatenate([[first], generator.integers(5, 49, 6 + 5 * number), [1]])
        mask = np.arange(len(ids)) >= 3 + number
        if number == count - 1:
            mask[-6:-3] = False
        traces.append(Trace(f"t{number}", ids.astype(np.int32), mask))
    return traces


def open_server(fake, tokenizer, **changes):
    settings = {"concurrency": 2, "retries": 3, "timeout": 20.0} | changes
    entry = TeacherEntry("", server=fake.url, model="big", dialect=fake.dialect)
    return server.open_server(entry, types.SimpleNamespace(**settings), tokenizer)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server, "_FIRST_PAUSE", 0.01)


@pytest.mark.parametrize(
    ("dialect", "top_k"),
    [(d, k) for d in DIALECTS for k in (0, 3, 49) if d != "llama_cpp" or not k],
)
def test_scores_are_the_servers(tokenizer, dialect, top_k):
    traces = make_traces()
    with serve(dialect, MODEL, tokenizer) as fake:
        scored = open_server(fake, tokenizer).score(traces, top_k=top_k)
    for before, after in zip(traces, scored, strict=True):
        places = np.flatnonzero(before.completion_mask)
        rows = MODEL[before.token_ids[places - 1]]
        own = rows[np.arange(len(places)), before.token_ids[places]]
        np.testing.assert_array_equal(after.logprobs, own.astype(np.float32))
        np.testing.assert_array_equal(after.token_ids, before.token_ids)
        if not top_k:
            assert after.topk_ids is None
            continue
        order = np.argsort(-rows, axis=-1)[:, :top_k]
        best = np.take_along_axis(rows, order, axis=-1)
        np.testing.assert_array_equal(after.topk_ids, order)
        np.testing.assert_array_equal(after.topk_logprobs, best.astype(ml_dtypes.bfloat16))
        tail = np.log1p(-np.exp(best).sum(-1)) if top_k < 49 else scoring.TAIL_FLOOR
        np.testing.assert_allclose(after.tail_logprobs, tail, rtol=1e-5)


def test_token_ids_are_sent_where_the_dialect_takes_them(tokenizer, monkeypatch):
    monkeypatch.setenv(server.KEY, "secret")
    [trace] = make_traces(1)
    ids, asked = trace.token_ids.tolist(), {}
    for dialect in DIALECTS:
        with serve(dialect, MODEL, tokenizer) as fake:
            open_server(fake, tokenizer).score([trace], top_k=2 * (dialect != "llama_cpp"))
            asked[dialect] = fake.bodies
            assert set(fake.keys) == {"Bearer secret"}
    [(path, body)] = asked["vllm"]
    assert (path, body["prompt"], body["prompt_logprobs"]) == ("/v1/completions", ids, 2)
    [(path, body)] = asked["sglang"]
    assert (path, body["input_ids"], body["logprob_start_len"]) == ("/generate", ids, 4)
    [(path, body)] = asked["llama_cpp"]
    assert (path, body["echo"]) == ("/v1/completions", True)
    assert tokenizer.encode(body["prompt"], add_special_tokens=False) == ids
    places = np.flatnonzero(trace.completion_mask).tolist()
    assert [body["prompt"] for _, body in asked["llama_server"]] == [ids[:at] for at in places]
    assert [body["logit_bias"][0][0] for _, body in asked["llama_server"]] == ids[places[0] :]


def test_llama_server_tells_of_tokens_that_end_inside_a_character():
    """It leaves those out that it samples; the whole vocabulary has them."""
    pieces = byte_level([])
    model = fake_servers.table(len(pieces), seed=1)
    text = pieces.encode("a é🙂 z", add_special_tokens=False)
    ids = np.array([*text, pieces.eos_token_id], np.int32)
    trace = Trace("t", ids, np.arange(len(ids)) >= 1)
    with serve("llama_server", model, pieces) as fake:
        [found] = open_server(fake, pieces).score([trace], top_k=2)
        asked = [body["n_probs"] for _, body in fake.bodies]
        fake.change = _last_is_impossible
        [same] = open_server(fake, pieces).score([trace], top_k=2)
        for value, message in ((math.nan, "is nan"), (10**400, "is 1000"), (None, "TypeError")):
            fake.change = _last_is(value)
            with pytest.raises(DcodError, match=rf"trace 't': .*{message}"):
                open_server(fake, pieces).score([trace], top_k=2)
        fake.change = lambda answer: answer | {"tokens_evaluated": 1}
        with pytest.raises(DcodError, match="'t': it read 1 of the 2 tokens before token 2"):
            open_server(fake, pieces).score([trace], top_k=0)
        fake.change = lambda answer: _top(answer, [])
        with pytest.raises(DcodError, match=r"it has no log-prob of the token \d+ at 2"):
            open_server(fake, pieces).score([trace], top_k=0)
    assert asked == [2, 258, 2, 258, 2, 2, 2, 2, 2, 2]
    rows = model[ids[:-1]]
    np.testing.assert_array_equal(
        found.logprobs, rows[np.arange(len(rows)), ids[1:]].astype(np.float32)
    )
    np.testing.assert_array_equal(found.topk_ids, np.argsort(-rows, axis=-1)[:, :2])
    np.testing.assert_array_equal(same.topk_ids, found.topk_ids)


def _last_is_impossible(answer):
    for said in answer.get("completion_probabilities", []):
        if len(said["top_logprobs"]) > 2:
            said["top_logprobs"][-1]["logprob"] = -3.4e38  # as llama-server writes -inf
    return answer


def _last_is(value):
    """The last log-prob of a position's alternatives, which no order has as NaN."""

    def change(answer):
        for said in answer.get("completion_probabilities", []):
            said["top_logprobs"][-1]["logprob"] = value
        return answer

    return change


def _top(answer, entries):
    for said in answer.get("completion_probabilities", []):
        said["top_logprobs"] = entries
    return answer


def test_failed_attempts_are_repeated_and_a_refusal_is_not(tokenizer):
    traces = make_traces()
    with serve("vllm", MODEL, tokenizer) as fake:
        teacher = open_server(fake, tokenizer)
        wanted = teacher.score(traces, top_k=0)
        fake.faults, fake.bodies = [429, 500, "dropped", b'{"choices": [', b"\xff"], []
        found = teacher.score(traces, top_k=0)
        assert len(fake.bodies) == len(traces) + 5
        for left, right in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(left.logprobs, right.logprobs)
        fake.faults = [503] * 20
        with pytest.raises(DcodError, match=r"'t0'.*in 4 attempts \(503 .*same command again"):
            teacher.score(traces[:1], top_k=0)
        fake.faults, fake.bodies = [400], []
        with pytest.raises(DcodError, match=r"'t0': the server refuses: 400 .*fault 400"):
            teacher.score(traces[:1], top_k=0)
        assert len(fake.bodies) == 1
    with pytest.raises(DcodError, match=r"/v1/models: no answer in 4 attempts \(ConnectionRef"):
        open_server(fake, tokenizer)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"


def drip(piece, head=b""):
    """Bytes without end, each in time."""

    def write(file):
        file.write(head)
        while True:
            file.write(piece)
            time.sleep(0.02)

    return write


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda file: file.write(chunked(500)), r"in 1 attempts \(IncompleteRead"),
        (lambda file: file.write(chunked(400)), r"in 1 attempts \(IncompleteRead"),
        (drip(b" ", HEAD), r"in 1 attempts \(TimeoutError: not whole in 0.1 s \(score.timeout"),
        (drip(b" ", HEAD.replace(b"200", b"503")), "TimeoutError: not whole in 0.1 s"),
        (drip(b"HTTP/1.1 100 Continue\r\n\r\n"), "not whole in 0.1 s"),
        (drip(b"H"), "not whole in 0.1 s"),
        (lambda file: file.write(moved(302)), "refuses: 302 .*sends requests to http://else.where"),
        (lambda file: file.write(moved(308)), "refuses: 308 .*set score.server"),
    ],
)
def test_an_answer_without_an_end_and_one_that_sends_elsewhere(tokenizer, fault, message):
    """A redirect would take the trace, and the key, to a host that nobody typed."""
    with serve("vllm", MODEL, tokenizer) as fake:
        teacher = open_server(fake, tokenizer, retries=0)
        if "not whole" in message:
            teacher = dataclasses.replace(teacher, timeout=0.1)
        fake.faults = [fault]
        with pytest.raises(DcodError, match=rf"trace 't0': .*{message}"):
            teacher.score(make_traces(1), top_k=0)


def chunked(status):
    return b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % status


def moved(status):
    return b"HTTP/1.1 %d X\r\nLocation: http://else.where/\r\nContent-Length: 0\r\n\r\n" % status


def test_a_key_that_no_request_can_carry_and_a_proxy(tokenizer, monkeypatch):
    with serve("vllm", MODEL, tokenizer) as fake:
        for key in ("secret\r", "secret key", "secr\u00e9t"):
            monkeypatch.setenv(server.KEY, key)
            with pytest.raises(DcodError, match=r"OPENAI_API_KEY.* set it again") as refused:
                open_server(fake, tokenizer)
            assert "secr" not in str(refused.value)
        monkeypatch.delenv(server.KEY)
        monkeypatch.setenv("http_proxy", fake.url)
        far = types.SimpleNamespace(url="http://big.example:8000", dialect="vllm")
        with pytest.raises(DcodError, match=r"big.example:8000/v1/models: .*refuses: 404"):
            open_server(far, tokenizer)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert open_server(fake, tokenizer).longest == 512


def test_a_server_that_is_another_one_after_its_answers_is_refused(tokenizer):
    traces = make_traces(2)
    with serve("vllm", MODEL, tokenizer) as fake:
        fake.change = of_each(decoded_token="token_id:7")
        with pytest.raises(DcodError, match="another tokenizer"):
            open_server(fake, tokenizer).score(traces, top_k=0)
        fake.change = _as_ids
        teacher = open_server(fake, tokenizer)
        teacher.score(traces, top_k=0)
        fake.longest = 600
        wanted = r"was {'max_model_len': 512} when it was opened and is {'max_model_len': 600} now"
        with pytest.raises(DcodError, match=wanted):
            teacher.score(traces, top_k=0)


def _as_ids(answer):
    for entry in answer["choices"][0]["prompt_logprobs"][1:]:
        for token, value in entry.items():
            value["decoded_token"] = f"token_id:{token}"
    return answer


def test_requests_run_together_up_to_the_limit(tokenizer):
    with serve("vllm", MODEL, tokenizer) as fake:
        fake.patience = 20.0
        open_server(fake, tokenizer, concurrency=2).score(make_traces(8), top_k=0)
    assert fake.most_busy == 2


def test_what_the_server_is_and_reads(tokenizer):
    with serve("vllm", MODEL, tokenizer) as fake:
        about = open_server(fake, tokenizer).provenance()
        assert about == {
            "name": "big",
            "revision": "",
            "weights": "served: big",
            "server": {
                "dialect": "vllm",
                "temperature": 1.0,
                "max_model_len": 512,
                "version": "0.11.0",
            },
        }
        fake.proxied = True  # and nothing but /v1 is passed
        assert "version" not in open_server(fake, tokenizer).provenance()["server"]
        fake.faults = [401]
        with pytest.raises(DcodError, match=r"refuses: 401 .*OPENAI_API_KEY in the environment"):
            open_server(fake, tokenizer).score(make_traces(1), top_k=0)
        fake.longest = 8
        with pytest.raises(DcodError, match=r"'t0' has 8 tokens.* reads 7 of big.*data.max_length"):
            open_server(fake, tokenizer).score(make_traces(), top_k=0)
        for fake.longest in (-5, True, 1e30, "512", None):
            assert open_server(fake, tokenizer).longest == 0
        fake.proxied, fake.about = (
            False,
            {"version": "\ud800", "a" * 300: "", **{f"k{i}": i for i in range(300)}},
        )
        assert len(open_server(fake, tokenizer).about) == 100
        fake.name = "other"
        with pytest.raises(DcodError, match=r"has the models other, not 'big'; set teacher.name"):
            open_server(fake, tokenizer)
        fake.name = "x" * 100_000
        with pytest.raises(DcodError, match=r"has the models x+, not 'big'; set teacher.name") as e:
            open_server(fake, tokenizer)
        assert len(str(e.value)) < 1000
    with serve("llama_server", MODEL, tokenizer) as fake:
        about = open_server(fake, tokenizer).provenance()["server"]
        assert (about["model_path"], about["build_info"]) == ("big.gguf", "b1")
        assert "total_slots" not in about  # which is no other model, but limits the requests
        assert [open_server(fake, tokenizer, concurrency=n).concurrency for n in (2, 16)] == [2, 3]
        entry = TeacherEntry("", server=fake.url, model="big", dialect="llama_cpp")
        settings = types.SimpleNamespace(concurrency=1, retries=0, timeout=5.0)
        with pytest.raises(DcodError, match=r"is llama.cpp's llama-server.*=llama_server"):
            server.open_server(entry, settings, tokenizer)
    with serve("sglang", MODEL, tokenizer) as fake:
        about = open_server(fake, tokenizer).provenance()["server"]
        assert about["model_path"] == "org/big"
        fake.dialect = "vllm"  # asked for SGLang's path, which it does not have
        entry = TeacherEntry("", server=fake.url, model="big", dialect="sglang")
        fake.faults = [404]
        with pytest.raises(DcodError, match=r"/generate, trace 't0': the server refuses: 404"):
            server.open_server(entry, settings, tokenizer).score(make_traces(1), top_k=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_another_tokenizer_is_refused_with_the_first_difference(tokenizer, dialect, tmp_path):
    alphabet = tiny.ALPHABET.replace("7", "X").replace("8", "7").replace("X", "8")
    other = load_tokenizer(tiny.write_tokenizer(tmp_path, alphabet=alphabet))
    other.bos_token = "<user>"
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


def vllm_entry(change):
    """An answer whose entry of the last token is changed."""

    def spoil(answer):
        entries = answer["choices"][0]["prompt_logprobs"]
        entries[-1] = change(entries[-1])
        return answer

    return spoil


def of_each(**changes):
    return vllm_entry(lambda entry: {key: value | changes for key, value in entry.items()})


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
