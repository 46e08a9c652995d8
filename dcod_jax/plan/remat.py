"""student.remat=auto: the least recomputation that fits the devices, found by compiling."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from typing import Any

import jax

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, read_json, replace_file, to_json
from dcod_jax.models import remat as remats
from dcod_jax.plan import chips, programs

log = logging.getLogger(__name__)


def choose_remat(config: Any, devices: Iterable[Any]) -> str:
    """student.remat, where "auto" stands for the least recomputation that fits these devices.

    It is "none" where no memory limit is known (a CPU with plan.hbm_gib=0). Between dots and
    attention memory is linear in the layers that are kept, so a few compilations find how many fit.
    The choice is kept in run_dir with the program's hash. Raises DcodError where none fits.
    """
    if config.student.remat != "auto":
        return config.student.remat
    devices = list(devices)
    limit = programs.memory_limit(config, devices[0])
    if limit is None:
        return remats.NAMES[0]
    full = programs.train_program(configs.replace(config, {"student.remat": "full"}), devices)
    text = re.sub(r"0x[0-9a-f]+", "", str(full.jaxpr))  # addresses of this process
    made_of = (text, jax.__version__, devices[0].device_kind, str(limit))
    file = as_path(config.run_dir) / "remat.json"
    known = read_json(file) if file.is_file() else {}
    program = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
    if known.get("program") == program and not remats.fault(str(known.get("remat"))):
        return known["remat"]
    chosen, peak, more = _least_remat(config, devices, limit)
    sizes = peak / chips.GIB, limit / chips.GIB
    log.info("student.remat=auto: %s, %.2f GiB of %.2f%s", chosen, *sizes, more)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, to_json({"program": program, "remat": chosen, "peak": peak}))
    return chosen


def _least_remat(config: Any, devices: list[Any], limit: float) -> tuple[str, float, str]:
    """(student.remat, its peak in bytes, what more memory would give as a text)."""
    peaks: dict[str, float | None] = {}

    def fits(remat: str) -> bool:
        traced = programs.train_program(configs.replace(config, {"student.remat": remat}), devices)
        try:
            peaks[remat] = programs.compile_program(traced, limit=limit).memory["peak"]
        except programs.DoesNotFitError as error:
            peaks[remat] = error.needed
            return False
        return True

    def found(remat: str) -> tuple[str, float, str]:
        dots = peaks.get("dots")
        more = f"; dots for all layers needs {dots / chips.GIB:.2f}" if dots else ""
        return remat, float(peaks[remat] or 0.0), "" if remat in ("none", "dots") else more

    for remat in remats.NAMES:
        if not fits(remat):
            continue
        least, dots = peaks.get("attention"), peaks.get("dots")
        if remat == "attention" and least and dots and dots > least:
            layers = programs.student_of(config).num_layers
            kept = int(layers * (limit - least) / (dots - least))
            # Buffers are not placed alike in any two programs: a layer less where it did not fit.
            for count in (n for n in (kept, kept - 1, kept - 2) if 0 < n < layers):
                if fits(f"dots:{count}"):
                    return found(f"dots:{count}")
        return found(remat)
    raise DcodError(
        f"student.remat=auto: none of {', '.join(remats.NAMES)} fits {limit / chips.GIB:.2f} GiB a "
        "device; raise train.microbatches or mesh.fsdp (python -m dcod_jax.plan tries them)"
    )
