"""Eight fake CPU devices, checked shapes, and the benchmark files where they exist."""

import atexit
import gc
import logging
import os
import shutil
import subprocess
import tempfile

import host_runs

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= host_runs.of_xla(8)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# All processes of one run of the suite share their compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dcod-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Copies and hashes of files, away from the user's own.
if "DCOD_CACHE_DIR" not in os.environ:
    os.environ["DCOD_CACHE_DIR"] = tempfile.mkdtemp(prefix="dcod-copies-")
    atexit.register(shutil.rmtree, os.environ["DCOD_CACHE_DIR"], ignore_errors=True)

from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src import compiler  # its options of one program have no public way in
from jaxtyping import install_import_hook

gc.disable()  # while everything is imported
# The same examples in every run.
hypothesis.settings.register_profile("suite", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("suite")
ROOT = Path(__file__).resolve().parents[1]

# Every module but types.py: its records are pytrees, and also hold shardings and shapes.
MODULES = [
    f"dcod_jax.{path.stem}"
    for path in (ROOT / "dcod_jax").iterdir()
    if path.stem not in ("__init__", "__main__", "__pycache__", "types", "assets", "configs")
]

# Measured; the others are shorter or have many tests. test_notebook.py behind the file whose
# programs it has: at the same time both would compile them.
LONGEST = [
    "test_hosts.py",
    "test_tutorial.py",
    "test_end_to_end.py",
    "test_train_losses.py",
    "test_train.py",
    "test_notebook.py",
    "test_train_step_teachers.py",
    "test_study.py",
    "test_train_step.py",
    "test_monitor.py",
    "test_faults.py",
    "test_tune.py",
]
install_import_hook(MODULES, "beartype.beartype")
logging.getLogger("dcod_jax").setLevel(logging.INFO)  # for caplog, as the verbs set it


def pytest_collection_modifyitems(items):
    """The longest files first, then those of the room of training: both workers end together."""
    first = {name: place for place, name in enumerate(LONGEST)}
    other = lambda path: len(first) + (path.parent.name != "train")  # noqa: E731
    items.sort(key=lambda item: first.get(item.path.name, other(item.path)))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: no collection of garbage looks at it again
    gc.set_threshold(10_000, 20, 20)  # to trace a step makes millions of objects
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file():
    """A compiled program holds memory maps, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", True)  # which `plan` turns off


@pytest.fixture
def compiled_as_for_users(monkeypatch):
    """XLA's own options: two programs of one step agree to the bit only with its fusions."""
    options, usual = compiler.get_compile_options, {host_runs.EMITTERS: True}
    if host_runs.faster_compiling():
        monkeypatch.setattr(
            compiler,
            "get_compile_options",
            lambda **own: options(**own | {"env_options_overrides": usual}),
        )


@pytest.fixture
def one_device(monkeypatch):
    """Training on one device: to compile for eight takes four times as long."""
    from dcod_jax.parallel.mesh import make_mesh
    from dcod_jax.train import loop, setup

    mesh = make_mesh(1, devices=jax.devices()[:1])
    for module in (loop, setup):
        monkeypatch.setattr(module, "make_mesh", lambda **_: mesh)


@pytest.fixture
def one_train_step(monkeypatch):
    """All runs of the test have the step of the first: they differ in nothing that it holds."""
    from dcod_jax.train import step

    made, make = [], step.make_train_step

    def once(*arguments, **options):
        if not made:
            made.append(make(*arguments, **options))
        return made[0]

    monkeypatch.setattr(step, "make_train_step", once)


@pytest.fixture(scope="session", autouse=True)
def _without_torch():
    """The tests' own processes may use torch; the verbs they start must do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "no_torch"), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark files and traces beside the checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the benchmark files are not beside this checkout")
    return path


# ---------------------------------------------------------------- stores
# Imports are inside: those of the package wait for the hook above.


@pytest.fixture
def copy_cache(tmp_path, monkeypatch):
    """Copies of remote files, away from the user's own."""
    from dcod_jax import copies

    monkeypatch.setenv(copies.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gcs():
    """The one bucket of a fake Cloud Storage server."""
    from fake_store import BUCKET, fake_gcs

    from dcod_jax.files import as_path

    with fake_gcs():
        yield as_path(f"gs://{BUCKET}")


@pytest.fixture(params=["memory", "gs"])
def store(request):
    """An empty directory, in fsspec's memory and on the fake Cloud Storage server."""
    if request.param == "gs":
        return request.getfixturevalue("gcs") / _place(request)
    return request.getfixturevalue("memory")


def _place(request) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


@pytest.fixture
def memory(request):
    """An empty directory in fsspec's memory."""
    from dcod_jax.files import as_path, remove_tree

    root = as_path(f"memory://{_place(request)}")
    remove_tree(root)
    return root


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, empty, at tmp_path/disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
