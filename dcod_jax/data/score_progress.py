"""What is written down while a teacher's scores are being added, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcod_jax.data import manifest as manifests
from dcod_jax.data.codec import score_kind
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, file_sha256, replace_file, to_json
from dcod_jax.types import Trace


def describe(
    manifest: dict[str, Any], teacher: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The identity of a scoring: who, how, and over which shards. Only an equal one may go on."""
    source = [shard["sha256"] for shard in manifest["shards"]]
    return {"teacher": teacher, "settings": settings, "source": source}


def shard_name(work: dict[str, Any], number: int) -> str:
    """File of a scored shard; the hash in it keeps a second teacher's shards from the first's."""
    key = hashlib.sha256(to_json(work)).hexdigest()[:8]
    return f"scored-{key}-{number:05d}.array_record"


def _file(directory: Path, process: int) -> Path:
    name = manifests.PROGRESS if process == 0 else f"score-progress-{process}.json"
    return directory / name


def shard_number(entry: dict[str, Any]) -> int:
    """Place among the dataset's shards of one that `shard_name` named."""
    return int(entry["shard"]["file"].split("-")[-1].partition(".")[0])


def save(directory: Path, work: dict[str, Any], done: list[dict[str, Any]], process: int) -> None:
    """Note what this process finished; each of several has a file of its own."""
    content = to_json({"work": work, "done": done})
    replace_file(_file(directory, process), content)


def noted(directory: Path, work: dict[str, Any], process: int) -> list[dict[str, Any]]:
    """What this process noted before about the same work."""
    path = _file(directory, process)
    found = json.loads(path.read_bytes()) if path.exists() else {}
    return found["done"] if found.get("work") == work else []


def finished(
    directory: Path, work: dict[str, Any], *, overwrite: bool
) -> dict[int, dict[str, Any]]:
    """{number: entry} of the undamaged shards that interrupted runs of the same work finished.

    Raises DcodError when the unfinished work is another's and `overwrite` is not given.
    """
    done: dict[int, dict[str, Any]] = {}
    for path in sorted(directory.glob(manifests.PROGRESS.replace(".json", "*.json"))):
        found = json.loads(path.read_bytes())
        if found["work"] != work:
            if overwrite:
                continue
            raise DcodError(
                f"{path}: an unfinished scoring has teacher {found['work']['teacher']} and "
                f"settings {found['work']['settings']}; this run has teacher {work['teacher']} "
                f"and settings {work['settings']}; go on with the former, or set "
                "score.overwrite=True"
            )
        for entry in found["done"]:
            file = directory / entry["shard"]["file"]
            if file.is_file() and file_sha256(file) == entry["shard"]["sha256"]:
                done[shard_number(entry)] = entry
    return done


def check_scored(given: Sequence[Trace], scored: Sequence[Trace], *, shard: str) -> None:
    """Scoring may add log-probs to traces and nothing else."""
    same = len(given) == len(scored) and all(
        before.id == after.id
        and np.array_equal(before.token_ids, after.token_ids)
        and np.array_equal(before.completion_mask, after.completion_mask)
        and after.logprobs is not None
        for before, after in zip(given, scored, strict=True)
    )
    kinds = {score_kind(trace) for trace in scored}
    if not same or len(kinds) != 1:
        raise DcodError(
            f"scoring {shard} must return its {len(given)} traces unchanged and in order with "
            f"logprobs and one top-k; got {len(scored)} traces of (scored, top-k) {sorted(kinds)}"
        )


def score_sums(traces: Sequence[Trace]) -> dict[str, Any]:
    """A shard's sums over completion tokens: log-probs, and the mass inside the top-k."""
    logprob = mass = 0.0
    for trace in traces:
        logprob += float(np.sum(np.asarray(trace.logprobs), dtype=np.float64))
        if trace.tail_logprobs is not None:
            mass -= float(np.sum(np.expm1(trace.tail_logprobs.astype(np.float64))))
    return {"logprob": logprob, "mass": mass, "top_k": score_kind(traces[0])[1]}


def scored_manifest(
    manifest: dict[str, Any], work: dict[str, Any], done: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest that points at the scored shards."""
    tokens = manifest["totals"]["completion_tokens"]
    top_k = done[0]["top_k"]
    new = manifest | {
        "shards": [entry["shard"] for entry in done],
        "scored": True,
        "teacher": work["teacher"],
        "score": work["settings"],
        "top_k": top_k,
        "mean_logprob": sum(entry["logprob"] for entry in done) / tokens,
    }
    new.pop("captured_mass", None)
    if top_k:
        new["captured_mass"] = sum(entry["mass"] for entry in done) / tokens
    return new
