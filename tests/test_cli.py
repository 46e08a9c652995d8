"""The command line: verbs, their help without array libraries, exit codes."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import pytest

from dcod_jax import __version__, cli, config
from dcod_jax.errors import DcodError

HEAVY = ("jax", "numpy", "transformers", "orbax", "grain", "flax", "torch", "datasets")


def test_the_overview_lists_the_verbs_in_the_order_of_the_work(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  {verb} ") for verb in cli.VERBS]
    assert places == sorted(places)
    assert all(verb.about in text for verb in cli.VERBS.values())
    assert ", ".join(config.shipped_recipes()) in text


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dcod_jax {__version__}\n"


def test_an_unknown_verb_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert "unknown verb 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_shipped_recipe_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(["--config", "quickstart"], verb="train").run_dir == "runs/quickstart"
    (tmp_path / "quickstar.py").write_text("")
    with pytest.raises(config.DcodError, match=r"no such file.*quickstart.*did you mean 'quicks"):
        config.load(["--config", "quickstrat"], verb="train")


def test_flags_of_a_verb_are_config_keys(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_config_verb", lambda verb, function, argv: seen.append(argv))
    words = ["--config", "r.py", "--topology", "v5e:4x4", "--num-slices=2", "--config.seed=3"]
    cli.run("plan", words)
    assert seen == [
        ["--config", "r.py", "--config.plan.topology", "v5e:4x4", "--config.plan.slices=2",
         "--config.seed=3"]
    ]  # fmt: skip


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_loads_no_array_library(verb):
    """Each verb as `python -m`, in a process that says at its end which modules it has."""
    script = (
        "import atexit, runpy, sys;"
        f"heavy = set({HEAVY!r});"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr));"
        f"sys.argv = ['dcod_jax.{verb}', '--help'];"
        f"runpy.run_module('dcod_jax.{verb}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dcod" in done.stdout
    assert done.stderr == "[]\n"


def test_output_whose_reader_left_ends_without_a_traceback():
    command = f"{sys.executable} -m dcod_jax train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("Distil a student")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_module_whose_reader_left_ends_without_a_traceback(stream):
    """As `python -m dcod_jax.prepare ... | head -1`, with a reader that is gone from the start."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "dcod_jax.prepare", *(["--help"] if stream == "stdout" else [])]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    done = subprocess.run(words, text=True, **options)
    os.close(write)
    assert done.returncode == 141
    assert not (done.stderr or "") + (done.stdout or "")


@pytest.mark.parametrize("how", ["exec <&- >&- 2>&-", "export PYTHONIOENCODING=ascii"])
def test_without_streams_and_in_any_encoding_the_verb_does_its_work(how, tmp_path):
    """No file of the verb has the number of a stream, to which a library may print."""
    script = (
        "from dcod_jax import cli\n"
        "def work(_):\n"
        "    print('«')\n"
        f"    with open({str(tmp_path / 'own')!r}, 'w') as file: file.write(str(file.fileno()))\n"
        "cli._command = lambda *_: work\n"
        "cli.run('inspect', ['x'])\n"
    )
    command = ["bash", "-c", f'{how}; "$0" "$@"', sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int((tmp_path / "own").read_text()) > 2
    assert done.stdout == ("" if "exec" in how else "\\xab\n")


# ---------------------------------------------------------------- how every verb ends

RUNNING = [verb for verb in cli.VERBS if verb != "doctor"]


@pytest.fixture
def ends(monkeypatch, tmp_path, capsys):
    """Runs a verb whose work is the given function; returns (exit code, what is on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(verb, work, *words):
        monkeypatch.setattr(cli, "_command", lambda *_: work)
        own = {"inspect": ["x"], "init_student": ["x", "y"]}.get(verb)
        own = own or ["--config", str(config.BASE), *words]
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            cli.run(verb, own)
        assert signal.getsignal(signal.SIGTERM) == before
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("verb", RUNNING)
def test_sigterm_ends_every_verb_with_75(verb, ends):
    def work(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was not seen")

    code, said = ends(verb, work)
    assert code == 75
    assert said == f"dcod_jax.{verb}: terminated; the same command goes on\n"


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "EMFILE", "ELOOP", "ENOTDIR", "EIO"])
def test_what_the_system_refuses_is_one_line_with_the_file(name, ends):
    def work(_):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number), "runs/default/goodput.json")

    code, said = ends("train", work)
    assert code == 1
    assert said.startswith("dcod_jax.train: error: runs/default/goodput.json: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [DcodError("0 records"), RuntimeError("INTERNAL: 0 records")])
def test_an_error_without_open_files_says_so(error, ends):
    """What a library makes of it may be anything: a shard with no records, a failed kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []

    def work(_):
        most = max(map(int, os.listdir("/proc/self/fd"))) + 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(3):  # as those that a verb closes on its way out
            os.close(opened.pop())
        raise error

    try:
        code, said = ends("train", work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)
    hint = "hardly a file can be opened: raise the limit of open files (ulimit -n)"
    assert (code, said) == (1, f"dcod_jax.train: error: {error}; {hint}\n")


def test_a_strangers_text_in_a_message_drives_no_terminal(ends):
    def work(_):
        raise DcodError("a name: \x1b[2J\ud800 \u202ee\u0301 é\n\tsecond line")

    shown = "a name: \\x1b[2J\\ud800 \\u202ee\u0301 é\n\tsecond line"
    assert ends("train", work) == (1, f"dcod_jax.train: error: {shown}\n")


@pytest.mark.parametrize(
    ("verb", "error", "said"),
    [
        (
            "train",
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9.1G of 8G\nx"),
            "9.1G of 8G; raise",
        ),
        ("score", MemoryError(), "of this machine; lower score.batch_tokens"),
        (
            "export",
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9.1G"),
            "9.1G; use more devices",
        ),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_lower(ends, verb, error, said):
    def work(_):
        raise error

    code, told = ends(verb, work)
    assert code == 1
    assert told.startswith(f"dcod_jax.{verb}: error: out of memory: ")
    assert said in told
    assert told.count("\n") == 1


def test_another_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault"), cli._reported("train"):
        raise RuntimeError("a fault")


def test_a_run_dir_that_can_be_none_is_refused_before_the_work(ends, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("file", "file/run", "loop", "loop/run", "gone"):
        code, said = ends("train", lambda _: None, f"--config.run_dir={tmp_path / name}")
        assert code == 1
        assert f"run_dir={tmp_path / name}: " in said
        assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_while_an_object_is_destroyed_is_no_traceback(capsys, caplog):
    class Half:
        def __del__(self):
            raise OSError("too many open files")

    def verb():
        Half()
        raise DcodError("cannot read")

    caplog.set_level("DEBUG", logger="dcod_jax")
    with pytest.raises(SystemExit), cli._reported("export"):
        verb()
    said = capsys.readouterr().err
    assert "dcod_jax.export: error: cannot read\n" in said
    assert "Traceback" not in said
    assert "too many open files" in caplog.text
