"""Messages to stderr, and progress bars; plain lines where stderr is not a terminal.

Modules log through `logging.getLogger(__name__)`; a verb calls `configure` once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LIBRARY_CHARACTERS = 400  # shown of a library's warning
LINE_SECONDS = 15.0  # between two progress lines where there is no bar


def configure(level: str = "info", process_index: int | None = None) -> None:
    """Send the package's messages from `level` on, and libraries' warnings once each, to stderr.

    process_index: this process's number in a run of several, which goes before each message; from
    process 1 on, messages below a warning are left to process 0.
    """
    root, package = logging.getLogger(), logging.getLogger("dcod_jax")
    for handler in [one for one in root.handlers if isinstance(one, _Stderr)]:
        root.removeHandler(handler)
    root.addHandler(_Stderr(process_index))
    package.setLevel(level.upper())
    if process_index:
        package.setLevel(max(package.level, logging.WARNING))


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is now: a progress bar replaces it while it is shown."""

    def __init__(self, process_index: int | None):
        super().__init__()
        self.prefix = "" if process_index is None else f"[{process_index}] "
        self.seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] != "dcod_jax":
            message = (record.name, str(record.msg)[:40])
            if record.levelno < logging.WARNING or message in self.seen:
                return
            self.seen.add(message)
            # Without a traceback: an error of a library comes out of the verb as well.
            short = textwrap.shorten(record.getMessage(), LIBRARY_CHARACTERS, placeholder=" …")
            text = f"{record.name}: {short}"
        else:
            text = self.format(record)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{self.prefix}{level}{printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without what drives a terminal: a stranger's file or server may have written it."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def track(
    label: str, total: int, *, unit: str = "tokens", done: int = 0, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield advance(n, text): n more are done, and text (such as the loss) is shown beside them.

    `done` of the total was finished before and has no rate.
    """
    from dcod_jax.parallel import hosts  # loads jax, which a verb's --help does not

    console = Console(stderr=True)
    bar = _bar(console, unit)
    task = bar.add_task(label, total=total, completed=done, rate="", text="")
    start = shown = time.monotonic()
    current = since = done
    first = True
    if enabled and not console.is_terminal:
        log.info(f"{label} {done:,}/{total:,} {unit}")

    def advance(amount: int, text: str = "") -> None:
        nonlocal current, shown, start, since, first
        hosts.moved()
        current += amount
        now = time.monotonic()
        speed = (current - since) / max(now - start, 1e-9)
        rate = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2f}"
        if console.is_terminal:
            bar.update(task, completed=current, rate=f"{rate} {unit}/s", text=text)
        elif enabled and (now - shown >= LINE_SECONDS or current >= total):
            shown = now
            left = max(total - current, 0)
            eta = "" if first and left else f" ETA {left / max(speed, 1e-9):.0f} s"
            count = f"{current:,}/{total:,} {unit}"
            log.info(f"{label} {count} {rate} {unit}/s{eta} {text}".rstrip())
        if first:  # it compiled: no measure of what is left
            first, start, since = False, now, current

    with bar if enabled and console.is_terminal else contextlib.nullcontext():
        yield advance


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
