"""GGUF files: weights (dequantised), through the `gguf` package (extra gguf)."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dcod_jax.copies import local_copy
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path
from dcod_jax.models import config as configs
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.gguf_metadata import BESIDE, raw_config
from dcod_jax.models.tensors import Part, Slot, assemble, shardings_of, slots
from dcod_jax.types import Params

if TYPE_CHECKING:  # an extra
    from gguf import GGUFReader

# What a header may announce, far above any model of today: each item costs memory when it is read.
_MOST = {"GGUF.kv_count": 1 << 16, "GGUF.tensor_count": 1 << 17, "items of an array": 1 << 21}
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS of the format


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise DcodError(
            "reading a .gguf file needs the extra gguf: pip install '.[gguf]' in the checkout"
        ) from error


def _reader() -> type[GGUFReader]:
    """The package's reader, with every announced size checked before something is read by it."""
    package = _package()
    kinds = package.GGUFValueType

    class Reader(package.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it announces {end} bytes and has {len(self.data)}")
            return super()._get(int(offset), dtype, count, override_order)

        def _push_field(self, field: Any, skip_sum: bool = False) -> Any:
            _check_count(field.name, int(field.parts[-1][0]) if field.name in _MOST else 0)
            return super()._push_field(field, skip_sum)

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if kinds(raw_type) != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            _check_count("items of an array", int(count[0]))
            kind = kinds(item[0])
            if kind == kinds.ARRAY:
                raise ValueError("it has an array of arrays")
            if kind == kinds.STRING:
                return super()._get_field_parts(orig_offs, raw_type)
            # One view of all values, where the package makes a view of each.
            values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count[0])
            return 12 + values.nbytes, [item, count, values], [2], [kinds.ARRAY, kind]

        def _get_tensor_info_field(self, orig_offs: Any) -> Any:
            field = super()._get_tensor_info_field(orig_offs)
            dimensions, place = field.parts[3].tolist(), int(field.parts[5][0])
            elements = math.prod(dimensions)
            if len(dimensions) > _MOST_DIMENSIONS or max(elements // 8, place) > len(self.data):
                raise ValueError(f"tensor {field.name} announces {dimensions[:5]} at byte {place}")
            return field

    return Reader


def _check_count(name: str, count: int) -> None:
    if count > _MOST.get(name, count):
        raise ValueError(f"it announces {count} {name}; at most {_MOST[name]} are read")


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open GGUF file; its tensors are mapped, not read."""

    path: Path
    reader: GGUFReader

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or the default; DcodError for a text that is none."""
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise DcodError(f"{self.path}: metadata key {key} is no text ({error})") from error


def open_gguf(location: Location) -> GgufFile:
    """Map a GGUF file; DcodError where it is missing or not whole."""
    path = as_path(location)
    if not path.is_file():
        raise DcodError(f"{path}: no such .gguf file; check the path")
    reader = _reader()
    try:
        return GgufFile(path, reader(local_copy(path)))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DcodError(f"{path}: not a whole GGUF file ({error}); download it again") from error


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: per head (pair, half) back to HF's (half, pair)."""
    grouped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def read_gguf(
    file: Location, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """(config, params) of a GGUF file, dequantised, sharded over mesh if one is given.

    Raises DcodError for another architecture or quantisation, for metadata that cannot be honoured
    exactly, and for tensors that are missing or unknown.
    """
    opened = open_gguf(file)
    path = opened.path
    config, tensors = _read_head(opened)
    expected = {slot.name: slot for slot in slots(config, "gguf")}
    ropes = [kind.rope.kind for kind in config.layer_kinds if kind.rope]
    beside = set().union(*(BESIDE.get(rope, set()) for rope in ropes))
    for name in sorted(expected.keys() ^ (tensors.keys() - beside)):
        state = "missing" if name in expected else "not part of this architecture here"
        raise DcodError(f"{path}: tensor {name} is {state}; use the HF directory of this model")
    interleaved = configs.FAMILIES[config.model_type].gguf_interleaved

    def read(slot: Slot, part: Part) -> np.ndarray:
        tensor, permuted = tensors[slot.name], interleaved and slot.rope_heads
        shape = tuple(map(int, tensor.shape[::-1]))
        if shape != slot.file_shape:
            raise DcodError(
                f"{path}: {slot.name} has shape {shape}, the metadata say {slot.file_shape}"
            )
        if len(shape) > 1 and not permuted:  # of whole rows, which are quantised by themselves
            values = _dequantised(tensor, path, rows=part[0])
            part = (slice(None), *part[1:])
        else:
            values = _dequantised(tensor, path)
        if permuted:
            values = _unpermute(values, slot.rope_heads)
        if slot.name.endswith("norm.weight"):  # such files hold what norms multiply by
            values = values - np.float32(config.norm_offset)
        return values[part]

    shardings = shardings_of(config, mesh)
    return config, assemble(config, "gguf", read, dtype=dtype, shardings=shardings)


def _dequantised(tensor: Any, path: Path, *, rows: slice = slice(None)) -> np.ndarray:
    quants = _package().quants
    try:
        return np.asarray(quants.dequantize(tensor.data[rows], tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise DcodError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which the gguf package "
            f"does not dequantise; use the HF directory of this model, or another quantisation"
        ) from error


def _read_head(file: GgufFile) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, {tensor name: tensor})."""
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    if "token_embd.weight" not in tensors:
        raise DcodError(
            f"{file.path}: tensor token_embd.weight is missing; is it a language model?"
        )
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}

    def factors(name: str) -> list[float]:
        return _dequantised(tensors[name], file.path).tolist()

    raw = raw_config(file.get, shapes, factors, path=file.path)
    return configs.from_hf(raw, source=str(file.path)), tensors


def read_config(location: Location) -> ModelConfig:
    """The config of a GGUF file; raises DcodError as read_gguf does."""
    return _read_head(open_gguf(location))[0]
