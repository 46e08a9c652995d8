"""What loading and exporting a model of 330 MB needs beside its parameters; JSON on stdout.

    python memory_use.py DIRECTORY {measure,limit} DEVICES

`measure` reads the peak of the resident memory; `limit` exports with data of 1.9 x the parameters
allowed, so that they have more than half of it.
"""

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import jax
import tiny

from dcod_jax.data.templates import OWN
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.export.check import verify
from dcod_jax.export.command import write_small
from dcod_jax.models import hf
from dcod_jax.models.counts import num_params
from dcod_jax.parallel.mesh import make_mesh

SHARD = 100 * 10**6
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "vocab_size": 16384,
}


def status(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def peak_of(work):
    """(its result, the most resident memory that it needed beyond what there was).

    What was freed goes back to the system first: what `work` takes of it would not be seen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = status("VmRSS")
    found = work()
    return found, status("VmHWM") - before


def main(directory: Path, what: str, devices: int) -> dict:
    mesh, model, out = make_mesh(1, devices), directory / "model", directory / f"{what}{devices}"
    if what == "make":
        tiny.write_model(model, shard_bytes=SHARD, **SIZES)
        return {}
    config, dtype = hf.read_config(model), "float32"
    total = 4 * num_params(config)
    jax.numpy.zeros(3).block_until_ready()
    if what == "limit":
        limit = status("VmData") + int(1.9 * total)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    (_, params), load = peak_of(lambda: hf.load_model(model, dtype=dtype, mesh=mesh))
    save = {"dtype": dtype, "max_shard_bytes": SHARD}
    found = {
        "parameters": total,
        "largest_file": max(file.stat().st_size for file in model.glob("*.safetensors")),
        "load": load - total,
        "save": peak_of(lambda: hf.save_params(out, config, params, **save))[1],
        "check": peak_of(lambda: hf.check_saved(out, config, params, dtype=dtype))[1],
    }
    if what == "limit":
        tokenizer = load_tokenizer(model)
        write_small(out, config, model, tokenizer, OWN, dtype=dtype, base="")
        found |= verify(out, config, params, tokenizer, dtype=dtype, mesh=mesh)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
