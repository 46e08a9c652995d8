"""The tool that samples from a server: a local one that fails often, resumed, read by prepare."""

import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from chat_server import Server

from dcod_jax import config as configs
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.presets import Fields
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.prepare.command import prepare

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "openai_traces.py"
tool = runpy.run_path(str(TOOL))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(home):
    with Server(load_tokenizer(home)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def write_prompts(path, count=6):
    fields = ("id", "prompt", "answer")
    return tiny.write_jsonl(path, [{k: r[k] for k in fields} for r in tiny.sums(count)])


def call(server, prompts, output, *more):
    words = [str(prompts), str(output), "--model=tiny", f"--url={server.url()}", "--n=3"]
    return tool["main"]([*words, "--pause=0.01", "--concurrency=4", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_that_fails_is_asked_again_until_everything_is_answered(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    prompts, output = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    server.patience = 60
    assert call(server, prompts, output, "--top-p=0.9", "--stop=x", '--extra={"user": "u"}') == 0
    records = lines(output)
    names = {f"{r['id']}-{k}" for r in tiny.sums(6) for k in range(3)}
    assert len(records) == 18
    assert {r["custom_id"] for r in records} == names
    assert len(server.bodies) > 18
    assert 1 < server.most_busy <= 4
    path, key, body = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
    assert (body["top_p"], body["stop"], body["user"]) == (0.9, ["x"], "u")
    assert "top_k" not in body
    assert "logprobs" not in body
    assert len({r["request"]["body"]["seed"] for r in records}) == 18
    traces = list(read_traces(find_sources(str(output)), Fields()))
    by_id = {r["id"]: r for r in tiny.sums(6)}
    for trace in traces:
        source = by_id[trace.id.rpartition("-")[0]]
        assert trace.messages[0] == {"role": "user", "content": source["prompt"]}
        assert trace.completion_text() == f"#### {source['answer']}"
        assert (trace.answer, trace.temperature) == (source["answer"], 1.0)
        assert (trace.model, trace.finish_reason) == ("tiny", "stop")


DIALECTS = {
    "deepseek": lambda text: {"content": text, "reasoning_content": "so"},
    "vllm": lambda text: {"content": f"\n\n{text}", "reasoning": "so", "reasoning_content": "so"},
    "sglang": lambda text: {"content": text, "reasoning_content": "so\n"},
    "ollama": lambda text: {"content": text, "thinking": "so"},
    "inline": lambda text: {"content": f"<think>\nso\n</think>\n\n{text}"},
    "parts": lambda text: {
        "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": text}]
    },
    "unfinished": lambda text: {"content": None, "reasoning_content": "so"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_reasoning_of_every_dialect_comes_through(server, tmp_path, name):
    server.failing, server.dialect = False, DIALECTS[name]
    prompts, output = write_prompts(tmp_path / "p.jsonl", 1), tmp_path / "out.jsonl"
    assert call(server, prompts, output) == 0
    traces = list(read_traces(find_sources(str(output)), Fields()))
    assert [bool(trace.unfinished) for trace in traces] == [name == "unfinished"] * 3
    if name != "unfinished":
        text = f"<think>\nso\n</think>\n\n#### {tiny.sums(1)[0]['answer']}"
        assert {trace.completion_text() for trace in traces} == {text}


def test_what_is_answered_is_not_asked_again_and_a_cut_line_is_mended(server, tmp_path, capsys):
    server.failing = False
    prompts, output = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    assert call(server, prompts, output) == 0
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:10]) + whole[10][:40])
    asked = len(server.bodies)
    assert call(server, prompts, output) == 0
    assert "removed a last line that was cut off (40 bytes)" in capsys.readouterr().out
    assert len(server.bodies) == asked + 8
    assert output.read_bytes().splitlines(keepends=True)[:10] == whole[:10]
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(whole)
    assert call(server, prompts, output, "--n=4") == 0  # more samples of the same prompts
    assert len(server.bodies) == asked + 8 + 6
    assert len({r["custom_id"] for r in lines(output)}) == 24
    assert call(server, prompts, output, "--temperature=0.5") == 2
    assert "asked with other temperature" in capsys.readouterr().err


def test_a_file_without_any_whole_line_is_emptied(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * 200_000)
    assert tool["repair"](path) == 200_000
    assert path.read_bytes() == b""
    path.write_bytes(b"{}\n" + b"a" * 200_000)
    assert tool["repair"](path) == 200_000
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize("content", ['{"prompt": "1+1?"}\n{"prompt": "2+2?"}', '{"a": 1}', "notes"])
def test_a_file_of_someone_else_keeps_every_byte(server, tmp_path, capsys, content):
    """Also its last line, which has no newline as one that was cut off has none."""
    prompts, other = write_prompts(tmp_path / "p.jsonl"), tmp_path / "other"
    other.write_text(content)
    assert call(server, prompts, other) == 2
    assert "other:1: not a line of this tool" in capsys.readouterr().err
    assert call(server, other, other) == 2
    assert other.read_text() == content
    assert not server.bodies


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": 5}', "p:1: prompt must be non-empty text or a list of"),
        ('{"messages": []}', "p:1: messages must be non-empty text"),
        ('{"messages": [{"role": "user"}]}', "p:1: messages must be non-empty text"),
        ('\n{"text": "a"}', "p:2: no prompt; expected one of prompt, question"),
        ("[1]", "p:1: no prompt"),
        ("", "p: no prompts; expected one JSON object a line"),
        (b"\xff", "p: not UTF-8 at byte 0"),
        (None, "p: No such file"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "p"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [str(path), str(tmp_path / "o"), "--model=m", "--system=s", "--url=http://127.0.0.1:9"]
    assert tool["main"](words) == 2
    assert f"{tmp_path}/{message}" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_prompts_as_other_programs_write_them(server, home, tmp_path):
    """A byte order mark, CRLF, ids and prompts that are null, and a field named "error"."""
    server.failing = False
    prompts, output = tmp_path / "p.jsonl", tmp_path / "new" / "o.jsonl"
    record = b'{"id": null, "prompt": null, "question": "%d+1?", "answer": %d, "error": "x"}\r\n'
    prompts.write_bytes(b"\xef\xbb\xbf" + record % (1, 2) + record % (2, 3))
    more = ("--logprobs", '--extra={"return_token_ids": true}', "--n=1")
    assert call(server, prompts, output, *more) == 0
    assert sorted(r["custom_id"] for r in lines(output)) == ["0-0", "1-0"]
    assert len(prepared(home, tmp_path, str(output))) == 2  # graded: prepare drops wrong ones


def test_answers_that_prepare_could_not_read_are_not_kept(server, tmp_path, capsys):
    server.failing = False
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "f", "prompt": "filtered+1?"}\n{"id": "g", "prompt": "1+1?"}\n')
    assert call(server, prompts, tmp_path / "o.jsonl", "--n=1") == 1
    assert "f-0: gave up: an answer without text" in capsys.readouterr().err
    assert [r["custom_id"] for r in lines(tmp_path / "o.jsonl")] == ["g-0"]
    server.scores = False
    assert call(server, prompts, tmp_path / "l.jsonl", "--logprobs") == 2
    assert "its answers have no log-probs; leave --logprobs out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--url=localhost:8000/v1", "expected http://HOST:PORT/v1"),
        ("--timeout=0", "--timeout must be above 0"),
        ("--n=0", "--n and --concurrency must be at least 1"),
        ("--extra=[]", "--extra must be a JSON object"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, capsys, word, message):
    with pytest.raises(SystemExit):
        tool["main"]([str(tmp_path / "p"), str(tmp_path / "o"), "--model=m", word])
    assert message in capsys.readouterr().err


def test_what_can_not_be_answered_is_told_and_the_rest_goes_on(server, tmp_path, capsys):
    server.failing = False
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    with open(prompts, "a") as file:
        file.write('{"id": "l", "prompt": "long+1?"}\n')
    assert call(server, prompts, tmp_path / "out.jsonl") == 1
    assert "l-0: gave up: 400" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.jsonl")) == 6
    assert call(server, prompts, tmp_path / "other.jsonl", "--model=unknown") == 2
    assert "no such model" in capsys.readouterr().err
    server.failing = True
    assert call(server, prompts, tmp_path / "few.jsonl", "--retries=0") == 1


def prepared(home, tmp_path, traces):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(tmp_path / "run")
    config.data.traces = traces
    config.student.tokenizer = str(home)
    config.prepare.logprobs = "require"
    config.prepare.deduplicate = False
    prepare(config)
    dataset = TraceDataset(tmp_path / "run" / "dataset" / "train")
    return dataset.read(range(len(dataset)))


def test_prepare_takes_the_answers_with_their_logprobs(server, home, tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 8), tmp_path / "out.jsonl"
    assert call(server, prompts, output, "--logprobs", '--extra={"return_token_ids": true}') == 0
    traces = prepared(home, tmp_path, str(output))
    assert len(traces) == 24
    for trace in traces:
        np.testing.assert_array_equal(trace.logprobs, np.full(trace.completion_mask.sum(), -0.5))


def test_prepare_takes_a_batch_that_vllm_ran_from_its_request_file(home, tmp_path):
    """`vllm run-batch` with n = 2 and log-probs whose tokens are given as ids."""
    tokenizer = load_tokenizer(home)
    requests, outputs, expected = [], [], {}
    for place, record in enumerate(tiny.sums(3)):
        body = {
            "model": "served",
            "messages": [{"role": "user", "content": record["prompt"]}],
            "n": 2,
            "temperature": 0.7,
            "logprobs": True,
            "return_tokens_as_token_ids": True,
        }
        name = f"request-{place}"
        requests.append(
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        )
        choices = []
        for index in range(2):
            text = record["completion"] if index else f"#### {record['answer']}"
            ids = [*tokenizer.encode(text, add_special_tokens=False), 1]
            values = [-0.125 * (k + 1 + index) for k in range(len(ids))]
            content = [
                {"token": f"token_id:{i}", "logprob": v, "bytes": None, "top_logprobs": []}
                for i, v in zip(ids, values, strict=True)
            ]
            message = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning_content": None,
            }
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": content},
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "token_ids": None,
                }
            )
            expected[f"{name}/{index}"] = values
        answer = {
            "id": f"chatcmpl-{place}",
            "object": "chat.completion",
            "created": 1760000000,
            "model": "served",
            "choices": choices,
            "usage": {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25},
            "prompt_logprobs": None,
        }
        response = {"status_code": 200, "request_id": f"vllm-batch-{place}", "body": answer}
        outputs.append(
            {"id": f"vllm-{place}", "custom_id": name, "response": response, "error": None}
        )
    asked = tiny.write_jsonl(tmp_path / "requests.jsonl", requests)
    given = tiny.write_jsonl(tmp_path / "outputs.jsonl", list(reversed(outputs)))
    traces = prepared(home, tmp_path, f"{asked},{given}")
    assert {trace.id for trace in traces} == set(expected)
    for trace in traces:
        np.testing.assert_array_equal(trace.logprobs, np.float32(expected[trace.id]))


def test_help_names_the_options_and_needs_nothing_but_python(tmp_path):
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(TOOL), "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--concurrency", "--retries", "--logprobs", "--extra", "--n"):
        assert option in done.stdout
