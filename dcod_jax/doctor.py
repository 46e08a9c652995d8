"""`dcod doctor`: what this machine has, what an extra lacks, and whether training can work here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement

from dcod_jax import __version__
from dcod_jax.config import BASE, shipped_recipes

ACCELERATORS = {"tpu": ("/dev/accel0", "/dev/vfio/0"), "gpu": ("/dev/nvidia0",)}
INSTALL = "pip install '.[{}]' in the checkout"  # the package is on no index
GIB = 2**30


def doctor(argv: Sequence[str]) -> int:
    """Print the findings; 1 when something cannot work, else 0."""
    argparse.ArgumentParser("dcod doctor", description=__doc__).parse_args(argv)
    problems: list[str] = []
    print(f"dcod_jax {__version__} at {BASE.parents[1]}")
    print(f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}")
    print(f"recipes: {', '.join(shipped_recipes())}")
    print("\npackages")
    for line in _packages(problems):
        print(f"  {line}")
    print("\nmachine")
    for line in [*_memory(), *_devices(problems)]:
        print(f"  {line}")
    print()
    for problem in problems:
        print(f"problem: {problem}")
    print("something cannot work: see above" if problems else "the whole package can work here")
    return 1 if problems else 0


def _requirements() -> dict[str, list[Requirement]]:
    """{extra: what it requires}; the package's own requirements under ""."""
    found: dict[str, list[Requirement]] = {"": []}
    for text in importlib.metadata.requires("dcod_jax") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        found.setdefault(extra[1] if extra else "", []).append(Requirement(text))
    return found


def _lack(requirement: Requirement) -> str:
    """What is wrong with the installed version of a requirement; "" when it fits."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} does not fit {requirement.specifier}"


def _packages(problems: list[str]) -> Iterator[str]:
    wanted = _requirements()
    for requirement in wanted.pop(""):
        if lack := _lack(requirement):
            problems.append(f"{lack}: pip install '{requirement.name}{requirement.specifier}'")
            yield lack
        else:
            yield f"{requirement.name} {importlib.metadata.version(requirement.name)}"
    for extra, requirements in sorted(wanted.items()):
        lacking = []
        for one in requirements:
            if one.name == "jax" and one.extras:  # it needs what that extra of jax names
                one = Requirement("libtpu" if "tpu" in one.extras else "jax-cuda13-plugin")
            if one.name != "dcod_jax" and (lack := _lack(one)):
                lacking.append(lack)
        how = f": {'; '.join(lacking)} ({INSTALL.format(extra)})"
        yield f"extra {extra}{how if lacking else ': ready'}"


def _memory() -> Iterator[str]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield f"{os.cpu_count()} CPU cores, {pages * size / GIB:.1f} GiB of memory"
    here = pathlib.Path.cwd()
    writable = "" if os.access(here, os.W_OK) else ", not writable: set run_dir elsewhere"
    yield f"{shutil.disk_usage(here).free / GIB:.1f} GiB free in {here}{writable}"


def _devices(problems: list[str]) -> Iterator[str]:
    """The devices JAX has, after a product was computed on each of them."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        problems.append(f"jax cannot be imported: {error}")
        return
    try:
        devices = jax.local_devices()
        for device in devices:
            x = jax.device_put(jnp.full((128, 128), 0.5, jnp.bfloat16), device)
            total = float(jax.jit(lambda x: (x @ x).astype(jnp.float32).sum())(x))
            stats = device.memory_stats() or {}
            limit = f", {stats['bytes_limit'] / GIB:.1f} GiB" if "bytes_limit" in stats else ""
            yield f"{device.platform} {device.id}: {device.device_kind}{limit}"
            if total != 128 * 128 * 32:
                problems.append(f"{device} computes wrong: expected {128 * 128 * 32}, got {total}")
    except (RuntimeError, OSError, AssertionError) as error:  # jax asserts that a platform is there
        asked = os.environ.get("JAX_PLATFORMS", "")
        problems.append(
            f"JAX cannot use its devices (JAX_PLATFORMS={asked!r}): {error or type(error).__name__}"
        )
        return
    for kind, files in ACCELERATORS.items():
        there = any(pathlib.Path(file).exists() for file in files)
        if there and devices[0].platform != kind and os.environ.get("JAX_PLATFORMS", "") == "":
            problems.append(
                f"a {kind.upper()} is here but JAX uses {devices[0].platform}: "
                f"{INSTALL.format(kind)}"
            )


if __name__ == "__main__":
    raise SystemExit(doctor(sys.argv[1:]))
