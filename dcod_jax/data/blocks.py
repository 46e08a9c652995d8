"""JSONL files that grow block by block, are cut back to whole blocks, and end with a manifest.

    traces.jsonl.partial, traces.jsonl.partial.json   while they grow: the bytes, how far they count
    traces.jsonl, traces.jsonl.manifest.json          when they are finished

What was asked for (the request) is kept in both records: files of another request are never
mistaken for these. Several files may grow together; the first gives its name to the records.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dcod_jax.data.manifest import file_sha256, replace_file, to_json


class BlockFiles:
    """The files of one request; `counts` is what the last committed block said."""

    def __init__(self, paths: Sequence[Path], request: dict[str, Any]):
        self.paths, self.request = list(paths), json.loads(to_json(request))
        self.partials = [_beside(path, ".partial") for path in self.paths]
        self.record = _beside(self.paths[0], ".partial.json")
        self.manifest = _beside(self.paths[0], ".manifest.json")
        self.counts: dict[str, Any] = {}

    def finished(self) -> tuple[dict[str, Any] | None, str]:
        """(manifest, "") of a finished result of this request; (None, what is there instead).

        (None, "") when nothing is there.
        """
        if not self.paths[0].exists():
            return None, ""
        if not self.manifest.exists():
            return None, "by something else (it has no manifest)"
        found = json.loads(self.manifest.read_text(encoding="utf-8"))
        changed = [k for k, v in self.request.items() if found["request"].get(k) != v]
        if changed:
            return None, f"with other {', '.join(changed)}"
        if found["files"] != {path.name: _hash(path) for path in self.paths}:
            return None, "and changed since"
        return found, ""

    def resume(self) -> dict[str, Any]:
        """Counts of the blocks that are whole, {} without any; what came after them is cut off."""
        self.counts = self._whole()
        if not self.counts:
            for partial in self.partials:
                partial.write_bytes(b"")
        return self.counts

    def _whole(self) -> dict[str, Any]:
        if not self.record.exists():
            return {}
        found = json.loads(self.record.read_text(encoding="utf-8"))
        if found["request"] == self.request:
            for path, partial in zip(self.paths[1:], self.partials[1:], strict=True):
                if path.exists() and not partial.exists():  # stopped between two renames of finish
                    os.replace(path, partial)
        if not all(path.exists() for path in self.partials):
            return {}
        sizes = [path.stat().st_size for path in self.partials]
        whole = len(found["bytes"]) == len(sizes) and all(
            size >= kept for size, kept in zip(sizes, found["bytes"], strict=True)
        )
        if found["request"] != self.request or not whole:
            return {}
        for path, kept in zip(self.partials, found["bytes"], strict=True):
            os.truncate(path, kept)
        return found["counts"]

    @contextlib.contextmanager
    def open(self) -> Iterator[list[IO[bytes]]]:
        """The growing files, to append to; `resume` comes before."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open(path, "ab")) for path in self.partials]

    def commit(self, files: Sequence[IO[bytes]], counts: dict[str, Any]) -> None:
        """Record a block only after its bytes are on the disk."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        self.counts = counts
        sizes = [file.tell() for file in files]
        state = {"request": self.request, "bytes": sizes, "counts": counts}
        replace_file(self.record, to_json(state))

    def finish(self) -> dict[str, Any]:
        """Give the files their names, the manifest first; returns the manifest."""
        hashes = {
            path.name: _hash(partial)
            for path, partial in zip(self.paths, self.partials, strict=True)
        }
        manifest = self.counts | {"request": self.request, "files": hashes}
        replace_file(self.manifest, to_json(manifest))
        for path, partial in reversed(list(zip(self.paths, self.partials, strict=True))):
            os.replace(partial, path)
        self.record.unlink(missing_ok=True)
        return manifest


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _hash(path: Path) -> str:
    return file_sha256(path) if path.exists() else ""
