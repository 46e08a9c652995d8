"""The teacher of a configuration: where it is, and what a manifest says about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dcod_jax.data.templates import OWN, TemplateChoice
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.hf import load_model, weights_fingerprint
from dcod_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that scores or samples, and what a manifest says about it; tensors not yet read."""

    path: Path
    name: str
    revision: str
    fingerprint: str  # hash of the content of its tensor files
    dtype: str  # of parameters and compute
    tokenizer: Any

    def provenance(self) -> dict[str, str]:
        return {
            "name": self.name,
            "revision": self.revision,
            "weights": self.fingerprint,
            "dtype": self.dtype,
        }

    def load(self, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
        return load_model(self.path, dtype=jnp.dtype(self.dtype), mesh=mesh)


def open_teacher(settings: Any, *, template: TemplateChoice = OWN) -> Teacher:
    """The teacher of config.teacher (path, name, revision, dtype): an HF directory or .gguf."""
    if not settings.path:
        raise DcodError("teacher.path is empty; expected an HF directory or a .gguf file")
    path = as_path(settings.path)
    return Teacher(
        path=path,
        name=settings.name or path.name.removesuffix(".gguf"),
        revision=settings.revision,
        fingerprint=weights_fingerprint(path),
        dtype=settings.dtype,
        tokenizer=load_tokenizer(path, template=template),
    )
