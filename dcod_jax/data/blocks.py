"""JSONL files made block by block, by one process or several, and finished with a manifest.

    traces.jsonl.partial-<request>/      while they grow: each block a file of its own (for each of
                                         the files), and its counts, which make it whole
    traces.jsonl, traces.jsonl.manifest.json    when every block is there

A block is a range of indices. What was asked for (the request) is in the manifest, and its hash in
the name of the directory: files of another request are never mistaken for these. Several files may
grow together; the first gives its name to the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dcod_jax.files import (
    Path,
    commit_file,
    file_sha256,
    remove_tree,
    replace_file,
    scratch,
    to_json,
)
from dcod_jax.parallel import hosts


class BlockFiles:
    """The files of one request."""

    def __init__(self, paths: Sequence[Path], request: dict[str, Any]):
        self.paths, self.request = list(paths), json.loads(to_json(request))
        first = self.paths[0]
        self.manifest = first.with_name(first.name + ".manifest.json")
        key = hashlib.sha256(to_json(self.request)).hexdigest()[:8]
        self.blocks = first.with_name(f"{first.name}.partial-{key}")

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
        if hosts.first():
            remove_tree(self.blocks)
        return found, ""

    def _done(self) -> dict[range, dict[str, Any]]:
        """{indices: counts} of the blocks that are whole, in order."""
        done = {}
        for file in sorted(self.blocks.glob("*.json")):
            first, last = map(int, file.stem.split("-"))
            done[range(first, last)] = json.loads(file.read_text())
        return done

    def pending(self, total: int, size: int) -> tuple[int, list[range]]:
        """(indices that are done, blocks that are left): on every process as the first sees them.

        A run with another size goes on between the blocks that are there.
        """
        left, start, done = [], 0, {}
        if hosts.first():
            done = self._done()
            for block in [*done, range(total, total)]:
                gap = range(start, block.start)
                left += [[i, min(i + size, gap.stop)] for i in gap[::size]]
                start = block.stop
        told = json.dumps([sum(map(len, done)), left])
        count, blocks = json.loads(hosts.exchange("share out the blocks", told)[0])
        return count, [range(*block) for block in blocks]

    def commit(self, block: range, texts: Sequence[str], counts: dict[str, Any]) -> None:
        """Write a block's part of each file; its counts, which make it whole, come last."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        for place, text in enumerate(texts):
            replace_file(self._part(block, place), text.encode("utf-8"))
        replace_file(self.blocks / f"{_name(block)}.json", to_json(counts))

    def _part(self, block: range, place: int) -> Path:
        return self.blocks / f"{_name(block)}.{place}.jsonl"

    def finish(self) -> dict[str, Any]:
        """Join the blocks of all processes in their order; returns the manifest.

        It has the sums of the blocks' counts. The first file gets its name last.
        """
        hosts.barrier("the blocks")
        if hosts.first():
            self._join()
        hosts.barrier("the manifest of the blocks")
        return json.loads(self.manifest.read_text(encoding="utf-8"))

    def _join(self) -> None:
        done, hashes = self._done(), {}
        for place, path in reversed(list(enumerate(self.paths))):
            with scratch(path) as temporary:
                with temporary.open("wb") as whole:
                    for block in done:
                        whole.write(self._part(block, place).read_bytes())
                hashes[path.name] = file_sha256(temporary)
                if place == 0:
                    manifest = _sum(list(done.values())) | {"request": self.request}
                    replace_file(self.manifest, to_json(manifest | {"files": hashes}))
                commit_file(temporary, path)
        remove_tree(self.blocks)


def _name(block: range) -> str:
    return f"{block.start:09d}-{block.stop:09d}"


def _sum(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of numbers, and of dicts of numbers: {"n": 1, "by": {"a": 1}} twice -> doubled."""
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, dict):
                total[name] = _sum([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def _hash(path: Path) -> str:
    return file_sha256(path) if path.exists() else ""
