"""The training loop of one run: read `fit` from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from dcod_jax import config as configs
from dcod_jax.data import chat, pipeline
from dcod_jax.errors import EXIT_INTERRUPTED
from dcod_jax.files import Path, as_path, forget_unfinished, replace_file, to_json
from dcod_jax.locks import check_held, locked
from dcod_jax.losses.reduce import Sums
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.plan.remat import choose_remat
from dcod_jax.train import learned_from
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.forward import make_forward
from dcod_jax.train.held_out import HeldOut, reading
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.train.on_policy import OnPolicy
from dcod_jax.train.profiling import GOODPUT
from dcod_jax.train.settings import best_metric
from dcod_jax.train.setup import (
    Student,
    initial_snapshot,
    load_base,
    load_live_teacher,
    load_student,
    open_datasets,
)
from dcod_jax.train.step import compiled_apart, configured_step, make_eval_step
from dcod_jax.train.telemetry import Pending, Telemetry
from dcod_jax.types import Params

log = logging.getLogger(__name__)


def fit(config: Any, *, name: str = "", until: int = 0) -> int:
    """Train to train.steps, or to the step `until` for now; returns the number of steps done."""
    entered = time.monotonic()
    hosts.check_joined()
    student = load_student(config)
    with locked(configs.dataset_lock(config), what="data.dataset", shared=True):
        return _fit(config, name, student, entered, until or config.train.steps)


def _fit(config: Any, name: str, student: Student, entered: float, end: int) -> int:
    train_set, eval_set = open_datasets(config, student)
    run_dir = as_path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(**config.mesh)
    base = load_base(config, student, mesh)
    optimizer, train_step, eval_step = _make_steps(config, student, mesh, base)
    of = (student.config, student.tokenizer, mesh)
    held_out = HeldOut(config, *of, dataset=eval_set, eval_step=eval_step, base=base)
    checkpoints = Checkpoints(config, best_metric=held_out.known(best_metric(config)))
    learns_from = learned_from.parts(config, student.tokenizer, train_set, eval_set)
    run = initial_snapshot(config, student, optimizer, mesh, checkpoints, learns_from)
    batches = pipeline.train_batches(
        train_set, seed=config.seed, **reading(config, mesh, whole=config.on_policy.fraction > 0)
    )
    _begin(config, run, batches, run_dir)
    if run.step >= end:
        log.info("%s: all %d steps are done", run_dir, end)
        if hosts.first():
            forget_unfinished(run_dir / GOODPUT)
        checkpoints.close()
        return run.step
    sample = train_set.read([0])[0]
    print(f"one trace, supervised part marked:\n{chat.render_sample(student.tokenizer, sample)}\n")

    policy = OnPolicy(config, student, mesh, base=base, spent=run.on_policy)
    telemetry = Telemetry(config, run, student, train_set, checkpoints, name=name, entered=entered)
    with hosts.interruption() as interrupted, telemetry:
        # The order is part of exactness: evaluate -> save -> advance the iterator -> step.
        while True:
            began, last = time.monotonic(), run.step == end
            stop = interrupted(run.step) or last
            evaluate = held_out.due(run.step, run.metrics, last=last)
            checkpointer = checkpoints.due(run.step, stop=stop)
            if evaluate or checkpointer:
                telemetry.settle()
            if evaluate:
                _measure(evaluate, run, held_out, telemetry)
            if checkpointer:
                _save(config, run, batches, telemetry, checkpointer)
            if stop:
                break
            step = run.step + 1
            with telemetry.timed("data_wait", f"reading the batch of step {step}"):
                host_batch, trace_index, cost = policy(run.step, run.state, *next(batches))
                batch = pipeline.to_device(host_batch, mesh)
            with telemetry.timed("dispatch", f"starting step {step}"), telemetry.tracer.step(step):
                run.state, values = train_step(run.state, batch)
            run.step, run.metrics = step, {}
            # Step n is running on the device; only now is step n-1 waited for.
            places = host_batch["head_positions"]
            telemetry.dispatched(Pending(step, values, trace_index, cost, places))
        with telemetry.timed("save"):
            checkpoints.close()
    if not last:
        text = "%s: interrupted, saved at step %d in %.1f s; the same command goes on"
        log.warning(text, run_dir, run.step, time.monotonic() - began)
        raise SystemExit(EXIT_INTERRUPTED)
    return run.step


def _begin(config: Any, run: Snapshot, batches: Any, run_dir: Path) -> None:
    """Put the data where the run goes on; a run that begins writes its config."""
    if run.iterator:
        own, accept = batches.get_state()["stream"], config.train.accept_changed_data
        batches.set_state(learned_from.position(run.iterator, own, accept=accept))
    elif hosts.first():
        replace_file(run_dir / "config.json", to_json(config.to_dict()))


def _measure(names: list[str], run: Snapshot, held_out: HeldOut, telemetry: Telemetry) -> None:
    with telemetry.timed("eval", f"{', '.join(names)} at step {run.step}"):
        run.metrics = run.metrics | held_out.measure(names, run.state)
    telemetry.held_out()


def _save(
    config: Any,
    run: Snapshot,
    batches: Any,
    telemetry: Telemetry,
    checkpointer: Checkpointer | LocalCheckpoints,
) -> None:
    run_dir = as_path(config.run_dir)
    with telemetry.timed("save", f"saving step {run.step}"):
        check_held(run_dir / ".train.lock", what=f"run_dir={run_dir}")
        telemetry.writer.sync()  # a resumed run needs the lines up to its checkpoint
        run.iterator = batches.get_state()
        checkpointer.save(run)
    telemetry.goodput.saved(run.step)


def _make_steps(
    config: Any, student: Student, mesh: Mesh, base: tuple[Params, ...]
) -> tuple[optax.GradientTransformation, Callable[..., Any], Callable[..., Sums]]:
    """(optimizer, train step, held-out step); the steps are of (state, batch) alone."""
    teacher, teacher_params = load_live_teacher(config, student, mesh)
    forward = make_forward(
        config,
        student.config,
        mesh=mesh,
        valid_vocab=student.valid_vocab,
        teacher=teacher,
        remat=choose_remat(config, mesh.devices.flat),
    )
    optimizer, train_step = configured_step(config, forward)
    train_step, eval_step = compiled_apart(train_step), make_eval_step(forward)
    return (
        optimizer,
        lambda state, batch: train_step(state, batch, *teacher_params, *base),
        lambda state, batch: eval_step(state, batch, *teacher_params, *base),
    )
