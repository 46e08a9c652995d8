"""The verbs that write, what each begins with and must end with, and what may be read meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from forked import NONE, Ended, Fault, run

from dcod_jax.data.dataset import MANIFEST, TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.export.command import check_destination
from dcod_jax.models import hf, transformer
from dcod_jax.report import command as report
from dcod_jax.report import data as report_data
from dcod_jax.train import checksums
from dcod_jax.train.checkpoint_reader import read_params
from dcod_jax.train.checkpointer import finished
from dcod_jax.train.metrics import read_metrics

RECIPE = """
from dcod_jax.configs.base import get_config as base

def get_config():
    c = base()
    c.run_dir = "{home}/run"
    c.student.path = "{place}/student"
    c.student.compute_dtype = "float32"
    c.teacher.path = "{place}/teacher"
    c.teacher.dtype = "float32"
    c.data.traces = "{place}/traces.jsonl"
    c.data.dataset = "{home}/dataset"
    c.data.eval_fraction = 0.3
    c.data.max_length = 64
    c.data.seq_len = 64
    c.data.batch_size = 4
    c.prepare.shard_records = 4
    c.generate.prompts = "{place}/problems.jsonl"
    c.generate.samples = 4
    c.generate.batch_size = 2
    c.generate.max_new_tokens = 8
    c.evaluate.problems = "{place}/problems.jsonl"
    c.evaluate.batch_size = 1
    c.evaluate.max_new_tokens = 4
    c.drift.prompts = "{place}/problems.jsonl"
    c.drift.batch_size = 1
    c.drift.samples = 1
    c.drift.max_new_tokens = 4
    c.drift.resamples = 20
    c.train.steps = 4
    c.train.log_every = 1
    c.train.eval_every = 1
    c.train.save_every = 1
    c.train.keep = 1
    c.train.progress = False
    c.export.dtype = "float32"
    c.report.at_end = False
    return c
"""
# verb: the verb whose result it begins with, and its further flags. `train` ends with an export of
# the best step, which `export` replaces by one of half the numbers' size.
AFTER: dict[str, tuple[str, list[str]]] = {
    "prepare": ("", []),
    "score": ("prepare", []),
    "train": ("score", ["--config.evaluate.problems="]),
    "export": ("train", ["--config.export.dtype=bfloat16"]),
    "generate_traces": ("", []),
    "evaluate": ("", []),
    "drift": ("", []),
}
# Names under which nothing is ever read.
UNNAMED = re.compile(
    r"\.tmp$|\.part-|\.partial\b|\.old\b|\.orbax-checkpoint-tmp|/\.removed/|/\.[^/]*$"
)
CLOCKS = re.compile(r"time|seconds|per_second")  # keys of values that no run repeats
GROWING = ("metrics.jsonl", "trace_weights.jsonl")  # whose lines are read up to the last whole one
APART = re.compile(r"/tensorboard/|goodput\.json$|\.lock$|/checkpoints/")  # compared elsewhere


@dataclasses.dataclass(frozen=True)
class Case:
    """A verb, its home before and after it, its changes of files and their sizes."""

    verb: str
    place: Path
    before: Path
    after: Path
    changes: list[str]
    sizes: list[int]

    @property
    def home(self) -> Path:
        return self.place / "home"

    def begin(self) -> None:
        """Make the home what the verb begins with."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.before, self.home)

    def run(self, fault: Fault = NONE, **options: Any) -> Ended:
        return _run(self.place, self.verb, fault, **options)

    def check_end(self, fault: Fault = NONE, **options: Any) -> str:
        """The same command ends, with what an uninterrupted run leaves; what it printed."""
        ended = self.run(fault, **options)
        assert ended.code == 0, ended.text
        for found in (contents, functools.partial(checkpoints, self.place)):
            now, expected = found(self.home), found(self.after)
            assert now.keys() == expected.keys(), now.keys() ^ expected.keys()
            differ = [name for name in expected if now[name] != expected[name]]
            assert not differ, differ
        return ended.text

    def check_whole(self) -> None:
        """Every name holds what was there before or what will be, and its reader reads it."""
        before, after = self.known
        for name, content in contents(self.home).items():
            if UNNAMED.search(name):
                continue
            if name.endswith(GROWING):
                lines = json.loads(content)
                assert lines == json.loads(after[name])[: len(lines)]
            else:
                assert content in (before.get(name), after.get(name)), f"{name} is half-written"
        read(self.home)

    @functools.cached_property
    def known(self) -> tuple[dict[str, str | bytes], ...]:
        return contents(self.before), contents(self.after)


def _run(place: Path, verb: str, fault: Fault = NONE, **options: Any) -> Ended:
    words = [f"--config={place / 'recipe.py'}", *AFTER[verb][1]]
    return run(verb, words, home=place / "home", fault=fault, **options)


def write_place(place: Path) -> Path:
    """Models, traces and a recipe whose runs are all in place/home."""
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    tiny.write_model(place / "student", seed=1, **small)
    tiny.write_model(place / "teacher", seed=2, **small)
    tiny.write_jsonl(place / "traces.jsonl", tiny.sums(24))
    tiny.write_jsonl(place / "problems.jsonl", tiny.sums(6, seed=5))
    (place / "recipe.py").write_text(RECIPE.format(place=place, home=place / "home"))
    (place / "begin").mkdir()
    return place


@functools.cache
def case_of(place: Path, verb: str) -> Case:
    """The verb after the one that it begins with, run once without a fault."""
    earlier, _ = AFTER[verb]
    before = case_of(place, earlier).after if earlier else place / "begin"
    case = Case(verb, place, before, place / "after" / verb, [], [])
    case.begin()
    ended = case.run()
    assert ended.code == 0, ended
    shutil.copytree(case.home, case.after)
    new = contents(case.after).items() - contents(before).items()
    return dataclasses.replace(
        case,
        changes=ended.changes,
        sizes=sorted({(case.after / name[1:]).stat().st_size for name, _ in new} - {0}),
    )


# ---------------------------------------------------------------- what is read


def contents(home: Path) -> dict[str, str | bytes]:
    """{name: content without what a clock gives} of the files that are compared as they are."""
    walked = os.walk(home)  # unlike rglob it passes by what is removed meanwhile
    paths = sorted(Path(folder, name) for folder, _, names in walked for name in names)
    names = {f"/{path.relative_to(home)}": path for path in paths}
    found: dict[str, str | bytes] = {}
    for name, path in names.items():
        if APART.search(name):
            continue
        with contextlib.suppress(FileNotFoundError):  # it was removed or renamed meanwhile
            if name.endswith(GROWING):
                found[name] = json.dumps([_timeless(line) for line in read_metrics(path)])
                continue
            whole = path.read_bytes()
            named = path.suffix == ".json" and not UNNAMED.search(name)
            found[name] = json.dumps(_timeless(json.loads(whole))) if named else whole
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not CLOCKS.search(key)}
        return {key: _timeless(part) for key, part in kept.items()}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def checkpoints(place: Path, home: Path) -> dict[int | str, str]:
    """{step: hash of the parameters} of a run's checkpoints, {name: ""} of what else is there."""
    there = home / "run" / "checkpoints"
    names = {path.name for path in there.iterdir()} if there.is_dir() else set()
    found: dict[int | str, str] = dict.fromkeys(names - set(map(str, finished(there))), "")
    for step in finished(there):
        config, _ = hf.load_config(place / "student")
        params, _ = read_params(home / "run", transformer.param_shapes(config), step=step)
        flat = hf.flatten(params)
        whole = hashlib.sha256()
        for name in sorted(flat):
            whole.update(np.asarray(flat[name]).tobytes())
        found[step] = whole.hexdigest()
    return found


def read(home: Path) -> None:
    """Read whatever is there, each with its own reader; DcodError for what is not whole.

    What one reads may be replaced meanwhile, as by a scoring; then it is read again.
    """
    for again in (True, True, False):
        try:
            return _read(home)
        except (DcodError, FileNotFoundError):
            if not again:
                raise


def _read(home: Path) -> None:
    for manifest in home.glob(f"dataset/*/{MANIFEST}"):
        dataset = TraceDataset(manifest.parent)
        dataset.read(range(len(dataset)))
    check_destination(home / "run" / "export")
    steps = finished(home / "run" / "checkpoints")
    for step in steps:
        checksums.verify(home / "run" / "checkpoints", step, (), steps=steps)
    if (home / "run" / GROWING[0]).is_file() and (home / "run" / "config.json").is_file():
        runs = report_data.find_runs([home / "run"])
        settings = report.load_recipe(report.BASE).report
        settings.traces = 0
        found = report.collect(runs, settings=settings)
        assert found["notes"] == []
