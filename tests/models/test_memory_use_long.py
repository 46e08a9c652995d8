"""The memory of loading and exporting, measured in processes of their own (memory_use.py)."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    run(place, "make", 1)
    return place


def run(place: Path, what: str, devices: int) -> dict:
    command = [sys.executable, str(TESTS / "models" / "memory_use.py"), str(place), what]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(devices)],
        # glibc would keep freed blocks of less than 32 MB, which are larger in a real model, and
        # in a heap of each thread.
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": paths}
        | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("devices", "what"), [(1, ("load", "save", "check")), (4, ("load",))])
def test_the_host_holds_less_than_a_file_and_a_third_beside_the_parameters(place, devices, what):
    """Saving from several CPU devices also has their copies of one layer in this memory.

    The median of three processes: XLA frees a device's block in a thread of its own, sometimes
    after the next one is there.
    """
    runs = [run(place, "measure", devices) for _ in range(3)]
    assert runs[0]["parameters"] > 3 * runs[0]["largest_file"]
    for one in what:
        peak = statistics.median(found[one] for found in runs)
        assert peak <= 1.3 * runs[0]["largest_file"], (one, runs)


def test_a_model_larger_than_half_of_the_memory_loads_and_exports(place):
    found = run(place, "limit", 1)
    assert found["tensors_equal_in_dtype"] is True
    assert found["max_logit_difference_from_float32"] == 0.0
