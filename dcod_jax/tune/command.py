"""Tune: train a small grid of settings by successive halving, and write the best as a recipe.

    dcod tune --config my_recipe.py --config.train.eval_problems=validation.jsonl
        --config.train.best_metric=accuracy
        --config.tune.grid='optim.learning_rate=1e-5|3e-5,loss.weights.name=uniform|sigmoid'

Every candidate is a run in run_dir/<name>. A round trains those that are left up to its step, where
train.best_metric is measured; one in tune.factor goes on from its checkpoint, so the chosen one has
the bits of a run of its own. tune.budget bounds the steps of all together. Each result goes into
run_dir/tune.json; the same command goes on after an interruption. Prints one table and writes
run_dir/best.py, a recipe: `dcod train --config run_dir/best.py` exports the chosen run.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from dcod_jax import config as configs
from dcod_jax.bounds import array, check, mapping, number, optional, text, whole
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.metrics import number_table, show
from dcod_jax.files import Path, as_path, check_own, read_json, replace_file, to_json
from dcod_jax.locks import locked
from dcod_jax.parallel import hosts
from dcod_jax.train.checkpoint_reader import read_record
from dcod_jax.train.checkpointer import rank
from dcod_jax.train.command import runs_ready
from dcod_jax.train.loop import fit
from dcod_jax.train.settings import best_metric
from dcod_jax.train.telemetry import DivergedError
from dcod_jax.tune.grid import Rung, candidates_and_rounds, spent

log = logging.getLogger(__name__)
RESULTS, RECIPE, CHOSEN = "tune.json", "best.py", "Chosen by dcod tune"


def tune(config: Any) -> str:
    """Every round that tune.json lacks; returns the name of the chosen candidate."""
    if not config.tune.grid:
        raise DcodError(
            'tune.grid is empty; expected entries such as "optim.learning_rate=1e-5|3e-5"'
        )
    changes, rounds = candidates_and_rounds(configs.keys(config))
    names = [f"c{number:0{len(str(len(changes)))}}" for number in range(1, len(changes) + 1)]
    compare = tuple(" ".join((n, *own)) for n, own in zip(names, changes, strict=True))
    grid = configs.replace(config, {"compare": compare, "tune.grid": ()})
    folder = as_path(config.run_dir)
    check_own(folder / RECIPE, CHOSEN)
    results = _Results(folder / RESULTS, compare, rounds, best_metric(config))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".tune.lock", what=f"run_dir={folder}"), runs_ready(grid) as runs:
        hosts.barrier("the lock of tune")
        told = " then ".join(f"{rung.candidates} to step {rung.steps}" for rung in rounds)
        log.info("tune: %s; %d steps in all", told, spent(rounds))
        left = dict(runs)
        for rung in rounds:
            left = {name: left[name] for name in results.order(list(left))[: rung.candidates]}
            for name, run in left.items():
                if not results.known(name, rung.steps):
                    results.add(name, rung.steps, _train(run, name, rung.steps))
                    hosts.release_memory()
                    hosts.stop_if_noticed()
        best = results.order(list(left))[0]
        if results.failed(best):
            raise DcodError(f"every candidate failed, see {folder / RESULTS}; change tune.grid")
        chosen = configs.replace(dict(runs)[best], {"tune.grid": ()})
        if hosts.first():
            replace_file(folder / RECIPE, recipe(chosen, results.text(best)).encode())
    results.show(dict(zip(names, changes, strict=True)), best)
    print(f"chosen: {compare[names.index(best)]}; dcod train --config {folder / RECIPE}")
    return best


def _train(run: Any, name: str, steps: int) -> dict[str, Any]:
    """Train one candidate up to a step; its held-out metrics there, or how it failed."""
    try:
        fit(run, name=name, until=steps)
    except DivergedError as error:
        log.warning("%s failed: %s", name, error)
        return {"error": str(error)}
    return {"metrics": read_record(run.run_dir, step=steps).metrics}


_RESULT = {"name": text(), "step": whole(0, 1 << 53), "error": optional(text())}
_RESULT |= {"metrics": optional(mapping(items=number(-1e308, 1e308)))}
_CONTENT = {"plan": mapping(), "results": array(mapping(_RESULT))}


class _Results:
    """run_dir/tune.json: what is tried, and what each candidate reached in each round."""

    def __init__(self, path: Path, compare: tuple[str, ...], rounds: list[Rung], metric: str):
        self.path, self.metric = path, metric
        of = {"candidates": list(compare), "rounds": [vars(r) for r in rounds], "metric": metric}
        self.content: dict[str, Any] = {"plan": of, "results": []}
        check_own(path, '"plan"', '"results"')
        if path.is_file():
            self.content = read_json(path)
            check(self.content, _CONTENT, source=path)
            for line in self.content["results"]:
                if not line.get("error") and metric not in (line.get("metrics") or {}):
                    raise DcodError(
                        f"{path}: the result of {line['name']!r:.80} has neither {metric} nor an "
                        "error; take it out, and that round of the candidate is done again"
                    )
            if self.content["plan"] != of:
                changed = [key for key in of if self.content["plan"].get(key) != of[key]]
                raise DcodError(
                    f"{path} is of another tuning: its {' and '.join(changed)} differ; set tune.*, "
                    "train.steps and train.best_metric back, or choose another run_dir"
                )

    def add(self, name: str, steps: int, found: dict[str, Any]) -> None:
        """Note a result; raises DcodError where the metric was not measured."""
        metrics = found.get("metrics")
        if metrics is not None and self.metric not in metrics:
            raise DcodError(
                f"train.best_metric={self.metric} was not measured: there are no held-out traces; "
                "set data.eval_fraction (and prepare again), or train.eval_problems and "
                "train.best_metric=accuracy"
            )
        self.content["results"].append({"name": name, "step": steps, **found})
        if hosts.first():
            replace_file(self.path, to_json(self.content))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.content["results"] if line["name"] == name]

    def failed(self, name: str) -> bool:
        return any(line.get("error") for line in self.of(name))

    def known(self, name: str, steps: int) -> bool:
        """Whether this round of the candidate is done; nothing more is asked of a failed one."""
        return self.failed(name) or any(line["step"] == steps for line in self.of(name))

    def order(self, names: list[str]) -> list[str]:
        """The best first, by the last round of each; equal ones by nll, then as in the grid."""

        def key(name: str) -> tuple[Any, ...]:
            lines = self.of(name)
            metrics = (lines[-1].get("metrics") if lines else None) or {}
            return self.failed(name), rank(metrics, self.metric), rank(metrics, "eval/nll")

        return sorted(names, key=key)

    def text(self, name: str) -> str:
        """The metric of the candidate's last round."""
        last = self.of(name)[-1]
        return f"{self.metric} {self._value(last)} at step {last['step']}"

    def _value(self, line: dict[str, Any]) -> str:
        if line.get("error"):
            return "failed"
        value = line["metrics"][self.metric]
        return f"{value:.1%}" if self.metric == "eval/accuracy" else f"{value:.4f}"

    def show(self, changes: dict[str, tuple[str, ...]], best: str) -> None:
        """One row for each candidate, the last ones left first, one column for each round."""
        ends = [rung["steps"] for rung in self.content["plan"]["rounds"]]
        title = f"{self.metric} of {len(changes)} candidates, chosen: {best}"
        table = number_table(title, "candidate", "settings", *(f"step {end}" for end in ends))
        for name in sorted(self.order(list(changes)), key=lambda name: -len(self.of(name))):
            cells = {line["step"]: self._value(line) for line in self.of(name)}
            row = (cells.get(end, "–") for end in ends)
            table.add_row(name, "\n".join(changes[name]), *row)
        show(table)


def recipe(config: Any, about: str) -> str:
    """A recipe file with the keys of a config that differ from the base config."""
    base = configs.keys(configs.load_recipe(configs.BASE))
    own = {key: value for key, value in configs.keys(config).items() if key in base}
    lines = [f"    c.{key} = {value!r}" for key, value in own.items() if value != base[key]]
    head = json.dumps(f"{CHOSEN}: {about}.", ensure_ascii=False)
    imported = "from dcod_jax.configs.base import get_config as base"
    body = "\n".join(["    c = base()", *lines, "    return c"])
    return f"{head}\n\n{imported}\n\n\ndef get_config():\n{body}\n"
