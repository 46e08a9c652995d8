"""The command line: `dcod <verb>`, `python -m dcod_jax.<verb>`; --help loads no array library."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dcod_jax import config as configs
from dcod_jax.errors import DcodError

ALONE = ("drift", "report", "plan")  # verbs of one process
OWN = ("hosts.process_id", "train.progress", "log_level")  # a process of several has its own


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: where its function is, and what it does in a line."""

    function: str  # in dcod_jax.<verb>.command; of the config
    about: str
    main: str = ""  # function of the arguments, where the verb has a command line of its own


# In the order of the work.
VERBS: dict[str, Verb] = {
    "generate_traces": Verb("generate_traces", "sample traces from the teacher"),
    "prepare": Verb("prepare_once", "raw traces -> trace dataset"),
    "score": Verb("score", "add the teacher's log-probs to a trace dataset"),
    "inspect": Verb("", "look at a trace dataset token by token", main="main"),
    "train": Verb("train", "distil the student; runs the steps that are missing first"),
    "export": Verb("export", "checkpoint -> HF directory"),
    "evaluate": Verb("evaluate", "accuracy with intervals on held-out problems"),
    "drift": Verb("drift", "how errors compound on the student's own text"),
    "report": Verb("report", "one HTML page of everything measured", main="main"),
    "plan": Verb("plan", "memory and time on a TPU slice that is not at hand", main="main"),
    "study": Verb("study", "compare methods over seeds and conditions"),
}


def run(verb: str, argv: Sequence[str] | None = None) -> None:
    """Entry of `python -m dcod_jax.<verb>`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    entry = VERBS[verb]
    if entry.main:
        from dcod_jax import logs

        logs.configure()
        module = importlib.import_module(f"dcod_jax.{verb}.command")
        code = getattr(module, entry.main)(argv)
        raise SystemExit(code or 0)

    def function(config: Any) -> object:
        module = importlib.import_module(f"dcod_jax.{verb}.command")
        return getattr(module, entry.function)(config)

    run_config_verb(verb, function, argv)


def run_config_verb(
    verb: str, function: Callable[[Any], object], argv: Sequence[str] | None = None
) -> None:
    """Load the config and call function: a DcodError is printed as it is, with exit code 1.

    Joins the other processes where config.hosts or the machine names any; they must have been
    started with the same config and see the same run_dir.
    """
    try:
        config = configs.load(sys.argv[1:] if argv is None else argv, verb=verb)
        from dcod_jax import logs
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
    except DcodError as error:
        print(f"dcod_jax.{verb}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"dcod_jax.{verb}: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
