"""Adapters of low rank: which parameters are trained, which are frozen, and both as one model.

With config.lora the params of a model have leaves lora_a and lora_b beside the kernels. They are
trained, in float32; the rest, the base, keeps the compute dtype and has no gradient, no moments and
no place in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcod_jax.errors import DcodError
from dcod_jax.models.config import Lora, ModelConfig
from dcod_jax.models.transformer import declarations, init_params, logical_axes
from dcod_jax.parallel import mesh as meshes
from dcod_jax.types import Params

ADAPTER = ("lora_a", "lora_b")


def _flat(tree: Params) -> dict[Any, Any]:
    return traverse_util.flatten_dict(tree)


def with_adapter(config: ModelConfig, settings: Any) -> ModelConfig:
    """The model with the adapters of student.lora.*; as it is where the rank is 0.

    Raises DcodError for a target that names no linear map of the model's layers.
    """
    if not settings or not settings["rank"]:
        return config
    options = {key: settings[key] for key in ("rank", "alpha", "rslora")}

    def adapted(*targets: str) -> ModelConfig:
        return dataclasses.replace(config, lora=Lora(targets=targets, **options))

    for target in settings["targets"]:
        if not linear_maps(adapted(target)):
            raise DcodError(
                f"student.lora.targets: {target!r} names no linear map of model_type="
                f"{config.model_type!r} that adapters are for (of attention, and of an MLP that is "
                f"no mixture of experts): {', '.join(linear_maps(adapted('.*')))}"
            )
    return adapted(*settings["targets"])


def linear_maps(config: ModelConfig) -> list[str]:
    """Names, within a layer's files, of the maps that have an adapter: "self_attn.q_proj"."""
    flat = _flat(declarations(config)["layers"])
    found = [one.hf for path, one in flat.items() if path[-1] == ADAPTER[0]]
    return sorted(name.removeprefix("model.layers.{layer}.").rsplit(".", 2)[0] for name in found)


def without_adapter(config: ModelConfig) -> ModelConfig:
    """The base's own config."""
    return dataclasses.replace(config, lora=None)


def _some(tree: Params, *, adapter: bool) -> Params:
    flat = _flat(tree)
    chosen = {path: x for path, x in flat.items() if (path[-1] in ADAPTER) == adapter}
    return traverse_util.unflatten_dict(chosen)


def trained(config: ModelConfig, params: Params) -> Params:
    """What is trained of a tree in the structure of params: the adapters, without them all."""
    return params if config.lora is None else _some(params, adapter=True)


def frozen(config: ModelConfig, params: Params) -> Params:
    """What is not trained of such a tree; {} without adapters."""
    return {} if config.lora is None else _some(params, adapter=False)


def join(params: Params, base: Params) -> Params:
    """Params of the whole model from the trained and the frozen part."""
    flat = _flat(params) | _flat(base)
    return traverse_util.unflatten_dict(flat)


def trained_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Of what is trained."""
    return meshes.tree_shardings(mesh, trained(config, logical_axes(config)))


def init_trained(config: ModelConfig, key: Array, mesh: jax.sharding.Mesh) -> Params:
    """Random parameters of what is trained, float32, in their pieces; they follow from the key.

    Of adapters A is uniform and B zero.
    """
    layout = trained_shardings(config, mesh)
    return jax.jit(lambda key: trained(config, init_params(config, key)), out_shardings=layout)(key)


@functools.partial(jax.jit, static_argnames="scale")
def _merged(
    kernel: Float[Array, "L I O"], a: Float[Array, "L I R"], b: Float[Array, "L R O"], scale: float
) -> Float[Array, "L I O"]:
    product = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product


def merge(
    config: ModelConfig, adapter: Params, base: Params, *, dtype: DTypeLike = jnp.float32
) -> Params:
    """Params without adapters, W + scale·A·B in float32 and then in dtype.

    `base` is emptied: one leaf at a time is there twice.
    """
    assert config.lora is not None
    flat, low = _flat(base), _flat(adapter)
    base.clear()
    whole = {}
    for path in list(flat):
        leaf = flat.pop(path)
        if path[-1] == "kernel" and (*path[:-1], ADAPTER[0]) in low:
            a, b = (low[(*path[:-1], name)] for name in ADAPTER)
            made = _merged(leaf, a, b, scale=config.lora.scale)
            whole[path] = jax.device_put(made.astype(dtype), leaf.sharding)
        else:
            whole[path] = leaf.astype(dtype)
    return traverse_util.unflatten_dict(whole)
