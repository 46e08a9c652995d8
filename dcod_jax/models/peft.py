"""adapter_config.json of the PEFT library: what one says, and the one that adapters of ours get."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from dcod_jax.bounds import check, flag, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, read_json
from dcod_jax.models.config import Lora, ModelConfig
from dcod_jax.models.lora import linear_maps
from dcod_jax.models.tensors import PEFT, flatten
from dcod_jax.models.transformer import declarations

ADAPTER_CONFIG = "adapter_config.json"
_USED = {
    "peft_type": text(),
    "base_model_name_or_path": text(),
    "r": whole(1, 1 << 20),
    "lora_alpha": number(1e-9, 1e9),
    "use_rslora": optional(flag()),
}
# Of the training, of the first values, of an empty feature: the model is the same with any value.
_INERT = (
    "task_type inference_mode auto_mapping peft_version revision target_modules exclude_modules "
    "lora_dropout runtime_config qalora_group_size megatron_core "
    "ensure_weight_tying"
).split()
_NOTHING = (None, False, "", "none", [], {})
# Starts of A and B alone. With others (pissa, olora, corda, loftq, ...) PEFT changes the base, too.
_STARTS = (True, "gaussian", "eva", "orthogonal", "mica")
_NAME = re.compile(rf"{re.escape(PEFT)}model\.layers\.\d+\.(.+)\.lora_A\.weight")


def read(directory: Path) -> dict[str, Any]:
    """The checked adapter_config.json; DcodError for what changes the model and is not done."""
    file = directory / ADAPTER_CONFIG
    found = read_json(file)
    if found.get("peft_type") != "LORA":
        raise DcodError(
            f"{file}: peft_type={found.get('peft_type')!r}; only LORA adapters are read"
        )
    check({key: found.get(key) for key in _USED}, _USED, source=file)
    for key in sorted(found.keys() - _USED.keys() - set(_INERT)):
        starts = key == "init_lora_weights" and found[key] in _STARTS
        if found[key] not in _NOTHING and not starts:
            raise DcodError(
                f"{file}: {key}={found[key]!r} is not computed here; merge the adapter with PEFT "
                "(merge_and_unload, save_pretrained) and give that directory"
            )
    return found


def lora_of(settings: dict[str, Any], names: Collection[str]) -> Lora:
    """The adapters of a checked adapter_config.json whose tensors have these names."""
    maps = sorted({found[1] for name in names if (found := _NAME.fullmatch(name))})
    scaled = bool(settings.get("use_rslora"))
    targets = tuple(re.escape(name) for name in maps)
    return Lora(settings["r"], float(settings["lora_alpha"]), targets, scaled)


def to_peft(config: ModelConfig, base: str) -> dict[str, Any]:
    """adapter_config.json for the adapters of a model beside `base`, a directory or a hub id."""
    assert config.lora is not None
    flat = flatten(declarations(config))
    adapted = [path.replace("lora_a", "kernel") for path in flat if path.endswith("lora_a")]
    if fused := sorted({flat[path].hf for path in adapted if flat[path].rows}):
        raise DcodError(
            f"export.adapter: files of model_type={config.model_type!r} hold several maps in one "
            f"tensor ({fused[0]}), which PEFT adapts as one; set export.adapter=false, or "
            "student.lora.targets to others"
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "use_rslora": config.lora.rslora,
        "target_modules": linear_maps(config),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
