"""Distil a student: one command from raw traces, or from prompts and a teacher, to an HF model.

Steps that are missing are run first (generate_traces, prepare, score), each with its progress.
Then the student is trained on the packed trace dataset; the same command resumes after an
interruption. With `compare` every variant is trained from the same start; with
`evaluate.problems` all are graded by greedy decoding; the result is exported as an HF directory.

Writes run_dir/{config.json,metrics.jsonl,tensorboard,checkpoints,export}; with `compare` one such
directory for each variant. Exit codes: 0 done, 1 error, 75 interrupted after saving.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcod_jax import config as configs
from dcod_jax import metrics as meters
from dcod_jax import stages
from dcod_jax.checkpoint import Checkpointer
from dcod_jax.compiled import choose_remat
from dcod_jax.config import run_verb
from dcod_jax.data import chat, pipeline
from dcod_jax.data.manifest import replace_file
from dcod_jax.data.records import TraceDataset
from dcod_jax.losses import distill, reduce
from dcod_jax.losses.distill import LossConfig
from dcod_jax.mesh import make_mesh
from dcod_jax.models.config import flops_per_token
from dcod_jax.on_policy import OnPolicy
from dcod_jax.optim import make_optimizer
from dcod_jax.progress import track
from dcod_jax.start import (
    Student,
    load_live_teacher,
    load_student,
    open_datasets,
    preflight,
    start_state,
)
from dcod_jax.train_step import make_eval_step, make_train_step
from dcod_jax.types import DcodError, TrainState

# The loop warns when the tokens that the student gives q <= 0.9 have less than this share of the
# average weight. Evidence: docs/benchmarks.md, "A student that lacks the skill".
UNKNOWN_WEIGHT = 0.6


def train(config: Any) -> None:
    """The verb: missing inputs, every variant, then evaluation and export."""
    runs = list(configs.variants(config))
    for _, variant in runs:
        preflight(variant)
    stages.ensure_inputs(config)
    for name, variant in runs:
        fit(variant, name=name)
    stages.finish(config, runs)


# ---------------------------------------------------------------- one run


def fit(config: Any, *, name: str = "") -> int:
    """Train one variant to train.steps, or resume it; returns the number of steps done."""
    student = load_student(config)
    train_set, eval_set = open_datasets(config, student)
    loss_config = configs.loss_config(config)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(
        run_dir,
        keep=config.train.keep,
        best_metric=config.train.best_metric if eval_set else "",
    )

    mesh = make_mesh(**config.mesh)
    optimizer, schedule = make_optimizer(configs.optim_config(config), config.train.steps)
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
    state, restored = start_state(config, student, optimizer, mesh, checkpointer)

    batches = pipeline.train_batches(train_set, seed=config.seed, **reading)
    step, progress = 0, {"tokens_seen": 0, "on_policy": {}}
    if restored:
        step, progress = restored.step, restored.progress
        batches.set_state(progress["iterator"])
    policy = OnPolicy(config, student, mesh, spent=progress["on_policy"])
    if step >= config.train.steps:
        print(f"{run_dir}: all {step} steps are done")
        checkpointer.close()
        return step
    if not restored:
        replace_file(run_dir / "config.json", configs.to_json(config).encode())
    sample = train_set.read([0])[0]
    print(f"one trace, supervised part marked:\n{chat.render_sample(student.tokenizer, sample)}\n")

    tokens_seen = progress["tokens_seen"]
    log = Log(config, student, name=name, start=step, tokens_seen=tokens_seen, mesh=mesh)
    evaluated = step if restored and restored.metrics else -1
    saved = step if restored else -1
    held_out: dict[str, float] = {}
    pending: Pending | None = None
    with interruption() as interrupted, log:
        # The order is part of exactness: evaluate -> save -> advance the iterator -> step.
        while True:
            last = step == config.train.steps
            stop = last or interrupted()
            evaluate = evaluator is not None and _due(step, config.train.eval_every, last=last)
            save = stop or (step > 0 and _due(step, config.train.save_every, last=last))
            if (evaluate or save) and pending:
                log.settle(pending, train_set, checkpointer)
                pending = None
            if evaluate and evaluated != step and evaluator is not None:
                with log.pause():
                    held_out = evaluator(state)
                log.held_out(step, held_out)
                evaluated = step
            if save and saved != step:
                with log.pause():
                    checkpointer.save(
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
            if stop:
                break
            host_batch, trace_index, cost = policy(step, state, *next(batches))
            batch = pipeline.to_device(host_batch, mesh)
            state, values = train_step(state, batch, *teacher_params)
            step += 1
            # Step n is running on the device; only now are the numbers of step n-1 fetched.
            if pending:
                log.settle(pending, train_set, checkpointer)
            pending = Pending(step, values, trace_index, cost)
        checkpointer.close()
    if not last:
        print(f"{run_dir}: interrupted, saved at step {step}; the same command goes on")
        raise SystemExit(configs.EXIT_INTERRUPTED)
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


@contextmanager
def interruption() -> Iterator[Any]:
    """Yield a function that says whether SIGTERM or SIGINT came; a second one ends at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print(f"{signal.Signals(number).name}: saving after this step", flush=True)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------- inside the loop


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose numbers are still on the device."""

    step: int
    values: dict[str, jax.Array]
    trace_index: np.ndarray  # [B / hosts, T], -1 in padding
    cost: dict[str, float]  # of sampling on the student's side, where it does


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


class Log:
    """Numbers of a run: progress bar, metrics.jsonl, TensorBoard, and the stop at NaN."""

    def __init__(
        self, config: Any, student: Student, *, name: str, start: int, tokens_seen: int, mesh: Any
    ):
        self.config = config
        self.tokens_seen = tokens_seen
        self.writer = meters.MetricsWriter(config.run_dir, start)
        self.bar = track(
            f"training {name}".rstrip(),
            config.train.steps,
            unit="steps",
            done=start,
            enabled=config.train.progress,
        )
        positions = config.data.batch_size * config.data.seq_len
        self.flops = positions * flops_per_token(student.config, config.data.seq_len)
        peak = meters.device_peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * mesh.size if peak else None
        self.note = ""
        self.warned = False
        self.paused = 0.0
        self.clock = time.monotonic()
        self.clock_step = start
        self.clock_tokens = 0

    def __enter__(self) -> Log:
        self.advance = self.bar.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.bar.__exit__(*details)
        self.writer.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not a step's: evaluation and saving."""
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    def settle(self, done: Pending, dataset: TraceDataset, checkpointer: Checkpointer) -> None:
        """Fetch one step's numbers, stop if they are not finite, count, show and write them."""
        values = {key: float(value) for key, value in jax.device_get(done.values).items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise DcodError(_not_finite(done, values, dataset, checkpointer))
        values |= done.cost
        self._warn(done.step, values)
        self.tokens_seen += int(values["tokens/completion"])
        self.clock_tokens += int(values["tokens/total"])
        elapsed = max(time.monotonic() - self.clock - self.paused, 1e-9)
        pace = f"{self.clock_tokens / elapsed:,.0f} tokens/s"
        self.advance(1, f"step {done.step} loss {values['loss']:.4f} {pace}{self.note}")
        if done.step % self.config.train.log_every == 0 or done.step == self.config.train.steps:
            self.writer.write(
                done.step, values | {"tokens_seen": self.tokens_seen} | self._pace(done.step)
            )

    def _warn(self, step: int, values: dict[str, float]) -> None:
        """Once: when the weights have left what the student does not know yet."""
        mass, share = values["weights/confident_mass"], values["weights/confident_tokens"]
        if self.warned or not 1 - mass < UNKNOWN_WEIGHT * (1 - share):
            return
        self.warned = True
        print(
            f"warning: step {step}: {mass:.0%} of the weight lies on tokens that the student gives "
            f"q > 0.9 already, which are {share:.0%} of the tokens (effective sample size "
            f"{values['weights/ess']:.2f}). A student that lacks the skill stops learning so; see "
            "docs/method.md, and consider loss.weights.temperature=auto, a higher target_ess or "
            "warmup_steps",
            flush=True,
        )

    def _pace(self, step: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self.clock - self.paused, 1e-9)
        per_step = seconds / (step - self.clock_step)
        pace = {
            "time/step_seconds": per_step,
            "time/tokens_per_second": self.clock_tokens / seconds,
        }
        if self.peak:
            pace["time/mfu"] = self.flops / per_step / self.peak
        self.clock, self.clock_step = time.monotonic(), step
        self.paused, self.clock_tokens = 0.0, 0
        return pace

    def held_out(self, step: int, values: dict[str, float]) -> None:
        self.writer.write(step, values)
        self.note = f" held-out nll {values['eval/nll']:.4f} (step {step})"


def _not_finite(
    done: Pending, values: dict[str, float], dataset: TraceDataset, checkpointer: Checkpointer
) -> str:
    traces = np.unique(done.trace_index[done.trace_index >= 0])
    ids = [trace.id for trace in dataset.read(traces)]
    steps = checkpointer.steps()
    good = f"step {steps[-1]} in {checkpointer.directory}" if steps else "none"
    return (
        f"step {done.step}: loss={values['loss']}, grad_norm={values['grad_norm']}; the state was "
        f"not saved. Last good checkpoint: {good}. Traces of the batch: {', '.join(ids)}. Look at "
        "them with dcod_jax.inspect; lower optim.learning_rate or set optim.clip_norm if they are "
        "as they should be"
    )


if __name__ == "__main__":
    run_verb("train", train)
