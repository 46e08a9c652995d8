"""Steps that change nothing: the gradient is not finite, or far larger than it was lately.

Two things are asked of a step: that loss and gradient norm are finite (optim.on_nonfinite=skip),
and that the norm is at most optim.spike_factor times the running quantile of the steps taken.
All of it is decided on the device, in the step; the state is part of the optimizer's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dcod_jax.train.metrics import quantile_of

WINDOW = 100  # steps taken, whose gradient norms the quantile is of
FEWEST = 10  # of them before the quantile means anything
QUANTILE = 0.95


class Guarded(NamedTuple):
    """State of an optimizer with a guard."""

    inner: Any
    norms: Float[Array, " W"]  # of the last WINDOW steps taken, in a ring; +inf where none was
    taken: Int[Array, ""]
    skipped: Int[Array, ""]


def limit(state: Guarded, factor: float) -> Float[Array, ""]:
    """The largest gradient norm of a step that is taken; +inf without a factor or a history."""
    if not factor:
        return jnp.float32(jnp.inf)
    count = jnp.minimum(state.taken, WINDOW)
    found = factor * quantile_of(jnp.sort(state.norms), count, QUANTILE)
    return jnp.where(count >= FEWEST, found, jnp.inf)


def guarded(
    optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose update of a step that is skipped is 0 and leaves its state as it was.

    update takes `loss` and `norm`, of the gradient before clipping, as further arguments. factor 0:
    only what is not finite is skipped.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> Guarded:
        none = jnp.zeros((), jnp.int32)
        return Guarded(optimizer.init(params), jnp.full(WINDOW, jnp.inf, jnp.float32), none, none)

    def update(
        updates: optax.Updates,
        state: Guarded,
        params: optax.Params | None = None,
        *,
        loss: Array,
        norm: Array,
        **more: Any,
    ) -> tuple[optax.Updates, Guarded]:
        skip = ~(jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit(state, factor)))
        changes, inner = optimizer.update(updates, state.inner, params, **more)
        taken = Guarded(
            inner, state.norms.at[state.taken % WINDOW].set(norm), state.taken + 1, state.skipped
        )
        changes = jax.tree.map(lambda x: jnp.where(skip, jnp.zeros_like(x), x), changes)
        state = choose(skip, state, taken)
        return changes, state._replace(skipped=state.skipped + skip)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def choose(skip: Bool[Array, ""], before: Any, after: Any) -> Any:
    """The tree before a step that was skipped, or after one that was taken: the same bits."""
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), before, after)
