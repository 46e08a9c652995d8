"""dcod doctor: what it finds, and that it ends with 1 where something cannot work."""

import importlib.metadata
import os
import re
import subprocess
import sys

from dcod_jax import doctor


def test_all_is_well_here(capsys):
    assert doctor.doctor([]) == 0
    out = capsys.readouterr().out
    assert f"jax {importlib.metadata.version('jax')}" in out
    assert "cpu 7: cpu" in out  # a product was computed on each of the eight
    assert re.search(r"recipes: .*\bquickstart, ", out)
    assert out.endswith("the whole package can work here\n")


def test_a_missing_and_an_old_package_are_problems(capsys, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"flax": "0.11.0", "gguf": "0.1"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.doctor([]) == 1
    out = capsys.readouterr().out
    assert "problem: grain is missing: pip install 'grain" in out
    assert "problem: flax 0.11.0 does not fit " in out
    # An extra that lacks something is no problem: it says how to get it.
    assert "extra gguf: gguf 0.1 does not fit" in out
    assert "(pip install '.[gguf]' in the checkout)" in out
    assert "problem: gguf" not in out


def test_a_device_that_jax_cannot_start_is_a_problem():
    command = [sys.executable, "-m", "dcod_jax.doctor"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "problem: JAX cannot use its devices" in done.stdout
