"""Where a run's time goes: phases of a step, goodput over all its starts, and XProf traces.

All clocks are the host's; only the end of a trace waits for the device. docs/profiling.md says how
to read the numbers.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from typing import Any

import jax

from dcod_jax.bounds import array, check, mapping, number, text, whole
from dcod_jax.copies import Mirror
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, read_json, replace_file, to_json
from dcod_jax.train.metrics import read_metrics

log = logging.getLogger(__name__)
GOODPUT = "goodput.json"
PHASES = ("data_wait", "dispatch", "device")
PARTS = {  # of an attempt's time that is not in steps which count: its key, and its name in text
    "startup": "start-up",
    "eval": "evaluation",
    "save": "saves",
    "lost": "steps done again after a restart",
}

_SECONDS = number(0, 1e300)
_ATTEMPT = {"from_step": whole(0, 1 << 53), "step": whole(0, 1 << 53), "ended": text()}
_ATTEMPT |= {"steps_at_save": mapping(items=_SECONDS), **dict.fromkeys(PARTS, _SECONDS)}
_FILE = {"attempts": array(mapping(_ATTEMPT | {"elapsed": _SECONDS}))}


class Goodput:
    """The share of a run's time, over all its attempts, in steps that count (goodput.json).

    An attempt is one start of the program, from `entered` on: start-up (loading and compiling,
    until the first step is done), steps, evaluation, saves. When a later attempt begins at step r,
    the steps that an earlier one did after its last save up to r are lost. The end of a killed
    attempt is known from the last line of metrics.jsonl. Only the first process writes.
    """

    def __init__(self, run_dir: Path, start: int, *, entered: float, enabled: bool):
        self._file = run_dir / GOODPUT
        self._entered, self._enabled = entered, enabled
        self._started = False
        self._now: dict[str, Any] = {"from_step": start, "step": start, "elapsed": 0.0}
        self._now |= dict.fromkeys(PARTS, 0.0) | {"steps_at_save": {}, "ended": ""}
        self.attempts = [*(_earlier(run_dir, start) if enabled else []), self._now]
        self._tick(start)
        self._write()

    def started(self) -> None:
        """The first step of this attempt is done: the time before it is start-up."""
        if not self._started:
            self._tick(self._now["step"])
            self._started = True
            self._write()

    def paused(self, kind: str, seconds: float) -> None:
        """Count a pause of the steps; kind: eval | save."""
        self._now[kind] += seconds

    def saved(self, step: int) -> None:
        """A checkpoint of this step was begun; the steps before it will not be lost."""
        self._tick(step)
        self._now["steps_at_save"][str(step)] = _step_seconds(self._now)
        self._write()

    def line(self, step: int) -> dict[str, float]:
        """The fields of a metrics line."""
        self._tick(step)
        goodput = totals(self.attempts)["goodput"]
        return {"time/elapsed_seconds": self._now["elapsed"], "time/goodput": goodput}

    def finish(self, *, failed: bool) -> None:
        """Record the end of this attempt."""
        self._tick(self._now["step"])
        self._now["ended"] = "failed" if failed else "ended"
        self._write()

    def text(self) -> str:
        """One line for the end of a run."""
        total, starts = totals(self.attempts), len(self.attempts)
        parts = ", ".join(f"{text} {total[f'{key}_seconds']:.1f} s" for key, text in PARTS.items())
        return (
            f"goodput {total['goodput']:.1%}: {total['productive_seconds']:.1f} of "
            f"{total['wall_seconds']:.1f} s in steps that count ({parts}; "
            f"{starts} start{'s' if starts > 1 else ''})"
        )

    def _tick(self, step: int) -> None:
        now = self._now
        now["step"], now["elapsed"] = step, time.monotonic() - self._entered
        if not self._started:
            now["startup"] = now["elapsed"] - now["eval"] - now["save"]

    def _write(self) -> None:
        if self._enabled:
            content = {"attempts": self.attempts, "total": totals(self.attempts)}
            replace_file(self._file, to_json(content))


def _step_seconds(attempt: dict[str, Any]) -> float:
    spent = attempt["startup"] + attempt["eval"] + attempt["save"]
    return max(attempt["elapsed"] - spent, 0.0)


def totals(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over attempts; goodput is the share of wall time in steps that were not done again."""
    total: dict[str, float] = {f"{k}_seconds": sum(a[k] for a in attempts) for k in PARTS}
    wall = sum(attempt["elapsed"] for attempt in attempts)
    productive = sum(map(_step_seconds, attempts)) - total["lost_seconds"]
    goodput = productive / wall if wall else 0.0
    return total | {"wall_seconds": wall, "productive_seconds": productive, "goodput": goodput}


def _earlier(run_dir: Path, start: int) -> list[dict[str, Any]]:
    """The attempts before one that begins at step `start`, with what is now lost of each."""
    if not (run_dir / GOODPUT).is_file():
        return []
    found = read_json(run_dir / GOODPUT)
    check(found, _FILE, source=f"{run_dir / GOODPUT} (without it the count begins anew)")
    attempts = found["attempts"]
    saves = [key for attempt in attempts for key in attempt["steps_at_save"]]
    if unnamed := [key for key in saves if not re.fullmatch("[0-9]{1,16}", key)]:
        raise DcodError(f"{run_dir / GOODPUT}: steps_at_save names no step: {unnamed[0]!r:.80}")
    if attempts and not attempts[-1]["ended"]:
        last, path = attempts[-1], run_dir / "metrics.jsonl"
        for line in read_metrics(path) if path.is_file() else ():
            elapsed = line.get("time/elapsed_seconds", 0.0)  # others' lines were dropped
            if line["step"] > last["from_step"] and elapsed > last["elapsed"]:
                last |= {"step": line["step"], "elapsed": elapsed}
        last["ended"] = "killed"
    for attempt in attempts:
        if attempt["ended"] == "ended" and attempt["step"] <= start:
            continue
        saves = {int(step): seconds for step, seconds in attempt["steps_at_save"].items()}
        kept = max((seconds for step, seconds in saves.items() if step <= start), default=0.0)
        attempt["lost"] = max(_step_seconds(attempt) - kept, 0.0)
    return attempts


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
