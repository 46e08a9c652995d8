"""Numbers of a run as it goes: progress bar, metrics.jsonl, TensorBoard, and the stop at NaN."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.packing import head_capacity
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path
from dcod_jax.logs import track
from dcod_jax.parallel import hosts
from dcod_jax.plan import chips
from dcod_jax.plan.estimate import step_flops
from dcod_jax.train import trace_weights
from dcod_jax.train.checkpointer import Snapshot
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.metrics import MetricsWriter, StepMetrics, is_logged
from dcod_jax.train.profiling import PHASES, Goodput, Tracer
from dcod_jax.train.settings import loss_config
from dcod_jax.train.setup import Student

log = logging.getLogger(__name__)

Fetched = TypeVar("Fetched")
# The loop warns when the tokens that the student gives q <= 0.9 have less than this share of the
# average weight. Evidence: docs/auto_temperature.md.
UNKNOWN_WEIGHT = 0.6


class DivergedError(DcodError):
    """Numbers that are not finite, or too many skipped steps: of the training, not the set-up."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose numbers are still on the device."""

    step: int
    values: StepMetrics
    trace_index: np.ndarray  # [B / hosts, T], -1 in padding
    cost: dict[str, float]  # of sampling from the student
    head_positions: np.ndarray | None = None  # [B / hosts, C]


class Telemetry:
    """Progress bar, metrics files, times and the stop at NaN of one run."""

    def __init__(
        self,
        config: Any,
        run: Snapshot,
        student: Student,
        dataset: TraceDataset,
        checkpoints: Checkpoints,
        *,
        name: str,
        entered: float,
    ):
        """entered: when this attempt began, of time.monotonic. run.tokens_seen is counted here."""
        self.config, self.run = config, run
        self.dataset, self.checkpoints = dataset, checkpoints
        run_dir = as_path(config.run_dir)
        # Before the metrics file is opened, which drops the lines of a killed attempt.
        self.goodput = Goodput(run_dir, run.step, entered=entered, enabled=hosts.first())
        self.tracer = Tracer(config.profile.steps, run_dir, first=run.step + 1)
        self.writer = MetricsWriter(config.run_dir, run.step)
        self.bar = track(
            f"training {name}".rstrip(),
            config.train.steps,
            unit="steps",
            done=run.step,
            enabled=config.train.progress,
        )
        row = (config.data.seq_len, config.data.head_tokens)
        self.flops = step_flops(config, student.config, head_capacity(dataset.lengths, *row))
        peak = chips.peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.pending: list[Pending] = []  # not fetched yet, oldest first
        self.note = self.shown = ""
        self.warned = False
        self.by_trace = loss_config(config).weights.scope == "sequence"
        self._begin_line(run.step)

    def _begin_line(self, step: int) -> None:
        """Count from 0 what the next metrics line is about: the steps after this one."""
        self.line_step, self.line_tokens, self.line_began = step, 0, time.monotonic()
        self.spent: dict[str, float] = dict.fromkeys((*PHASES, "eval", "save"), 0.0)

    def _stepping(self) -> float:
        """Seconds of this line without evaluation and saves; never 0."""
        paused = self.spent["eval"] + self.spent["save"]
        return max(time.monotonic() - self.line_began - paused, 1e-9)

    def __enter__(self) -> Telemetry:
        self.advance = self.bar.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        failed = details[0] is not None
        for end in (
            self.tracer.close,
            functools.partial(self.bar.__exit__, *details),
            self.writer.close,
            functools.partial(self.goodput.finish, failed=failed),
        ):
            try:
                end()
            except (DcodError, OSError) as error:
                if not failed:
                    raise
                # The error that came first is told: on a full disk each of these fails, too.
                log.debug("while the run ended: %s", error)
        if not failed:
            log.info(self.goodput.text())

    @contextmanager
    def timed(self, part: str, doing: str = "") -> Iterator[None]:
        """Count the body as "eval", "save" or one of profiling.PHASES."""
        if doing:
            hosts.doing(doing)
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.spent[part] += seconds
        if part not in PHASES:
            self.goodput.paused(part, seconds)

    def dispatched(self, started: Pending) -> None:
        """Wait for the step before this one, which has just been started; settle a log step."""
        self.tracer.after(started.step, started.values)
        if self.pending:
            before = self.pending[-1]
            if self._is_logged(before.step):
                self.settle()
            else:  # so that neither steps nor batches pile up, and a signal is answered in time
                self._wait(before.step, lambda: jax.block_until_ready(before.values.array))
                self.advance(1, self.shown + self.note)
        self.pending.append(started)

    def _is_logged(self, step: int) -> bool:
        return bool(is_logged(step, self.config.train.log_every, self.config.train.steps))

    def _wait(self, step: int, until: Callable[[], Fetched]) -> Fetched:
        hosts.doing(f"the numbers of step {step}", waiting=True)
        with self.timed("device"):
            found = until()
        self.goodput.started()
        return found

    def settle(self) -> None:
        """Fetch, count and write the steps since the last time; not finite is an error."""
        if not self.pending:
            return
        steps, self.pending = self.pending, []
        last = steps[-1].step
        arrays = [done.values.array for done in steps]
        fetched = self._wait(last, lambda: jax.device_get(arrays))
        for done, numbers in zip(steps, fetched, strict=True):
            self._count(done, dict(zip(done.values.names, numbers.tolist(), strict=True)))
        self.advance(1, self.shown + self.note)

    def _count(self, done: Pending, values: dict[str, float]) -> None:
        """Stop where the numbers are not finite; add them up, and write those of a log step."""
        if values.get("skipped"):
            self._skipped(done, values)
        elif not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise DivergedError(self._not_finite(done, values))
        self.run.tokens_seen += int(values["tokens/completion"])
        self.line_tokens += int(values["tokens/total"])
        pace = f"{self.line_tokens / self._stepping():,.0f} tokens/s"
        self.shown = f"step {done.step} loss {values['loss']:.4f} {pace}"
        if self._is_logged(done.step):
            values |= done.cost
            self._warn(done.step, values)
            found, traces = self._trace_weights(done)
            values |= found | {"tokens_seen": self.run.tokens_seen} | self._pace(done.step)
            self.writer.write(done.step, values, traces)

    def _trace_weights(self, done: Pending) -> tuple[dict[str, float], dict[str, Any]]:
        """trace_weights.summary of a step; nothing where the traces have none of their own."""
        weights, places = done.values.token_weights, done.head_positions
        if weights is None or places is None or done.cost.get("on_policy/batch"):
            return {}, {}
        own = trace_weights.trace_weights(trace_weights.own_rows(weights), done.trace_index, places)
        return trace_weights.summary(own, self.dataset)

    def held_out(self) -> None:
        """Write the held-out metrics of the run's step, and show them beside the bar."""
        self.writer.write(self.run.step, self.run.metrics)
        found = self.run.metrics
        texts = [f"nll {found['eval/nll']:.4f}"] if "eval/nll" in found else []
        if "eval/accuracy" in found:
            low, high = found["eval/accuracy_low"], found["eval/accuracy_high"]
            texts.append(f"accuracy {found['eval/accuracy']:.1%} ({low:.1%} to {high:.1%})")
        self.note = f" held-out {', '.join(texts)} (step {self.run.step})"

    def _warn(self, step: int, values: dict[str, float]) -> None:
        """Once: when the tokens that the student does not know yet have too little weight.

        One weight for each trace is meant to leave out traces that the student would not write.
        """
        mass, share = values["weights/confident_mass"], values["weights/confident_tokens"]
        if self.warned or self.by_trace or not 1 - mass < UNKNOWN_WEIGHT * (1 - share):
            return
        self.warned = True
        log.warning(
            "step %d: %.0f%% of the weight lies on tokens that the student gives q > 0.9 already, "
            "which are %.0f%% of the tokens (effective sample size %.2f). With such weights a "
            "student that lacks the skill stops learning; see docs/method.md, and consider "
            "loss.weights.name=auto or loss.weights.temperature=auto",
            step,
            100 * mass,
            100 * share,
            values["weights/ess"],
        )

    def _pace(self, step: int) -> dict[str, float]:
        """The times of a metrics line, as means over the steps since the last one."""
        seconds, steps = self._stepping(), step - self.line_step
        pace = {
            "time/step_seconds": seconds / steps,
            "time/tokens_per_second": self.line_tokens / seconds,
            **{f"time/{name}_seconds": self.spent[name] / steps for name in PHASES},
            **self.goodput.line(step),
        }
        if self.peak:
            pace["time/mfu"] = self.flops * steps / seconds / self.peak
        self._begin_line(step)
        return pace

    def _skipped(self, done: Pending, values: dict[str, float]) -> None:
        """Log a step that changed nothing; raises DcodError when there were too many."""
        count, most = int(values["skipped_total"]), self.config.optim.max_skipped
        what = (
            f"step {done.step} was skipped: loss={values['loss']}, grad_norm={values['grad_norm']};"
            f" {count} skipped so far, optim.max_skipped={most}. Traces of the batch: "
            f"{self._traces(done)}"
        )
        if count > most:
            raise DivergedError(
                f"{what}. Look at them with dcod_jax.inspect; lower optim.learning_rate, or raise "
                "optim.max_skipped or optim.spike_factor"
            )
        log.warning(what)

    def _traces(self, done: Pending) -> str:
        """Ids of the traces of a batch, on all processes."""
        traces = np.unique(done.trace_index[done.trace_index >= 0])
        own = [trace.id for trace in self.dataset.read(traces)]
        everyone = hosts.exchange("the traces of the batch", own)  # the loss is the same on all
        return ", ".join(dict.fromkeys(name for names in everyone for name in names))

    def _not_finite(self, done: Pending, values: dict[str, float]) -> str:
        ids = self._traces(done)
        shared = self.checkpoints.shared
        shared.wait()
        steps = shared.steps()
        good = f"step {steps[-1]} in {shared.directory}" if steps else "none"
        return (
            f"step {done.step}: loss={values['loss']}, grad_norm={values['grad_norm']}; the state "
            f"was not saved. Last good checkpoint: {good}. Traces of the batch: {ids}. "
            "Look at them with dcod_jax.inspect; lower optim.learning_rate or set optim.clip_norm "
            "if they are as they should be"
        )
