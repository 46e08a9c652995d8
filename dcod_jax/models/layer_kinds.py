"""The kinds of a model's layers: windows and ropes, as HF configs write them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from dcod_jax.bounds import check, number, optional
from dcod_jax.errors import DcodError
from dcod_jax.models import rope
from dcod_jax.models.families import Family, refuse
from dcod_jax.models.layer_types import FULL, SLIDING, Raw, every_layer_alike, rotated
from dcod_jax.models.rope import Rope

_SHARE = optional(number(1e-3, 1))
MAX_PERIOD = 16  # layers of a repeating group; kinds in a longer period are scanned in runs


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of a model."""

    window: int | None = None  # positions that a query sees, its own included; None: all
    rope: Rope | None = None  # None: no positions (NoPE)


def read(family: Family, raw: Raw, source: str) -> tuple[LayerKind, ...]:
    """The kind of each layer, or of all where they are alike; raw has the family's defaults."""
    rotates, count = rotated(raw), raw["num_hidden_layers"]
    if len(rotates) < count:
        raise DcodError(f"{source}: no_rope_layers has {len(rotates)} entries for {count} layers")
    ropes = _ropes(family, raw, source)
    types = _layer_types(family, raw, source)
    window = raw.get("sliding_window")
    everywhere = family.rotates_full or window is None
    kinds = [
        LayerKind(
            window if one == SLIDING else None,
            ropes[one] if turns and (everywhere or one == SLIDING) else None,
        )
        for one, turns in zip(types, rotates, strict=True)
    ]
    return tuple(kinds[:1]) if len(set(kinds)) == 1 else tuple(kinds)


def _layer_types(family: Family, raw: Raw, source: str) -> Sequence[str]:
    given, count, implied = raw.get("layer_types"), raw["num_hidden_layers"], family.types(raw)
    types = implied if given is None else given
    if len(types) != count:
        raise DcodError(
            f"{source}: layer_types has {len(types)} entries; num_hidden_layers={count}"
        )
    for layer, one in enumerate(types):
        if one not in (FULL, SLIDING):
            raise refuse(source, "layer_types", one, f"{FULL}, {SLIDING}")
        if not family.reads_types and one != implied[layer]:
            raise refuse(source, "layer_types", one, f"{implied[layer]} there")
    if SLIDING in types:
        if raw.get("use_sliding_window", True) is not True:
            raise refuse(source, "layer_types", SLIDING, "with use_sliding_window=true")
        if not raw.get("sliding_window"):
            raise refuse(source, "sliding_window", raw.get("sliding_window"), "a window")
    return types


def layer_keys(family: Family, config: Any) -> Raw:
    """The keys that say windows and missing positions of a ModelConfig's layers."""
    window = next((kind.window for kind in config.layer_kinds if kind.window), None)
    keys: Raw = {}
    switch = "use_sliding_window" in family.defaults
    nowhere = not (family.rotates_full or any(kind.rope for kind in config.layer_kinds))
    if family.reads_types and not switch and (family.rotates_full or nowhere):
        # Of full layers alone, too, transformers makes the mask of a window.
        window = window or family.defaults["sliding_window"]
    if "sliding_window" in family.defaults or family.types is every_layer_alike:
        keys["sliding_window"] = window
    if family.reads_types:
        keys["layer_types"] = [FULL if kind.window is None else SLIDING for kind in config.kinds]
    if switch:
        keys["use_sliding_window"] = window is not None
    if "max_window_layers" in family.defaults:  # read by transformers 4 where it knows no types
        windows = [kind.window for kind in config.kinds]
        keys["max_window_layers"] = next((i for i, one in enumerate(windows) if one), len(windows))
    if "no_rope_layer_interval" in family.defaults:
        keys["no_rope_layers"] = [int(kind.rope is not None) for kind in config.kinds]
    return keys


def _ropes(family: Family, raw: Raw, source: str) -> dict[str, Rope]:
    """The rope of each layer type, in the form of transformers 4 or 5."""
    old = raw.get("rope_scaling") or {}
    new = raw.get("rope_parameters")
    new = family.defaults.get("rope_parameters", {}) if new is None else new
    nested = {key: value for key, value in new.items() if isinstance(value, dict)}
    if not family.two_ropes:
        key = "rope_scaling" if old else "rope_parameters"
        if any(isinstance(value, dict) for value in (old or new).values()):
            raise refuse(source, key, old or new, "one flat rope for all layers")
        one = _one_rope(family, raw, old or new, raw["rope_theta"], f"{source}: {key}")
        return {FULL: one, SLIDING: one}
    flat = {key: value for key, value in new.items() if value is not None and key not in nested}
    whole = all(nested.get(kind, {}).get("rope_theta") is not None for kind in (FULL, SLIDING))
    default = {"rope_type": "default", "rope_theta": flat.get("rope_theta")}
    # Early transformers 5 write it and, of OLMo-3 alone, read it as the rope of every layer.
    if family.local_theta and whole and flat in ({"rope_type": "default"}, default):
        flat = {}
    if flat or not nested.keys() <= {FULL, SLIDING}:
        raise refuse(source, "rope_parameters", new, f"an object for {FULL} and for {SLIDING}")
    full, sliding = nested.get(FULL, {}), nested.get(SLIDING, {})
    local = raw[family.local_theta] if family.local_theta else family.defaults["rope_theta"]
    if sliding.get("rope_theta") is None and not family.local_theta and raw["rope_theta"] != local:
        raise refuse(source, "rope_theta", raw["rope_theta"], f"{local}, or in rope_parameters")
    if "type" in old and "rope_type" not in old:
        raise refuse(
            source, "rope_scaling.type", old["type"], "none; transformers 5 reads rope_type"
        )
    if {**full, **old}.get("truncate") is False:
        raise refuse(source, "rope_parameters.truncate", False, "true, where layer types differ")
    return {
        FULL: _one_rope(family, raw, {**full, **old}, raw["rope_theta"], f"{source}: {FULL}"),
        SLIDING: _one_rope(family, raw, sliding, local, f"{source}: {SLIDING}"),
    }


def _one_rope(family: Family, raw: Raw, given: Raw, theta: int | float, source: str) -> Rope:
    values = {
        **given,
        "rope_theta": theta if given.get("rope_theta") is None else given["rope_theta"],
    }
    kind = values.get("rope_type", values.get("type", "default"))
    share = values.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    place, _, key = source.rpartition(": ")
    if family.partial_rope:
        check({"partial_rotary_factor": share}, {"partial_rotary_factor": _SHARE}, source=place)
    elif share not in (1, 1.0, None):
        raise refuse(place, f"{key}.partial_rotary_factor", share, "1.0")
    if family.own_length:
        values["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        values["rope_type"] = kind = "longrope" if kind in ("su", "yarn") else kind
        if kind not in ("default", "longrope"):
            raise refuse(place, f"{key}.rope_type", kind, "default, longrope")
    return rope.read(values, raw, fraction=1.0 if share is None else float(share), source=source)


def rope_keys(family: Family, config: Any) -> Raw:
    """The keys of both forms that say the ropes of a ModelConfig.

    Where HF has no word for them, the keys say other ropes, which reading them back shows.
    """
    ropes = {kind.window is None: kind.rope for kind in config.layer_kinds if kind.rope}
    full = ropes.get(True) or ropes.get(False) or Rope(family.defaults["rope_theta"])
    local = ropes.get(False) or Rope(family.defaults[family.local_theta or "rope_theta"])
    flat = full.to_hf()
    scaling = {key: value for key, value in flat.items() if key != "rope_theta"}
    keys: Raw = {
        "rope_theta": full.theta,  # read by transformers 4, with rope_scaling
        "rope_scaling": None if full.kind == "default" else scaling,
        "rope_parameters": {FULL: flat, SLIDING: local.to_hf()} if family.two_ropes else flat,
    }
    if family.local_theta:
        keys[family.local_theta] = local.theta
    if family.partial_rope:
        keys["partial_rotary_factor"] = full.fraction
    if family.own_length and full.kind == "longrope":
        original = full["original_max_position_embeddings"]
        keys["original_max_position_embeddings"] = original
        names = ("short_factor", "long_factor")
        short: Raw = {"type": "longrope", **{name: list(full[name]) for name in names}}
        if rope.read({**short, **keys}, vars(config), fraction=full.fraction, source="") == full:
            keys["rope_scaling"] = short  # transformers 4 takes these three keys only
    return keys


@functools.cache
def groups(kinds: tuple[LayerKind, ...]) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """The layers as ((kinds of a period, periods), ...), with as few kinds in all as can be.

    Each is one scan over its periods. F F F -> ((F,), 3); S F S F S -> ((S, F), 2), ((S,), 1).
    """
    count = len(kinds)
    if len(set(kinds)) == 1:
        return ((kinds[:1], count),)
    longest = [0] * (MAX_PERIOD + 1)  # layers from `start` on that equal the one a period later
    # best[i]: (kinds in all, number of groups, groups) of the layers from i on.
    best: list[tuple[int, int, tuple[Any, ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        found = []
        for period in range(1, min(count - start, MAX_PERIOD) + 1):
            after = start + period
            alike = after < count and kinds[start] == kinds[after]
            longest[period] = longest[period] + 1 if alike else 0
            most = longest[period] // period + 1
            for periods in {most, max(most - 1, 1), 1}:
                size, number, rest = best[start + period * periods]
                group = kinds[start:after], periods
                found.append((size + period, number + 1, (group, *rest)))
        best[start] = min(found, key=lambda one: one[:2])
    return best[0][2]
