"""Python programs in forks of one process that has imported every verb and run nothing.

A fork pays for no import. `python forks.py serve SOCKET` serves. `python forks.py ask SOCKET FD`
and the words that Python would get (-m MODULE, -c CODE or a file, then its own) run the program in
a fork, here and on these streams, and end as it ends; its pid is written to FD where that is not 0.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings

VERBS = ("drift", "evaluate", "export", "generate_traces", "inspect", "plan", "prepare", "report")
PATIENCE = 5.0  # seconds between two looks whether the server's parent is still there
WIDTH = 4  # bytes of a number on the socket


def serve(path: str) -> None:
    """Returns in a fork, whose program has ended."""
    for verb in (*VERBS, "score", "train"):
        importlib.import_module(f"dcod_jax.{verb}.command")
    importlib.import_module("tensorboardX.event_file_writer")
    gc.freeze()
    parent = os.getppid()
    with packets() as listener:
        listener.bind(f"{path}.tmp")
        listener.listen()
        os.rename(f"{path}.tmp", path)  # nobody asks before it listens
        listener.settimeout(PATIENCE)
        while os.getppid() == parent:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with contextlib.suppress(TimeoutError):
                asking, _ = listener.accept()
                with warnings.catch_warnings(action="ignore"):  # threads of imported libraries wait
                    child = os.fork()
                if not child:
                    break
                asking.close()
        else:
            return
    answer(asking)


def packets() -> socket.socket:
    """A socket whose messages come whole."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def answer(asking: socket.socket) -> None:
    asking.settimeout(None)
    text, streams, *_ = socket.recv_fds(asking, 1 << 20, 3)
    if child := os.fork():
        for stream in streams:
            os.close(stream)
        asking.send(child.to_bytes(WIDTH, signed=True))
        _, status = os.waitpid(child, 0)
        asking.send(os.waitstatus_to_exitcode(status).to_bytes(WIDTH, signed=True))
        os._exit(0)
    asking.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    words, place, environment = json.loads(text)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    perform(*words)


def perform(kind: str, *words: str) -> None:
    if kind == "-m":
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *words[1:]]
        exec(words[0], {"__name__": "__main__"})
    else:
        sys.argv = [kind, *words]
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")


def ask(path: str, told: int, words: list[str]) -> None:
    with packets() as server:
        server.connect(path)
        request = json.dumps([words, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [request.encode()], [0, 1, 2])
        pid = number(server)
        if told:
            os.write(told, str(pid).encode())
            os.close(told)
        code = number(server)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def number(server: socket.socket) -> int:
    if not (text := server.recv(WIDTH)):
        raise SystemExit("the server of forks ended")
    return int.from_bytes(text, signed=True)


@functools.cache
def server() -> str:
    """The socket of this process's own server, which ends with it."""
    place = tempfile.TemporaryDirectory(prefix="dcod-forks-")
    path = os.path.join(place.name, "socket")
    running = subprocess.Popen([sys.executable, __file__, "serve", path])
    atexit.register(lambda: (running.kill(), running.wait(), place.cleanup()))
    while not os.path.exists(path):
        assert running.poll() is None, "the server of forks ended"
        time.sleep(0.02)
    return path


class Started(subprocess.Popen):
    """A program in a fork; `program` is its pid, to which signals go."""

    def __init__(self, words, **options):
        reader, writer = os.pipe()
        command = [sys.executable, "-IS", __file__, "ask", server(), writer, *words]
        super().__init__([*map(str, command)], pass_fds=[writer], **options)
        os.close(writer)
        with os.fdopen(reader) as told:
            self.program = int(told.read())

    def send_signal(self, sig):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.program, sig)


def run(words, **options):
    """What subprocess.run gives of the program in a fork, with its output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with Started(words, **options) as started:
        said = started.communicate()
    return subprocess.CompletedProcess(words, started.returncode, *said)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", path]:
            serve(path)
        case ["ask", path, told, *words]:
            ask(path, int(told), words)
