"""Results made block by block, by one process or several: a killed run resumes where it stopped.

A block is a range of indices. While a result grows, there is a directory beside it:

    traces.jsonl.partial-<request>/000000000-000000004.json    counts of a block, written last
    traces.jsonl.partial-<request>/000000000-000000004.0.jsonl its part of each file (BlockFiles)

The request is everything that the result follows from. Its hash is in the name of the directory,
so blocks of another request are never mistaken for these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from dcod_jax.bounds import Bound, check, either, mapping, number
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    Path,
    atomic_write,
    file_sha256,
    read_json,
    remove_tree,
    replace_file,
    to_json,
)
from dcod_jax.parallel import hosts


class Blocks:
    """The finished blocks of one request for the result at `path`."""

    def __init__(self, path: Path, request: dict[str, Any], *, note: Bound | None = None):
        """note: what is noted of a block."""
        self.request, self.note = json.loads(to_json(request)), note or mapping()
        self.key = hashlib.sha256(to_json(self.request)).hexdigest()[:8]
        self.directory = path.with_name(f"{path.name}.partial-{self.key}")

    def done(self) -> dict[range, dict[str, Any]]:
        """{indices: counts} of the finished blocks, in their order; no two may overlap."""
        found, end = {}, 0
        for file in sorted(self.directory.glob("*-*.json")):
            if not re.fullmatch(r"\d{9,18}-\d{9,18}", file.stem):
                continue  # nobody's
            block = range(*map(int, file.stem.split("-")))
            if not end <= block.start < block.stop:
                raise DcodError(f"{file}: beside the blocks before {end}; move it away")
            found[block], end = read_json(file), block.stop
            check({"note": found[block]}, {"note": self.note}, source=file)
        return found

    def commit(self, block: range, counts: dict[str, Any]) -> None:
        """Note that a block is finished; what it consists of must be on the disk before."""
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(self.directory / f"{_name(block)}.json", to_json(counts))


class BlockFiles(Blocks):
    """JSONL files that grow together; the first one gives its name to the manifest."""

    def __init__(
        self, paths: Sequence[Path], request: dict[str, Any], *, counts: Sequence[str] = ()
    ):
        """counts: names of numbers, or of objects of numbers, that are noted of every block."""
        self.counts = dict.fromkeys(counts, _COUNT)
        super().__init__(paths[0], request, note=mapping(self.counts, items=_COUNT))
        self.paths = list(paths)
        self.manifest = paths[0].with_name(paths[0].name + ".manifest.json")

    def finished(self) -> tuple[dict[str, Any] | None, str]:
        """(manifest, "") of a finished result of this request; (None, what is there or "")."""
        found: dict[str, Any] = {"files": {}}
        if self.manifest.exists():
            found = read_json(self.manifest)
            parts = {"request": mapping(), "files": mapping(), **self.counts}
            check(found, parts, source=self.manifest)
        if not self.paths[0].exists():
            if self.directory.is_dir():  # of an interrupted start
                return None, ""
            others = [path for path in self.paths[1:] if path.exists()]
            others = [p for p in others if found["files"].get(p.name) != file_sha256(p)]
            return None, f"beside a {others[0].name} of something else" if others else ""
        if not found["files"]:
            return None, "by something else (it has no manifest)"
        changed = [k for k, v in self.request.items() if found["request"].get(k) != v]
        if changed:
            return None, f"with other {', '.join(changed)}"
        hashes = {p.name: file_sha256(p) if p.exists() else "" for p in self.paths}
        if found["files"] != hashes:
            return None, "and changed since"
        if hosts.first():
            remove_tree(self.directory)
        return found, ""

    def pending(self, total: int, size: int) -> tuple[int, list[range]]:
        """(indices that are done, blocks that are left), the same on every process.

        A run with another size goes on between the blocks that are there.
        """
        left, start, done = [], 0, {}
        if hosts.first():
            done = self.done()
            for block in [*done, range(total, total)]:
                gap = range(start, block.start)
                left += [[i, min(i + size, gap.stop)] for i in gap[::size]]
                start = block.stop
        told = [sum(map(len, done)), left]
        count, blocks = hosts.exchange("share out the blocks", told)[0]
        return count, [range(*block) for block in blocks]

    def write(self, block: range, texts: Sequence[str], counts: dict[str, Any]) -> None:
        """Write and commit a block's part of each file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for place, text in enumerate(texts):
            replace_file(self._part(block, place), text.encode("utf-8"))
        self.commit(block, counts)

    def _part(self, block: range, place: int) -> Path:
        return self.directory / f"{_name(block)}.{place}.jsonl"

    def finish(self) -> dict[str, Any]:
        """Join the blocks of all processes in their order; returns the sums of their counts."""
        hosts.barrier("the blocks")
        if hosts.first():
            self._join()
        hosts.barrier("the manifest of the blocks")
        return read_json(self.manifest)

    def _join(self) -> None:
        done, hashes = self.done(), {}
        for place, path in reversed(list(enumerate(self.paths))):  # the first one last
            with atomic_write(path) as temporary:
                with temporary.open("wb") as whole:
                    for block in done:
                        whole.write(self._part(block, place).read_bytes())
                hashes[path.name] = file_sha256(temporary)
                if place == 0:
                    manifest = _sum(list(done.values())) | {"request": self.request}
                    replace_file(self.manifest, to_json(manifest | {"files": hashes}))
        remove_tree(self.directory)


_NUMBER = number(0, 1e300)
_COUNT = either(_NUMBER, mapping(items=_NUMBER))


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
