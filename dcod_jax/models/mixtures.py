"""Mixtures of experts: what a model has of them, and how config.json says it."""

from __future__ import annotations

import dataclasses
from typing import Any

from dcod_jax.bounds import Bound, check, flag, optional, whole
from dcod_jax.errors import DcodError
from dcod_jax.models.layer_types import Raw

_COUNT = whole(1, 4096)
# Key -> the only values under which every layer is such a mixture, and nothing else (ACCEPTED of
# models/config.py): layers with one MLP would need a stack of parameters of their own.
ACCEPTS: dict[str, tuple[Any, ...] | None] = {
    "num_experts": None,
    "num_local_experts": None,
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "router_jitter_noise": (0, 0.0, None),
}
_NAMES = ("num_experts", "num_local_experts")  # transformers reads and writes either


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The MLPs of each layer, of which a router gives every token some (arXiv 2101.03961)."""

    experts: int
    per_token: int
    width: int  # channels of one expert
    normalized: bool  # whether the router's weights of a token's experts add up to 1
    block_sparse: bool = False  # files name router and experts as Mixtral does


@dataclasses.dataclass(frozen=True)
class MixtureKeys:
    """How a family's config.json says its mixture, and what HF assumes for absent keys."""

    experts: int
    per_token: int
    width: str  # the key of an expert's channels
    normalized: bool | None = None  # None: by norm_topk_prob, absent: false
    block_sparse: bool = False

    def read(self, raw: Raw, source: str) -> Mixture:
        """The mixture of a config with the family's defaults."""
        bounds: dict[str, Bound] = dict.fromkeys(_NAMES, optional(_COUNT))
        bounds |= {"num_experts_per_tok": optional(_COUNT), "norm_topk_prob": optional(flag())}
        check(raw, bounds | {self.width: whole(1, 2**22)}, source=source)
        given = {key: raw[key] for key in _NAMES if raw.get(key) is not None}
        if len(set(given.values())) > 1:
            raise DcodError(f"{source}: {given} must be the same number; keep one of the keys")
        experts = next(iter(given.values()), self.experts)
        per_token = raw.get("num_experts_per_tok") or self.per_token
        if per_token > experts:
            raise DcodError(
                f"{source}: num_experts_per_tok={per_token} must be at most the {experts} experts"
            )
        normalized = self.normalized
        if normalized is None:
            normalized = bool(raw.get("norm_topk_prob"))
        return Mixture(experts, per_token, raw[self.width], normalized, self.block_sparse)

    def to_hf(self, mixture: Mixture) -> dict[str, Any]:
        """The keys that say a mixture."""
        keys: dict[str, Any] = dict.fromkeys(_NAMES, mixture.experts)
        keys |= {"num_experts_per_tok": mixture.per_token, self.width: mixture.width}
        if self.normalized is None:
            keys["norm_topk_prob"] = mixture.normalized
        return keys
