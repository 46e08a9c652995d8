"""Report the end of a process that could not report it itself; run beside it, by path.

JAX aborts a process (SIGABRT) as soon as the coordinator's connection closes, and the kernel kills
one that is out of memory. monitor.py writes a JSON line here with each heartbeat; when the lines
stop without {"closed": true}, the reason is printed to the same stderr.
"""

import json
import socket
import sys
import time
from typing import Any

CONNECT_TIMEOUT = 3.0  # seconds for the coordinator to answer


def answers(address: str) -> bool:
    """Whether something listens at host:port; True without an address."""
    if not address:
        return True
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT):
            return True
    except OSError:
        return False


def reason(last: dict[str, Any], *, reached: bool) -> str:
    """The message for a process whose last line was `last`; reached: the coordinator answers."""
    who, state = f"dcod_jax: process {last['process']} ({last['host']})", last["state"]
    if last["process"] != 0 and not reached:
        return (
            f"{who} stops: lost: process 0 ({last['first_host']}), the coordinator at "
            f"{last['coordinator']}, last: {last['first_state']}"
        )
    if last["joining"]:
        return (
            f"{who} stops: {state}: not all did; start the same command on every host, each with "
            "its own number"
        )
    return (
        f"{who} was killed or aborted (out of memory? see above and the kernel's log), "
        f"last: {state}"
    )


def main() -> None:
    last: dict[str, Any] = {}
    for line in sys.stdin:
        last = json.loads(line)
    if not last or "closed" in last:
        return
    time.sleep(0.2)  # the abort's own output comes first
    print(reason(last, reached=answers(last["coordinator"])), file=sys.stderr)
    print("dcod_jax: start the same command on every host again", file=sys.stderr)


if __name__ == "__main__":
    main()
