"""The system refuses: a full or a read-only disk, no more open files; it is told in a line."""

import contextlib
import os
import shutil
import subprocess

import pytest
from cases import AFTER, case_of, write_place
from forked import Fault, warm


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("refusals"))
    with warm():
        yield place


def told(case, fault, text):
    """The verb ends with a message that holds the text, and nothing is half-written."""
    ended = case.run(fault)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.text
    assert text in ended.text.splitlines()[-1]
    case.check_whole()


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


@pytest.mark.parametrize("verb", AFTER)
def test_without_descriptors(place, verb):
    case = case_of(place, verb)
    case.begin()
    told(case, Fault("descriptors", 1), "open files")


@pytest.mark.parametrize("verb", AFTER)
def test_on_a_read_only_disk(place, verb):
    case = case_of(place, verb)
    case.begin()
    with mounted(case.home, f"--bind {case.home}", "-o remount,ro,bind"):
        told(case, Fault(), "ead-only")


@pytest.mark.parametrize("verb", AFTER)
def test_on_a_full_disk(place, verb):
    case = case_of(place, verb)
    case.begin()
    with mounted(case.home, "-t tmpfs -o size=4m tmpfs"):
        shutil.copytree(case.before, case.home, dirs_exist_ok=True)
        with contextlib.suppress(OSError), (case.home / ".filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        told(case, Fault(), "space left")
        (case.home / ".filler").unlink()
        case.check_end()
