"""The train step: one jitted, sharded function from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from dcod_jax import metrics
from dcod_jax.losses import reduce, weights
from dcod_jax.losses.distill import LossConfig, distill_loss
from dcod_jax.losses.head import TokenStats
from dcod_jax.losses.reduce import Sums
from dcod_jax.mesh import batch_shards, constrain, sharding, tree_shardings
from dcod_jax.models import transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.optim import Schedule
from dcod_jax.types import Batch, DcodError, Params, TrainState

LossOf = Callable[[Params, Batch, Array], tuple[Array, tuple[Sums, TokenStats]]]


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Refuse a batch that does not fall into equal micro-batches on every batch shard."""
    shards = batch_shards(mesh)
    if batch_size % (microbatches * shards):
        raise DcodError(
            f"data.batch_size={batch_size} must be a multiple of {microbatches * shards} = "
            f"train.microbatches={microbatches} * {shards} batch shards (mesh data="
            f"{mesh.shape['data']} * fsdp={mesh.shape['fsdp']}); change one of them"
        )


def state_shardings(
    model_config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings in the structure of the state; the optimizer's moments follow the parameters."""
    params = tree_shardings(mesh, transformer.logical_axes(model_config))
    shapes = jax.eval_shape(optimizer.init, transformer.param_shapes(model_config))
    replicated = sharding(mesh, ())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, layout: layout,
        shapes,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(step=replicated, params=params, opt_state=moments)  # pyright: ignore


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    model_config: ModelConfig,
    abstract: bool = False,
) -> TrainState:
    """State of step 0 around params, which the first train step will donate.

    abstract: params may be ShapeDtypeStructs, and the state holds ShapeDtypeStructs with shardings.
    """
    layout = state_shardings(model_config, optimizer, mesh)
    if abstract:
        shapes = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore
            params=params,
            opt_state=jax.eval_shape(optimizer.init, params),
        )
        return jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, layout
        )
    params = jax.device_put(params, layout.params)
    opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), layout.step)
    return TrainState(step=step, params=params, opt_state=opt_state)


def _make_loss(
    model_config: ModelConfig,
    loss_config: LossConfig,
    *,
    mesh: Mesh,
    compute_dtype: DTypeLike,
    remat: str,
    valid_vocab: int | None,
) -> LossOf:
    def loss(params: Params, batch: Batch, step: Array) -> tuple[Array, tuple[Sums, TokenStats]]:
        hidden = transformer.hidden_states(
            model_config,
            params,
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            compute_dtype=compute_dtype,
            remat=remat,
            mesh=mesh,
        )
        head = transformer.head_weight(model_config, params)
        options = {"step": step, "mesh": mesh, "valid_vocab": valid_vocab}
        sums, stats = distill_loss(loss_config, hidden, head, batch, **options)
        return sums.loss, (sums, stats)

    return loss


def _accumulate(
    loss: LossOf, state: TrainState, batch: Batch, *, microbatches: int, mesh: Mesh
) -> tuple[Params, Sums, TokenStats]:
    """Gradient of the loss sum, sums and per-token statistics of the whole batch.

    Micro-batch i takes rows i, i+A, i+2A, ...: with that order each of them is split over the
    devices as the batch is, and no row moves.
    """
    gradient_of = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        gradients, (sums, stats) = gradient_of(state.params, batch, state.step)
        return gradients, sums, stats

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return constrain(jnp.swapaxes(x, 0, 1), mesh, None, "batch")

    def join(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1)
        return constrain(x.reshape(-1, *x.shape[2:]), mesh, "batch")

    def piece(total: tuple[Params, Sums], piece: Batch) -> tuple[tuple[Params, Sums], TokenStats]:
        gradients, (sums, stats) = gradient_of(state.params, piece, state.step)
        gradients = jax.tree.map(jnp.add, total[0], gradients)
        return (gradients, reduce.add(total[1], sums)), stats

    start = (jax.tree.map(jnp.zeros_like, state.params), reduce.zero())
    (gradients, sums), stats = jax.lax.scan(piece, start, jax.tree.map(split, batch))
    return gradients, sums, jax.tree.map(join, stats)


def _measure(cfg: LossConfig, batch: Batch, sums: Sums, stats: TokenStats) -> dict[str, Array]:
    """Metrics of one step that come from the loss: scalars, NaN where not available."""
    raw = weights.raw_weights(
        cfg.weights,
        stats.student_logprobs,
        batch.teacher_logprobs,
        batch.loss_mask,
        batch.segment_ids,
    )
    order = weights.segment_cumsum(batch.loss_mask.astype(jnp.float32), batch.segment_ids) - 1.0
    measured = {
        "loss": reduce.finish(sums, cfg.weights.normalize),
        "nll": reduce.mean_nll(sums),
        "tokens/completion": sums.count,
        "tokens/total": (batch.segment_ids > 0).sum(),
        **metrics.weight_statistics(
            raw, stats.weights, stats.student_logprobs, batch.loss_mask, order
        ),
    }
    if weights.needs_teacher(cfg.weights):
        r = weights.log_ratio(cfg.weights, stats.student_logprobs, batch.teacher_logprobs)
        measured["weights/log_ratio"] = jnp.where(batch.loss_mask, r, 0.0).sum() / sums.count
    return measured


def make_train_step(
    model_config: ModelConfig,
    loss_config: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    batch_size: int,
    microbatches: int,
    mesh: Mesh,
    compute_dtype: DTypeLike,
    remat: str,
    valid_vocab: int | None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Jitted (state, batch) -> (next state, metrics as device scalars); the state is donated.

    Gradients are sums over completion tokens, added over micro-batches in float32 and divided
    once by the global divisor. Raises DcodError where batch_size cannot be split so.
    """
    check_batch(batch_size, microbatches, mesh)
    transformer.check_mesh(model_config, mesh)
    normalize = loss_config.weights.normalize
    loss = _make_loss(
        model_config,
        loss_config,
        mesh=mesh,
        compute_dtype=compute_dtype,
        remat=remat,
        valid_vocab=valid_vocab,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        gradients, sums, stats = _accumulate(
            loss, state, batch, microbatches=microbatches, mesh=mesh
        )
        gradients = reduce.mean_gradients(gradients, sums, normalize)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measured = _measure(loss_config, batch, sums, stats)
        measured["grad_norm"] = optax.tree.norm(gradients)
        measured["learning_rate"] = schedule(state.step)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(measured["grad_norm"])
        measured["nonfinite"] = ~finite
        scalars = {key: value.astype(jnp.float32) for key, value in measured.items()}
        return TrainState(state.step + 1, params, opt_state), scalars  # pyright: ignore

    layout = state_shardings(model_config, optimizer, mesh)
    return jax.jit(
        train_step,
        in_shardings=(layout, sharding(mesh, ("batch",))),
        out_shardings=(layout, sharding(mesh, ())),
        donate_argnums=0,
    )


def make_eval_step(
    model_config: ModelConfig,
    loss_config: LossConfig,
    *,
    mesh: Mesh,
    compute_dtype: DTypeLike,
    remat: str = "none",
    valid_vocab: int | None,
) -> Callable[[TrainState, Batch], Sums]:
    """Jitted (state, batch) -> sums of the held-out loss and nll; add them, then finish."""
    loss = _make_loss(
        model_config,
        loss_config,
        mesh=mesh,
        compute_dtype=compute_dtype,
        remat=remat,
        valid_vocab=valid_vocab,
    )

    def eval_step(params: Params, batch: Batch, step: Array) -> Sums:
        return loss(params, batch, step)[1][0]

    params_layout: Any = tree_shardings(mesh, transformer.logical_axes(model_config))
    replicated = sharding(mesh, ())
    jitted = jax.jit(
        eval_step,
        in_shardings=(params_layout, sharding(mesh, ("batch",)), replicated),
        out_shardings=replicated,
    )
    return lambda state, batch: jitted(state.params, batch, state.step)
