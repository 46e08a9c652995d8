"""The train step: one jitted, sharded function from (state, batch) to (state, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive, distill, reduce
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.losses.routing import statistics
from dcod_jax.losses.weights import Tokens
from dcod_jax.models import lora, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import batch_shards, constrain, describe, sharding, tree_shardings
from dcod_jax.train import metrics
from dcod_jax.train.forward import Forward
from dcod_jax.train.metrics import StepMetrics
from dcod_jax.train.optim import Guarded, Schedule, make_optimizer, unless_skipped
from dcod_jax.train.settings import optim_config
from dcod_jax.types import Batch, LossState, Params, TrainState

_Rows = tuple[TokenStats, Array | None]  # statistics of tokens [B,C], and routing [B,L,R]


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Refuse a batch that does not fall into equal micro-batches on every batch shard."""
    shards = batch_shards(mesh)
    if batch_size % (microbatches * shards):
        raise DcodError(
            f"data.batch_size={batch_size} must be a multiple of {microbatches * shards} = "
            f"train.microbatches={microbatches} * {shards} batch shards (mesh "
            f"{describe(mesh, 'batch')}); change one of them"
        )


def state_shardings(
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    offload: bool = False,
) -> TrainState:
    """Shardings in the structure of the state; `offload` puts the moments into host memory."""
    params = lora.trained_shardings(model_config, mesh)
    trained = lora.trained(model_config, transformer.param_shapes(model_config))
    shapes = jax.eval_shape(optimizer.init, trained)
    replicated = sharding(mesh, ())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, layout: layout.with_memory_kind("pinned_host") if offload else layout,
        shapes,
        params,
        transform_non_params=lambda _: replicated,
    )
    loss_state = jax.tree.map(lambda _: replicated, jax.eval_shape(adaptive.initial))
    return TrainState(replicated, params, moments, loss_state)  # pyright: ignore


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    model_config: ModelConfig,
    abstract: bool = False,
    offload: bool = False,
) -> TrainState:
    """State of step 0 around params, arrays or `abstract` shapes; the first step donates it."""
    layout = state_shardings(model_config, optimizer, mesh, offload=offload)

    def others(params: Params) -> tuple[Array, Any, LossState]:
        return jnp.zeros((), jnp.int32), optimizer.init(params), adaptive.initial()

    if abstract:
        step, opt_state, loss_state = jax.eval_shape(others, params)
        shapes = TrainState(step, params, opt_state, loss_state)
        return jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, layout
        )
    params = jax.device_put(params, layout.params)
    shardings = (layout.step, layout.opt_state, layout.loss_state)
    step, opt_state, loss_state = jax.jit(others, out_shardings=shardings)(params)
    return TrainState(step, params, opt_state, loss_state)


def _microbatches(
    per_piece: Callable[[Any, Batch], Any],
    carry: Any,
    batch: Batch,
    *,
    microbatches: int,
    mesh: Mesh,
) -> tuple[Any, Any]:
    """Scan over micro-batches; what a piece yields per row is joined to the whole batch again.

    Micro-batch i takes rows i, i+A, i+2A, ...: with that order each of them is split over the
    devices as the batch is, and no row moves.
    """

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return constrain(jnp.swapaxes(x, 0, 1), mesh, None, "batch")

    def join(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1)
        return constrain(x.reshape(-1, *x.shape[2:]), mesh, "batch")

    if microbatches == 1:
        return per_piece(carry, batch)
    carry, rows = jax.lax.scan(per_piece, carry, jax.tree.map(split, batch))
    return carry, jax.tree.map(join, rows)


def _accumulate(
    forward: Forward, state: TrainState, batch: Batch, frozen: tuple[Params, ...], microbatches: int
) -> tuple[Params, _Rows]:
    """Gradient of the loss sum, and per-token statistics and routing of the whole batch.

    The load-balance loss needs the batch's routing first: of several micro-batches that is one more
    forward pass.
    """
    gradient_of = jax.grad(forward, has_aux=True)
    pieces = {"microbatches": microbatches, "mesh": forward.mesh}
    extra, whole = (state.step, state.loss_state, frozen), None

    def gradients_of(piece: Batch) -> tuple[Params, _Rows]:
        gradients, (_, *rows) = gradient_of(state.params, piece, *extra, whole)
        return gradients, tuple(rows)

    if microbatches == 1:
        return gradients_of(batch)

    def observe(total: Sums, piece: Batch) -> tuple[Sums, Array | None]:
        _, (sums, _, routing) = forward(state.params, piece, *extra)
        return reduce.add(total, sums), routing

    def piece(total: Params, piece: Batch) -> tuple[Params, _Rows]:
        gradients, rows = gradients_of(piece)
        return jax.tree.map(jnp.add, total, gradients), rows

    if forward.balances:
        sums, routed = _microbatches(observe, reduce.zero(), batch, **pieces)
        whole = routed.sum(0), sums
    start = jax.tree.map(jnp.zeros_like, state.params)
    return _microbatches(piece, start, batch, **pieces)


def _temper_now(
    forward: Forward, state: TrainState, batch: Batch, frozen: tuple[Params, ...], microbatches: int
) -> TrainState:
    """The state with the automatic temperature of this very batch: one more forward pass."""

    def piece(carry: None, piece: Batch) -> tuple[None, Tokens]:
        return None, forward.observe(state.params, piece, frozen)

    _, tokens = _microbatches(piece, None, batch, microbatches=microbatches, mesh=forward.mesh)
    loss_state = adaptive.retemper(forward.loss.config.weights, state.loss_state, tokens)
    return dataclasses.replace(state, loss_state=loss_state)


def _update(
    state: TrainState,
    gradients: Params,
    loss: Array,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    place: Any,
) -> tuple[Params, Any, dict[str, Array]]:
    """(parameters, optimizer state, metrics); place: where moments in host memory go."""
    if place is not None:
        moments = jax.device_put(state.opt_state, place)
    else:
        # What is done to the moments alone (a TPU lays the embedding's out anew) would else be
        # done first, and lie beside the activations of the whole step.
        gradients, moments = jax.lax.optimization_barrier((gradients, state.opt_state))
    norm = optax.tree.norm(gradients)
    measured = {"grad_norm": norm, "nonfinite": ~(jnp.isfinite(loss) & jnp.isfinite(norm))}
    opt_state: Any
    updates, opt_state = optimizer.update(gradients, moments, state.params, loss=loss, norm=norm)
    params: Any = optax.apply_updates(state.params, updates)
    count = state.step
    if isinstance(opt_state, Guarded):
        measured["skipped"] = opt_state.skipped > moments.skipped
        measured["skipped_total"] = opt_state.skipped
        # Of parameters, too: adding an update of 0 would make a 0 of -0.
        params = unless_skipped(measured["skipped"], state.params, params)
        count -= moments.skipped
    measured["learning_rate"] = schedule(count)
    return params, opt_state, measured


def _measured(
    forward: Forward,
    rows: _Rows,
    small: Batch,
    sums: Sums,
    loss_state: LossState,
    changed: dict[str, Array],
    *,
    logged: Array | bool,
    token_weights: bool,
) -> StepMetrics:
    """The metrics of a step; those of a log step are NaN in others, a branch on the device."""
    (stats, routing), cfg = rows, forward.loss.config
    always = changed | {
        "loss": reduce.finish(sums, cfg.weights.normalize),
        "tokens/completion": sums.count,
        "tokens/total": sums.tokens,
    }
    names, values = metrics.packed_where(
        logged,
        lambda: (
            metrics.measure(cfg, small, sums, stats, loss_state)
            | ({} if routing is None else statistics(routing.sum(0), sums.tokens))
        ),
    )
    return StepMetrics(
        constrain(jnp.concatenate([metrics.pack(always), values]), forward.mesh),
        (*always, *names),
        constrain(stats.weights, forward.mesh, "batch") if token_weights else None,
    )


def make_train_step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    batch_size: int,
    microbatches: int = 1,
    offload: bool = False,
    log_every: int = 1,
    steps: int = 0,
    token_weights: bool = False,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Jitted (state, batch) -> (next state, metrics on the device); the state is donated.

    What is frozen comes behind them (`Forward.frozen_axes`), sharded as the student's parameters.
    Gradients are sums over completion tokens, added over micro-batches in float32 and divided once
    by the global divisor. offload: the optimizer's moments live in host memory between steps.
    log_every, steps: as metrics.is_logged has them. token_weights: the metrics hold them. Raises
    DcodError where batch_size cannot be split.
    """
    mesh, loss = forward.mesh, forward.loss
    optimizer = optax.with_extra_args_support(optimizer)
    check_batch(batch_size, microbatches, mesh)
    transformer.check_mesh(forward.model, mesh)
    layout = state_shardings(forward.model, optimizer, mesh, offload=offload)
    on_device = state_shardings(forward.model, optimizer, mesh).opt_state if offload else None

    def train_step(
        state: TrainState, batch: Batch, *frozen: Params
    ) -> tuple[TrainState, StepMetrics]:
        before = state
        if adaptive.same_step(loss.config.weights):
            state = _temper_now(forward, state, batch, frozen, microbatches)
        gradients, rows = _accumulate(forward, state, batch, frozen, microbatches)
        small = jax.tree.map(lambda x: constrain(x, mesh, "batch"), distill.compact(batch))
        sums = reduce.token_sums(rows[0], small.loss_mask, batch.segment_ids)
        gradients = reduce.mean_gradients(gradients, sums, loss.config.weights.normalize)
        params, opt_state, changed = _update(
            state, gradients, sums.loss, optimizer=optimizer, schedule=schedule, place=on_device
        )
        logged = log_every == 1 or metrics.is_logged(state.step + 1, log_every, steps)
        measured = _measured(
            *(forward, rows, small, sums, state.loss_state, changed),
            logged=logged,
            token_weights=token_weights,
        )
        loss_state = loss.learned(state.loss_state, state.step, small, sums, rows[0])
        if "skipped" in changed:
            loss_state = unless_skipped(changed["skipped"], before.loss_state, loss_state)
        return TrainState(state.step + 1, params, opt_state, loss_state), measured  # pyright: ignore

    return jax.jit(
        train_step,
        in_shardings=(layout, sharding(mesh, ("batch",)), *_frozen_layout(forward)),
        out_shardings=(layout, None),  # of the metrics as constrained
        donate_argnums=0,
    )


def compiled_apart(step: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function that is compiled whole before it first runs with arguments of a form.

    What the compiler has freed is returned to the system in between: on a CPU it would lie beside
    the temporaries of every step.
    """
    programs: dict[Any, Any] = {}

    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        form = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if form not in programs:
            programs[form] = step.lower(*args).compile()  # pyright: ignore
            hosts.release_memory()
        return programs[form](*args)

    return run


def configured_step(
    config: Any, forward: Forward
) -> tuple[optax.GradientTransformation, Callable[..., tuple[TrainState, StepMetrics]]]:
    """(optimizer, train step) of optim.*, train.* and data.batch_size."""
    optimizer, schedule = make_optimizer(optim_config(config), config.train.steps)
    return optimizer, make_train_step(
        forward,
        optimizer,
        schedule,
        batch_size=config.data.batch_size,
        microbatches=config.train.microbatches,
        offload=config.optim.offload,
        log_every=config.train.log_every,
        steps=config.train.steps,
        token_weights=forward.loss.config.weights.varies,
    )


def _frozen_layout(forward: Forward) -> tuple[Params, ...]:
    if forward.teacher is not None:
        transformer.check_mesh(forward.teacher.config, forward.mesh)
    return tuple(tree_shardings(forward.mesh, axes) for axes in forward.frozen_axes())


def make_eval_step(forward: Forward) -> Callable[..., Sums]:
    """Jitted (state, batch, *frozen) -> held-out sums; add them, then finish."""

    mesh, replicated = forward.mesh, sharding(forward.mesh, ())
    params = lora.trained_shardings(forward.model, mesh)
    layout = TrainState(replicated, params, None, replicated)  # pyright: ignore

    def eval_step(state: TrainState, batch: Batch, *frozen: Params) -> Sums:
        inputs = (state.params, batch, state.step, state.loss_state, frozen)
        return forward(*inputs)[1][0]

    jitted = jax.jit(
        eval_step,
        in_shardings=(layout, sharding(mesh, ("batch",)), *_frozen_layout(forward)),
        out_shardings=replicated,
    )

    def run(state: TrainState, batch: Batch, *frozen: Params) -> Sums:
        return jitted(dataclasses.replace(state, opt_state=None), batch, *frozen)

    return run
