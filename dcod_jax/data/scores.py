"""A teacher's scores added to a trace dataset, shard by shard; a killed run goes on.

A scored shard is written beside the old ones under a name of its own, and a note of it into
scores.partial-<request>/. When all are written, the manifest names them, and the old shards and the
notes are removed. Until then the directory is the old dataset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dcod_jax import bounds
from dcod_jax.data.blocks import Blocks
from dcod_jax.data.codec import encode, score_kind
from dcod_jax.data.dataset import (
    MANIFEST,
    SHARD,
    TraceDataset,
    read_manifest,
    remove_unlisted,
    write_manifest,
    write_shard,
)
from dcod_jax.data.teachers import TEACHER
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, file_sha256, read_json, remove_tree, to_json
from dcod_jax.parallel import hosts
from dcod_jax.types import Trace

_NOTES = "scores"
_NUMBER, _COUNT = bounds.number(-1e300, 1e300), bounds.whole(0, 1 << 53)
_REQUEST = bounds.mapping({"teacher": bounds.mapping(), "settings": bounds.mapping()})
_NOTE = {"shard": SHARD, "request": _REQUEST, "logprob": _NUMBER, "mass": _NUMBER}
_NOTE |= dict.fromkeys(("top_k", "spans", "longest_span"), _COUNT)
_NOTE |= {"teachers": bounds.mapping(items=bounds.array(_NUMBER, fewest=3, most=3))}


def score_blocks(
    directory: Path, manifest: dict[str, Any], teacher: dict[str, Any], settings: dict[str, Any]
) -> Blocks:
    """The notes of one scoring: who scores, how, and which shards. Only an equal one goes on."""
    source = [shard["sha256"] for shard in manifest["shards"]]
    request = {"teacher": teacher, "settings": settings, "source": source}
    return Blocks(directory / _NOTES, request, note=bounds.mapping(_NOTE))


def _requests(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, who scores and how) of each note of any scoring."""
    for file in sorted(directory.glob(f"{_NOTES}.partial-*/*-*.json")):
        note = read_json(file)
        bounds.check(note, {"request": _REQUEST}, source=file)
        yield file, note["request"]


def scored_shards(directory: Path, blocks: Blocks, *, overwrite: bool) -> dict[int, dict[str, Any]]:
    """{number: note} of the undamaged shards that interrupted runs of the same scoring finished.

    Raises DcodError when another scoring is unfinished and `overwrite` is not given.
    """
    own = blocks.request
    for file, found in _requests(directory):
        if found != own and not overwrite:
            raise DcodError(
                f"{file.parent}: an unfinished scoring has teacher {found['teacher']} and "
                f"settings {found['settings']}; this run has teacher {own['teacher']} "
                f"and settings {own['settings']}; go on with the former, or set "
                "score.overwrite=True"
            )
    return {
        block.start: note
        for block, note in blocks.done().items()
        if (shard := directory / note["shard"]["file"]).is_file()
        and file_sha256(shard) == note["shard"]["sha256"]
    }


def _content(trace: Trace) -> bytes:
    """Hash of all that its scores follow from, beside the teachers."""
    parts = (
        np.asarray(trace.token_ids, "<i4").tobytes(),
        np.packbits(np.asarray(trace.completion_mask, bool)).tobytes(),
        str(trace.meta.get(TEACHER, "")).encode(),
    )
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


class KnownScores:
    """Scores of an earlier dataset, found by a trace's tokens, mask and teacher."""

    def __init__(self, datasets: Sequence[TraceDataset]):
        self._datasets = datasets
        self._places: dict[bytes, tuple[int, int]] = {}
        for number, dataset in enumerate(datasets):
            for index in range(len(dataset)):
                self._places[_content(dataset.read([index])[0])] = number, index

    def of(self, trace: Trace) -> Trace | None:
        """The trace with its scores; None where they are not known."""
        place = self._places.get(_content(trace)) if self._places else None
        if place is None:
            return None
        old = self._datasets[place[0]].read([place[1]])[0]
        names = "logprobs topk_ids topk_logprobs tail_logprobs span_starts start_logprobs".split()
        return dataclasses.replace(trace, **{name: getattr(old, name) for name in names})


def known_scores(
    directories: Sequence[Path], *, teacher: dict[str, Any], settings: dict[str, Any]
) -> KnownScores:
    """What this teacher with these settings scored in the datasets that are there."""
    found = [
        TraceDataset(path, verify=hosts.first())
        for path in directories
        if (path / MANIFEST).is_file()
    ]
    wanted = json.loads(to_json([teacher, settings]))
    return KnownScores(
        [d for d in found if [d.manifest.get("teacher"), d.manifest.get("score")] == wanted]
    )


def add_scores(
    directory: Location,
    *,
    teacher: dict[str, Any],
    settings: dict[str, Any],
    score_shard: Callable[[list[Trace]], list[Trace]],
    overwrite: bool = False,
    process: int = 0,
    processes: int = 1,
    write: bool = True,
) -> dict[str, Any]:
    """Add a teacher's log-probs to a dataset, shard by shard; returns the new manifest.

    `score_shard` gets a shard's traces without scores and returns them with; it must not depend on
    earlier calls. Killed at any time, the same call goes on with the shards that are left and ends
    with the same bytes. A run with the manifest's own teacher and settings does nothing.

    Of several processes all call this. Either each scores every processes-th shard from `process`
    on, and the first one writes the manifest when all are there; or all compute along and one
    has `write`.

    Raises DcodError when another teacher scored, or began to score, and `overwrite` is not given.
    """
    dataset = TraceDataset(directory, verify=hosts.first())
    path, manifest = dataset.directory, dataset.manifest
    teacher, settings = json.loads(to_json([teacher, settings]))
    if manifest.get("teacher") == teacher and manifest.get("score") == settings:
        if write:
            _clean(path, manifest)
        return manifest
    if dataset.scored and not overwrite:
        before = manifest.get("teacher") or {"name": "the source of the traces"}
        differ = [*_differences(before, teacher), *_differences(manifest.get("score"), settings)]
        raise DcodError(
            f"{path} already holds log-probs from {before['name']}; different: "
            f"{', '.join(differ)}; set score.overwrite=True to replace them"
        )
    blocks, shards = score_blocks(path, manifest, teacher, settings), manifest["shards"]
    done = scored_shards(path, blocks, overwrite=overwrite)
    for number in range(process, len(shards), processes):
        if number in done:
            continue
        bare = _bare(dataset.read(range(dataset.starts[number], dataset.starts[number + 1])))
        scored = score_shard(bare)
        _check_scored(bare, scored, shard=shards[number]["file"])
        if write:
            file = path / f"scored-{blocks.key}-{number:05d}.array_record"
            note = {"shard": write_shard(file, scored), "request": blocks.request}
            blocks.commit(range(number, number + 1), note | _sums(scored))
    hosts.barrier(f"scoring {path.name}")
    if write and process == 0:
        _publish(path, manifest, blocks, scored_shards(path, blocks, overwrite=overwrite))
    hosts.barrier(f"the manifest of {path.name}")
    return read_manifest(path)


def _bare(traces: Sequence[Trace]) -> list[Trace]:
    """The traces without scores."""
    return [Trace(t.id, t.token_ids, t.completion_mask, meta=t.meta) for t in traces]


def _check_scored(given: Sequence[Trace], scored: Sequence[Trace], *, shard: str) -> None:
    """Scoring may add log-probs to traces and nothing else."""
    same = [*map(encode, _bare(scored))] == [*map(encode, given)]
    kinds = {score_kind(trace) for trace in scored}
    if not same or len(kinds) != 1 or not min(kinds)[0]:
        raise DcodError(
            f"scoring {shard} must return its {len(given)} traces unchanged and in order with "
            f"logprobs and one top-k; got {len(scored)} traces of (scored, top-k) {sorted(kinds)}"
        )


def _sums(traces: Sequence[Trace]) -> dict[str, Any]:
    """A shard's sums over completion tokens: log-probs, the mass inside the top-k, by teacher."""
    logprob = mass = 0.0
    teachers: dict[str, list[float]] = {}
    for trace in traces:
        own = float(np.sum(np.asarray(trace.logprobs), dtype=np.float64))
        logprob += own
        if trace.tail_logprobs is not None:
            mass -= float(np.sum(np.expm1(trace.tail_logprobs.astype(np.float64))))
        sums = teachers.setdefault(str(trace.meta.get(TEACHER, "")), [0, 0, 0.0])
        sums[:] = sums[0] + 1, sums[1] + len(np.asarray(trace.logprobs)), sums[2] + own
    counts = [int(np.count_nonzero(trace.completion_mask)) for trace in traces]
    starts = [
        np.ones(count, bool) if trace.span_starts is None else trace.span_starts
        for trace, count in zip(traces, counts, strict=True)
    ]
    places = np.flatnonzero(np.append(np.concatenate(starts), True))
    found = {"logprob": logprob, "mass": mass, "top_k": score_kind(traces[0])[1]}
    found |= {"spans": len(places) - 1, "longest_span": int(np.diff(places).max())}
    return found | {"teachers": teachers}


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """The values of nested objects that are not the same, by key."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        yield from [] if before == now else [f"{key or 'score'} (it was {before!r}, now {now!r})"]
        return
    for name in sorted(before | now):
        inner = f"{key}.{name}".lstrip(".")
        yield from _differences(before.get(name), now.get(name), inner)


def _by_teacher(notes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: {traces, completion_tokens, mean_logprob}} of several teachers' shards."""
    names = sorted({name for note in notes for name in note["teachers"]})
    found = {}
    for name in names:
        sums = [note["teachers"][name] for note in notes if name in note["teachers"]]
        traces, tokens, logprob = (sum(column) for column in zip(*sums, strict=True))
        mean = logprob / tokens
        found[name] = {"traces": traces, "completion_tokens": tokens, "mean_logprob": mean}
    return found


def _publish(
    directory: Path, manifest: dict[str, Any], blocks: Blocks, done: dict[int, dict[str, Any]]
) -> None:
    """Name the scored shards in the manifest, in their order, and remove the old ones."""
    missing = sorted(set(range(len(manifest["shards"]))) - set(done))
    if missing:
        raise DcodError(
            f"{directory}: the scored shards {missing} are missing or damaged although every "
            "process finished; run the same command again, it makes these alone"
        )
    notes = [done[number] for number in sorted(done)]
    tokens, top_k = manifest["totals"]["completion_tokens"], notes[0]["top_k"]
    new = manifest | {
        "shards": [note["shard"] for note in notes],
        "scored": True,
        "teacher": blocks.request["teacher"],
        "score": blocks.request["settings"],
        "top_k": top_k,
        "mean_logprob": sum(note["logprob"] for note in notes) / tokens,
    }
    for name in ("captured_mass", "by_teacher", "start", "alignment"):
        new.pop(name, None)
    if "tokenizers" in new["score"]:  # of teachers that have not the traces' own
        spans, longest = ([note[name] for note in notes] for name in ("spans", "longest_span"))
        new["alignment"] = {"spans": sum(spans), "longest_span": max(longest)}
    if "teachers" in new["teacher"]:
        new["by_teacher"] = _by_teacher(notes)
    if start := new["score"].get("start"):
        new["start"] = start
    if top_k:
        new["captured_mass"] = sum(note["mass"] for note in notes) / tokens
    write_manifest(directory, new)
    _clean(directory, new)  # only now: the manifest no longer names the old shards


def tidy(directory: Path, manifest: dict[str, Any]) -> None:
    """Remove what this manifest's scoring left when it was killed behind it.

    Nothing is removed where another teacher's scoring is unfinished: it would begin anew.
    """
    own = manifest["teacher"], manifest["score"]
    if all((found["teacher"], found["settings"]) == own for _, found in _requests(directory)):
        _clean(directory, manifest)


def _clean(directory: Path, manifest: dict[str, Any]) -> None:
    """Remove what a finished scoring no longer needs."""
    remove_unlisted(directory, manifest)
    for notes in directory.glob(f"{_NOTES}.partial-*"):
        remove_tree(notes)
