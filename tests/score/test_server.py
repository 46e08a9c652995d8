"""Traces scored by a server: exact, in each dialect; what it says is checked, and asked again."""

import dataclasses
import math
import time
import types

import fake_servers
import ml_dtypes
import numpy as np
import pytest
from fake_servers import DIALECTS, MODEL, make_traces, of_each, open_server, serve, tiny_tokenizer
from other_tokenizers import byte_level

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.errors import DcodError
from dcod_jax.score import scoring, server
from dcod_jax.types import Trace


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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
