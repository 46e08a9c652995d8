"""Write the trained student as a Hugging Face directory, re-open it and compare before it counts.

Reads the run's checkpoint (export.step; by default the best, else the newest) and writes
export.path (default run_dir/export): weights, config, generation config, tokenizer, chat template,
a model card, and the resolved config and checks of the export itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcod_jax import __version__
from dcod_jax.config import dataset_dir
from dcod_jax.data.dataset import MANIFEST, read_manifest
from dcod_jax.data.tokenizer import (
    load_tokenizer,
    stop_ids,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path, publish, remove_tree, unfinished
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import ModelConfig, to_hf
from dcod_jax.models.gguf import export_tokenizer
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import batch_shards, make_mesh
from dcod_jax.train.checkpointer import Checkpointer, Record, sharded_shapes
from dcod_jax.types import Params

log = logging.getLogger(__name__)

MARKER = "dcod_jax.json"  # says that a directory is an export of ours, and what was checked
RECIPE = "dcod_jax_config.json"  # the resolved config
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
CHECK_ROWS, CHECK_LENGTH = 4, 48


# ---------------------------------------------------------------- the verb


def export(config: Any) -> Path:
    """Export the run's checkpoint; returns the directory once it was re-opened and compared."""
    source = as_path(config.student.path or config.student.config)
    if not config.student.path and not config.student.config:
        raise DcodError("no student: set student.path or student.config as in the training run")
    model_config = hf.read_config(source)
    hosts.check_joined()
    mesh = make_mesh(**config.mesh)
    hosts.doing(f"exporting {config.run_dir}")
    params, record = _read_checkpoint(config, model_config, mesh)
    path = export_path(config)
    report = export_model(
        params,
        model_config,
        path,
        tokenizer_source=_tokenizer_home(config, source),
        chat_template=config.student.chat_template,
        dtype=config.export.dtype,
        max_shard_bytes=int(config.export.max_shard_gb * 1e9),
        card=_card(config, record),
        mesh=mesh,
    )
    log.info(
        "%s: step %d in %s, re-opened; its logits equal those of the training parameters in %s bit "
        "for bit, and differ from those of the float32 parameters by at most %.3g",
        path,
        record.step,
        config.export.dtype,
        config.export.dtype,
        report["max_logit_difference_from_float32"],
    )
    return path


def export_path(config: Any) -> Path:
    """Where the run's export is or will be."""
    return as_path(config.export.path or as_path(config.run_dir) / "export")


def _read_checkpoint(config: Any, model_config: ModelConfig, mesh: Mesh) -> tuple[Params, Record]:
    directory = as_path(config.run_dir) / "checkpoints"
    if not directory.is_dir():
        raise DcodError(f"{directory} does not exist; expected the checkpoints of a training run")
    checkpointer = Checkpointer(config.run_dir, best_metric=config.train.best_metric)
    step = config.export.step if config.export.step >= 0 else checkpointer.best()
    restored = checkpointer.restore_params(sharded_shapes(model_config, mesh), step=step)
    checkpointer.close()
    return restored


def _tokenizer_home(config: Any, source: Path) -> Path:
    home = as_path(config.student.tokenizer) if config.student.tokenizer else source
    return home.parent if home.name == "config.json" else home


def _card(config: Any, record: Record) -> dict[str, Any]:
    """What the model card tells: recipe, data and held-out metrics."""
    root = as_path(dataset_dir(config))
    names = [name for name in ("train", "eval") if (root / name / MANIFEST).is_file()]
    data = {name: read_manifest(root / name) for name in names}
    if not data and (root / MANIFEST).is_file():
        data = {"train": read_manifest(root)}
    return {
        "base_model": config.student.path or config.student.config,
        "step": record.step,
        "metrics": record.metrics,
        "data": data,
        "config": record.config,  # of the run that wrote the checkpoint
    }


# ---------------------------------------------------------------- writing


def export_model(
    params: Params,
    model_config: ModelConfig,
    path: Location,
    *,
    tokenizer_source: Location,
    dtype: str,
    card: dict[str, Any],
    max_shard_bytes: int,
    chat_template: str = "",
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Write an HF directory under a temporary name, re-open and compare it, then name it.

    tokenizer_source is an HF directory or a .gguf file. An earlier export at `path` is replaced
    once the new one is whole; anything else there is refused. Raises DcodError for a model that HF
    cannot express and when what is read back is not what was to be written; then no directory
    appears. Returns the checks.
    """
    path = as_path(path).resolve()
    raw = to_hf(model_config, dtype=dtype)
    tokenizer = load_tokenizer(as_path(tokenizer_source), chat_template=chat_template)
    if len(tokenizer) > model_config.vocab_size:
        raise DcodError(
            f"{tokenizer_source}: the tokenizer has {len(tokenizer)} entries, the model "
            f"{model_config.vocab_size} rows; set student.tokenizer to the student's own"
        )
    temporary = path.with_name(f".{path.name}.partial")
    if hosts.first():
        _refuse_foreign(path)
        remove_tree(temporary)
        temporary.mkdir(parents=True)
    hosts.barrier("export: directory")
    try:
        hf.save_params(
            temporary,
            model_config,
            params,
            dtype=jnp.dtype(dtype),
            max_shard_bytes=max_shard_bytes,
        )
        if hosts.first():
            _write_small_files(
                temporary, raw, model_config, as_path(tokenizer_source), tokenizer, chat_template
            )
        hosts.barrier("export: written")
        report = verify(temporary, model_config, params, tokenizer, dtype=dtype, mesh=mesh)
        if hosts.first():
            _write_card(temporary, card, report, dtype=dtype)
            publish(temporary, path, last=MARKER)
        hosts.barrier("export: published")
    finally:
        if hosts.first():
            remove_tree(temporary)
    return report


def _refuse_foreign(path: Path) -> None:
    if not path.exists() or (path / MARKER).is_file() or unfinished(path, last=MARKER):
        return
    if not path.is_dir() or any(path.iterdir()):
        raise DcodError(
            f"{path} exists and is not an export of this program (no {MARKER} in it); it is left "
            "as it is: set export.path to another directory"
        )


def _write_small_files(
    directory: Path,
    raw: dict[str, Any],
    model_config: ModelConfig,
    tokenizer_source: Path,
    tokenizer: Any,
    chat_template: str,
) -> None:
    """config.json, generation_config.json, the tokenizer's files and the chat template."""
    _write_json(directory / "config.json", raw)
    if tokenizer_source.suffix == ".gguf":
        export_tokenizer(tokenizer_source, directory)
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer_source / name).is_file():
                (directory / name).write_bytes((tokenizer_source / name).read_bytes())
    if chat_template:
        settings_file = directory / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        _write_json(settings_file, settings)
        template = as_path(chat_template).read_bytes()
        (directory / "chat_template.jinja").write_bytes(template)
    earlier = tokenizer_source / "generation_config.json"
    generation = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    stops = stop_ids(model_config, tokenizer)
    generation |= {
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
        "pad_token_id": model_config.pad_token_id,
    }
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- checking


def verify(
    directory: Path,
    model_config: ModelConfig,
    params: Params,
    tokenizer: Any,
    *,
    dtype: str,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Re-open an export and compare it with what it was made from.

    The logits of the re-opened weights must equal those of `params` cast to dtype, bit for bit, on
    random rows and on rows of text; config, tokenizer and template must be the same. Raises
    DcodError with the first difference.
    """
    reopened_config, reopened = hf.load_model(directory, dtype=jnp.float32, mesh=mesh)
    # generation_config.json adds the tokenizer's own stop token to those of the config.
    stops = stop_ids(model_config, tokenizer)
    if set(reopened_config.eos_token_ids) != set(stops):
        raise DcodError(f"{directory}: stops at {reopened_config.eos_token_ids}, not at {stops}")
    if dataclasses.replace(reopened_config, eos_token_ids=()) != dataclasses.replace(
        model_config, eos_token_ids=()
    ):
        raise DcodError(f"{directory}: config.json reads back as {reopened_config}")
    _check_tokenizer(directory, tokenizer)
    tokens = _check_tokens(tokenizer, batch_shards(mesh))
    logits = jax.jit(lambda weights: transformer.logits(model_config, weights, tokens, mesh=mesh))
    master = _fetch(logits(params))
    cast = jax.jit(
        lambda weights: jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), weights)
    )
    expected, found = _fetch(logits(cast(params))), _fetch(logits(reopened))
    if not np.isfinite(expected).all():
        raise DcodError(
            f"the parameters in {dtype} give logits that are not finite; set export.dtype=float32, "
            "or look at the run: its parameters may have diverged"
        )
    if not np.array_equal(expected, found):
        difference = np.abs(expected - found).max()
        raise DcodError(
            f"{directory}: the weights read back give other logits than the training parameters "
            f"(largest difference {difference:.3g}); the disk or the writer is at fault, and no "
            "export was left. Run the same command again"
        )
    return {
        "logits_equal_in_dtype": True,
        "max_logit_difference_from_float32": float(np.abs(master - expected).max()),
        "rows": list(tokens.shape),
    }


def _check_tokenizer(directory: Path, tokenizer: Any) -> None:
    written = load_tokenizer(directory)
    for what in (tokenizer_fingerprint, template_fingerprint):
        if what(written) != what(tokenizer):
            raise DcodError(
                f"{directory}: the {what.__name__} of the written files differs from the "
                "student's; are tokenizer.json and tokenizer_config.json of one model?"
            )


def _check_tokens(tokenizer: Any, shards: int) -> jax.Array:
    """A row of text first, then random ids."""
    text = "Question: 12 + 30 = ? Answer: first 10 + 30 = 40, then 40 + 2 = 42.\n#### 42"
    ids = tokenizer.encode(text, add_special_tokens=False)
    real = np.resize(np.asarray(ids, np.int32), (1, CHECK_LENGTH))
    random = np.random.default_rng(0).integers(
        len(tokenizer), size=(max(CHECK_ROWS, shards) - 1, CHECK_LENGTH), dtype=np.int32
    )
    rows = np.concatenate([real, random])
    return jnp.asarray(rows[: len(rows) // shards * shards])


def _fetch(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


# ---------------------------------------------------------------- the card


def _write_card(
    directory: Path, card: dict[str, Any], report: dict[str, Any], *, dtype: str
) -> None:
    _write_json(directory / RECIPE, card["config"])
    marker = {
        "dcod_jax": __version__,
        "dtype": dtype,
        "step": card["step"],
        "metrics": card["metrics"],
        "data": card["data"],
        "checks": report,
    }
    _write_json(directory / MARKER, marker)
    (directory / "README.md").write_text(card_text(card, report, dtype=dtype), encoding="utf-8")


def card_text(card: dict[str, Any], report: dict[str, Any], *, dtype: str) -> str:
    """The model card: what it was made from, by which recipe, with which result."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, dcod_jax]",
        "---",
        "",
        "# Distilled student",
        "",
        f"Made with dcod_jax {__version__} by offline distillation from fixed teacher traces.",
        "",
        f"- start: `{card['base_model']}`",
        f"- checkpoint: step {card['step']}, weights in {dtype}",
        *(f"- {name}: {value:.6g}" for name, value in sorted(card["metrics"].items())),
        f"- checked on writing: logits on {report['rows'][0]} rows of {report['rows'][1]} tokens "
        f"equal those of the training parameters in {dtype} bit for bit; the largest difference "
        f"from float32 is {report['max_logit_difference_from_float32']:.3g}",
        "",
        "## Data",
        "",
    ]
    for split, manifest in card["data"].items():
        lines += [f"**{split}**", "", *_data_lines(manifest), ""]
    if not card["data"]:
        lines += ["The trace dataset was not beside the run when this was written.", ""]
    lines += ["## Recipe", "", f"The resolved config, also in `{RECIPE}`:", ""]
    lines += ["```json", json.dumps(card["config"], indent=1, sort_keys=True), "```", ""]
    return "\n".join(lines)


def _data_lines(manifest: dict[str, Any]) -> Sequence[str]:
    totals, teacher = manifest["totals"], manifest.get("teacher")
    lines = [
        f"- {totals['records']:,} traces, {totals['tokens']:,} tokens, "
        f"{totals['completion_tokens']:,} of them the teacher's",
    ]
    if teacher:
        lines.append("- teacher: " + ", ".join(f"{k} `{v}`" for k, v in teacher.items() if v))
    if "mean_logprob" in manifest:
        lines.append(f"- the teacher's mean log-prob of its tokens: {manifest['mean_logprob']:.4f}")
    if "counts" in manifest:
        lines.append(f"- counts: `{json.dumps(manifest['counts'], sort_keys=True)}`")
    for name in ("tokenizer", "template"):
        if name in manifest:
            lines.append(f"- {name}: `{manifest[name]['fingerprint']}`")
    return lines
