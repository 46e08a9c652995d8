"""JSONL files made of blocks that several processes write, joined when all of them are there.

    traces.jsonl.partial-<key>/000000000-000000256.0   while they grow: a block of the first file,
                               000000000-000000256.1   of the second, and, last, its counts:
                               000000000-000000256.json
    traces.jsonl, traces.jsonl.manifest.json           when they are finished

What was asked for (the request) names the directory and is in the manifest: files of another
request are never mistaken for these. A block without its counts is not there, and is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dcod_jax import hosts
from dcod_jax.data.manifest import commit_file, file_sha256, replace_file, to_json
from dcod_jax.paths import Path
from dcod_jax.storage import remove_tree, scratch


class BlockFiles:
    """The files of one request; every process of a run has one and sees the same files."""

    def __init__(self, paths: Sequence[Path], request: dict[str, Any]):
        self.paths, self.request = list(paths), json.loads(to_json(request))
        self.manifest = self.paths[0].with_name(self.paths[0].name + ".manifest.json")
        key = hashlib.sha256(to_json(self.request)).hexdigest()[:8]
        self.blocks = self.paths[0].with_name(f"{self.paths[0].name}.partial-{key}")

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
        """{items: counts} of the blocks that are whole, in order."""
        done = {}
        for file in sorted(self.blocks.glob("*.json")):
            start, stop = map(int, file.stem.split("-"))
            done[range(start, stop)] = json.loads(file.read_text(encoding="utf-8"))
        return done

    def pending(self, total: int, size: int) -> list[range]:
        """The items that are left, in blocks; the same on every process, as the first sees it.

        A run with another size of blocks goes on between those that are there.
        """
        pending, start = [], 0
        if hosts.first():
            for block in [*self._done(), range(total, total)]:
                gap = range(start, block.start)
                pending += [[i, min(i + size, gap.stop)] for i in gap[::size]]
                start = block.stop
        told = hosts.exchange(f"share out {self.paths[0].name}", json.dumps(pending))[0]
        return [range(*block) for block in json.loads(told)]

    def commit(self, block: range, contents: Sequence[bytes], counts: dict[str, Any]) -> None:
        """Write a block, one content for each file; its counts, which make it whole, come last."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(contents):
            replace_file(self._block(block, str(number)), content)
        replace_file(self._block(block, "json"), to_json(counts))

    def finish(self) -> dict[str, Any]:
        """Join the blocks once every process has come here; the manifest, with their counts' sums.

        Every process must call it.
        """
        hosts.barrier(f"the blocks of {self.paths[0].name}")
        if hosts.first():
            done = self._done()
            manifest: dict[str, Any] = {}
            for counts in done.values():
                manifest = _sum(manifest, counts)
            hashes = {}
            for number, path in reversed(list(enumerate(self.paths))):
                with scratch(path) as temporary:
                    with temporary.open("wb") as whole:
                        for block in done:
                            whole.write(self._block(block, str(number)).read_bytes())
                    hashes[path.name] = file_sha256(temporary)
                    if number == 0:
                        record = manifest | {"request": self.request, "files": hashes}
                        replace_file(self.manifest, to_json(record))
                    commit_file(temporary, path)
            remove_tree(self.blocks)
        hosts.barrier(f"the manifest of {self.paths[0].name}")
        return json.loads(self.manifest.read_text(encoding="utf-8"))

    def _block(self, block: range, suffix: str) -> Path:
        return self.blocks / f"{block.start:09d}-{block.stop:09d}.{suffix}"


def _sum(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Numbers added, dicts of them key by key, in the order of the names."""
    total = dict(first)
    for name, value in second.items():
        if isinstance(value, dict):
            total[name] = _sum(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return dict(sorted(total.items()))


def _hash(path: Path) -> str:
    return file_sha256(path) if path.exists() else ""
