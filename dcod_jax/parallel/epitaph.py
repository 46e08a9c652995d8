"""What is said of a process of a run that ended without a word of its own.

JAX aborts a process (SIGABRT) as soon as the coordinator's connection closes, before Python can
say which process is gone, and the kernel kills one that is out of memory. `watch.py` starts this
file beside a process, by its path and without the package: it reads a JSON line for each sign of
life, and when they stop without a farewell it prints the reason to the same stderr.
"""

import json
import socket
import sys
import time

PATIENCE = 3.0  # seconds for the coordinator to answer


def answers(address: str) -> bool:
    """Whether something listens at host:port; without an address nothing is known against it."""
    if not address:
        return True
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE):
            return True
    except OSError:
        return False


def epitaph(last: dict, *, reached: bool) -> str:
    """The message of a process whose last line was {process, host, state, coordinator, first}."""
    who = f"dcod_jax: process {last['process']} ({last['host']})"
    coordinator = f"process 0 ({last['first']['host']}), the coordinator at {last['coordinator']}"
    if last["process"] != 0 and not reached:
        return f"{who} stops: lost: {coordinator}, last: {last['first']['state']}"
    if last["joining"]:
        return (
            f"{who} stops: {last['state']}: not all did; start the same command on every host, "
            "each with its own number"
        )
    return (
        f"{who} was killed or aborted (out of memory? see above and the kernel's log), "
        f"last: {last['state']}"
    )


def main() -> None:
    last = None
    for line in sys.stdin:
        last = json.loads(line)
        if "farewell" in last:
            return
    if last is None:
        return
    time.sleep(0.2)  # the abort's own page comes first
    reached = answers(last["coordinator"])
    print(epitaph(last, reached=reached), file=sys.stderr)
    print("dcod_jax: start the same command on every host again", file=sys.stderr)


if __name__ == "__main__":
    main()
