"""The locked versions: they fit pyproject.toml on every Python that it allows."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_lock_fits_what_the_package_requires(python):
    """It fails where a bound was moved without `make lock`."""
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    pins = map(Requirement, (line for line in lines if not line.lstrip().startswith("#")))
    here = {"python_full_version": python, "python_version": python[:4], "sys_platform": "linux"}
    locked = {pin.name: str(pin.specifier)[2:] for pin in pins if _holds(pin, here)}
    extras = [text for name in ("gguf", "gcs", "lm-eval", "test") for text in EXTRAS[name]]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras]):
        name = wanted.name.lower().replace("_", "-")
        if name != "dcod-jax":
            assert wanted.specifier.contains(locked[name]), f"{wanted}, locked {locked[name]}"


def _holds(pin: Requirement, environment: dict[str, str]) -> bool:
    return pin.marker is None or pin.marker.evaluate(environment)
