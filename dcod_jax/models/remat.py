"""What the backward pass finds saved of each layer: the values of student.remat."""

from __future__ import annotations

import re
from typing import Any

import jax

from dcod_jax.errors import DcodError

BLOCK_INPUT = "block_input"
EXPERT_PRODUCT = "expert_product"  # which no policy for matrix products knows as one
ATTENTION = "attention"  # what attention mixed, and what its backward pass needs of the sums
# Beside the layer's input, which "offload" keeps in the host's memory; "none" is no policy.
POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(EXPERT_PRODUCT, ATTENTION),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
NAMES = ("none", "dots", "attention", "full", "offload")  # the least recomputation first
_PARTIAL = re.compile(r"(none|dots):([1-9]\d{0,5})")


def fault(remat: str) -> str:
    """What a value may be; "" where it is one."""
    if remat in NAMES or _PARTIAL.fullmatch(remat):
        return ""
    return f"{', '.join(NAMES)}, or dots:K or none:K for the last K layers"


def pieces(remat: str, num_layers: int) -> list[tuple[str, int]]:
    """[(mode, layers)] from the first layer on; the others of mode:K are "attention".

    ("dots:12", 28) -> [("attention", 16), ("dots", 12)]: what is kept of the last layers is free
    again when the backward pass begins to recompute. Raises DcodError for another value.
    """
    if wrong := fault(remat):
        raise DcodError(f"remat={remat!r} must be {wrong}")
    mode, _, kept = remat.partition(":")
    count = min(int(kept), num_layers) if kept else num_layers
    return [(name, n) for name, n in (("attention", num_layers - count), (mode, count)) if n]


def rematerialised(block: Any, mode: str) -> Any:
    """block(kind, carry, layer) as the backward pass runs it."""
    if mode == "none":
        return block
    # Inside a scan nothing can be merged across the two passes: prevent_cse only costs.
    return jax.checkpoint(block, policy=POLICIES[mode], prevent_cse=False, static_argnums=(0,))
