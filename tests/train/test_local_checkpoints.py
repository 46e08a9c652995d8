"""Local checkpoints: agreement on a step, whose they are, damage, full disks, and the same bits."""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.losses.adaptive import initial
from dcod_jax.models import hf, transformer
from dcod_jax.parallel import hosts
from dcod_jax.parallel import mesh as meshes
from dcod_jax.prepare.command import prepare
from dcod_jax.train import loop as train
from dcod_jax.train import step as train_steps
from dcod_jax.train.checkpoint_reader import read_params
from dcod_jax.train.checkpointer import Checkpointer, Snapshot, finished
from dcod_jax.train.local_checkpoints import IDENTITY, LocalCheckpoints, layout, newest_common
from dcod_jax.types import TrainState


@pytest.fixture(autouse=True)
def said(caplog):
    """A function that gives the lines logged since the last call."""
    caplog.set_level("INFO", logger="dcod_jax")

    def lines():
        found = [r.getMessage() for r in caplog.records if r.name.startswith("dcod_jax")]
        caplog.clear()
        return found

    return lines


# ---------------------------------------------------------------- what is agreed on


@pytest.mark.parametrize(
    ("steps", "agreed"),
    [
        ([[12, 14], [12, 14]], (14, 14, [])),
        ([[12, 14], [10, 12]], (12, 14, [1])),  # one was killed while it wrote its step 14
        ([[12, 14], [], [12, 14]], (None, 14, [1])),
        ([[12], [14]], (None, 14, [0])),
        ([[], []], (None, 0, [])),
        ([[8, 10], [8, 10]], (None, 0, [])),  # the shared one is as new
        ([[8, 20], [8, 20]], (None, 0, [])),  # the run is to end before
    ],
)
def test_the_newest_step_that_all_have_and_who_lacks_the_newest(steps, agreed):
    assert newest_common(steps, after=10, before=20) == agreed


def state_of(mesh, step, rows=16):
    """A state sharded over the mesh, another one at each step."""
    params = {"kernel": jnp.arange(rows * 4.0).reshape(rows, 4) + step}
    state = TrainState(jnp.int32(step), params, {"mu": params["kernel"] / 7}, initial())
    rows_split = meshes.sharding(mesh, ("embed", None))
    whole = meshes.sharding(mesh, ())
    return jax.tree.map(lambda x: jax.device_put(x, rows_split if x.ndim == 2 else whole), state)


def test_the_layout_is_of_the_mesh_and_of_the_model():
    two, four = meshes.make_mesh(4, 2), meshes.make_mesh(2, 4)
    one_process = layout(state_of(two, 0))
    assert one_process == layout(state_of(two, 1))
    assert one_process != layout(state_of(four, 0))
    assert one_process != layout(state_of(two, 0, rows=32))


# ---------------------------------------------------------------- one process's view


@pytest.fixture
def mesh():
    return meshes.make_mesh(2, 4)


@partial(jax.jit, donate_argnums=0)
def advance(state):
    return jax.tree.map(lambda x: x - 1, state)


class Run:
    """Starts of one run whose run_dir and disk are below a directory."""

    def __init__(self, place, mesh):
        self.place, self.mesh, self.like = place, mesh, state_of(mesh, 0)

    def start(self, *, local=True, name="run", before=100):
        """(local checkpoints, what they restored) of a new start."""
        shared = Checkpointer(self.place / name)
        directory = str(self.place / "disk") if local else ""
        opened = LocalCheckpoints(shared, directory=directory, every=1)
        return opened, opened.restore(self.like, before=before)

    def save(self, opened, *steps):
        """As the loop does: the state is the next step's to overwrite when save returns."""
        for step in steps:
            state = state_of(self.mesh, step)
            opened.save(Snapshot(state=state, step=step, iterator={"row": step}))
            jax.block_until_ready(advance(state))
        if opened.own:
            opened.own.wait()

    def share(self, step):
        shared = Checkpointer(self.place / "run")
        shared.save(Snapshot(state=state_of(self.mesh, step), step=step))
        shared.close()

    def steps(self):
        [place] = self.place.glob("disk/run-*/process-0/*/checkpoints")
        return finished(place)


@pytest.fixture
def run(tmp_path, mesh):
    run = Run(tmp_path, mesh)
    opened, found = run.start()
    assert found is None
    run.save(opened, 1, 2, 3)
    return run


def test_the_newest_two_are_kept_and_restored_to_the_bit_and_the_layout(run, mesh):
    assert run.steps() == [2, 3]
    opened, restored = run.start()
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(mesh, 3))
    assert restored.state.params["kernel"].sharding == run.like.params["kernel"].sharding
    assert (restored.step, restored.iterator) == (3, {"row": 3})
    assert not opened.due(3)  # it is there already
    run.save(opened, 4)
    assert run.steps() == [3, 4]
    opened.close()
    assert not list((run.place / "disk").iterdir())
    assert not (run.place / "run" / "checkpoints" / IDENTITY).exists()


def test_one_that_is_not_newer_than_the_shared_is_passed_over_for_good(run):
    run.share(3)
    _, found = run.start()
    assert found is None
    (run.place / "run" / "checkpoints" / "3").rename(run.place / "away")
    assert run.start()[1] is None
    assert run.steps() == []


def test_steps_behind_the_end_of_the_run_are_not_used(run):
    assert run.start(before=3)[1].step == 2
    assert run.steps() == [2]


def test_those_of_a_run_that_was_thrown_away_are_not_restored(run):
    assert run.start(name="other")[1] is None
    assert run.steps() == [2, 3]
    (run.place / "run").rename(run.place / "away")
    _, found = run.start()
    assert found is None
    assert run.steps() == []


def test_a_start_without_them_ends_their_life(run):
    assert run.start(local=False)[1] is None
    assert run.start()[1] is None


def test_another_mesh_is_told_and_not_restored(run, said):
    run.like = state_of(meshes.make_mesh(4, 2), 0)
    assert run.start()[1] is None
    assert said() == ["local checkpoints are of another mesh or model; not used"]


def test_another_number_of_processes_is_told(run, said):
    path = run.place / "run" / "checkpoints" / IDENTITY
    name, _, held = path.read_text().split()
    path.write_text(f"{name} 2 {held}")
    assert run.start()[1] is None
    assert said() == ["local checkpoints are of 2 processes, these are 1; not used"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"{}"])
def test_a_damaged_record_is_no_record(run, content):
    (run.place / "run" / "checkpoints" / IDENTITY).write_bytes(content)
    assert run.start()[1] is None
    assert run.steps() == []


def test_an_id_that_is_a_path_is_no_id(run):
    """Else checkpoints elsewhere were read, and what lies beside them removed."""
    path = run.place / "run" / "checkpoints" / IDENTITY
    name, count, held = path.read_text().split()
    [own] = run.place.glob("disk/run-*/process-0")
    (own / name).rename(own.parent / "away")
    (own.parent / "away" / "checkpoints" / "notes").touch()
    path.write_text(f"../away {count} {held}")
    assert run.start()[1] is None
    assert (own.parent / "away" / "checkpoints" / "notes").exists()


@pytest.mark.parametrize("item", ["params", "opt_state", "run"])
def test_a_damaged_one_is_told_and_the_older_one_read(run, mesh, said, item):
    [place] = run.place.glob("disk/run-*/process-0/*/checkpoints")
    for file in (place / "3" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    opened, restored = run.start()
    assert restored.step == 2
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(mesh, 2))
    [line] = said()
    assert line.startswith("local checkpoints of step 3 are not used. process 0 (")
    assert f"{place / '3'} is damaged" in line
    run.save(opened, 3)
    assert run.steps() == [2, 3]


def test_a_half_written_directory_is_not_read(run):
    [place] = run.place.glob("disk/run-*/process-0/*/checkpoints")
    (place / "3").rename(place / "3.orbax-checkpoint-tmp")
    opened, restored = run.start()
    assert restored.step == 2
    assert [path.name for path in place.iterdir()] == ["2"]
    run.save(opened, 3)
    assert run.steps() == [2, 3]


# ---------------------------------------------------------------- beside another process


def beside(monkeypatch, answers):
    """Process 1 on host-b says these; of a name that is not there, what process 0 says."""
    said = {name: list(texts) for name, texts in answers.items()}

    def exchange(name, text):
        return [text, said[name].pop(0) if name in said else text]

    monkeypatch.setattr(hosts, "exchange", exchange)


def test_a_process_that_lacks_them_is_named_and_nobody_restores(run, monkeypatch, said):
    beside(monkeypatch, {"local steps": [["host-b", []]]})
    assert run.start()[1] is None
    assert said() == ["local checkpoints: process 1 (host-b) has none of step 3; not used"]
    assert run.steps() == []


def test_all_take_the_older_step_when_one_cannot_read_the_newest(run, monkeypatch, said):
    steps = ["host-b", [2, 3]]
    problems = ["the disk of b is bad", ""]
    beside(monkeypatch, {"local steps": [steps] * 2, "reading local checkpoints": problems})
    assert run.start()[1].step == 2
    [line] = said()
    assert "step 3 are not used. process 1 (host-b): the disk of b is bad" in line
    assert run.steps() == [2]


# ---------------------------------------------------------------- disks that refuse


def test_a_directory_that_cannot_be_made_is_told_and_the_run_goes_on(tmp_path, mesh, said):
    (tmp_path / "disk").write_text("a file")
    run = Run(tmp_path, mesh)
    opened, found = run.start()
    assert found is None
    run.save(opened, 1, 2)
    opened.close()
    [line] = said()
    assert line.startswith("process 0 (")
    assert f"{tmp_path / 'disk'}" in line
    assert f"those in {tmp_path / 'run' / 'checkpoints'} go on" in line


def test_a_full_disk_is_told_once_and_the_finished_ones_stay(tmp_path, small_disk, mesh, said):
    run = Run(tmp_path, mesh)
    opened, _ = run.start()
    run.save(opened, 1)
    noise = jax.random.normal(jax.random.key(0), (2000, 1000))
    big = TrainState(jnp.int32(2), {"w": noise}, {}, initial())
    opened.save(Snapshot(state=big, step=2))
    for step in (3, 4):
        assert opened.due(step)  # as on the processes whose disks are not full
        run.save(opened, step)
    [line] = said()
    assert line.startswith("process 0 (")
    assert "cannot save a local checkpoint: no space left on the disk. No more" in line
    assert f"{small_disk}" in line
    [place] = small_disk.glob("run-*/process-0/*/checkpoints")
    assert [path.name for path in place.iterdir()] == ["1"]
    _, restored = run.start()
    assert restored is not None
    assert restored.step == 1


# ---------------------------------------------------------------- a whole run

RECIPE = """
from dcod_jax.configs.base import get_config as base

def get_config():
    c = base()
    c.student.path = {student!r}
    c.student.compute_dtype = "float32"
    c.student.remat = "none"
    c.loss.weights.name = "uniform"
    c.data.traces = {traces!r}
    c.data.dataset = {dataset!r}
    c.data.max_length = 64
    c.data.seq_len = 64
    c.data.batch_size = 8
    c.optim.learning_rate = 3e-3
    c.train.steps = 6
    c.train.log_every = 1
    c.train.eval_every = 0
    c.train.save_every = 3
    c.train.local_dir = {disk!r}
    c.train.local_every = 1
    c.train.progress = False
    return c
"""


def test_a_run_that_died_goes_on_from_the_local_step_to_the_same_bits(tmp_path, said, monkeypatch):
    tiny.write_model(tmp_path / "student", seed=1, num_hidden_layers=1)
    tiny.write_jsonl(tmp_path / "traces.jsonl", tiny.sums(40))
    names = ("student", "dataset", "disk")
    where = {name: str(tmp_path / name) for name in names}
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(**where, traces=str(tmp_path / "traces.jsonl")))
    whole, died = (
        configs.load(["--config", str(recipe), f"--config.run_dir={tmp_path / name}"], verb="train")
        for name in ("whole", "died")
    )
    prepare(whole)
    made, make = [], train_steps.make_train_step  # compiled once for the three starts
    monkeypatch.setattr(
        train_steps,
        "make_train_step",
        lambda *args, **options: (
            made[0] if made else made.append(make(*args, **options)) or made[0]
        ),
    )
    train.fit(whole)
    assert not list((tmp_path / "disk").iterdir())

    def strike(what, **_):
        if what == "reading the batch of step 6":
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("disk/died-*/process-0/*/checkpoints/5")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            raise RuntimeError("struck")

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "doing", strike)
        with pytest.raises(RuntimeError, match="struck"):
            train.fit(died)
    assert Checkpointer(tmp_path / "died").steps() == [3]
    said()
    assert train.fit(configs.replace(died, {"train.local_every": 2})) == 6
    disk = tmp_path / "disk"
    assert f"resuming {died.run_dir} at step 5, from the local checkpoints in {disk}" in said()
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "died")
    ]
    ours, theirs = (
        [{k: v for k, v in line.items() if not k.startswith("time")} for line in part]
        for part in lines
    )
    assert ours == theirs
    shapes = transformer.param_shapes(hf.read_config(tmp_path / "student"))
    found = [read_params(tmp_path / name, shapes)[0] for name in ("whole", "died")]
    jax.tree.map(np.testing.assert_array_equal, *found)
    first, second = json.loads((tmp_path / "died" / "goodput.json").read_text())["attempts"]
    assert set(first["steps_at_save"]) == {"1", "2", "3", "4", "5"}
    assert (second["from_step"], first["ended"]) == (5, "failed")
    assert first["save"] > 0
    assert not list(disk.iterdir())
