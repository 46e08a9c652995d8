"""Hugging Face directories: config.json and safetensors, read and written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dcod_jax.bounds import check, mapping, text
from dcod_jax.copies import local_copy
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path, atomic_write, from_json, rename
from dcod_jax.models import config as configs
from dcod_jax.models import gguf, lora, peft
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.tensors import (
    Form,
    Part,
    Slot,
    assemble,
    check_structure,
    flatten,
    slots,
    tensor_of,
)
from dcod_jax.models.transformer import check_mesh, logical_axes
from dcod_jax.parallel import hosts
from dcod_jax.parallel import mesh as meshes
from dcod_jax.stores import RemotePath
from dcod_jax.types import Params

SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # of a PEFT directory
INDEX = "model.safetensors.index.json"
_INDEX = {"weight_map": mapping(items=text(255))}

# Buffers that old exports wrote; their values follow from the config.
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FLOATS = {"F32", "BF16", "F16"}


def _directory(path: Location) -> Path:
    if not str(path):
        raise DcodError("the model path is empty; give an HF directory or a .gguf file")
    directory = as_path(path)
    if not directory.exists():
        raise DcodError(f"{directory}: no such model directory; check the path")
    return directory


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DcodError(f"{file}: not valid JSON ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise DcodError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def load_config(path: Location) -> tuple[ModelConfig, dict[str, Any]]:
    """(ModelConfig, the file's own dict) of an HF directory or a config.json.

    A text ends at the ids of config.json and at those of the generation_config.json beside it,
    which often names more (Qwen2.5 two, Llama 3 three). Raises DcodError for a path without
    config.json and for whatever the model does not do.
    """
    directory = _directory(path)
    file = directory if directory.is_file() else directory / "config.json"
    if _is_adapter(directory):
        config, raw = load_config(peft.read(directory)["base_model_name_or_path"])
        return _with_stop_ids(config, file), raw
    if not file.is_file():
        raise DcodError(f"{directory}: no config.json in it; expected an HF model directory")
    raw = _read_json(file)
    return _with_stop_ids(configs.from_hf(raw, source=str(file)), file), raw


def _is_adapter(directory: Path) -> bool:
    """Whether it is a PEFT directory, whose weights are those of another beside these."""
    whole = any((directory / name).is_file() for name in (SINGLE, INDEX))
    return not whole and (directory / peft.ADAPTER_CONFIG).is_file()


def _with_stop_ids(config: ModelConfig, file: Path) -> ModelConfig:
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        stops = _read_json(generation).get("eos_token_id")
        config = configs.add_stop_ids(config, stops, source=str(generation))
    return config


def read_config(path: Location) -> ModelConfig:
    """ModelConfig of an HF directory, a config.json or a .gguf file."""
    directory = _directory(path)
    return gguf.read_config(directory) if directory.suffix == ".gguf" else load_config(directory)[0]


def _weight_map(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    single = directory / (ADAPTER if _is_adapter(directory) else SINGLE)
    index = directory / INDEX
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        content = _read_json(index)
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


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(local_copy(file), framework="np") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise DcodError(
            f"{file}: not a whole safetensors file ({error}); download or write it again"
        ) from error


def _check_names(config: ModelConfig, found: set[str], expected: set[str], *, where: Path) -> None:
    missing = sorted(expected - found)
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; set tie_word_embeddings=true in config.json if the head is the embedding"
        raise DcodError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}; "
            f"the config (model_type={config.model_type!r}) needs them{hint}"
        )
    unexpected = sorted(name for name in found - expected if not _tolerated(config, name))
    if unexpected:
        raise DcodError(
            f"{where}: {len(unexpected)} tensors are not part of "
            f"model_type={config.model_type!r} with this config, first {unexpected[0]!r}; "
            f"dropping them would change the model"
        )


def _tolerated(config: ModelConfig, name: str) -> bool:
    duplicate = config.tie_word_embeddings and name == "lm_head.weight"
    return duplicate or _BUFFERS.fullmatch(name) is not None


def load_params(
    path: Location,
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Params | None = None,
    form: Form = "hf",
) -> Params:
    """Params of an HF directory, read tensor by tensor and placed as shardings say.

    form="peft": the adapters of a PEFT directory.

    Raises DcodError naming the tensor that is missing, unexpected, of another shape or type.
    """
    directory = _directory(path)
    expected = slots(config, form)
    files = _weight_map(directory)
    _check_names(config, set(files), {slot.name for slot in expected}, where=directory)
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in sorted(set(files.values()))}

        def view(name: str, shape: tuple[int, ...]) -> Any:
            if name not in handles[files[name]].keys():  # noqa: SIM118
                raise DcodError(f"{directory / INDEX}: {name} is not in {files[name].name}")
            tensor = handles[files[name]].get_slice(name)
            if tuple(tensor.get_shape()) != shape:
                raise DcodError(
                    f"{files[name]}: {name} has shape {tuple(tensor.get_shape())}, "
                    f"the config expects {shape}"
                )
            if tensor.get_dtype() not in _FLOATS:
                raise DcodError(
                    f"{files[name]}: {name} has type {tensor.get_dtype()}, expected one of "
                    f"{sorted(_FLOATS)}; quantised weights must be dequantised first"
                )
            return tensor

        for slot in expected:  # every shape, before the first byte is read
            view(slot.name, slot.file_shape)
        if config.tie_word_embeddings and "lm_head.weight" in files:
            _check_tied(view, (config.vocab_size, config.hidden_size), where=directory)

        def read(slot: Slot, part: Part) -> np.ndarray:
            return view(slot.name, slot.file_shape)[part]

        return assemble(config, form, read, dtype=dtype, shardings=shardings)


def _check_tied(view: Callable[..., Any], shape: tuple[int, int], *, where: Path) -> None:
    embedding = view("model.embed_tokens.weight", shape)
    head = view("lm_head.weight", shape)
    if not np.array_equal(embedding[:], head[:]):
        raise DcodError(
            f"{where}: lm_head.weight differs from model.embed_tokens.weight although "
            f"tie_word_embeddings is true; set it to false in config.json to keep both"
        )


def load_model(
    path: Location, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """(config, params) of an HF directory or a .gguf file, sharded over mesh if one is given.

    A PEFT directory is read as its base with the adapters merged.
    """
    directory = _directory(path)
    if _is_adapter(directory):
        return _load_adapted(directory, dtype=dtype, mesh=mesh)
    config, params = (
        gguf.read_gguf(directory, dtype=dtype)
        if directory.suffix == ".gguf"
        else (load_config(directory)[0], None)
    )
    shardings = None
    if mesh is not None:
        check_mesh(config, mesh)
        shardings = meshes.tree_shardings(mesh, logical_axes(config))
    if params is None:
        return config, load_params(directory, config, dtype=dtype, shardings=shardings)
    return config, params if shardings is None else jax.tree.map(meshes.put, params, shardings)


def _load_adapted(
    directory: Path, *, dtype: DTypeLike, mesh: Mesh | None
) -> tuple[ModelConfig, Params]:
    settings = peft.read(directory)
    found, base = load_model(settings["base_model_name_or_path"], dtype=dtype, mesh=mesh)
    whole = dataclasses.replace(found, lora=peft.lora_of(settings, _weight_map(directory)))
    shardings = None
    if mesh is not None:
        shardings = meshes.tree_shardings(mesh, lora.trained(whole, logical_axes(whole)))
    adapter = load_params(directory, whole, shardings=shardings, form="peft")
    return load_config(directory)[0], lora.merge(whole, adapter, base, dtype=dtype)


def save_params(
    path: Location,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    max_shard_bytes: int,
    form: Form = "hf",
) -> None:
    """Write model.safetensors, or several files with an index where one would be too large.

    form="peft": adapter_model.safetensors, which is always one file.

    Every process calls it, the first one writes. Files appear under their names only when all are
    complete, the index last; an interrupted save leaves no weights that look whole.
    """
    if max_shard_bytes < 1:
        raise DcodError(f"max_shard_bytes={max_shard_bytes} must be positive")
    check_structure(config, params, form)
    directory, single = as_path(path), ADAPTER if form == "peft" else SINGLE
    named: dict[str, list[Slot]] = {}
    for slot in sorted(slots(config, form), key=lambda slot: slot.rows or (0, 0)):
        named.setdefault(slot.name, []).append(slot)
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda parts: sum(part.num_bytes(dtype) for part in parts),
        filename_pattern=single.replace(".", "{suffix}."),
        max_shard_size=sys.maxsize if form == "peft" else max_shard_bytes,
    )
    files = {name: directory / f".{name}.{os.getpid()}.tmp" for name in split.filename_to_tensors}
    flat = flatten(params)
    writes = jax.process_index() == 0
    try:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                parts = [tensor_of(flat, slot, dtype=dtype) for slot in named[name]]
                tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            hosts.moved()
            if writes:
                _write_shard(files[file], tensors)
        if writes:
            _publish(directory, files, split)
    except (SafetensorError, OSError) as error:
        raise DcodError(
            f"{directory}: weights could not be written ({error}); nothing was replaced unless "
            f"all of it was written; free some space or change the path"
        ) from error
    finally:
        for temporary in files.values():
            temporary.unlink(missing_ok=True)


def _write_shard(file: Path, tensors: dict[str, np.ndarray]) -> None:
    if isinstance(file, RemotePath):
        with atomic_write(file) as local:
            save_file(tensors, local, metadata={"format": "pt"})
        return
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library creates it readable by its owner only
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _publish(directory: Path, files: dict[str, Path], split: StateDictSplit) -> None:
    """Move complete files to their names; order matters: index away, shards in, index in."""
    if len(files) == 1:
        [(name, file)] = files.items()
        rename(file, directory / name)
        (directory / INDEX).unlink(missing_ok=True)
    else:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        temporary = directory / f".{INDEX}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (directory / SINGLE).unlink(missing_ok=True)
        (directory / INDEX).unlink(missing_ok=True)
        for name, file in files.items():
            rename(file, directory / name)
        rename(temporary, directory / INDEX)
    for stale in directory.glob("model-*-of-*.safetensors"):
        if stale.name not in files:
            stale.unlink()


@functools.lru_cache(maxsize=1024)
def _digest(file: pathlib.Path, state: tuple[int, ...]) -> bytes:
    """sha256 of a file, read once by a process as long as its inode, size and time are `state`."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def weights_fingerprint(path: Location) -> str:
    """sha256 over the content of the weight files, in the order of their names, and of a base."""
    directory = _directory(path)
    files = [directory] if directory.is_file() else sorted(set(_weight_map(directory).values()))
    whole = hashlib.sha256()
    for file in files:
        local = local_copy(file)
        now = local.stat()
        whole.update(_digest(local, (now.st_ino, now.st_size, now.st_mtime_ns)))
    if directory.is_dir() and _is_adapter(directory):
        base = peft.read(directory)["base_model_name_or_path"]
        whole.update(weights_fingerprint(base).encode())
    return whole.hexdigest()
