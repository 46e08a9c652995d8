"""DcodError and the hints in its messages; imports nothing of the package."""

import difflib
from collections.abc import Iterable


class DcodError(Exception):
    """A mistake in what the user gave; the message is the whole report, no traceback needed."""


EXIT_INTERRUPTED = 75  # a signal stopped the run after its state was saved: start it again


class TerminatedError(SystemExit):
    """SIGTERM came where no state but that on disk is needed to go on."""


def _initials(name: str) -> str:
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def nearest(key: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest known dotted key or leaf name, or nothing.

    Initials stand for a name (lr for learning_rate), first in the section that the key names.
    """
    known = list(known)
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    close = [name for name in known if leaf and _initials(name.rpartition(".")[2]) == leaf]
    close.sort(key=lambda name: not name.startswith(f"{section}."))
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaves = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)
        close = [by_leaf[name] for name in leaves]
    return f"; did you mean {close[0]!r}?" if close else ""
