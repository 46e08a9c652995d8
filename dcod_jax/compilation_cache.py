"""Compiled programs kept between processes: JAX's persistent cache, its place and its size."""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any

from dcod_jax.errors import DcodError

log = logging.getLogger(__name__)
AUTO = "auto"  # of the key compilation_cache
MOST_BYTES = 8 << 30  # the programs that were used longest ago are removed above it


def keep_programs(key: str) -> None:
    """Read programs that were compiled before, and keep those that are compiled from now on.

    key: compilation_cache of a config. A JAX_COMPILATION_CACHE_DIR of the environment, and other
    settings of JAX there, go before it. Raises DcodError where the directory cannot be made; that
    of "auto" is done without.
    """
    import jax  # which a verb's --help does not load

    if not key or jax.config.values["jax_compilation_cache_dir"]:
        return
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else pathlib.Path.home() / ".cache"
    auto = home / "dcod_jax" / "programs"
    place = str(auto if key == AUTO else pathlib.Path(key).expanduser())
    own: dict[str, Any] = {"jax_compilation_cache_dir": key if "://" in key else place}
    own["jax_persistent_cache_min_compile_time_secs"] = 0.0  # a start has many small programs
    if "://" not in key:  # a store has no lock, which removing needs
        own["jax_compilation_cache_max_size"] = MOST_BYTES
        try:
            os.makedirs(place, exist_ok=True)
        except OSError as error:
            if key != AUTO:
                raise DcodError(
                    f"compilation_cache={key}: cannot make the directory ({error.strerror}); set "
                    "it to another one, or to '' to keep no compiled programs"
                ) from error
            log.info("compiled programs are not kept: %s: %s", place, error.strerror)
            return
    for name, value in own.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
