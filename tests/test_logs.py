"""Messages reach stderr from the level asked for; progress is a line where there is no terminal."""

import logging

import pytest

from dcod_jax import logs

ours, theirs = logging.getLogger("dcod_jax.somewhere"), logging.getLogger("somebody.else")


@pytest.fixture(autouse=True)
def _restored():
    root, package = logging.getLogger(), logging.getLogger("dcod_jax")
    handlers, level = list(root.handlers), package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)


def say_everything():
    ours.debug("a detail")
    ours.info("a fact")
    ours.warning("a doubt about %s", "this")
    theirs.info("chatter")
    for _ in range(3):
        theirs.warning(["deprecated"])


@pytest.mark.parametrize(
    ("level", "process", "expected"),
    [
        ("debug", None, ["a detail", "a fact", "warning: a doubt about this"]),
        ("info", None, ["a fact", "warning: a doubt about this"]),
        ("info", 0, ["[0] a fact", "[0] warning: a doubt about this"]),
        ("info", 3, ["[3] warning: a doubt about this"]),
        ("error", None, []),
    ],
)
def test_a_level_decides_and_libraries_warn_once(capsys, level, process, expected):
    logs.configure("debug")  # a second call replaces the first
    logs.configure(level, process)
    say_everything()
    prefix = "" if process is None else f"[{process}] "
    out, err = capsys.readouterr()
    assert err.splitlines() == [*expected, f"{prefix}warning: somebody.else: ['deprecated']"]
    assert out == ""


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys):
    logs.configure()
    with logs.track("training", 2000, unit="steps", done=1000) as advance:
        advance(400, "nll 2")
        advance(600, "nll 1")
    with logs.track("hidden", 1, enabled=False) as advance:
        advance(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training 2,000/2,000 steps ")
    assert line.endswith(" steps/s ETA 0 s nll 1")
