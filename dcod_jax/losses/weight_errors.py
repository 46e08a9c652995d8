"""What is wrong across the keys of loss.weights; config_checks.py checks each key by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dcod_jax.losses.weights import AUTO, WEIGHTS, WeightConfig


def config_errors(cfg: WeightConfig) -> Iterator[str]:
    """What is wrong across the keys of loss.weights."""
    key = "loss.weights."
    yield from _choice_errors(cfg)
    for name, value in (("temperature", cfg.temperature), ("offset", cfg.offset)):
        may = [weight for weight, entry in WEIGHTS.items() if name in entry.automatic]
        if value == AUTO and cfg.name not in may:
            yield (
                f"{key}{name}='auto' means nothing for {key}name={cfg.name!r}; it is for "
                + ", ".join(may)
            )
        elif isinstance(value, str) and value != AUTO:
            yield f"{key}{name}={value!r} must be a number or 'auto'"
    if cfg.temperature != AUTO:
        return
    loss, ess, mean = cfg.target_loss, cfg.target_ess, cfg.target_mean
    both = cfg.offset == AUTO
    if loss and ess:
        yield (
            f"{key}target_loss={loss} and {key}target_ess={ess} are two targets for one "
            "temperature; set one of them to 0"
        )
    elif (loss or ess) and not both and mean != WeightConfig.target_mean:
        yield (
            f"{key}target_mean={mean} is not read: the temperature aims at "
            f"{'target_loss' if loss else 'target_ess'}. Set {key}target_loss=0 and "
            f"{key}target_ess=0 to aim at it, or {key}offset='auto'"
        )
    elif both and not loss and not ess:
        yield (
            f"{key}temperature and offset are both 'auto' but target_loss=0 and target_ess=0 leave "
            "one target for two unknowns; set one of them"
        )
    elif both and 0 < ess <= mean:
        # w in (0, 1): mean(w²) <= mean(w), so (mean w)² / mean(w²) >= mean w = target_mean.
        yield (
            f"{key}target_ess={ess} must be above {key}target_mean={mean} where temperature and "
            "offset are both 'auto': weights between 0 and 1 of that mean have no smaller "
            "effective sample size"
        )


def _choice_errors(cfg: WeightConfig) -> Iterator[str]:
    """Choices of loss.weights that exclude each other."""
    key, entry = "loss.weights.", WEIGHTS[cfg.name]
    if cfg.unit == "spread" and ("temperature" not in entry.automatic or cfg.temperature == AUTO):
        yield (
            f"{key}unit='spread' is for a number {key}temperature of sigmoid or power, got "
            f"{key}name={cfg.name!r} and {key}temperature={cfg.temperature!r}; set {key}unit='nats'"
        )
    if entry.cumulative and cfg.scope != "token":
        yield (
            f"{key}scope={cfg.scope!r}: {cfg.name} weights are about the trace before the token "
            f"already; set {key}scope='token'"
        )
    if entry.signed and (cfg.normalize != "none" or cfg.warmup_steps or cfg.scope != "token"):
        yield (
            f"{key}name={cfg.name!r} has weights of both signs, one for each token: their mean may "
            f"be 0, and between 1 and them is no loss. Set {key}normalize='none', {key}scope="
            f"'token' and {key}warmup_steps=0"
        )


_USUAL = {"temperature": 1.0, "offset": 0.0, "scope": "token", "unit": "nats"}  # in configs/base.py


def auto_errors(flat: dict[str, Any]) -> Iterator[str]:
    """Keys of {dotted key: value} that are set although loss.weights.name=auto chooses them."""
    for name, usual in _USUAL.items() if flat["loss.weights.name"] == AUTO else ():
        if (value := flat[f"loss.weights.{name}"]) != usual:
            yield (
                f"loss.weights.{name}={value!r}: loss.weights.name='auto' chooses it; leave it at "
                f"{usual!r}, or set loss.weights.name=sigmoid"
            )
