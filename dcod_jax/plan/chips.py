"""What a plan needs to know of an accelerator that is not at hand: memory, speed, networks, clock.

Figures are of one JAX device, which on TPU7x is a chiplet (half a chip) and elsewhere a chip.
peak_flops, ici_bandwidth and dcn_bandwidth follow Google's pages
docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; v4's interconnect is the page's all-reduce
bandwidth of a pod over its 4096 chips, and v4's data-centre bandwidth is not on it. ICI counts one
direction (half of the pages' bidirectional figure). The largest slices are the pages' too; libtpu
also describes larger ones, which the cloud does not offer.
hbm_usable is what libtpu 0.0.x names when a program does not fit ("exceeds available HBM"), read
from a program of 8 TiB for each topology with jax 0.10.2; it is less than the chip's HBM.
clock turns libtpu's estimated cycles into seconds: peak_flops over the matrix units' operations in
a cycle (cycle_flops). The latter is the power of two above what libtpu's estimate of an 8192-cubed
bfloat16 product comes to: 115 (v5e), 236 (v5p), 243 (v4), 369 (v6e) and 422 (TPU7x) thousand.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of JAX device."""

    name: str  # as a topology names it: v5e of v5e:4x4
    peak_flops: float  # dense bfloat16, a second
    hbm_usable: float  # bytes
    ici_bandwidth: float  # bytes a second into the device from its slice
    dcn_bandwidth: float | None  # bytes a second into the device from other slices
    cycle_flops: int  # matrix operations of one cycle
    dimensions: int  # of the torus of a slice
    largest: int  # chips of the largest slice
    options: tuple[tuple[str, str], ...] = ()  # of get_topology_desc, beside the topology's name

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.cycle_flops


# jax.Device.device_kind -> chip.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(
        *("v4", 275e12, 30.75 * GIB, 268e9, None, 2**18, 3, 4096),
        options=(("chip_config_name", "megacore"),),
    ),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 200e9, 3.125e9, 2**17, 2, 256),
    "TPU v5": Chip("v5p", 459e12, 95.74 * GIB, 600e9, 6.25e9, 2**18, 3, 6144),
    "TPU v6 lite": Chip("v6e", 918e12, 31.25 * GIB, 400e9, 12.5e9, 2**19, 2, 256),
    "TPU7x": Chip("tpu7x", 1153.5e12, 94.75 * GIB, 300e9, 6.25e9, 2**19, 3, 9216),
}


# Dense bfloat16 FLOP/s of devices that no plan is made for: a core of TPU v2 and v3 (half a chip),
# the other names of newer TPUs, and GPUs.
OTHER_PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of `jax.Device.device_kind`; None where it is not known."""
    chip = CHIPS.get(device_kind)
    return chip.peak_flops if chip else OTHER_PEAKS.get(device_kind)
