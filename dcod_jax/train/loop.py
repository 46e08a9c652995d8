"""The training loop of one run: read `fit` from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from dcod_jax import config as configs
from dcod_jax.data import chat, pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import EXIT_INTERRUPTED, DcodError
from dcod_jax.files import as_path, replace_file
from dcod_jax.losses import reduce
from dcod_jax.losses.reduce import Sums
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.plan.programs import choose_remat
from dcod_jax.train import settings
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.forward import make_forward
from dcod_jax.train.on_policy import OnPolicy
from dcod_jax.train.optim import Schedule, make_optimizer
from dcod_jax.train.setup import (
    Student,
    initial_snapshot,
    load_live_teacher,
    load_student,
    open_datasets,
)
from dcod_jax.train.step import make_eval_step, make_train_step
from dcod_jax.train.telemetry import Pending, Telemetry
from dcod_jax.types import TrainState

log = logging.getLogger(__name__)


def fit(config: Any, *, name: str = "") -> int:
    """Train one variant to train.steps, or resume it; returns the number of steps done."""
    entered = time.monotonic()
    hosts.check_joined()
    student = load_student(config)
    train_set, eval_set = open_datasets(config, student)
    run_dir = as_path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config, best_metric=config.train.best_metric if eval_set else "")
    mesh = make_mesh(**config.mesh)
    optimizer, schedule = make_optimizer(settings.optim_config(config), config.train.steps)
    train_step, eval_step = _make_steps(config, student, optimizer, schedule, mesh)
    held_out = HeldOut(config, eval_set, eval_step, mesh)
    run = initial_snapshot(config, student, optimizer, mesh, checkpoints)
    batches = pipeline.train_batches(
        train_set, seed=config.seed, **reading(config, mesh, whole=config.on_policy.fraction > 0)
    )
    if run.iterator:
        batches.set_state(run.iterator)
    elif hosts.first():
        replace_file(run_dir / "config.json", configs.to_json(config).encode())
    if run.step >= config.train.steps:
        log.info("%s: all %d steps are done", run_dir, run.step)
        checkpoints.close()
        return run.step
    sample = train_set.read([0])[0]
    print(f"one trace, supervised part marked:\n{chat.render_sample(student.tokenizer, sample)}\n")

    policy = OnPolicy(config, student, mesh, spent=run.on_policy)
    telemetry = Telemetry(config, run, student, train_set, checkpoints, name=name, entered=entered)
    with hosts.interruption() as interrupted, telemetry:
        # The order is part of exactness: evaluate -> save -> advance the iterator -> step.
        while True:
            began = time.monotonic()
            last = run.step == config.train.steps
            stop = interrupted(run.step) or last
            evaluate = not run.metrics and held_out.due(run.step, last=last)
            save = checkpoints.due(run.step, stop=stop)
            if evaluate or save:
                telemetry.settle()
            if evaluate:
                with telemetry.timed("eval", f"held-out loss at step {run.step}"):
                    run.metrics = held_out(run.state)
                telemetry.held_out()
            if save:
                with telemetry.timed("save", f"saving step {run.step}"):
                    telemetry.writer.sync()  # a resumed run needs the lines up to its checkpoint
                    run.iterator = batches.get_state()
                    checkpoints.save(run, stop=stop)
                telemetry.goodput.saved(run.step)
            if stop:
                break
            with telemetry.timed("data_wait", f"reading the batch of step {run.step + 1}"):
                host_batch, trace_index, cost = policy(run.step, run.state, *next(batches))
                batch = pipeline.to_device(host_batch, mesh)
            with telemetry.dispatching(run.step + 1):
                run.state, values = train_step(run.state, batch)
            run.step, run.metrics = run.step + 1, {}
            # Step n is running on the device; only now are the numbers of step n-1 fetched.
            telemetry.dispatched(Pending(run.step, values, trace_index, cost))
        with telemetry.timed("save"):
            checkpoints.close()
    if not last:
        log.warning(
            "%s: interrupted, saved at step %d in %.1f s; the same command goes on",
            run_dir,
            run.step,
            time.monotonic() - began,
        )
        raise SystemExit(EXIT_INTERRUPTED)
    return run.step


def _make_steps(
    config: Any,
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
) -> tuple[Callable[..., tuple[TrainState, dict[str, jax.Array]]], Callable[..., Sums]]:
    """(train step, held-out step), both of (state, batch); a live teacher is bound to them."""
    teacher, teacher_params = load_live_teacher(config, student, mesh)
    forward = make_forward(
        config,
        student.config,
        mesh=mesh,
        valid_vocab=student.valid_vocab,
        teacher=teacher,
        remat=choose_remat(config, mesh.devices.flat),
    )
    train_step = make_train_step(
        forward,
        optimizer,
        schedule,
        batch_size=config.data.batch_size,
        microbatches=config.train.microbatches,
        offload=config.optim.offload,
    )
    eval_step = make_eval_step(forward)
    return (
        lambda state, batch: train_step(state, batch, *teacher_params),
        lambda state, batch: eval_step(state, batch, *teacher_params),
    )


def reading(config: Any, mesh: Mesh, *, whole: bool = False) -> dict[str, Any]:
    """The fields of pipeline.Reading for this host's rows, or for all rows of the batch."""
    loss_config = settings.loss_config(config)
    process, processes = (0, 1) if whole else pipeline.host_slice(mesh, config.data.batch_size)
    return {
        "seq_len": config.data.seq_len,
        "batch_size": config.data.batch_size,
        "head_tokens": config.data.head_tokens,
        "prefetch": config.data.prefetch,
        "require_scores": loss_config.needs_cache,
        "require_top_k": loss_config.needs_top_k,
        "process_index": process,
        "process_count": processes,
    }


class HeldOut:
    """Held-out loss: nll per token and the weighted objective, on every trace of the split."""

    def __init__(
        self,
        config: Any,
        dataset: TraceDataset | None,
        eval_step: Callable[..., Sums],
        mesh: Mesh,
    ):
        self.config, self.dataset, self.eval_step, self.mesh = config, dataset, eval_step, mesh
        self.every = config.train.eval_every if dataset else 0

    def due(self, step: int, *, last: bool) -> bool:
        """Whether the split is evaluated at this step; `last`: no step follows."""
        return bool(self.every) and (last or step % self.every == 0)

    def __call__(self, state: TrainState) -> dict[str, float]:
        if self.dataset is None:  # never due
            return {}
        total = None
        batches = pipeline.eval_batches(self.dataset, **reading(self.config, self.mesh))
        for number, (host_batch, _) in enumerate(batches, 1):
            batch = pipeline.to_device(host_batch, self.mesh)
            sums = self.eval_step(state, batch)
            hosts.moved()
            total = sums if total is None else reduce.add(total, sums)
            if number == self.config.train.eval_batches:
                break
        if total is None:
            raise DcodError(f"{self.dataset.directory} gave no held-out batch")
        return {
            "eval/nll": float(reduce.mean_nll(total)),
            "eval/loss": float(reduce.finish(total, self.config.loss.weights.normalize)),
            "eval/tokens": float(total.count),
        }
