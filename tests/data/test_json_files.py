"""JSON files that nest 100,000 deep, or hold what no run wrote, are named, whichever they are."""

import contextlib
import json

import pytest

from dcod_jax.data import dataset
from dcod_jax.data.blocks import BlockFiles
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import problems
from dcod_jax.files import read_json
from dcod_jax.models import hf
from dcod_jax.study import conditions
from dcod_jax.train import checksums, metrics
from dcod_jax.train.checkpoint_reader import read_record
from dcod_jax.train.checkpointer import finished
from dcod_jax.train.profiling import PARTS, Goodput
from dcod_jax.tune.command import _Results


def _manifest(path):
    return dataset.read_manifest(path.parent)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("any.json", read_json),
        ("manifest.json", _manifest),
        ("config.json", hf.load_config),
        ("problems.jsonl", lambda path: list(problems.read_records(path))),
        ("metrics.jsonl", metrics.read_metrics),
        ("results.jsonl", conditions.read_results),
    ],
)
def test_deep_nesting_is_named(tmp_path, name, read) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DcodError, match="nested too deep"):
        read(path)


RUN = {"step": 8, "config": {}, "metrics": {}}
RUN |= {"progress": {"iterator": {}, "tokens_seen": 1, "on_policy": {}, "data": {}}}
ATTEMPT = {"from_step": 0, "step": 1, "elapsed": 1.0, "steps_at_save": {"1": 1.0}, "ended": ""}
ATTEMPT |= dict.fromkeys(PARTS, 0.0)


def _goodput(path):
    Goodput(path.parent, 1, entered=0.0, enabled=True)


def _blocks(path):
    path.with_name("a").touch()
    BlockFiles([path.with_name("a")], {"seed": 0}).finished()


@pytest.mark.parametrize(
    ("name", "read", "good"),
    [
        ("checkpoints/8/run/metadata", lambda path: read_record(path.parents[3]), RUN),
        ("goodput.json", _goodput, {"attempts": [ATTEMPT]}),
        ("a.manifest.json", _blocks, {"request": {"seed": 0}, "files": {}}),
        (
            "tune.json",
            lambda path: _Results(path, (), [], "eval/nll"),
            {"plan": {"candidates": [], "rounds": [], "metric": "eval/nll"}, "results": []},
        ),
        ("metrics.jsonl", metrics.read_metrics, {"step": 1}),
    ],
)
def test_what_a_run_reads_of_its_own_is_checked_to_the_leaves(tmp_path, name, read, good):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    places = [(good, key) for key in good]
    for inner, key in places:
        if isinstance(parts := inner[key], dict):
            places += [(parts, name) for name in parts]
        elif isinstance(parts, list):
            places += [(parts, place) for place in range(len(parts))]
    for inner, key in places:
        kept = inner[key]
        for junk in ("x", [[None]], {"y": []}, True):
            inner[key] = junk
            path.write_text(json.dumps(good) + "\n")
            with contextlib.suppress(DcodError):
                read(path)
        inner[key] = kept
    path.write_text(json.dumps(good) + "\n")
    read(path)


@pytest.mark.parametrize(
    "files", [{"run/metadata": 5}, ["run/metadata"], {"run/metadata": [1, None]}]
)
def test_checksums_of_no_such_kind_are_damage(tmp_path, files):
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / checksums.NAME).write_text(json.dumps({"step": 8, "files": files}))
    with pytest.raises(checksums.DamagedCheckpointError, match="cannot be read"):
        checksums.verify(tmp_path, 8, ())


def test_only_a_steps_own_name_is_a_checkpoint(tmp_path):
    for name in ("8", "08", "²", "٣", "-1", "1" * 200, "9.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert finished(tmp_path) == [8, int("1" * 200)]
