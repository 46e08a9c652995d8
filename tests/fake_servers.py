"""Servers with log-probs as vLLM, SGLang and both of llama.cpp's document them, on a table.

The model is a table of log-probs of the next token, by the token before. What a dialect sends was
written from vLLM's and SGLang's documentation of /v1/completions and /generate, and from
llama-cpp-python's create_completion, its shift of texts without a bos token included. llama-server
is as its own code: it tells of the token that it samples, unless that ends inside a character.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import http.server
import itertools
import json
import threading
import types

import numpy as np
import tiny

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.data.tokenizer import decode, load_tokenizer, token_bytes
from dcod_jax.score import server
from dcod_jax.types import Trace

BOS = 2  # <user>: the tiny template begins with it, as SmolLM2's does with <|im_start|>
DIALECTS = ("vllm", "sglang", "llama_cpp", "llama_server")


def table(vocabulary: int, *, seed: int = 0) -> np.ndarray:
    """float64 [V, V], log p(next | token before)."""
    logits = np.random.default_rng(seed).normal(0, 2, (vocabulary, vocabulary))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


MODEL = table(49)


class FakeServer(http.server.ThreadingHTTPServer):
    """`change(answer)` may spoil an answer; `faults` holds what the first attempts get."""

    daemon_threads = True

    def __init__(self, dialect, model, tokenizer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dialect, self.model, self.tokenizer = dialect, model, tokenizer
        self.name, self.longest, self.shifts, self.proxied = "big", 512, True, False
        self.change, self.faults = (lambda answer: answer), []
        self.about = {"version": "0.11.0"}
        self.bodies, self.keys = [], []
        self.busy = self.most_busy = self.patience = 0
        self.together = threading.Event()  # of the first two requests, where patience is set
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, token_id: int) -> str:
        return decode(self.tokenizer, [int(token_id)])

    def top(self, before: int, count: int) -> list[int]:
        return np.argsort(-self.model[before], kind="stable")[:count].tolist()

    def vllm(self, body):
        ids, k, entries = body["prompt"], body["prompt_logprobs"], [None]
        for before, own in itertools.pairwise(ids):
            order = np.argsort(-self.model[before], kind="stable").tolist()
            shown = dict.fromkeys([own, *order[:k]])
            entries.append(
                {
                    str(t): {
                        "logprob": self.model[before, t],
                        "rank": order.index(t) + 1,
                        "decoded_token": self.text(t),
                    }
                    for t in shown
                }
            )
        choice = {"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": entries}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def sglang(self, body):
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        own, tops = [[None, ids[start], self.text(ids[start])]], [None]
        for before, token in itertools.pairwise(ids[start:]):
            own.append([self.model[before, token], token, self.text(token)])
            tops.append([[self.model[before, t], t, self.text(t)] for t in self.top(before, k)])
        about = {"prompt_tokens": len(ids), "input_token_logprobs": own}
        return {"text": "x", "meta_info": about | ({"input_top_logprobs": tops} if k else {})}

    def llama_cpp(self, body):
        ids, bos = self.tokens(body["prompt"]), self.tokenizer.bos_token_id
        rows = [self.model[token] for token in ids]  # the distribution behind each token
        whole = [*ids[ids[0] == bos :], self.top(ids[-1], 1)[0]]
        if not self.shifts and ids[0] != bos:
            rows = [np.zeros(len(self.model)), *rows]
        said = collections.defaultdict(list)
        for token, row in zip(whole, rows, strict=False):
            if token == bos:
                continue
            text = "" if token in self.tokenizer.added_tokens_decoder else self.text(token)
            order = np.argsort(-row, kind="stable")[: body["logprobs"]]
            said["tokens"].append(text)
            said["token_logprobs"].append(row[token])
            said["top_logprobs"].append({self.text(t): row[t] for t in order} | {text: row[token]})
        said["token_logprobs"][0] = said["top_logprobs"][0] = None
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return {"choices": [{"text": body["prompt"], "logprobs": said}], "usage": usage}

    def llama_server(self, body):
        row, special = self.model[body["prompt"][-1]], self.tokenizer.added_tokens_decoder
        [[token, bias]] = body["logit_bias"]
        sampled = np.argmax(row + bias * (np.arange(len(row)) == token))

        def said(token):
            text = "" if token in special else self.text(token)
            return {"id": int(token), "token": text, "logprob": row[token]}

        top = [said(t) for t in self.top(body["prompt"][-1], body["n_probs"])]
        found = [said(sampled) | {"top_logprobs": top}]
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(*token_bytes(self.tokenizer, [int(sampled)]))
        told = {} if reader.getstate()[0] else {"completion_probabilities": found}
        return {"tokens_evaluated": len(body["prompt"])} | told


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, value, status=200):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    def do_GET(self):
        server = self.server
        card = {"id": server.name, "object": "model", "max_model_len": server.longest}
        if server.dialect == "llama_server":
            card["owned_by"] = "llamacpp"
        said = {
            "/v1/models": {"object": "list", "data": [card]},
            "/version": server.about,
            "/get_model_info": {"model_path": "org/big", "is_generation": True},
            "/props": {"model_path": "big.gguf", "build_info": "b1", "total_slots": 3},
        }
        said = None if server.proxied and self.path != "/v1/models" else said.get(self.path)
        self._send(said or {"detail": "Not Found"}, 200 if said else 404)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append((self.path, body))
            server.keys.append(self.headers.get("Authorization"))
            fault = server.faults.pop(0) if server.faults else None
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            if server.busy == 2:
                server.together.set()
        if server.patience:
            server.together.wait(server.patience)
        if fault is None:
            self._send(server.change(getattr(server, server.dialect)(body)))
        elif fault == "dropped":
            self.close_connection = True
        elif isinstance(fault, bytes):
            self._send(fault)
        elif callable(fault):
            self.close_connection = True
            with contextlib.suppress(ConnectionError):
                fault(self.wfile)
        else:
            self._send({"error": f"fault {fault}"}, fault)
        with server.lock:
            server.busy -= 1


@contextlib.contextmanager
def serve(dialect, model, tokenizer):
    """A server in a thread of its own."""
    with FakeServer(dialect, model, tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def tiny_tokenizer(directory, **options):
    """tiny's, with a bos token."""
    found = load_tokenizer(tiny.write_tokenizer(directory, **options))
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


def vllm_entry(change):
    """An answer whose entry of the last token is changed."""

    def spoil(answer):
        entries = answer["choices"][0]["prompt_logprobs"]
        entries[-1] = change(entries[-1])
        return answer

    return spoil


def of_each(**changes):
    return vllm_entry(lambda entry: {key: value | changes for key, value in entry.items()})
