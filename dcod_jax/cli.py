"""The command line: `dcod <verb>` and `python -m dcod_jax.<verb>`.

Only the verb that runs is imported: `--help` loads no array library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import importlib
import io
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from dcod_jax import __version__, logs
from dcod_jax import config as configs
from dcod_jax.compilation_cache import keep_programs
from dcod_jax.errors import EXIT_INTERRUPTED, DcodError, TerminatedError, nearest
from dcod_jax.files import as_path

log = logging.getLogger(__name__)

ALONE = ("drift", "report", "plan")  # verbs of one process
# Keys that each process has for itself.
OWN = ("hosts.process_id", "train.progress", "log_level", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    about: str
    function: str = ""  # of the config, in dcod_jax.<verb>.command
    arguments: str = ""  # function of the result of dcod_jax.<verb>.arguments.parse
    flags: tuple[tuple[str, str], ...] = ()  # flag -> the config key that it sets


# In the order of the work.
VERBS: dict[str, Verb] = {
    "doctor": Verb("check this machine: versions, devices, memory, what each extra lacks"),
    "init_student": Verb("make a smaller student from a model", arguments="init_student"),
    "generate_traces": Verb("sample traces from a teacher model and grade them", "generate_traces"),
    "prepare": Verb("turn raw traces into a trace dataset", "prepare"),
    "score": Verb("add the teacher's log-probs to the trace dataset", "score"),
    "inspect": Verb("show a trace dataset token by token", arguments="inspect"),
    "plan": Verb(
        "compile for a TPU slice that is not at hand: memory, time, largest batch",
        "plan",
        flags=(("--topology", "plan.topology"), ("--num-slices", "plan.slices")),
    ),
    "train": Verb("distil the student; runs missing steps first, resumes", "train"),
    "export": Verb("write a checkpoint as a Hugging Face directory", "export_runs"),
    "evaluate": Verb("grade models on held-out problems, with intervals", "evaluate"),
    "drift": Verb("measure how errors compound on the student's own text", "drift"),
    "report": Verb("write one HTML page about one run or several", "report", "report_runs"),
    "tune": Verb("choose settings from a small grid by successive halving", "tune"),
    "study": Verb("compare methods over seeds and conditions", "study"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `dcod`."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
    elif words[0] in ("-V", "--version"):
        print(f"dcod_jax {__version__}")
    elif (verb := words[0].replace("-", "_")) in VERBS:
        run(verb, words[1:])
    else:
        hint = nearest(verb, VERBS)
        print(f"dcod: error: unknown verb {words[0]!r}{hint}; dcod --help", file=sys.stderr)
        raise SystemExit(2)


def overview() -> str:
    """The text of `dcod --help`."""
    verbs = "\n".join(f"  {name:<16} {verb.about}" for name, verb in VERBS.items())
    return (
        "usage: dcod <verb> --config RECIPE [--config.key=value ...]\n"
        "       dcod doctor | inspect | init_student [options]\n\n"
        "Distil a small student from a teacher's traces. In the order of the work:\n\n"
        f"{verbs}\n\n"
        "RECIPE is a Python file or the name of a shipped recipe "
        f"({', '.join(configs.shipped_recipes())}).\n"
        "dcod <verb> --help lists its options, of most verbs every key of a recipe; "
        "dcod --version.\npython -m dcod_jax.<verb> is the same as dcod <verb>."
    )


@contextlib.contextmanager
def _readable_end() -> Iterator[None]:
    """What is written ends in no traceback: without a stream, in any encoding, without a reader."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass  # of `>&-`: else a file of the verb gets the number, and what a library prints
        os.close(descriptor)
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a file that became another one
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(141) from None  # as a shell says of SIGPIPE


@_readable_end()
def run(verb: str, argv: Sequence[str] | None = None) -> None:
    """Entry of `dcod <verb>` and `python -m dcod_jax.<verb>`."""
    entry, words = VERBS[verb], sys.argv[1:] if argv is None else list(argv)
    # transformers says where torch is not installed that it can load no models; they are ours.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if verb == "doctor":
        from dcod_jax.doctor import doctor

        raise SystemExit(doctor(words))
    if entry.arguments:
        arguments = importlib.import_module(f"dcod_jax.{verb}.arguments").parse(words)
        if arguments is not None:
            logs.configure()
            with _reported(verb):
                _command(verb, entry.arguments)(arguments)
            return
    flags = dict(entry.flags)
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in flags:
            words[place] = f"--config.{flags[flag]}{equals}{value}"
    run_config_verb(verb, lambda config: _command(verb, entry.function)(config), words)


def _command(verb: str, function: str) -> Callable[[Any], object]:
    return getattr(importlib.import_module(f"dcod_jax.{verb}.command"), function)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _reported(verb: str) -> Iterator[None]:
    """An error that a user can mend is printed as it is: exit code 1; Ctrl-C 130; SIGTERM 75."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        yield
    except BrokenPipeError:
        raise  # of `| head`, see _readable_end
    except (DcodError, OSError) as error:
        text = _message(error) + _exhausted(error)
        gc.collect()  # what a failed read left half-done is destroyed while the hook is ours
        raise _failed(verb, text) from None
    except (RuntimeError, MemoryError) as error:  # JAX's is a RuntimeError
        if files := _exhausted(error):
            raise _failed(verb, " ".join(str(error).split())[:300] + files) from None
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = (str(error).strip().splitlines() or ["of this machine"])[0][:300]
        raise _failed(verb, f"out of memory: {told}; {_SMALLER.get(verb, _LESS)}") from None
    except TerminatedError:
        print(f"dcod_jax.{verb}: terminated; the same command goes on", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"dcod_jax.{verb}: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sys.unraisablehook = hook
        if main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _failed(verb: str, text: str) -> SystemExit:
    print(f"dcod_jax.{verb}: error: {logs.printable(text)}", file=sys.stderr)
    return SystemExit(1)


def _unraisable(found: Any) -> None:
    """An error while an object is destroyed reaches nobody: a failed read's other tasks, closed."""
    log.debug("while %r was destroyed: %s", found.object, found.exc_value)


def _exhausted(error: BaseException) -> str:
    """What to add to an error where hardly a file can be opened, which a library may not tell.

    On the way here files of the verb were closed.
    """
    opened: list[int] = []
    try:
        while len(opened) < _FEW:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as found:
        if found.errno in (errno.EMFILE, errno.ENFILE) and "open files" not in str(error):
            return f"; hardly a file can be opened: {_HINTS[errno.EMFILE]}"
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return ""


_FEW = 16  # files; a verb has about 30 of 1,024 open


def _message(error: DcodError | OSError) -> str:
    """A DcodError's own text; of the system's refusal the file, the reason and what to do."""
    if isinstance(error, DcodError):
        return str(error)
    if error.errno is None:
        return f"{error}; the same command goes on once it is mended"
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
    hint = _HINTS.get(error.errno, "the same command goes on once it is mended")
    return f"{names}{': ' if names else ''}{error.strerror}; {hint}"


_LESS = "use more devices (mesh.fsdp, mesh.tensor) or a smaller model"
_SMALLER = {
    "train": "raise train.microbatches or mesh.fsdp, set student.remat=full, or lower "
    "data.batch_size and data.seq_len; dcod plan tells what fits",
    "score": f"lower score.batch_tokens, or {_LESS}",
    "generate_traces": f"lower generate.batch_size, or {_LESS}",
    "evaluate": f"lower evaluate.batch_size, or {_LESS}",
    "drift": f"lower drift.batch_size, or {_LESS}",
}
_HINTS = {
    errno.ENOSPC: "free space and start the same command again",
    errno.EDQUOT: "free space and start the same command again",
    errno.EROFS: "the disk is read-only: set the path to another one",
    errno.EACCES: "set the path to one that you may read and write",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ELOOP: "a symbolic link leads to itself: set the path to another one",
    errno.ENOTDIR: "a part of this path is a file: set the path to another one",
    errno.EISDIR: "this is a directory: set the path to a file",
}


def _check_run_dir(directory: str) -> None:
    """Raise DcodError where run_dir is a file, below one, or a link that leads to itself."""
    path = as_path(directory)
    while isinstance(path, pathlib.Path) and not path.is_dir():
        if path.is_symlink() or path.exists():
            what = "a link that leads nowhere" if path.is_symlink() else "no directory"
            raise DcodError(f"run_dir={directory}: {path} is {what}; set run_dir to another place")
        path = path.parent


def run_config_verb(
    verb: str, function: Callable[[Any], object], argv: Sequence[str] | None = None
) -> None:
    """Load the config and call the function with it.

    Joins the other processes where config.hosts or the machine names any; they must have been
    started with the same config and see the same run_dir.
    """
    with _reported(verb):
        config = configs.load(sys.argv[1:] if argv is None else argv, verb=verb)
        from dcod_jax.parallel import hosts

        _check_run_dir(config.run_dir)
        logs.configure(config.log_level)
        keep_programs(config.compilation_cache)
        if verb in ALONE:
            hosts.refuse_peers(config.hosts, verb)
        with hosts.session(config.hosts, notices=verb == "train"):
            logs.configure(config.log_level, hosts.process_index())
            values = configs.keys(config)
            hosts.agree("config", {key: values[key] for key in values if key not in OWN})
            hosts.check_shared(config.run_dir)
            if not hosts.first():
                config = configs.replace(config, {"train.progress": False})
            function(config)
