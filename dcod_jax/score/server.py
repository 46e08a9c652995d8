"""The client of a server that scores traces (vLLM, SGLang, llama.cpp): requests and attempts.

dialects.py says what is asked and what an answer must be.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import reprlib
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.data.tokenizer import Tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.score.dialects import DIALECTS, Asked, scored
from dcod_jax.score.teacher import entry_weights
from dcod_jax.types import Trace

KEY = "OPENAI_API_KEY"  # environment variable; sent where it is set
_AGAIN = (408, 409, 425, 429)  # and every 5xx: the server may answer the same request later
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds between attempts
_ENTRY_BYTES = 600  # of an answer, for one token of one position
_TOLD = 100  # of what a server says of itself, so many entries of at most 200 characters are kept
_SHOWN = reprlib.Repr()  # of an answer, which may be large
_SHOWN.maxstring = 200


class _RefusedError(DcodError):
    """A request that will never be answered."""


class _UnavailableError(Exception):
    """An attempt that failed; the same request may succeed later, in `pause` seconds."""

    def __init__(self, why: str, pause: str | None = None):
        super().__init__(why)
        self.pause = min(float(pause), _LONGEST_PAUSE) if pause and pause.isdecimal() else 0.0


@dataclasses.dataclass(frozen=True)
class ServedTeacher:
    """A model behind a server, as it described itself when it was opened."""

    entry: TeacherEntry
    url: str
    tokenizer: Tokenizer
    about: dict[str, Any]  # what the server says of itself and of the model
    longest: int  # tokens that it reads; 0: it does not say
    concurrency: int
    retries: int
    timeout: float  # seconds

    @property
    def name(self) -> str:
        """The model's name on the server."""
        return self.entry.model

    def provenance(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "name": self.name,
            "revision": self.entry.revision,
            "weights": entry_weights(self.entry),
            "server": self.about | {"dialect": self.entry.dialect, "temperature": 1.0},
        }

    def score(
        self,
        traces: Sequence[Trace],
        *,
        top_k: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[Trace]:
        """The traces with their log-probs; the first that fails ends the others.

        Raises DcodError where the server tells of another model behind them than when it was
        opened, as after a restart.
        """
        stopped, found = threading.Event(), []
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        try:
            waiting = [pool.submit(self._score_one, t, top_k, stopped) for t in traces]
            for trace, future in zip(traces, waiting, strict=True):
                found.append(future.result())
                on_tokens(len(trace.token_ids))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        now = _told(self)[0]
        if changed := [key for key in {**self.about, **now} if self.about.get(key) != now.get(key)]:
            was, is_now = ({key: of.get(key) for key in changed} for of in (self.about, now))
            raise DcodError(
                f"{self.url} was {was} when it was opened and is {is_now} now: another model or "
                "version; finished shards are kept; serve the first one again, or score anew"
            )
        return found

    def _score_one(self, trace: Trace, top_k: int, stopped: threading.Event) -> Trace:
        count = len(trace.token_ids)
        if self.longest and count >= self.longest:
            raise DcodError(
                f"trace {trace.id!r} has {count} tokens, {self.url} reads {self.longest - 1} of "
                f"{self.name}; lower data.max_length and prepare again"
            )
        places = np.flatnonzero(trace.completion_mask).tolist()
        asked = Asked(trace, places, top_k, self.name, self.tokenizer)
        dialect = DIALECTS[self.entry.dialect]
        what = f"{self.url}{dialect.path}, trace {trace.id!r}"
        limit = (1 << 20) + (count * (top_k + 2) + len(self.tokenizer)) * _ENTRY_BYTES
        answers = []
        for body in dialect.bodies(asked):
            if stopped.is_set():  # by another trace's error, which is the one shown
                raise _RefusedError(f"{what}: stopped")
            answers.append(self._answer(dialect.path, body, limit, what, stopped))
        own = {_last_name(name) for name in (self.name, str(self.about.get("root", self.name)))}
        for said in [answer.get("model") for answer in answers if isinstance(answer, dict)]:
            if isinstance(said, str) and _last_name(said) not in own:
                raise DcodError(
                    f"{what}: the answer is by the model {said[:200]!r}: the server was started "
                    "again with another model, or passes requests on to one"
                )
        try:
            return scored(asked, dialect.read(answers, asked))
        except DcodError as error:
            raise DcodError(f"{what}: {error}") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DcodError(
                f"{what}: not an answer of the dialect {self.entry.dialect} with the prompt's "
                f"log-probs ({type(error).__name__}: {str(error)[:80]}): {_SHOWN.repr(answers[-1])}"
            ) from None

    def _answer(
        self,
        path: str,
        body: dict[str, Any] | None,
        limit: int,
        what: str,
        stopped: threading.Event,
    ) -> Any:
        """Attempts with pauses that double, each shortened at random by up to a half."""
        for attempt in range(self.retries + 1):
            try:
                return _ask(self.url + path, body, limit=limit, timeout=self.timeout, what=what)
            except _UnavailableError as error:
                if attempt == self.retries or stopped.is_set():
                    raise DcodError(
                        f"{what}: no answer in {attempt + 1} attempts ({error}); finished shards "
                        "are kept, so run the same command again when the server is well"
                    ) from None
                pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                stopped.wait(max(pause, error.pause))
        raise AssertionError("unreachable")


def _last_name(model: str) -> str:
    """big of org/big and of /models/big.gguf: servers and proxies put more before a name."""
    return model.rpartition("/")[2].removesuffix(".gguf")


def _ask(url: str, body: dict[str, Any] | None, *, limit: int, timeout: float, what: str) -> Any:
    """One attempt. Raises _UnavailableError where another may succeed, else DcodError."""
    headers = {"Content-Type": "application/json", "Connection": "close"}
    key = os.environ.get(KEY, "")
    if key and not re.fullmatch("[!-~]+", key):
        raise _RefusedError(
            f"{KEY} in the environment has blanks, ends of lines or letters that are not ASCII, "
            "and no request can carry it; set it again"
        )
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data, ends = None if body is None else json.dumps(body).encode(), time.monotonic() + timeout
    try:
        response, content = _exchange(url, data, headers, most=limit + 1, timeout=timeout)
    except (OSError, http.client.HTTPException) as error:
        late = f"not whole in {timeout:g} s (score.timeout)" if time.monotonic() > ends else error
        raise _UnavailableError(f"{type(error).__name__}: {late}") from None
    if (status := response.status) != http.HTTPStatus.OK:
        said = f"{status} {content[:500].decode('utf-8', 'replace')}"
        if status in _AGAIN or status >= 500:
            raise _UnavailableError(said, response.headers.get("Retry-After"))
        hint = f"; {KEY} in the environment is the key sent" if status in (401, 403) else ""
        if 300 <= status < 400:
            hint = f"; it sends requests to {str(response.headers.get('Location'))[:200]}: set "
            hint += "score.server (server= in score.teachers) to the place that answers"
        raise _RefusedError(f"{what}: the server refuses: {said}{hint}")
    if len(content) > limit:
        raise DcodError(f"{what}: an answer of more than {limit} bytes, which no such trace needs")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        begins = content[:60].decode("utf-8", "replace")
        why = f"an answer that is no JSON, {begins!r}: {str(error)[:80]}"
        raise _UnavailableError(why) from None


def _cut_off(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has been closed
        connection.shutdown(socket.SHUT_RDWR)


def _exchange(
    url: str, data: bytes | None, headers: dict[str, str], *, most: int, timeout: float
) -> tuple[http.client.HTTPResponse, bytes]:
    """(answer, its first `most` bytes) of one request, whole in `timeout` seconds or TimeoutError.

    No redirect is followed: neither the text nor the key goes to a place that nobody typed.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    direct = not proxy or urllib.request.proxy_bypass(parts.netloc)
    via = parts if direct else urllib.parse.urlsplit(proxy)
    kind = {"https": http.client.HTTPSConnection}.get(parts.scheme, http.client.HTTPConnection)
    connection = kind(via.hostname or "", via.port, timeout=timeout)
    if not direct and parts.scheme == "https":
        connection.set_tunnel(parts.hostname or "", parts.port)
    target = url if not direct and parts.scheme == "http" else parts.path
    ends = time.monotonic() + timeout
    with contextlib.closing(connection):
        connection.connect()
        end = threading.Timer(timeout, _cut_off, [connection.sock])
        end.daemon = True
        end.start()  # each byte of an answer may come in time, and the last one never
        try:
            connection.request("GET" if data is None else "POST", target, data, headers)
            with connection.getresponse() as response:
                content = response.read(most)
        finally:
            end.cancel()
    if time.monotonic() > ends:
        raise TimeoutError
    return response, content


def open_server(entry: TeacherEntry, settings: Any, tokenizer: Tokenizer) -> ServedTeacher:
    """The teacher behind entry.server; settings: score.* (concurrency, retries, timeout)."""
    url = entry.server.rstrip("/").removesuffix("/v1")
    options = (settings.concurrency, settings.retries, settings.timeout)
    teacher = ServedTeacher(entry, url, tokenizer, {}, 0, *options)
    about, slots = _told(teacher)
    longest = about.get("max_model_len", 0)
    # A trace more than llama-server's slots would have it read another's prompt at each token.
    own = min(teacher.concurrency, slots) if isinstance(slots, int) and slots > 0 else None
    return dataclasses.replace(
        teacher,
        about=about,
        longest=longest if type(longest) is int and longest > 0 else 0,
        concurrency=own or teacher.concurrency,
    )


def _told(teacher: ServedTeacher) -> tuple[dict[str, Any], Any]:
    """(what the server says of itself and of the model, how many requests it reads at once)."""
    entry, url = teacher.entry, teacher.url

    def get(path: str) -> Any:
        return teacher._answer(path, None, 1 << 20, url + path, threading.Event())

    try:
        cards = {card["id"]: card for card in get("/v1/models")["data"]}
    except (KeyError, TypeError) as error:
        raise DcodError(f"{url}/v1/models: not a list of models ({error!r})") from None
    if entry.model not in cards:
        raise DcodError(
            f"{url} has the models {', '.join(map(str, cards))[:500] or 'none'}, not "
            f"{entry.model!r}; set teacher.name (model= in score.teachers) to one of them"
        )
    card = cards[entry.model]
    if card.get("owned_by") == "llamacpp" and entry.dialect != "llama_server":
        raise DcodError(
            f"{url} is llama.cpp's llama-server, which tells nothing of a prompt's tokens in the "
            f"dialect {entry.dialect}; set score.dialect=llama_server (dialect= in score.teachers)"
        )
    told, slots = {key: card.get(key) for key in ("root", "max_model_len")}, None
    if path := DIALECTS[entry.dialect].about:
        with contextlib.suppress(_RefusedError):  # a proxy may pass /v1 alone
            more, names = get(path), DIALECTS[entry.dialect].told
            if isinstance(more, dict):
                told |= {key: more[key] for key in names or more if key in more}
                slots = more.get("total_slots")
    kept = [(key, value) for key, value in told.items() if isinstance(value, str | int)]
    plain = [(k, v) for k, v in kept if len(both := f"{k} {v}") <= 200 and both.isprintable()]
    return dict(plain[:_TOLD]), slots
