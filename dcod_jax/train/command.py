"""Distil a student: one command from raw traces, or from prompts and a teacher, to an HF model.

Steps that are missing are run first (generate_traces, prepare, score), each with its progress.
Then the student is trained on the packed trace dataset; the same command resumes after an
interruption. With `compare` every variant is trained from the same start; with
`evaluate.problems` all are graded by greedy decoding; the result is exported as an HF directory.

Writes run_dir/{config.json,metrics.jsonl,tensorboard,checkpoints,export}; with `compare` one such
directory for each variant. Exit codes: 0 done, 1 error, 75 interrupted after saving.
"""

from __future__ import annotations

import time
from typing import Any

import jax.numpy as jnp

from dcod_jax import config as configs
from dcod_jax.data import chat, pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import EXIT_INTERRUPTED, DcodError
from dcod_jax.files import as_path, replace_file
from dcod_jax.losses import distill, reduce
from dcod_jax.losses.distill import LossConfig
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.plan.programs import choose_remat
from dcod_jax.train import on_policy, settings, stages
from dcod_jax.train.checkpoint import Checkpointer
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.train.log import Log, Pending
from dcod_jax.train.optim import make_optimizer
from dcod_jax.train.start import (
    load_live_teacher,
    load_student,
    open_datasets,
    preflight,
    start_state,
)
from dcod_jax.train.step import make_eval_step, make_train_step
from dcod_jax.types import TrainState


def train(config: Any) -> None:
    """The verb: missing inputs, every variant, then evaluation and export."""
    runs = list(configs.variants(config))
    for _, variant in runs:
        preflight(variant)
    stages.ensure_inputs(config)
    for name, variant in runs:
        fit(variant, name=name)
        stages.return_freed_memory()
        hosts.stop_if_noticed()
    stages.finish(config, runs)


# ---------------------------------------------------------------- one run


def fit(config: Any, *, name: str = "") -> int:
    """Train one variant to train.steps, or resume it; returns the number of steps done."""
    hosts.check_joined()
    entered = time.monotonic()
    student = load_student(config)
    train_set, eval_set = open_datasets(config, student)
    loss_config = settings.loss_config(config)
    run_dir = as_path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(
        run_dir,
        keep=config.train.keep,
        best_metric=config.train.best_metric if eval_set else "",
        beside_local=bool(config.train.local_dir),
    )
    local = LocalCheckpoints(
        checkpointer, directory=config.train.local_dir, every=config.train.local_every
    )

    mesh = make_mesh(**config.mesh)
    optimizer, schedule = make_optimizer(settings.optim_config(config), config.train.steps)
    teacher, teacher_params = load_live_teacher(config, student, mesh)
    options: dict[str, Any] = {
        "teacher": teacher,
        "mesh": mesh,
        "compute_dtype": jnp.dtype(config.student.compute_dtype),
        "remat": choose_remat(config, mesh.devices.flat),
        "valid_vocab": student.valid_vocab,
    }
    train_step = make_train_step(
        student.config,
        loss_config,
        optimizer,
        schedule,
        batch_size=config.data.batch_size,
        microbatches=config.train.microbatches,
        offload=config.optim.offload,
        **options,
    )
    reading = _reading(config, loss_config, mesh)
    evaluator = None
    if eval_set:
        step_of = make_eval_step(student.config, loss_config, **options)
        evaluator = Evaluator(config, eval_set, reading, step_of, teacher_params, mesh)
    state, restored = start_state(config, student, optimizer, mesh, checkpointer, local)

    batches = pipeline.train_batches(
        train_set, seed=config.seed, **on_policy.reading(config, reading)
    )
    step, progress = 0, {"tokens_seen": 0, "on_policy": {}}
    if restored:
        step, progress = restored.step, restored.progress
        batches.set_state(progress["iterator"])
    policy = on_policy.OnPolicy(config, student, mesh, spent=progress["on_policy"])
    if step >= config.train.steps:
        print(f"{run_dir}: all {step} steps are done")
        checkpointer.close()
        local.close()
        return step
    if not restored and hosts.first():
        replace_file(run_dir / "config.json", configs.to_json(config).encode())
    sample = train_set.read([0])[0]
    print(f"one trace, supervised part marked:\n{chat.render_sample(student.tokenizer, sample)}\n")

    tokens_seen = progress["tokens_seen"]
    log = Log(
        config,
        student,
        name=name,
        start=step,
        tokens_seen=tokens_seen,
        mesh=mesh,
        entered=entered,
    )
    held_out = restored.metrics if restored else {}
    evaluated = step if held_out else -1
    saved = step if step in checkpointer.steps() else -1
    pending: Pending | None = None
    with hosts.interruption() as interrupted, log:
        # The order is part of exactness: evaluate -> save -> advance the iterator -> step.
        while True:
            last = step == config.train.steps
            began = time.monotonic()
            stop = interrupted(step) or last
            evaluate = evaluator is not None and _due(step, config.train.eval_every, last=last)
            save = stop or (step > 0 and _due(step, config.train.save_every, last=last))
            save_locally = not save and local.due(step)
            if (evaluate or save or save_locally) and pending:
                log.settle(pending, train_set, checkpointer)
                pending = None
            if evaluate and evaluated != step and evaluator is not None:
                hosts.doing(f"held-out loss at step {step}")
                with log.pause("eval"):
                    held_out = evaluator(state)
                log.held_out(step, held_out)
                evaluated = step
            if (save or save_locally) and saved != step:
                hosts.doing(f"saving step {step}")
                with log.pause("save"):
                    log.writer.sync()  # a resumed run needs the lines up to its checkpoint
                    (checkpointer if save else local).save(
                        state,
                        step=step,
                        progress={
                            "iterator": batches.get_state(),
                            "tokens_seen": log.tokens_seen,
                            "on_policy": policy.spent,
                        },
                        config=config.to_dict(),
                        metrics=held_out if evaluated == step else None,
                    )
                saved = step
                log.goodput.saved(step)
            if stop:
                break
            hosts.doing(f"reading the batch of step {step + 1}")
            with log.phases.phase("data_wait"):
                host_batch, trace_index, cost = policy(step, state, *next(batches))
                batch = pipeline.to_device(host_batch, mesh)
            hosts.doing(f"starting step {step + 1}")
            with log.dispatching(step + 1):
                state, values = train_step(state, batch, *teacher_params)
            step += 1
            log.tracer.after(step, values)
            # Step n is running on the device; only now are the numbers of step n-1 fetched.
            if pending:
                log.settle(pending, train_set, checkpointer)
            pending = Pending(step, values, trace_index, cost)
        with log.pause("save"):
            checkpointer.close()
            local.close()  # only now is the last shared checkpoint whole
    if not last:
        seconds = time.monotonic() - began
        print(
            f"{run_dir}: interrupted, saved at step {step} in {seconds:.1f} s; "
            "the same command goes on"
        )
        raise SystemExit(EXIT_INTERRUPTED)
    return step


def _reading(config: Any, loss_config: LossConfig, mesh: Any) -> dict[str, Any]:
    """The fields of pipeline.Reading for this host."""
    process, processes = pipeline.host_slice(mesh, config.data.batch_size)
    cached = loss_config.teacher == "cached"
    return {
        "seq_len": config.data.seq_len,
        "batch_size": config.data.batch_size,
        "head_tokens": config.data.head_tokens,
        "prefetch": config.data.prefetch,
        "require_scores": distill.needs_cache(loss_config),
        "require_top_k": cached and distill.needs_distribution(loss_config),
        "process_index": process,
        "process_count": processes,
    }


def _due(step: int, every: int, *, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


# ---------------------------------------------------------------- inside the loop


class Evaluator:
    """Held-out loss: nll per token and the weighted objective, on every trace of the split."""

    def __init__(
        self,
        config: Any,
        dataset: TraceDataset,
        reading: dict[str, Any],
        step: Any,
        teacher_params: tuple[Any, ...],
        mesh: Any,
    ):
        self.config, self.dataset, self.reading, self.mesh = config, dataset, reading, mesh
        self.step, self.teacher_params = step, teacher_params

    def __call__(self, state: TrainState) -> dict[str, float]:
        total = None
        batches = pipeline.eval_batches(self.dataset, **self.reading)
        for number, (host_batch, _) in enumerate(batches, 1):
            batch = pipeline.to_device(host_batch, self.mesh)
            sums = self.step(state, batch, *self.teacher_params)
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
