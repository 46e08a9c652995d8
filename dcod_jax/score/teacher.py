"""The teachers of a configuration: where they are, and what a manifest says about them."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dcod_jax.data.teachers import TeacherEntry
from dcod_jax.data.templates import OWN, TemplateChoice, template_of
from dcod_jax.data.tokenizer import Tokenizer, load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path, to_json
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.hf import load_model, weights_changed, weights_fingerprint
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
        """What a manifest says of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "weights": self.fingerprint,
            "dtype": self.dtype,
        }

    def load(self, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
        """(config, parameters), sharded over mesh if one is given."""
        return load_model(self.path, dtype=jnp.dtype(self.dtype), mesh=mesh)


def own_tokenizer(entry: TeacherEntry, *, date: str) -> Tokenizer:
    """The tokenizer of a teacher that does not share the student's, with its own chat template."""
    variables = tuple(filter(None, entry.template_kwargs.split(",")))
    choice = TemplateChoice(entry.chat_template, variables, date)
    return load_tokenizer(as_path(entry.tokenizer or entry.path), template=choice)


def open_teacher(settings: Any, *, template: TemplateChoice = OWN) -> Teacher:
    """The teacher of config.teacher (path, name, revision, ...): an HF directory or .gguf."""
    if not settings.path:
        raise DcodError("teacher.path is empty; expected an HF directory or a .gguf file")
    path = as_path(settings.path)
    return Teacher(
        path=path,
        name=settings.name or _name_of(path),
        revision=settings.revision,
        fingerprint=weights_fingerprint(path),
        dtype=settings.dtype,
        tokenizer=load_tokenizer(settings.tokenizer or path, template=template),
    )


def _name_of(path: Path) -> str:
    return path.name.removesuffix(".gguf")


def open_start(config: Any) -> Teacher:
    """student.path, the start, as a model that scores or samples in student.compute_dtype."""
    if not config.student.path:
        raise DcodError("student.path is empty; the student's own log-probs or samples need it")
    student, named = config.student, {"name": "", "revision": "", "tokenizer": ""}
    settings = types.SimpleNamespace(path=student.path, dtype=student.compute_dtype, **named)
    return open_teacher(settings, template=template_of(config.student))


def entry_weights(entry: TeacherEntry, told: Mapping[str, Any] | None = None) -> str:
    """The hash of a teacher's tensor files; of a served model, which nobody here can hash, a name.

    told: what a manifest says of this teacher. It is believed, and no file of the teacher read,
    where name and revision are the same and this machine does not know that the files have changed.
    No network is read for a server: training compares it with the manifest while it may be off.
    """
    if entry.server:
        return f"served: {entry.model}" + (f"@{entry.revision}" if entry.revision else "")
    name = entry.name or entry.model or _name_of(as_path(entry.path))
    named = {"name": name, "revision": entry.revision}
    believed = told and told.get("weights") and named.items() <= told.items()
    if told and believed and not weights_changed(entry.path):
        return told["weights"]
    return weights_fingerprint(as_path(entry.path))


def joint_weights(weights: Mapping[str, str]) -> str:
    """One value for the weights of {name: weights}; the only teacher's own."""
    if list(weights) == [""]:
        return weights[""]
    return hashlib.sha256(to_json(dict(sorted(weights.items())))).hexdigest()


def expected_weights(entries: Sequence[TeacherEntry], told: Mapping[str, Any] | None = None) -> str:
    """The weights that a manifest has for these teachers; told: as entry_weights has it."""
    told = told or {}
    each = told.get("teachers") or {"": told}
    return joint_weights({e.name: entry_weights(e, each.get(e.name)) for e in entries})


def joint_provenance(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a manifest says of the teachers {name: provenance}; of the only one, its own."""
    if list(found) == [""]:
        return found[""]
    return {
        "name": ", ".join(sorted(found)),
        "weights": joint_weights({name: about["weights"] for name, about in found.items()}),
        "teachers": dict(found),
    }
