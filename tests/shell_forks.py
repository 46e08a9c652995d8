"""`dcod` for a shell, in forks of one process that has imported everything and run nothing.

A fork pays for no import. `python shell_forks.py SOCKET` serves; with words after the socket it
asks for a fork that runs them in its own directory, on its own streams.
"""

import importlib
import json
import os
import socket
import sys

VERBS = ("drift", "evaluate", "export", "generate_traces", "inspect", "plan", "prepare", "report")


def serve(path: str) -> None:
    from dcod_jax import cli

    for verb in (*VERBS, "score", "train"):
        importlib.import_module(f"dcod_jax.{verb}.command")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            asking, _ = listener.accept()
            with asking:
                text, streams, *_ = socket.recv_fds(asking, 1 << 16, 3)
                if not (child := os.fork()):
                    break
                _, status = os.waitpid(child, 0)
                asking.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            for stream in streams:
                os.close(stream)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    words, place = json.loads(text)
    os.chdir(place)
    cli.main(words)


def ask(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps([words, os.getcwd()]).encode()], [0, 1, 2])
        return int(server.recv(16))


if __name__ == "__main__":
    if sys.argv[2:]:
        raise SystemExit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
