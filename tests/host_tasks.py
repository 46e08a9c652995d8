"""What one process of a test's run does, one task after the other in one launch.

    python host_tasks.py "score; fit a; fit b stop 3" --config recipe.py --config.hosts...

`fit NAME` trains into run_dir/NAME, `stop STEP` sends this process SIGTERM before that step is
read, `kill STEP` SIGKILL; `late` sends SIGTERM when no loop runs, `die N`
kills it in its N-th shard. All do so on process 1 alone. From `slow` on process 0 takes a second to
make the directories of a checkpoint.
"""

import asyncio
import os
import signal
import sys
import time
from typing import Any

import jax
from orbax.checkpoint._src.path import atomicity

from dcod_jax import config as configs
from dcod_jax.cli import run_config_verb
from dcod_jax.evaluate import command as evaluate
from dcod_jax.export import command as export
from dcod_jax.generate_traces import command as generate_traces
from dcod_jax.models import hf
from dcod_jax.parallel import hosts
from dcod_jax.score import command as score
from dcod_jax.train import loop as train

SIGNALS = {"stop": signal.SIGTERM, "kill": signal.SIGKILL}


def strike_at(step: int, number: int) -> None:
    """Send this process a signal when it is about to read that step's batch, and go on slowly.

    The notifier of the preemption service looks once a second, and a save is written meanwhile.
    """
    real, struck = hosts.doing, []

    def doing(what: str, **options: bool) -> None:
        real(what, **options)
        if not what.startswith("reading") or (not struck and what.split()[-1] != str(step)):
            return
        if number == signal.SIGKILL:
            time.sleep(2)
        if not struck:
            os.kill(os.getpid(), number)
        struck.append(what)
        time.sleep(2)

    hosts.doing = doing


def die_in(piece: int) -> None:
    """Be killed when this process is about to score its shard of that number."""
    real, calls = score.score_traces, []

    def score_traces(*arguments: Any, **options: Any) -> Any:
        calls.append(piece)
        if len(calls) == piece:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    score.score_traces = score_traces


def slow_directories() -> None:
    real = atomicity._create_paths

    async def create(*arguments: Any, **options: Any) -> None:
        await asyncio.sleep(1)
        await real(*arguments, **options)

    atomicity._create_paths = create


def kept_tensors() -> list[bool]:
    """Whether this process gets each of the tensors that an export gathers."""
    real, kept = hf.tensor_of, []

    def tensor_of(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        kept.append(found is not None)
        return found

    hf.tensor_of = tensor_of
    return kept


def work(config) -> None:
    for task in tasks.split(";"):
        match task.split():
            case ["fit", name, *strike]:
                if strike and jax.process_index() == 1:
                    strike_at(int(strike[1]), SIGNALS[strike[0]])
                train.fit(configs.replace(config, {"run_dir": f"{config.run_dir}/{name}"}))
            case ["export", name]:
                kept = kept_tensors()
                export.export(configs.replace(config, {"run_dir": f"{config.run_dir}/{name}"}))
                assert set(kept) == {jax.process_index() == 0}, "all get what one writes"
            case ["late"]:
                if jax.process_index() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(2)  # the notice reaches the coordinator in a thread
                hosts.barrier("the notice is there")
                hosts.stop_if_noticed()
            case ["slow"]:
                if jax.process_index() == 0:
                    slow_directories()
            case ["die", piece]:
                if jax.process_index() == 1:
                    die_in(int(piece))
            case ["score"]:
                score.score(config)
            case ["generate"]:
                generate_traces.generate_traces(config)
            case ["evaluate"]:
                evaluate.evaluate(config)
            case _:
                raise ValueError(task)


if __name__ == "__main__":
    tasks = sys.argv.pop(1)
    run_config_verb("train", work)
