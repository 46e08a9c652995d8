"""Readers of checkpoints: they create and remove nothing, also while a run is saving."""

import os
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_store import contents
from forks import Started

from dcod_jax.errors import DcodError
from dcod_jax.files import as_path
from dcod_jax.losses.adaptive import initial
from dcod_jax.train.checkpoint_reader import find_run, read_params
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.types import TrainState

TESTS = Path(__file__).resolve().parents[1]
SHAPE = (512, 512)
WRITER = """
import sys, test_checkpoint_reader as own
for place, steps in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    own.save(place, range(1, steps + 1), keep=1)
"""


def state_of(step):
    params = {"kernel": jnp.full(SHAPE, step, jnp.float32)}
    return TrainState(jnp.int32(step), params, jax.tree.map(jnp.zeros_like, params), initial())


def save(place, steps, **options):
    checkpointer = Checkpointer(place, **options)
    for step in steps:
        checkpointer.save(Snapshot(state=state_of(step), step=step))
    checkpointer.close()


def read(place):
    """The step that was read; all of its array must be of that step."""
    like = {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    params, record = read_params(place, like)
    np.testing.assert_array_equal(params["kernel"], np.full(SHAPE, record.step, np.float32))
    return record.step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with steps 4 and 8, and 9 half-written."""
    place = tmp_path_factory.mktemp("checkpoints") / "run"
    save(place, [4, 8])
    half = place / "checkpoints" / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "file").write_text("being written")
    return place


def test_reading_leaves_a_save_in_progress_alone(run):
    before = contents(run)
    assert read(run) == 8
    assert read(run / "checkpoints" / "4") == 4
    assert contents(run) == before


def test_a_relative_place_is_read(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert read("run") == 8
    assert read("run/checkpoints/4") == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rum", r"train.init_from=.*rum: .*; no such directory; did you mean 'run'\?"),
        ("run/checkpoints/5", r"finished checkpoints: \[4, 8\]"),
        ("run/checkpoints/9", r"finished checkpoints: \[4, 8\]"),
        ("run/checkpoints/8/params", "no such directory|finished checkpoints: none"),
        ("run/checkpoints", "finished checkpoints: none"),
        ("none/checkpoints/4", "no such directory"),
    ],
)
def test_what_is_no_checkpoint_is_named_and_not_made(run, name, said):
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(DcodError, match=said):
        find_run(run.parent / name, key="train.init_from")
    assert sorted(run.parent.rglob("*")) == before


# Where a file is removed under Orbax, it leaves its reads of the others behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_is_read_again_and_again_while_it_saves(tmp_path, gcs):
    places = [as_path(tmp_path / "run"), gcs / "live"]
    words = [word for place, steps in zip(places, (12, 4), strict=True) for word in (place, steps)]
    paths = os.pathsep.join([str(TESTS / "train"), str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    seen = {place: set() for place in places}
    command = ["-c", WRITER, *words]
    with Started(command, env=environment, stderr=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None:
            time.sleep(0.2)
            for place in places:
                try:
                    find_run(place, key="place")
                except DcodError:
                    continue  # nothing is saved yet
                seen[place].add(read(place))
        assert writer.returncode == 0, writer.communicate()[1]
    assert [read(place) for place in places] == [12, 4]
    assert min(map(len, seen.values())) >= 1
