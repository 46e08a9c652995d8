"""XProf traces of a run's steps; docs/profiling.md says how to read the times of a run."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import jax

from dcod_jax.copies import Mirror
from dcod_jax.files import Path

log = logging.getLogger(__name__)


class Tracer:
    """An XProf trace of profile.steps ("10:13": steps 10, 11, 12 and 13) in run_dir/profile."""

    def __init__(self, steps: str, run_dir: Path, *, first: int):
        """first: the first step of this attempt."""
        begin, _, end = steps.partition(":")
        self.wanted = range(int(begin), int(end) + 1) if steps else range(0)
        self.directory = run_dir / "profile"
        self._mirror: Mirror | None = None
        if steps and self.wanted[-1] < first:
            log.info("profile.steps=%s are before this start at step %d: no trace", steps, first)

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Its body starts this step; the trace is opened before the first that is wanted."""
        if step in self.wanted and self._mirror is None:
            self._mirror = Mirror(self.directory)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing every Python call would slow the steps
            self._mirror.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._mirror.directory), profiler_options=options)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, values: Any) -> None:
        """End the trace once the last wanted step is done on the device."""
        if self._mirror is not None and step + 1 not in self.wanted:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """End the trace, where one is open."""
        if self._mirror is not None:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None
            log.info("profile: %s (open with: tensorboard --logdir %s)", *[self.directory] * 2)
