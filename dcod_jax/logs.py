"""A progress bar with rate and remaining time; plain lines where the output is not a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dcod_jax.parallel import hosts

LINE_SECONDS = 15.0  # between two lines of a log file


class Advance(Protocol):
    """Count `amount` more as done and show `text` (such as the loss) beside it."""

    def __call__(self, amount: int, text: str = "") -> None: ...


@contextlib.contextmanager
def track(
    label: str, total: int, *, unit: str = "tokens", done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """Yield advance(n, text); `done` of the total was finished before and has no rate."""
    console = Console(stderr=True)
    if not enabled:
        yield lambda amount, text="": hosts.moved()
    elif console.is_terminal:
        with _bar(console, unit) as bar:
            start = time.monotonic()
            task = bar.add_task(label, total=total, completed=done, rate="", text="")

            def advance(amount: int, text: str = "") -> None:
                hosts.moved()
                bar.advance(task, amount)
                current = bar.tasks[0].completed - done
                rate = current / max(time.monotonic() - start, 1e-9)
                bar.update(task, rate=f"{_rate(rate)} {unit}/s", text=text)

            yield advance
    else:
        yield _Lines(console, label, total, unit=unit, done=done)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[text]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


class _Lines:
    """The bar's text, one line at most every LINE_SECONDS and one at the end."""

    def __init__(self, console: Console, label: str, total: int, *, unit: str, done: int):
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.first = self.current = done
        self.start = self.shown = time.monotonic()

    def __call__(self, amount: int, text: str = "") -> None:
        hosts.moved()
        self.current += amount
        now = time.monotonic()
        if now - self.shown < LINE_SECONDS and self.current < self.total:
            return
        self.shown = now
        rate = (self.current - self.first) / max(now - self.start, 1e-9)
        eta = max(self.total - self.current, 0) / max(rate, 1e-9)
        self.console.print(
            f"{self.label} {self.current:,}/{self.total:,} {self.unit} "
            f"{_rate(rate)} {self.unit}/s ETA {eta:.0f} s {text}".rstrip(),
            highlight=False,
        )
