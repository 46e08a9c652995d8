"""Hugging Face directories: config.json and safetensors, read and written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError

from dcod_jax.copies import changed_since_hashed, content_sha256
from dcod_jax.errors import DcodError
from dcod_jax.files import (
    NO_HUB_ID,
    Location,
    Path,
    as_path,
    near,
    read_json,
    scratch,
    why_no_hub_id,
)
from dcod_jax.models import config as configs
from dcod_jax.models import gguf, lora, peft
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.tensor_files import (
    ADAPTER,
    SINGLE,
    checked_reader,
    is_adapter,
    publish,
    stored_form,
    weight_map,
    write_shard,
)
from dcod_jax.models.tensors import (
    FileForm,
    Slot,
    assemble,
    check_structure,
    differing,
    flatten,
    shardings_of,
    slots,
    tensor_of,
)
from dcod_jax.parallel import hosts
from dcod_jax.types import Params


def _directory(path: Location) -> Path:
    if not str(path):
        raise DcodError("the model path is empty; give an HF directory or a .gguf file")
    directory = as_path(path)
    if not directory.exists():
        if why_no_hub_id(str(path)) != NO_HUB_ID:
            hint = f"; a model is read from a disk: hf download {path} --local-dir models/…"
        else:
            hint = near(directory)
        raise DcodError(f"{directory}: no such model directory{hint}")
    return directory


def load_config(path: Location) -> tuple[ModelConfig, dict[str, Any]]:
    """(ModelConfig, the file's own dict) of an HF directory or a config.json.

    A text ends at the ids of config.json and at those of the generation_config.json beside it,
    which often names more (Qwen2.5 two, Llama 3 three). Raises DcodError for a path without
    config.json and for whatever the model does not do.
    """
    directory = _directory(path)
    file = directory if directory.is_file() else directory / "config.json"
    if is_adapter(directory):
        config, raw = load_config(_base_of(directory))
        return _with_stop_ids(config, file), raw
    if not file.is_file():
        raise DcodError(f"{directory}: no config.json in it; expected an HF model directory")
    raw = read_json(file)
    return _with_stop_ids(configs.from_hf(raw, source=str(file)), file), raw


def _base_of(directory: Path) -> str:
    """The model that adapters belong to; DcodError where that is a directory of adapters, too."""
    base = peft.read(directory)["base_model_name_or_path"]
    if is_adapter(as_path(base)):
        raise DcodError(
            f"{directory / peft.ADAPTER_CONFIG}: base_model_name_or_path={base} holds adapters, no "
            "model; merge them with PEFT (merge_and_unload, save_pretrained) and name that"
        )
    return base


def _with_stop_ids(config: ModelConfig, file: Path) -> ModelConfig:
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        stops = read_json(generation).get("eos_token_id")
        config = configs.add_stop_ids(config, stops, source=str(generation))
    return config


def read_config(path: Location) -> ModelConfig:
    """ModelConfig of an HF directory, a config.json or a .gguf file."""
    directory = _directory(path)
    return gguf.read_config(directory) if directory.suffix == ".gguf" else load_config(directory)[0]


def load_params(
    path: Location,
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Params | None = None,
    form: FileForm = "hf",
) -> Params:
    """Params of an HF directory, read tensor by tensor and placed as shardings say.

    form="peft": the adapters of a PEFT directory.

    Raises DcodError naming the tensor that is missing, unexpected, of another shape or type.
    """
    directory = _directory(path)
    form = stored_form(directory, form)
    with checked_reader(directory, config, form) as read:
        return assemble(config, form, read, dtype=dtype, shardings=shardings)


def check_saved(
    path: Location, config: ModelConfig, params: Params, *, dtype: DTypeLike, form: FileForm = "hf"
) -> None:
    """Read what save_params wrote back, and compare it with params cast to dtype, bit for bit.

    Block by block, on each process what its devices have. Raises DcodError with the first leaf that
    differs.
    """
    with checked_reader(_directory(path), config, form) as read:
        if leaf := differing(config, form, read, params, dtype=dtype):
            raise DcodError(
                f"{path}: {leaf} reads back as another than the training parameters; the disk or "
                "the writer is at fault, and no export was left. Run the same command again"
            )


def load_model(
    path: Location, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """(config, params) of an HF directory or a .gguf file, sharded over mesh if one is given.

    A PEFT directory is read as its base with the adapters merged.
    """
    directory = _directory(path)
    if is_adapter(directory):
        return _load_adapted(directory, dtype=dtype, mesh=mesh)
    if directory.suffix == ".gguf":
        return gguf.read_gguf(directory, dtype=dtype, mesh=mesh)
    config = load_config(directory)[0]
    shardings = shardings_of(config, mesh)
    return config, load_params(directory, config, dtype=dtype, shardings=shardings)


def _load_adapted(
    directory: Path, *, dtype: DTypeLike, mesh: Mesh | None
) -> tuple[ModelConfig, Params]:
    settings = peft.read(directory)
    found, base = load_model(_base_of(directory), dtype=dtype, mesh=mesh)
    whole = dataclasses.replace(found, lora=peft.lora_of(settings, weight_map(directory)))
    shardings = None if mesh is None else lora.trained_shardings(whole, mesh)
    adapter = load_params(directory, whole, shardings=shardings, form="peft")
    return load_config(directory)[0], lora.merge(whole, adapter, base, dtype=dtype)


def save_params(
    path: Location,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    max_shard_bytes: int,
    form: FileForm = "hf",
) -> None:
    """Write model.safetensors, or several files with an index where one would be too large.

    form="peft": adapter_model.safetensors, which is always one file.

    Every process calls it; the first one gets the tensors, of one file at a time, and writes it.
    Files appear under their names only when all are complete, the index last; an interrupted save
    leaves no weights that look whole.
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
    flat, unnamed, opened = flatten(params), directory, contextlib.ExitStack()
    writes = jax.process_index() == 0
    try:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
        if writes and isinstance(directory, pathlib.Path):
            unnamed = opened.enter_context(scratch(directory))
        files = {name: unnamed / f".{name}.tmp" for name in split.filename_to_tensors}
        for file, names in split.filename_to_tensors.items():
            tensors: dict[str, Any] = {}  # of the last file let go
            for name in names:
                tensors[name] = tensor_of(flat, *named[name], dtype=dtype)
                hosts.moved()
            if writes:
                write_shard(files[file], tensors)
        if writes:
            publish(directory, files, split)
    except (SafetensorError, OSError) as error:
        raise DcodError(
            f"{directory}: weights could not be written ({error}); nothing was replaced unless "
            f"all of it was written; free some space or change the path"
        ) from error
    finally:
        opened.close()


def weights_fingerprint(path: Location) -> str:
    """sha256 over the content of the weight files, in the order of their names, and of a base.

    Of several processes the first one reads them; all call it (parallel/hosts.from_first).
    """
    return hosts.from_first("the hash of weights", lambda: _fingerprint(path))


def _fingerprint(path: Location) -> str:
    directory = _directory(path)
    files = [directory] if directory.is_file() else sorted(set(weight_map(directory).values()))
    whole = hashlib.sha256()
    for file in files:
        whole.update(bytes.fromhex(content_sha256(file)))
        hosts.moved()
    if directory.is_dir() and is_adapter(directory):
        whole.update(_fingerprint(_base_of(directory)).encode())
    return whole.hexdigest()


def weights_changed(path: Location) -> bool:
    """Whether a local weight file is not the one that this machine hashed; reads no content."""
    place = as_path(path)
    if not isinstance(place, pathlib.Path):
        return False
    return any(
        map(changed_since_hashed, [place] if place.is_file() else place.glob("*.safetensors"))
    )
