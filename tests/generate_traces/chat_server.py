"""A server of chat completions that fails in every way, for tests of tools/openai_traces.py."""

import collections
import http.server
import json
import threading

FAILURES = ("429", "500", "dropped", "cut", "garbage", "")  # one after the other, by prompt


class Server(http.server.ThreadingHTTPServer):
    """Answers "a+b?" with its sum; the first attempts of each request fail in some way."""

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.failing, self.scores = tokenizer, True, True
        self.dialect = lambda text: {"content": text}  # how a message says it
        self.attempts, self.bodies = collections.Counter(), []
        self.busy = self.most_busy = self.patience = 0
        self.together = threading.Event()  # two requests at once: the first waits for the second
        self.lock = threading.Lock()

    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.bodies.append((self.path, self.headers.get("Authorization"), body))
            attempt = server.attempts[question, body["seed"]]
            server.attempts[question, body["seed"]] += 1
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            if server.busy > 1:
                server.together.set()
        if not server.together.wait(server.patience):
            server.patience = 0
        try:
            kind = FAILURES[(body["seed"] + attempt) % len(FAILURES)] if server.failing else ""
            self.reply(kind, body, question)
        finally:
            with server.lock:
                server.busy -= 1

    def reply(self, kind, body, question):
        if body["model"] != "tiny":
            return self.send(404, {"error": {"message": "no such model"}})
        if question.startswith("long"):
            return self.send(400, {"error": {"message": "the prompt is too long"}})
        if question.startswith("filtered"):
            choice = {"index": 0, "message": {"role": "assistant", "content": None}}
            return self.send(200, {"choices": [choice]})
        if kind == "dropped":
            self.close_connection = True
            return None
        if kind in ("429", "500"):
            return self.send(int(kind), {"error": kind}, {"Retry-After": "0"})
        first, second = question.rstrip("?").split("+")
        text = f"#### {int(first) + int(second)}"
        ids = [*self.server.tokenizer.encode(text, add_special_tokens=False), 1]
        logprobs = {"content": [{"token": "x", "logprob": -0.5} for _ in ids]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "tool_calls": [], **self.server.dialect(text)},
            "finish_reason": "stop",
            "token_ids": ids if body.get("return_token_ids") else None,
            "logprobs": logprobs if body.get("logprobs") and self.server.scores else None,
        }
        answer = {"id": "c", "object": "chat.completion", "model": "tiny", "choices": [choice]}
        return self.send(200, answer, cut=kind == "cut", garbage=kind == "garbage")

    def send(self, status, content, headers=None, *, cut=False, garbage=False):
        data = b"<html>" if garbage else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut
