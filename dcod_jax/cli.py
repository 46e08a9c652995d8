"""The command line: `dcod <verb>` and `python -m dcod_jax.<verb>`.

Only the verb that runs is imported: `--help` loads no array library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dcod_jax import __version__, logs
from dcod_jax import config as configs
from dcod_jax.errors import DcodError, nearest

ALONE = ("drift", "report", "plan")  # verbs of one process
OWN = ("hosts.process_id", "train.progress", "log_level")  # keys that each process has for itself


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
    "export": Verb("write a checkpoint as a Hugging Face directory", "export"),
    "evaluate": Verb("grade models on held-out problems, with intervals", "evaluate"),
    "drift": Verb("measure how errors compound on the student's own text", "drift"),
    "report": Verb("write one HTML page about one run or several", "report", "report_runs"),
    "study": Verb("compare methods over seeds and conditions", "study"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `dcod`."""
    with _readable_end():
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(words: list[str]) -> None:
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
        "usage: dcod <verb> --config RECIPE [--config.key=value ...]\n\n"
        "Distil a small student from a teacher's traces. In the order of the work:\n\n"
        f"{verbs}\n\n"
        "RECIPE is a Python file or the name of a shipped recipe "
        f"({', '.join(configs.shipped_recipes())}).\n"
        "dcod <verb> --help lists every key; dcod --version; python -m dcod_jax.<verb> is the same."
    )


def run(verb: str, argv: Sequence[str] | None = None) -> None:
    """Entry of `dcod <verb>` and `python -m dcod_jax.<verb>`."""
    entry, words = VERBS[verb], sys.argv[1:] if argv is None else list(argv)
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


@contextlib.contextmanager
def _readable_end() -> Iterator[None]:
    """Where the reader of the output left (`| head`), the process ends without a traceback."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as a shell says of SIGPIPE


@contextlib.contextmanager
def _reported(verb: str) -> Iterator[None]:
    """A DcodError is printed as it is, with exit code 1; Ctrl-C ends with 130."""
    try:
        yield
    except DcodError as error:
        print(f"dcod_jax.{verb}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"dcod_jax.{verb}: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


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

        logs.configure(config.log_level)
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
