"""DcodError and the hints in its messages; imports nothing of the package."""

import difflib
from collections.abc import Iterable


class DcodError(Exception):
    """A mistake in what the user gave; the message is the whole report, no traceback needed."""


EXIT_INTERRUPTED = 75  # a signal stopped the run after its state was saved: start it again


def nearest(key: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest known dotted key or leaf name, or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        leaf = difflib.get_close_matches(key.rpartition(".")[2], list(by_leaf), n=1, cutoff=0.7)
        close = [by_leaf[leaf[0]]] if leaf else []
    return f"; did you mean {close[0]!r}?" if close else ""
