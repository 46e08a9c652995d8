"""Paths: local ones stay what they were, remote ones mean the same over a store; files replaced."""

import ast
import os
import pathlib
import subprocess
import sys
import types

import pytest
from fake_traces import contents

from dcod_jax import files
from dcod_jax.config import BASE, load_recipe
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, check_own, find, rename, replace_file, to_json
from dcod_jax.stores import RemotePath
from dcod_jax.train.setup import OWN_FILES

PACKAGE = pathlib.Path(files.__file__).parent
# Where paths are told apart, and a verb about this machine alone.
OWNERS = ("copies.py", "files.py", "doctor.py")
OPENERS = ("Path", "pathlib.Path", "open", "io.open", "gzip.open")
# Calls elsewhere that are about this machine alone, and why.
LOCAL = {
    "pathlib.Path(__file__)": "the checkout",
    "Path(__file__)": "the package",
    "Path(dcod_jax.__file__)": "the package, of its recipes",
    "gzip.open(packed, 'rb')": "a stream that as_path(...).open gave",
    "glob.glob('/dev/accel[0-9]*')": "devices",
    "open(os.devnull, 'w')": "nowhere",
    "pathlib.Path(tempfile.gettempdir())": "locks of what is in a store, of this machine",
    "glob.glob('/dev/vfio/[0-9]*')": "devices",
    "pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))": "compiled programs, of this machine",
    "pathlib.Path(key)": "the same, where a key says",
    "pathlib.Path(name)": "a temporary directory beside init_student's --out, which is local",
}


@pytest.fixture
def store(request):
    """An empty directory of the memory file system."""
    root = as_path(f"memory://bucket/{request.node.name}")
    yield root
    root.filesystem.rm(str(root.parent), recursive=True) if root.parent.exists() else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", pathlib.Path("runs/a")),
        ("/a//b/", pathlib.Path("/a/b")),
        ("", pathlib.Path("")),
        ("file:///a/b", pathlib.Path("/a/b")),
        ("gs://bucket/a//b/", RemotePath("gs", "bucket/a/b")),
        ("gcs://bucket", RemotePath("gs", "bucket")),
        ("memory://x/y", RemotePath("memory", "x/y")),
    ],
)
def test_the_scheme_decides_where_a_path_leads(text, expected):
    assert as_path(text) == expected
    assert as_path(expected) is expected


@pytest.mark.parametrize("text", ["gs://", "gs:///", "g s://b"])
def test_a_scheme_without_a_name_is_refused(text):
    with pytest.raises(DcodError, match="expected a local path or scheme://bucket/name"):
        as_path(text)


def test_names_are_those_of_pathlib():
    texts = ["a/b/c.jsonl.gz", "a/b", "a/.hidden", "a/b.c/d.gguf"]
    for text in texts:
        remote, local = as_path(f"gs://{text}"), pathlib.PurePosixPath(text)
        for name in ("name", "stem", "suffix"):
            assert getattr(remote, name) == getattr(local, name)
        assert remote.parent.key == str(local.parent)
        assert (remote / "x/y").key == str(local / "x/y")
        assert remote.with_name("z.json").key == str(local.with_name("z.json"))
        assert str(remote) == f"gs://{text}"
    assert sorted(map(as_path, ["gs://b/2", "gs://b/1"])) == [
        as_path("gs://b/1"),
        as_path("gs://b/2"),
    ]


def test_a_library_that_wants_a_local_file_refuses_a_remote_one():
    with pytest.raises(TypeError):
        os.stat(as_path("gs://bucket/file"))
    with pytest.raises(TypeError):
        pathlib.Path(as_path("gs://bucket/file"))


def look(root):
    """What every question about a small tree answers, with paths below root."""
    root = root / "tree"
    root.mkdir(parents=True, exist_ok=True)
    (root / "sub").mkdir(parents=True, exist_ok=True)
    (root / "a.txt").write_text("ä\n", encoding="utf-8")
    (root / "sub" / "b.bin").write_bytes(b"\0\1")
    (root / "sub" / "c.txt").write_bytes(b"c")
    rename(root / "sub" / "c.txt", root / "sub" / "d.txt")
    (root / "gone").write_bytes(b"x")
    (root / "gone").unlink()
    (root / "gone").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (root / "gone").unlink()
    with pytest.raises(FileNotFoundError):
        (root / "gone").read_bytes()
    with (root / "a.txt").open("rb") as file:
        opened = file.read()
    below = str(root)
    return {
        "text": (root / "a.txt").read_text(encoding="utf-8"),
        "opened": opened,
        "exists": [(root / n).exists() for n in ("a.txt", "sub", "gone", "sub/b.bin", "su")],
        "files": [(root / n).is_file() for n in ("a.txt", "sub", "gone")],
        "directories": [(root / n).is_dir() for n in ("a.txt", "sub", "gone")],
        "iterdir": sorted(str(p).removeprefix(below) for p in root.iterdir()),
        "glob": sorted(str(p).removeprefix(below) for p in root.glob("*/*.txt")),
        "rglob": sorted(str(p).removeprefix(below) for p in root.rglob("*") if p.is_file()),
        "found": [str(p).removeprefix(below) for p in find(f"{root}/**/*.txt")],
        "size": files.file_size(root / "sub" / "b.bin"),
    }


def test_a_store_answers_as_the_disk_does(tmp_path, store):
    expected = look(tmp_path)
    assert expected["iterdir"] == ["/a.txt", "/sub"]
    assert look(store) == expected


def test_a_study_in_a_store_is_refused():
    from dcod_jax.study.command import study

    with pytest.raises(DcodError, match="run_dir=gs://b/s: a study appends"):
        study(types.SimpleNamespace(run_dir="gs://b/s"))


def test_a_missing_driver_names_what_to_install():
    with pytest.raises(DcodError, match=r"nothere:// paths need its driver"):
        as_path("nothere://bucket/a").exists()
    code = (
        "import sys; sys.modules['gcsfs'] = None; from dcod_jax.files import as_path; "
        "as_path('gs://bucket/a').exists()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "DcodError: gs:// paths need the extra gcs: pip install '.[gcs]' in the checkout"
        in done.stderr
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_every_path_of_the_package_goes_through_one_module(path):
    """No pathlib.Path(...), builtin open, glob or shutil that a remote path would escape to."""
    if path.name in OWNERS or path.parent.name == "study":  # which refuses a remote run_dir
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name, call = ast.unparse(node.func), ast.unparse(node)
            direct = name in OPENERS or name.startswith(("glob.", "shutil."))
            assert not direct or call in LOCAL, f"{path.name}:{node.lineno}: {call}"


def test_a_file_that_cannot_be_replaced_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    replace_file(path, b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DcodError, match=r"progress\.json.*No space left"):
        replace_file(path, b"new")
    assert contents(tmp_path) == {"progress.json": b"old"}


def test_only_files_of_this_program_are_replaced(tmp_path):
    own = tmp_path / "own.json"
    assert check_own(own, '"attempts"') == own
    for content, ours in (("", True), ('{"attempts": []}', True), ("my notes", False)):
        own.write_text(content)
        if ours:
            check_own(own, '"attempts"')
        else:
            with pytest.raises(DcodError, match=r"own\.json exists and was not written by this"):
                check_own(own, '"attempts"')
    own.unlink()
    for kind in (own.mkdir, lambda: own.symlink_to(tmp_path / "nowhere")):
        kind()
        with pytest.raises(DcodError, match="left as it is"):
            check_own(own, '"attempts"')
        own.rmdir() if own.is_dir() else own.unlink()
    # What a model's directory holds is not what a run's holds, and what the program writes is.
    assert set(OWN_FILES) == {
        "config.json", "metrics.jsonl", "trace_weights.jsonl", "goodput.json",
        "remat.json",
    }  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DcodError, match=r"config\.json"):
        check_own(tmp_path / "config.json", *OWN_FILES["config.json"])
    (tmp_path / "config.json").write_bytes(to_json(load_recipe(BASE).to_dict()))
    check_own(tmp_path / "config.json", *OWN_FILES["config.json"])
