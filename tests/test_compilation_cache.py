"""Where compiled programs are kept, that they are used again, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as programs

from dcod_jax import cli
from dcod_jax.compilation_cache import AUTO, MOST_BYTES, keep_programs
from dcod_jax.errors import DcodError

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
)
USED = "jax_enable_compilation_cache"  # which `plan` turns off for the rest of its process


@pytest.fixture(autouse=True)
def _without_a_cache(monkeypatch, tmp_path):
    """As in a process whose environment names none; the suite's own is back afterwards."""
    before = {name: jax.config.values[name] for name in (*NAMES, USED)}
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update(NAMES[0], None)
    jax.config.update(USED, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    programs.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    programs.reset_cache()


def compiled(number):
    jax.clear_caches()
    return float(jax.jit(lambda x: x * number + 1)(jnp.float32(2)))


def test_a_program_is_kept_and_a_damaged_one_is_compiled_anew(tmp_path):
    keep_programs(str(tmp_path / "own"))
    assert compiled(3.25) == 7.5
    kept = sorted((tmp_path / "own").glob("*-cache"))
    assert kept
    found = [path.read_bytes() for path in kept]
    assert compiled(3.25) == 7.5
    assert sorted((tmp_path / "own").glob("*-cache")) == kept
    assert [path.read_bytes() for path in kept] == found
    for path in kept:
        path.write_bytes(b"\x00" * 64)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert compiled(3.25) == 7.5


def test_every_verb_with_a_config_keeps_its_programs(tmp_path):
    place = str(tmp_path / "xdg" / "dcod_jax" / "programs")
    seen = []

    def look(config):
        seen.append([jax.config.values[name] for name in NAMES])

    words = ["--config", "quickstart", f"--config.run_dir={tmp_path / 'run'}"]
    cli.run_config_verb("evaluate", look, [*words, "--config.compilation_cache="])
    cli.run_config_verb("evaluate", look, words)
    assert seen[0][0] is None
    assert seen[1] == [place, 0.0, MOST_BYTES]


def test_the_environment_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(NAMES[2].upper(), "1000")
    size = jax.config.values[NAMES[2]]
    keep_programs(AUTO)
    assert jax.config.values[NAMES[2]] == size
    jax.config.update(NAMES[0], str(tmp_path / "theirs"))
    keep_programs(str(tmp_path / "ours"))
    assert jax.config.values[NAMES[0]] == str(tmp_path / "theirs")


def test_a_directory_that_cannot_be_made_is_refused_or_done_without(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    with pytest.raises(DcodError, match=r"compilation_cache=\S+file/x: cannot make the directory"):
        keep_programs(str(tmp_path / "file" / "x"))
    (tmp_path / "xdg").write_text("")
    keep_programs(AUTO)
    assert jax.config.values[NAMES[0]] is None
    assert "compiled programs are not kept" in caplog.text
