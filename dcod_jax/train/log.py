"""Numbers of a run as it goes: progress bar, metrics.jsonl, TensorBoard, and the stop at NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path
from dcod_jax.logs import track
from dcod_jax.models.config import flops_per_token
from dcod_jax.parallel import hosts
from dcod_jax.train import metrics as meters
from dcod_jax.train.checkpoint import Checkpointer
from dcod_jax.train.profiling import Goodput, Phases, Tracer
from dcod_jax.train.start import Student

# The loop warns when the tokens that the student gives q <= 0.9 have less than this share of the
# average weight. Evidence: docs/auto_temperature.md.
UNKNOWN_WEIGHT = 0.6


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose numbers are still on the device."""

    step: int
    values: dict[str, jax.Array]
    trace_index: np.ndarray  # [B / hosts, T], -1 in padding
    cost: dict[str, float]  # of sampling on the student's side, where it does


class Log:
    """Numbers of a run: progress bar, metrics.jsonl, TensorBoard, and the stop at NaN."""

    def __init__(
        self,
        config: Any,
        student: Student,
        *,
        name: str,
        start: int,
        tokens_seen: int,
        mesh: Any,
        entered: float,
    ):
        self.config = config
        self.tokens_seen = tokens_seen
        run_dir = as_path(config.run_dir)
        # Before the metrics file is opened, which drops the lines of a killed attempt.
        self.goodput = Goodput(run_dir, start, entered=entered, enabled=hosts.first())
        self.phases = Phases()
        self.tracer = Tracer(config.profile.steps, run_dir, start=start)
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
        self.tracer.close()
        self.bar.__exit__(*details)
        self.writer.close()
        self.goodput.finish(failed=details[0] is not None)
        if details[0] is None:
            print(self.goodput.text())

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time that is not a step's: "eval" and "save"."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.paused += seconds
        self.goodput.paused(kind, seconds)

    @contextmanager
    def dispatching(self, step: int) -> Iterator[None]:
        """The body starts this step on the device; it is traced where profile.steps says so."""
        with self.tracer.step(step), self.phases.phase("dispatch"):
            yield

    def settle(self, done: Pending, dataset: TraceDataset, checkpointer: Checkpointer) -> None:
        """Fetch one step's numbers, stop if they are not finite, count, show and write them."""
        hosts.doing(f"the numbers of step {done.step}", waiting=True)
        with self.phases.phase("device"):
            fetched = jax.device_get(done.values)
        self.goodput.started()
        values = {key: float(value) for key, value in fetched.items()}
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
            "docs/method.md, and consider loss.weights.temperature=auto, a higher target_loss or "
            "warmup_steps",
            flush=True,
        )

    def _pace(self, step: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self.clock - self.paused, 1e-9)
        per_step = seconds / (step - self.clock_step)
        pace = {
            "time/step_seconds": per_step,
            "time/tokens_per_second": self.clock_tokens / seconds,
            **self.phases.take(step - self.clock_step),
            **self.goodput.line(step),
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
    own = json.dumps([trace.id for trace in dataset.read(traces)])
    everyone = hosts.exchange("the traces of the batch", own)  # the loss is the same on all
    ids = dict.fromkeys(name for text in everyone for name in json.loads(text))
    checkpointer.wait()
    steps = checkpointer.steps()
    good = f"step {steps[-1]} in {checkpointer.directory}" if steps else "none"
    return (
        f"step {done.step}: loss={values['loss']}, grad_norm={values['grad_norm']}; the state was "
        f"not saved. Last good checkpoint: {good}. Traces of the batch: {', '.join(ids)}. Look at "
        "them with dcod_jax.inspect; lower optim.learning_rate or set optim.clip_norm if they are "
        "as they should be"
    )
