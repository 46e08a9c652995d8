"""Killed or refused by the system: nothing is half-written, and the same command ends the same.

The long form tries 16 seeded points of each verb, no two before one kind of change:

    python -m pytest -m long -s tests/faults/test_faults.py
"""

import collections
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import warnings

import pytest
from cases import AFTER, case_of, read, write_place
from forked import KILLED, Fault, kind_of, run, warm

from dcod_jax import files
from dcod_jax.copies import local_copy
from dcod_jax.stores import RemotePath
from dcod_jax.train.checkpointer import finished
from dcod_jax.train.metrics import read_metrics

JUMP = 300.0  # seconds of the clock, forth and back
# The last change before which a verb is killed; the first four once left files that no restart
# removed, or a run that did not restart. With it, what the next start says.
LAST = {
    "prepare": ("os.rename /dataset.partial$", ""),
    "score": ("os.remove /dataset/train/traces-", "scored these traces before"),
    "train": ("os.remove .*params", "resuming"),
    "export": (r"os.rename /run/\.export\.partial", ""),
    "generate_traces": (r"os.rename .*/0+16-0+24\.json", "going on behind 16 traces"),
    "evaluate": (r"os.rename .*teacher\.jsonl.*/0+4-0+6\.json", "going on after 4 answers"),
    "drift": (r"os.remove /run/drift/start\.part-\d+\.npz$", "measured before"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("faults"))
    with warm():
        yield place


def kill(case, fault):
    ended = case.run(fault)
    assert ended.code in KILLED, (fault, ended)
    case.check_whole()


@pytest.mark.parametrize("verb", AFTER)
def test_killed_and_started_again_it_ends_as_if_it_had_not_been(place, verb):
    """The last start has a slow disk and a clock that jumps, and is read all the while."""
    case, dice = case_of(place, verb), random.Random(verb)
    case.begin()
    # Times that a file holds change its size by some digits: three quarters of it are written.
    kill(case, Fault("bytes", 3 * dice.choice(case.sizes) // 4))
    case.begin()
    change, said = LAST[verb]
    last = max(n for n, name in enumerate(case.changes) if re.match(change, name))
    *before, kind = map(kind_of, case.changes[: last + 1])
    kill(case, Fault("operation", before.count(kind) + 1, change=kind))
    meanwhile = lambda _: case.check_whole()  # noqa: E731
    assert said in case.check_end(Fault("slow", 0.003, clock=JUMP), meanwhile=meanwhile)


@pytest.mark.long
@pytest.mark.parametrize("verb", AFTER)
def test_killed_at_many_points(place, verb):
    case, dice = case_of(place, verb), random.Random(verb)
    kinds = collections.Counter(map(kind_of, case.changes))
    faults = [Fault("bytes", dice.randrange(size)) for size in dice.choices(case.sizes, k=4)]
    for kind in dice.sample(sorted(kinds), min(12, len(kinds))):
        faults.append(Fault("operation", (kinds[kind] + 1) // 2, change=kind))
    failed = []
    for fault in faults:
        case.begin()
        try:
            kill(case, fault)
            case.check_end()
        except AssertionError as error:
            failed.append((fault, str(error)[:300]))
    print(f"{verb}: {len(faults)} points of {len(case.changes)} changes, {len(failed)} failed")
    assert not failed, failed


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_fork(function):
    """Call what kills its process in a fork: JAX runs threads, and the child uses none of them."""
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if not child:
        function()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("exchange", "killed_in", "left"),
    [
        (True, "remove_tree", "new"),
        (False, "rename", "old"),  # between the two renames: nothing has the name
    ],
)
def test_a_directory_killed_while_it_is_replaced_is_the_old_or_the_new(
    tmp_path, monkeypatch, exchange, killed_in, left
):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    final, real, renamed = (tmp_path / "old").rename(tmp_path / "final"), files.rename, []
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)

    def rename(path, name):
        if len(renamed) == 2:  # the first found another directory with the name
            die()
        renamed.append(name)
        real(path, name)

    monkeypatch.setattr(files, killed_in, {"rename": rename, "remove_tree": die}[killed_in])
    killed_in_a_fork(lambda: files.publish(tmp_path / "new", final, last="file"))
    monkeypatch.undo()
    assert final.exists() == exchange
    files.recover(final)
    assert (final / "file").read_text() == left


def test_what_a_killed_writer_left_goes_at_the_next_start_of_one(copy_cache, memory, monkeypatch):
    """A download by each of two processes: one is killed in it, and one is still at work."""

    def half(path, file):
        file.write_bytes(b"hal")
        die()

    (source := memory / "file").write_bytes(b"whole")
    copy_cache.mkdir()
    with files.scratch(copy_cache) as own:
        with monkeypatch.context() as patch:
            patch.setattr(RemotePath, "download", half)
            killed_in_a_fork(lambda: local_copy(source))
        assert len(list(copy_cache.glob("*partial*/file"))) == 1
        copy = local_copy(source)
        assert copy.read_bytes() == b"whole"
        assert {own, copy.parent} == set(copy_cache.iterdir())
    assert [copy.parent] == list(copy_cache.iterdir())


def test_a_directory_takes_the_place_of_another_or_of_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / name).write_text(name)
        files.publish(tmp_path / "work", tmp_path / "final", last=name)
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert [path.name for path in (tmp_path / "final").iterdir()] == [name]


# ---------------------------------------------------------------- what the system refuses


def told(case, fault, text):
    """The verb ends with a message that holds the text, and nothing is half-written."""
    ended = case.run(fault)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.text
    assert text in ended.text.splitlines()[-1]
    case.check_whole()
    return ended.text


@contextlib.contextmanager
def mounted(path, *mounts):
    """While the body runs, these options of `mount` have been applied to the path in turn."""
    for options in mounts:
        command = ["mount", *options.split(), str(path)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


# Refusals of the other verbs take several seconds each.
QUICK = ("prepare", "generate_traces", "score", "export")
REFUSING = [verb if verb in QUICK else pytest.param(verb, marks=pytest.mark.long) for verb in AFTER]


@pytest.mark.parametrize("verb", REFUSING)
def test_without_descriptors(place, verb):
    case = case_of(place, verb)
    case.begin()
    told(case, Fault("descriptors", 1), "open files")


@pytest.mark.parametrize("verb", REFUSING)
def test_on_a_read_only_disk(place, verb):
    case = case_of(place, verb)
    case.begin()
    with mounted(case.home, f"--bind {case.home}", "-o remount,ro,bind"):
        told(case, Fault(), "ead-only")


@pytest.mark.long
@pytest.mark.parametrize("share", [0, 0.3, 0.7])
@pytest.mark.parametrize("verb", AFTER)
def test_on_a_full_disk(place, verb, share):
    """Full from the beginning, or where it has room for a share of what the verb adds to it."""
    case, page = case_of(place, verb), 4096
    case.begin()
    with mounted(case.home, "-t tmpfs -o size=8m tmpfs"):
        shutil.copytree(case.before, case.home, dirs_exist_ok=True)
        room = int(share * sum(case.sizes)) // page * page
        with contextlib.suppress(OSError), (case.home / ".filler").open("wb") as filler:
            while True:
                filler.write(bytes(page))
                filler.flush()
        os.truncate(case.home / ".filler", (case.home / ".filler").stat().st_size - room)
        text = told(case, Fault(), "space left")
        last = text.splitlines()[-1]
        assert str(case.home) in last, text
        assert re.search("free (some )?(disk )?space", last), text
        assert text.count("space left") == 1, text
        assert len(text.splitlines()) < 30, text
        (case.home / ".filler").unlink()
        case.check_end()


@pytest.mark.long
def test_readers_of_every_kind_while_a_run_saves(place):
    """And a second trainer, which is refused; the run ends as if nobody had looked."""
    case, steps = case_of(place, "train"), 120
    case.begin()
    recipe, run_dir = f"--config={place / 'recipe.py'}", case.home / "run"
    verbs = ("report", "export", "evaluate", "drift")
    readers = [(verb, [recipe]) for verb in verbs]
    readers += [("inspect", [str(case.home / "dataset"), f"--checkpoint={run_dir}"])]
    words = [recipe, "--config.evaluate.problems=", f"--config.train.steps={steps}"]
    ended = []

    def look(process):
        if not finished(run_dir / "checkpoints"):
            return
        verb, arguments = readers[len(ended) % len(readers)]
        ended.append((verb, run(verb, arguments, home=case.home)))
        exports = (run_dir / ".export.lock").exists() and "in use by process" in ended[-1][1].text
        assert ended[-1][1].code == 0 or (verb == "export" and exports), ended[-1]  # at its end
        second = run("train", words, home=case.home)
        assert second.code == 1 or not process.is_alive(), second
        assert "is in use by process" in second.text or not process.is_alive(), second

    trained = run("train", words, home=case.home, meanwhile=look)
    assert trained.code == 0, trained
    done = {verb for verb, one in ended if one.code == 0}
    assert done >= {*verbs, "inspect"}, done
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    read(case.home)
