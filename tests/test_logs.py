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


def test_progress_without_a_terminal_is_a_line_at_either_end(capsys):
    logs.configure()
    with logs.track("training", 2000, unit="steps", done=1000) as advance:
        advance(400, "nll 2")
        advance(600, "nll 1")
    with logs.track("hidden", 1, enabled=False) as advance:
        advance(1)
    start, end = capsys.readouterr().err.splitlines()
    assert start == "training 1,000/2,000 steps"
    assert end.startswith("training 2,000/2,000 steps ")
    assert end.endswith(" steps/s ETA 0 s nll 1")


def test_the_first_batch_is_no_measure_of_what_is_left(capsys, monkeypatch):
    """It compiles: 100 s for the first step, then 15 s for ten."""
    clock = iter([0.0, 100.0, 115.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    logs.configure()
    with logs.track("training", 31, unit="steps") as advance:
        advance(1)
        advance(10)
    _, first, second = capsys.readouterr().err.splitlines()
    assert first == "training 1/31 steps 0.01 steps/s"
    assert second == "training 11/31 steps 0.67 steps/s ETA 30 s"
