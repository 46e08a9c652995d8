"""Rope: the rotary positions of a layer, as HF configs write them, and the frequencies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dcod_jax.bounds import array, check, flag, mapping, number, optional, whole
from dcod_jax.errors import DcodError

Raw = dict[str, Any]
THETA = number(1, 1e12)
LENGTH = whole(1, 2**31 - 1)

_FACTOR = number(1, 1e6)
_SOME = optional(number(1e-3, 1e6))
_FACTORS = array(number(1e-3, 1e6), fewest=1, most=2**13)
# rope_type -> its keys beside rope_theta and partial_rotary_factor.
SCALINGS = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": number(1e-3, 1e6),
        "high_freq_factor": number(1e-3, 1e6),
        "original_max_position_embeddings": LENGTH,
    },
    "yarn": {
        "rope_theta": number(1.01, 1e12),
        "factor": optional(_FACTOR),
        "original_max_position_embeddings": LENGTH,
        "attention_factor": _SOME,
        "beta_fast": _SOME,
        "beta_slow": _SOME,
        "mscale": _SOME,
        "mscale_all_dim": _SOME,
        "truncate": optional(flag()),
    },
    "longrope": {
        "short_factor": _FACTORS,
        "long_factor": _FACTORS,
        "original_max_position_embeddings": whole(2, 2**31 - 1),
        "attention_factor": _SOME,
        "factor": _SOME,
    },
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: base, the rotated share of a head, and a scaling of the frequencies."""

    theta: float
    fraction: float = 1.0
    kind: str = "default"  # of SCALINGS
    scaling: tuple[tuple[str, Any], ...] = ()  # HF's names and values, what HF derives included

    def __getitem__(self, key: str) -> Any:
        return dict(self.scaling)[key]

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        return dict(self.scaling).get("attention_factor", 1.0)

    @property
    def switches_at(self) -> int | None:
        """The length of a text beyond which longrope takes its other factors."""
        return self["original_max_position_embeddings"] if self.kind == "longrope" else None

    def dims(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(head_dim * self.fraction)

    def to_hf(self) -> Raw:
        """The flat rope_parameters of transformers 5."""
        scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in self.scaling}
        share = {} if self.fraction == 1 else {"partial_rotary_factor": self.fraction}
        return {"rope_type": self.kind, "rope_theta": self.theta, **share, **scaling}


def read(rope: Raw, config: Raw, *, fraction: float, source: str) -> Rope:
    """The Rope of a flat dict of rope parameters, rope_theta and rope_type among them.

    config has head_dim, and max_position_embeddings for what the dict leaves out. Raises DcodError
    for another type and for values that make no frequencies; source names the dict.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise DcodError(
            f"{source}.rope_type={kind!r} is not supported (supported: {', '.join(SCALINGS)}); "
            f"use a model without it"
        )
    length = config["max_position_embeddings"]
    values = {"original_max_position_embeddings": length, **rope}
    place, _, key = source.rpartition(": ")
    bounds = {"rope_theta": THETA, **SCALINGS[kind]}
    check({key: values}, {key: mapping(bounds)}, source=place)
    found = Rope(float(values["rope_theta"]), float(fraction), kind)
    dims = found.dims(config["head_dim"])
    if dims < 2 or dims % 2:
        raise DcodError(
            f"{source}.partial_rotary_factor={fraction} of head_dim={config['head_dim']} is {dims} "
            f"dimensions; it must be an even number of them"
        )
    scaling = _RESOLVE.get(kind, _plain)(values, length, dims, source)
    return dataclasses.replace(found, scaling=tuple(sorted(scaling.items())))


def _plain(values: Raw, length: int, dims: int, source: str) -> Raw:
    wanted = SCALINGS[values.get("rope_type", values.get("type", "default"))]
    return {key: values[key] if "max" in key else float(values[key]) for key in wanted}


def _llama3(values: Raw, length: int, dims: int, source: str) -> Raw:
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    if low >= high:
        raise DcodError(f"{source}: low_freq_factor={low} must be below {high}, the high one")
    return _plain(values, length, dims, source)


def _yarn(values: Raw, length: int, dims: int, source: str) -> Raw:
    """Yarn as transformers resolves it (arXiv 2309.00071)."""
    original = values["original_max_position_embeddings"]
    factor = float(values.get("factor") or length / original)

    def mscale(of: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * of * math.log(factor) + 1.0

    attention, one, all_dims = (
        values.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if attention is None:
        if one and all_dims:
            attention = mscale(float(one)) / mscale(float(all_dims))
        else:
            attention = mscale(1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": float(attention),
        "beta_fast": float(values.get("beta_fast") or 32),
        "beta_slow": float(values.get("beta_slow") or 1),
        "truncate": values.get("truncate") is not False,
    }


def _longrope(values: Raw, length: int, dims: int, source: str) -> Raw:
    """Longrope as transformers resolves it (arXiv 2402.13753)."""
    original = values["original_max_position_embeddings"]
    for key in ("short_factor", "long_factor"):
        if len(values[key]) != dims // 2:
            raise DcodError(
                f"{source}.{key} has {len(values[key])} factors; it must have {dims // 2}, one for "
                f"each rotated pair of a head"
            )
    attention = values.get("attention_factor")
    if attention is None:
        factor = float(values.get("factor") or length / original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        **{key: tuple(map(float, values[key])) for key in ("short_factor", "long_factor")},
        "original_max_position_embeddings": original,
        "attention_factor": float(attention),
    }


_RESOLVE = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def frequencies(rope: Rope, head_dim: int, *, beyond: bool = False) -> list[float]:
    """Inverse frequencies, one for each rotated pair of a head.

    beyond: those of a text longer than rope.switches_at.
    """
    dims = rope.dims(head_dim)
    plain = [rope.theta ** (-index / dims) for index in range(0, dims, 2)]
    if rope.kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    if rope.kind == "llama3":
        return [_llama3_frequency(rope, frequency) for frequency in plain]
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, plain)
    if rope.kind == "longrope":
        factors = rope["long_factor" if beyond else "short_factor"]
        return [one / factor for one, factor in zip(plain, factors, strict=True)]
    return plain


def _llama3_frequency(rope: Rope, frequency: float) -> float:
    """One frequency f, scaled (arXiv 2407.21783).

    With wavelength w = 2π/f and original length n: f where w < n/high, f/factor where
    w > n/low, and in between ((1−s)/factor + s)·f with s = (n/w − low)/(high − low).
    """
    length = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / rope["factor"]
    smooth = (length / wavelength - low) / (high - low)
    return ((1 - smooth) / rope["factor"] + smooth) * frequency


def _yarn_frequencies(rope: Rope, plain: list[float]) -> list[float]:
    """Pairs that turn more than beta_fast times stay, those below beta_slow are stretched."""
    dims, length = 2 * len(plain), rope["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(rope["beta_fast"]), pair_of(rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    last += 0.001 if first == last else 0
    stretched = [min(max((i - first) / (last - first), 0), 1) for i in range(len(plain))]
    return [
        frequency * (share / rope["factor"] + 1 - share)
        for frequency, share in zip(plain, stretched, strict=True)
    ]
