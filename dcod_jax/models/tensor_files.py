"""The safetensors files of a directory: which tensor is in which, reading and writing them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from itertools import filterfalse
from typing import Any

import jax.numpy as jnp
import numpy as np
from huggingface_hub import StateDictSplit
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dcod_jax.bounds import check, mapping, text
from dcod_jax.copies import local_copy
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, atomic_write, read_json, rename
from dcod_jax.models import peft
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.multimodal import text_names
from dcod_jax.models.tensors import STAGED, FileForm, Part, Slot, blocks, slots
from dcod_jax.stores import RemotePath

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # of a PEFT directory
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STACKED = ".experts.gate_up_proj"  # end of the name of such a tensor
_INDEX = {"weight_map": mapping(items=text(255))}

# Buffers that old exports wrote; their values follow from the config.
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FLOATS = {"F32", "BF16", "F16"}


def is_adapter(directory: Path) -> bool:
    """Whether it is a PEFT directory, whose weights are those of another beside these."""
    whole = any((directory / name).is_file() for name in (SINGLE, INDEX))
    return not whole and (directory / peft.ADAPTER_CONFIG).is_file()


def weight_map(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    single = directory / (ADAPTER if is_adapter(directory) else SINGLE)
    index = directory / INDEX
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        content = read_json(index)
        check(content, _INDEX, source=index)
        names = set(content["weight_map"].values())
        if odd := sorted(name for name in names if "/" in name or "\\" in name or "\0" in name):
            raise DcodError(f"{index}: weight_map names {odd[0]!r}, which is not beside it")
        files = {name: directory / file for name, file in content["weight_map"].items()}
        for name, file in files.items():
            if not file.is_file():
                raise DcodError(f"{index}: {name} should be in {file.name}, which is missing")
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise DcodError(
            f"{directory}: only pytorch_model.bin weights; convert them to safetensors with "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise DcodError(f"{directory}: no {SINGLE} and no {INDEX} in it; expected HF weights")


def stored_form(directory: Path, form: FileForm) -> FileForm:
    """That of HF files with the experts of a layer in one tensor is another.

    Transformers 5 writes them so with save_original_format=False.
    """
    stacked = form == "hf" and any(name.endswith(STACKED) for name in weight_map(directory))
    return "stacked" if stacked else form


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(local_copy(file), framework="np") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise DcodError(
            f"{file}: not a whole safetensors file ({error}); download or write it again"
        ) from error


@contextlib.contextmanager
def _reader(
    files: dict[str, Path], stored: dict[str, str]
) -> Iterator[Callable[[Slot, Part], np.ndarray]]:
    """A function that reads a part of a slot's tensor; stored: names in the files.

    One file is mapped at a time, and anew after a few blocks: the pages that were read are let go.
    """
    opened, current, mapped = contextlib.ExitStack(), None, 0
    copies = {file: local_copy(file) for file in set(files.values())}
    handle: Any = None

    def read(slot: Slot, part: Part) -> np.ndarray:
        nonlocal current, handle, mapped
        file = files[slot.name]
        if current != file or mapped > 2 * STAGED:
            opened.close()
            current, handle, mapped = file, opened.enter_context(_open(copies[file])), 0
        tensor = handle.get_slice(stored[slot.name])[part]
        mapped += tensor.itemsize * len(tensor) * math.prod(slot.file_shape[1:])
        return tensor

    with opened:
        yield read


@contextlib.contextmanager
def checked_reader(
    directory: Path, config: ModelConfig, form: FileForm
) -> Iterator[Callable[[Slot, Part], np.ndarray]]:
    """`_reader` of the directory, once all names and shapes in it are the config's."""
    expected, held = slots(config, form), weight_map(directory)
    stored, vision = text_names(config.model_type, held)
    files = {name: held[own] for name, own in stored.items()}
    if vision:
        log.info("%s: %d tensors of the vision model are left out", directory, len(vision))
    _check_names(config, set(files), {slot.name for slot in expected}, where=directory)
    shapes = {slot.name: slot.file_shape for slot in expected}
    tied = config.tie_word_embeddings and HEAD in files
    if tied:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for file in sorted({files[name] for name in shapes}):
        with _open(file) as handle:
            here = {stored[name]: shape for name, shape in shapes.items() if files[name] == file}
            _check_shapes(handle, here, file=file)
    with _reader(files, stored) as read:
        if tied:
            _check_tied(read, slots(config, form), where=directory)
        yield read


def _check_shapes(handle: Any, shapes: dict[str, tuple[int, ...]], *, file: Path) -> None:
    held = set(handle.keys())
    for name, shape in shapes.items():
        if name not in held:
            raise DcodError(f"{file.with_name(INDEX)}: {name} is not in {file.name}")
        tensor = handle.get_slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise DcodError(
                f"{file}: {name} has shape {tuple(tensor.get_shape())}, the config expects {shape}"
            )
        if tensor.get_dtype() not in _FLOATS:
            raise DcodError(
                f"{file}: {name} has type {tensor.get_dtype()}, expected one of "
                f"{sorted(_FLOATS)}; quantised weights must be dequantised first"
            )


def _check_tied(
    read: Callable[[Slot, Part], np.ndarray], expected: list[Slot], *, where: Path
) -> None:
    embedding = next(slot for slot in expected if slot.name == EMBEDDING)
    head = dataclasses.replace(embedding, name=HEAD, path=HEAD)
    rows, columns = embedding.file_shape
    for part in blocks(((0, rows), (0, columns)), jnp.float32):
        if not np.array_equal(read(embedding, part), read(head, part)):
            raise DcodError(
                f"{where}: {HEAD} differs from {EMBEDDING} although tie_word_embeddings is true; "
                "set it to false in config.json to keep both"
            )


def _check_names(config: ModelConfig, found: set[str], expected: set[str], *, where: Path) -> None:
    missing = sorted(expected - found)
    if missing:
        hint = ""
        if missing == [HEAD]:
            hint = "; set tie_word_embeddings=true in config.json if the head is the embedding"
        raise DcodError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}; "
            f"the config (model_type={config.model_type!r}) needs them{hint}"
        )
    tied = {HEAD} if config.tie_word_embeddings else set()
    unexpected = sorted(filterfalse(_BUFFERS.fullmatch, found - expected - tied))
    if unexpected:
        raise DcodError(
            f"{where}: {len(unexpected)} tensors are not part of "
            f"model_type={config.model_type!r} with this config, first {unexpected[0]!r}; "
            f"dropping them would change the model"
        )


def write_shard(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file of these tensors and force it to the disk."""
    if isinstance(file, RemotePath):
        with atomic_write(file) as local:
            save_file(tensors, local, metadata={"format": "pt"})
        return
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library creates it readable by its owner only
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def publish(directory: Path, files: dict[str, Path], split: StateDictSplit) -> None:
    """Move complete files to their names; order matters: index away, shards in, index in."""
    if len(files) == 1:
        [(name, file)] = files.items()
        rename(file, directory / name)
        (directory / INDEX).unlink(missing_ok=True)
    else:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        temporary = next(iter(files.values())).with_name(f".{INDEX}.tmp")
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (directory / SINGLE).unlink(missing_ok=True)
        (directory / INDEX).unlink(missing_ok=True)
        for name, file in files.items():
            rename(file, directory / name)
        rename(temporary, directory / INDEX)
    for stale in directory.glob("model-*-of-*.safetensors"):
        if stale.name not in files:
            stale.unlink()
