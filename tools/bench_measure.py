"""The shape of the step benchmark and how it is measured; imports nothing but the standard library.

Shared by bench_step.py (ours) and bench_tunix.py (the peer, in an environment of its own).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
BATCH, LENGTH = 4, 512
LEARNING_RATE = 1e-4


def cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_megabytes() -> float:
    """Largest resident memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(run_steps: Callable[[int], Any], *, warmup: int, steps: int) -> dict[str, float]:
    """CPU-seconds and wall seconds per step of run_steps(n), after run_steps(warmup)."""
    run_steps(warmup)
    cpu, wall = cpu_seconds(), time.perf_counter()
    run_steps(steps)
    return {
        "cpu_s": (cpu_seconds() - cpu) / steps,
        "wall_s": (time.perf_counter() - wall) / steps,
        "peak_mb": peak_megabytes(),
    }
