"""Locks: one writer, many readers, and none that outlives its holder."""

import json
import os
import signal
import time

import pytest

from dcod_jax.errors import DcodError
from dcod_jax.locks import check_held, locked

WHO = rf"is in use by process {os.getpid()} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait"


def try_to_hold(path, **options):
    with locked(path, what="run_dir=x", **options):
        pass


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_only_readers_hold_a_lock_together(tmp_path, first, second):
    path = tmp_path / "run" / ".lock"
    path.parent.mkdir()
    with locked(path, what="run_dir=x", shared=first):
        if first and second:
            try_to_hold(path, shared=True)
        else:
            with pytest.raises(DcodError, match=f"^run_dir=x {WHO}"):
                try_to_hold(path, shared=second)
    try_to_hold(path)  # the file is there, the lock is not


def test_a_lock_of_a_place_in_a_store_is_this_machines(memory):
    path = memory / ".lock"
    with locked(path, what="run_dir=x"):
        with pytest.raises(DcodError, match=WHO):
            try_to_hold(path)
        check_held(path, what="run_dir=x")
    assert not path.exists()


def test_in_a_store_who_comes_later_takes_over(memory, caplog):
    path = memory / ".lock"
    other = json.dumps({"host": "elsewhere", "process": 1, "since": "noon"}).encode()
    path.write_bytes(other)
    with locked(path, what="run_dir=x"):
        assert "run_dir=x: process 1 on elsewhere since noon did not end in order" in caplog.text
        check_held(path, what="run_dir=x")
        path.write_bytes(other)  # it comes again
        with pytest.raises(DcodError, match="run_dir=x was taken over by process 1 on elsewhere"):
            check_held(path, what="run_dir=x")
    assert path.read_bytes() == other


def test_those_who_ended_are_not_named(tmp_path):
    path = tmp_path / ".lock"
    path.write_text('{"host": "elsewhere", "process": 1, "since": "2020"}\n')
    with locked(path, what="x"):
        assert "elsewhere" not in path.read_text()


def test_a_lock_file_that_says_nothing_still_locks(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, what="x"):
        path.write_text('junk\n[1]\n{"host": 1}\n')
        with pytest.raises(DcodError, match="x is in use by another process; wait"):
            try_to_hold(path)


def test_a_reader_makes_nothing_where_nothing_is(tmp_path):
    try_to_hold(tmp_path / "typo" / ".lock", shared=True)
    assert not any(tmp_path.iterdir())


def test_a_link_is_no_lock(tmp_path):
    """Whoever may write the directory for temporary files can make one; a lock is emptied."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to("mine")
    with (
        pytest.raises(DcodError, match="cannot make the lock"),
        locked(tmp_path / "lock", what="x"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_writer_without_the_right_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DcodError, match="cannot make the lock"):
        try_to_hold(tmp_path / "file" / ".lock")


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX runs threads; the child uses none of them
def test_a_child_does_not_hold_its_parents_lock(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, what="x"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        end = time.monotonic() + 20
        while True:  # until the child has begun to run, and closed its copy
            try:
                try_to_hold(path)
                break
            except DcodError:
                assert time.monotonic() < end
                time.sleep(0.05)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
