"""The manifest of a trace dataset: what is in it, where it came from, and proof that it is whole.

A directory is a dataset when it holds manifest.json, which is written last. Fields:

    format, version        of this layout
    shards                 [{file, records, tokens, completion_tokens, bytes, sha256}, ...]
    lengths                {file, bytes, sha256}: int32 [records, 2], tokens and completion tokens
    totals                 {records, tokens, completion_tokens}
    scored, top_k          whether every trace has teacher log-probs; K of the stored top-k, or 0
    tokenizer, template    {fingerprint, source, ...}: what made the token ids and the mask
    teacher                {name, revision, weights, ...} or absent; weights is a content hash
    counts, config, ...    whatever else the writing verb reports (kept and dropped by reason, ...)

It holds no time stamps and no absolute order of work, so equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.files import (
    Location,
    Path,
    RemotePath,
    as_path,
    file_sha256,
    file_size,
    local_copy,
    replace_file,
    to_json,
)

FORMAT = "dcod_jax.traces"
VERSION = 1
MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
PROGRESS = "score-progress.json"  # exists only while a teacher's scores are being added
_FIELDS = {"shards": list, "lengths": dict, "totals": dict, "scored": bool, "top_k": int}
_OWN_FILES = (
    "traces-*.array_record",
    "scored-*.array_record",
    "*.array_record.tmp",
    "*.json.tmp",
    LENGTHS + "*",
    PROGRESS,
    PROGRESS.replace(".json", "-*.json"),  # of further processes
)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    replace_file(directory / MANIFEST, to_json(manifest))


def read_manifest(directory: Location) -> dict[str, Any]:
    """The manifest of a complete dataset.

    Raises DcodError when the directory is missing, half written, or of another format or version.
    """
    directory = as_path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DcodError(
            f"{directory} is not a directory; expected a trace dataset "
            "(write one with `python -m dcod_jax.prepare`, or set data.dataset)"
        )
    if not path.is_file():
        inner = sorted(p.parent.name for p in directory.glob(f"*/{MANIFEST}"))
        hint = (
            f"it holds the datasets {', '.join(inner)}: name one of them"
            if inner
            else "prepare was interrupted before the dataset was complete, or never ran; "
            "run the same `python -m dcod_jax.prepare` command again"
        )
        raise DcodError(f"{directory} has no {MANIFEST}: {hint}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DcodError(f"{path} is not valid JSON ({error}); prepare the dataset again") from error
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise DcodError(
            f"{path}: expected format {FORMAT} version {VERSION}, found {found[0]} "
            f"version {found[1]}; prepare the dataset again with this version of dcod_jax"
        )
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong or not manifest["shards"]:
        raise DcodError(
            f"{path}: {', '.join(wrong) or 'shards'} missing or of a wrong type; the file was "
            "edited or damaged: restore it, or prepare the dataset again"
        )
    return manifest


def check_file(directory: Path, entry: dict[str, Any], *, verify: bool) -> None:
    """Compare a file with its manifest entry: presence and size, with `verify` also the hash."""
    path = directory / entry["file"]
    mend = "restore the file from a good copy, or prepare (and score) the dataset again"
    if not path.is_file():
        raise DcodError(f"{path} is missing, but {MANIFEST} lists it; {mend}")
    size = file_size(path)
    if size != entry["bytes"]:
        raise DcodError(f"{path} is damaged: expected {entry['bytes']} bytes, found {size}; {mend}")
    if not verify:
        return
    if isinstance(path, RemotePath):
        local_copy(path, sha256=entry["sha256"])
        return
    if (actual := file_sha256(path)) != entry["sha256"]:
        raise DcodError(
            f"{path} is damaged: expected sha256 {entry['sha256']}, found {actual}; {mend}"
        )


def listed(manifest: dict[str, Any]) -> set[str]:
    """Names of the files the manifest speaks of."""
    return {entry["file"] for entry in [*manifest["shards"], manifest["lengths"]]}


def remove_all_but(directory: Path, keep: Iterable[str]) -> None:
    """Delete this format's files that are not in `keep`; other files are left alone."""
    kept = {MANIFEST, *keep}
    for path in {path for pattern in _OWN_FILES for path in directory.glob(pattern)}:
        if path.name not in kept:
            path.unlink()
