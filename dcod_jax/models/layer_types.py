"""Which layers of a model have a window and which rotate, where config.json does not list them."""

from __future__ import annotations

from collections.abc import Callable

from dcod_jax.models.rope import Raw

FULL, SLIDING = "full_attention", "sliding_attention"


def every_layer_full(raw: Raw) -> list[str]:
    """No layer has a window."""
    return [FULL] * raw["num_hidden_layers"]


def every_layer_alike(raw: Raw) -> list[str]:
    """All layers have the window, where the config has one."""
    return [FULL if raw.get("sliding_window") is None else SLIDING] * raw["num_hidden_layers"]


def from_max_window_layers(raw: Raw) -> list[str]:
    """Layers from max_window_layers on have the window (Qwen)."""
    count = raw["num_hidden_layers"]
    windowed = raw["use_sliding_window"] and raw["sliding_window"] is not None
    first = (raw["max_window_layers"] or 0) if windowed else count
    return [SLIDING if layer >= first else FULL for layer in range(count)]


def full_every(period: int, *, at: int) -> Callable[[Raw], list[str]]:
    """Layer i is full where i % period == at."""
    return lambda raw: [
        FULL if layer % period == at else SLIDING for layer in range(raw["num_hidden_layers"])
    ]


def gemma3(raw: Raw) -> list[str]:
    """The last layer of each sliding_window_pattern is full."""
    period = raw["sliding_window_pattern"]
    return full_every(period, at=period - 1)(raw)


def exaone4(raw: Raw) -> list[str]:
    """None where transformers cannot tell: such a file has layer_types."""
    period = raw.get("sliding_window_pattern", 4)
    known = isinstance(period, int) and period > 0 and raw["sliding_window"] is not None
    return full_every(period, at=period - 1)(raw) if known else []


def smollm3(raw: Raw) -> list[str]:
    """Layers that rotate have the window, where it is used."""
    windowed = raw["use_sliding_window"] and raw["sliding_window"] is not None
    return [SLIDING if windowed and not rotates else FULL for rotates in rotated(raw)]


def rotated(raw: Raw) -> list[bool]:
    """Which layers have rotary positions (SmolLM3 leaves some without)."""
    count, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval")
    if raw.get("no_rope_layers") is not None:
        return [bool(rotates) for rotates in raw["no_rope_layers"][:count]]
    return [interval is None or (layer + 1) % interval != 0 for layer in range(count)]
