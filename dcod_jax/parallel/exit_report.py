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


def main() -> None:
    """Read lines to their end, and print the reason unless the last one says closed."""
    last: dict[str, Any] = {}
    for line in sys.stdin:
        last = json.loads(line)
    if not last or "closed" in last:
        return
    time.sleep(0.2)  # the abort's own output comes first
    reason = last["ended"] if answers(last["coordinator"]) else last["lost"]
    print(f"dcod_jax: {reason}", file=sys.stderr)
    print("dcod_jax: start the same command on every host again", file=sys.stderr)


if __name__ == "__main__":
    main()
