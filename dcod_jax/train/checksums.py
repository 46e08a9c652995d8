"""Checksums of a checkpoint's files: made before it gets its name, compared before it is used.

<step>/checksums.json is {"step": 8, "files": {"params/d/1a0f...": [bytes, checksum], ...}}. On a
disk the checksum is XXH3-128 of the content as it is read back; in a store it is the one that the
store has of the object. Both find damage. Neither finds a deliberate change: who can write the
files can write the checksums, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from dcod_jax.bounds import array, check, either, mapping, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    REFUSED,
    Path,
    file_size,
    from_json,
    move_tree,
    read_whole,
    remove_tree,
    replace_file,
    to_json,
)
from dcod_jax.parallel import hosts
from dcod_jax.stores import RemotePath

NAME = "checksums.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them after the checksums
_BLOCK = 1 << 22
_ENTRY = array(either(text(), whole(0, 1 << 60)), fewest=2, most=2)  # bytes and checksum
_SAVED = mapping({"step": whole(0, 1 << 53), "files": mapping(items=_ENTRY)})


class DamagedCheckpointError(DcodError):
    """A checkpoint whose files are not those that were saved."""


def write(directory: Path, step: int) -> None:
    """Write the checksums of all files of a checkpoint, from the parts where there are any."""
    known: dict[str, list[int | str]] = {}
    for part in list(directory.glob(f"{NAME}.*")):
        known |= from_json(part.read_bytes())
        part.unlink()
    names = _names(directory)
    found = {name: known[name] for name in names if name in known}
    found |= _checksums(directory, [name for name in names if name not in known])
    replace_file(directory / NAME, to_json({"step": step, "files": found}))


def write_part(directory: Path, process: int) -> None:
    """The checksums of this process's arrays, whose item still has Orbax's temporary name."""
    own = [name for name in _names(directory) if f"/ocdbt.process_{process}/d/" in name]
    found = _checksums(directory, own)
    named = {name.replace(".orbax-checkpoint-tmp/", "/"): found[name] for name in found}
    replace_file(directory / f"{NAME}.{process}", to_json(named))


def verify(
    home: Path, step: int, items: Sequence[str], *, steps: Sequence[int] = (), alone: bool = False
) -> None:
    """Compare the files of these items of a checkpoint with what was saved; () stands for all.

    Of several processes each reads every n-th file, and all call this; alone: one reads all of its
    own. Raises DamagedCheckpointError, which names the file and the newest whole one of `steps`.
    """
    problem = _problem(home, step, items, alone=alone)
    if not problem:
        return
    text = f"{home / str(step)} is damaged: {problem}"
    if alone:  # the caller says what follows from it
        raise DamagedCheckpointError(text)
    others = sorted(set(steps) - {step}, reverse=True)
    good = next((other for other in others if not _problem(home, other, (), alone=False)), None)
    if good is None:
        raise DamagedCheckpointError(
            f"{text}; no other checkpoint is whole: restore the file from a copy, or move the "
            "directory away to begin anew"
        )
    raise DamagedCheckpointError(
        f"{text}; step {good} is whole: train.on_damaged_checkpoint=previous goes on from it and "
        f"sets the damaged one aside, export.step={good} exports it"
    )


def set_aside(home: Path, step: int) -> None:
    """Move a damaged checkpoint to <run>/damaged/<step>."""
    if hosts.first():
        aside = home.with_name("damaged") / str(step)
        remove_tree(aside)
        move_tree(home / str(step), aside)
    hosts.barrier("a damaged checkpoint set aside")


def _problem(home: Path, step: int, items: Sequence[str], *, alone: bool) -> str:
    """What is wrong with a checkpoint, the same on all processes; "" for nothing."""
    found = _own_problem(home / str(step), step, items, share=slice(None) if alone else _share())
    texts = [found] if alone else hosts.exchange("checksums", found)
    return next(filter(None, texts), "")


def _share() -> slice:
    process = hosts.process_index()
    return slice(None) if process is None else slice(process, None, hosts.count())


def _own_problem(directory: Path, step: int, items: Sequence[str], *, share: slice) -> str:
    try:
        if not (directory / NAME).is_file():
            return f"{NAME} is missing"
        saved = from_json(read_whole(directory / NAME))
        check({"saved": saved}, {"saved": _SAVED}, source=NAME)
        if saved["step"] != step:
            return f"{NAME} is of step {saved['step']}"
        expected = saved["files"]
        names = [n for n in sorted(expected) if not items or n.split("/")[0] in items][share]
        there = _checksums(directory, names)
    except (DcodError, OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise
        return f"{NAME} cannot be read ({' '.join(str(error).split())[:200]})"
    for name in names:
        if name not in there:
            return f"{name} is missing"
        (size, checksum), (found, other) = expected[name], there[name]
        if size != found:
            return f"{name} has {found} bytes, {size} were saved"
        if checksum != other:
            return f"{name} has checksum {other}, saved was {checksum}"
    return ""


def _names(directory: Path) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    names = [str(path).removeprefix(f"{directory}/") for path in files]
    return sorted(n for n in names if n not in LATER and not n.startswith(NAME))


def _checksums(directory: Path, names: Iterable[str]) -> dict[str, list[int | str]]:
    """{name: [bytes, checksum]} of those of these files that are there."""
    if isinstance(directory, RemotePath):
        there = directory.checksums()
        return {name: there[name] for name in names if name in there}
    found: dict[str, list[int | str]] = {}
    for name in names:
        if (directory / name).is_file():
            whole = xxhash.xxh3_128()
            with (directory / name).open("rb") as file:
                while block := file.read(_BLOCK):
                    whole.update(block)
            found[name] = [file_size(directory / name), whole.hexdigest()]
    return found
