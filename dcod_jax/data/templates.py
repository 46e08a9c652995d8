"""Chat templates as text, rendered by template_process.py, which a hostile one can only end."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from dcod_jax.data import template_process
from dcod_jax.errors import DcodError

CPU_SECONDS, WALL_SECONDS = 5.0, 120.0  # for one text


class TemplateError(DcodError):
    """A template that refuses the messages, fails, or does not end within its limits."""


class _Renderer:
    """The process, started with the first request and again after a template ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(request).encode() + b"\n"
        with self.lock:
            process = self.process = self.process or _start()
            stdin, stdout = _pipes(process)
            try:
                stdin.write(content)
                stdin.flush()
                reply = stdout.readline()
            except BrokenPipeError:
                reply = b""
            if reply.endswith(b"\n"):
                return json.loads(reply)
            code = process.wait()
            self._close()
        limits = {
            -signal.SIGPROF: f"{CPU_SECONDS:g} s of CPU",
            -signal.SIGALRM: f"{WALL_SECONDS:g} s",
        }
        return {"limit": limits.get(code, f"its process can do (it ended with {code})")}

    def close(self) -> None:
        with self.lock:
            self._close()

    def _close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in _pipes(self.process):
                pipe.close()
            self.process = None


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """(its input, its output)."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the template process was started without pipes")
    return process.stdin, process.stdout


def _start() -> subprocess.Popen[bytes]:
    file = str(template_process.__file__)
    return subprocess.Popen(
        # -P: this directory hides no module of the library.
        [sys.executable, "-P", file, str(CPU_SECONDS), str(WALL_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


@functools.lru_cache(maxsize=1)
def _renderer(process: int) -> _Renderer:
    """The renderer of the process with this id: a forked child needs its own."""
    renderer = _Renderer()
    atexit.register(renderer.close)
    return renderer


def render(
    template: str, messages: Sequence[dict[str, Any]], names: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """(text, the characters [start, end) in generation markers) of messages.

    names are further variables of the template, such as add_generation_prompt. Raises TemplateError
    when the template refuses the messages, fails, or passes its limits of time, memory and length.
    """
    reply = _renderer(os.getpid()).ask(
        {"template": template, "messages": list(messages), "names": names}
    )
    if "limit" in reply:
        raise TemplateError(
            f"the chat template needs more than {reply['limit']} for one conversation; "
            "give another one (student.chat_template)"
        )
    if "refused" in reply:
        raise TemplateError(f"the chat template refuses them: {reply['refused']}")
    return reply["text"], [(start, end) for start, end in reply["spans"]]
