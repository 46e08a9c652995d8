"""Files of every kind, mutated: what reads them says so in a DcodError, and in bounded memory."""

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"gguf": 40, "model": 40, "tokenizer": 40, "template": 25, "dataset": 60}
EXAMPLES |= {"shard": 60, "report": 60, "traces": 15}
MEMORY = 2 << 30  # bytes, of the long form: beyond what the process has before


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fuzz.write_all(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_good_files_are_read(name, good):
    reader, files = fuzz.READERS[name]
    reader(good[name])
    assert all((good[name] / file).is_file() for file in files)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_mutated_files_are_refused_in_words_or_read(name, good, tmp_path):
    said = []

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 1 << 30))
    def run(seed):
        said.append(fuzz.try_one(name, good[name], tmp_path / "work", seed))

    run()
    assert any(said), "no mutation was refused"
    assert max(map(len, said)) < 4000


@pytest.mark.long
@pytest.mark.parametrize("name", fuzz.READERS)
def test_thousands_of_mutated_files_in_bounded_memory(name, tmp_path):
    """In a process of its own, whose memory is limited by the kernel."""
    count = 200 if name == "template" else 2000
    script = (
        "import sys, pathlib, fuzz;"
        "fuzz.main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))"
    )
    words = [str(tmp_path), name, "1000", str(count), str(MEMORY)]
    command = [sys.executable, "-W", "ignore", "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.splitlines()[-1].startswith(f"done {count} refused"), (
        done.stdout.splitlines()[-1],
        done.returncode,
        done.stderr[-3000:],
    )
