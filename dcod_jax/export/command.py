"""Write the trained student as a Hugging Face directory, and check it before it gets its name.

Reads the run's checkpoint (export.step; by default the best, else the newest) and writes
export.path (default run_dir/export): weights, config, generation config, tokenizer, chat template,
a model card, the run's config, and what the check found.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcod_jax import __version__
from dcod_jax.bounds import array, check, mapping, text, whole
from dcod_jax.data.dataset import read_manifest
from dcod_jax.data.templates import OWN, TemplateChoice, template_of
from dcod_jax.data.tokenizer import (
    MADE_WITH_EOS,
    Tokenizer,
    chat_template,
    downloaded,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.data.turns import end_of_turn, stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.export.card import RECIPE, card_text
from dcod_jax.files import (
    Location,
    Path,
    as_path,
    file_entry,
    file_sha256,
    file_size,
    publish,
    read_json,
    remove_tree,
    to_json,
    unfinished,
)
from dcod_jax.locks import locked
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import ModelConfig, to_hf
from dcod_jax.models.gguf import export_tokenizer
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import batch_shards, make_mesh
from dcod_jax.train.checkpoint_reader import read_student
from dcod_jax.train.settings import best_metric
from dcod_jax.train.setup import dataset_splits
from dcod_jax.types import Params

log = logging.getLogger(__name__)

MARKER = "dcod_jax.json"  # says that a directory is an export of ours, and what was checked
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt tokenizer.model chat_template.jinja"
).split()
CHECK_ROWS, CHECK_LENGTH = 4, 48


# ---------------------------------------------------------------- the verb


def export(config: Any) -> Path:
    """Export the run's checkpoint; returns the directory once it was re-opened and compared."""
    base_model = config.student.path or config.student.config
    if not base_model:
        raise DcodError("no student: set student.path or student.config as in the training run")
    path, home = export_path(config), _tokenizer_home(config)
    check_destination(path)
    hosts.check_joined()
    mesh = make_mesh(**config.mesh)
    hosts.doing(f"exporting {config.run_dir}")
    model_config, params, record = read_student(
        config.run_dir,
        base_model,
        mesh=mesh,
        step=config.export.step if config.export.step >= 0 else None,
        best_metric=best_metric(config),
    )
    with locked(path.with_name(f".{path.name}.lock"), what=f"export.path={path}"):
        checks = export_model(
            params,
            model_config,
            path,
            tokenizer_source=home,
            template=template_of(config.student),
            dtype=config.export.dtype,
            max_shard_bytes=int(config.export.max_shard_gb * 1e9),
            card={
                "base_model": base_model,
                "step": record.step,
                "metrics": record.metrics,
                "data_changes": record.data.get("changes", []),  # that the run was told to accept
                "data": {
                    name: read_manifest(split) for name, split in dataset_splits(config).items()
                },
                "config": record.config,  # of the run that wrote the checkpoint
            },
            mesh=mesh,
        )
    log.info(
        "%s: step %d in %s, re-opened; its logits equal those of the training parameters in %s bit "
        "for bit, and differ from those of the float32 parameters by at most %.3g",
        path,
        record.step,
        *[config.export.dtype] * 2,
        checks["max_logit_difference_from_float32"],
    )
    return path


def rehearse(config: Any) -> None:
    """Write and read back all of the export but its weights, and look at where it will be.

    Raises DcodError for what an export after the training would fail at.
    """
    student = config.student
    model_config = hf.read_config(as_path(student.path or student.config))
    home = _tokenizer_home(config)
    tokenizer = load_tokenizer(home, template=template_of(student))
    check_destination(export_path(config))
    with tempfile.TemporaryDirectory(prefix="dcod_jax-") as name:
        _write_small(
            as_path(name),
            model_config,
            home,
            tokenizer,
            template_of(student),
            dtype=config.export.dtype,
        )
        _check_small(as_path(name), model_config, tokenizer)


def _tokenizer_home(config: Any) -> Path:
    home = as_path(config.student.tokenizer or config.student.path or config.student.config)
    return home.parent if home.name == "config.json" else home


def check_destination(path: Path) -> None:
    """Raise DcodError where an export at `path` would replace what no export of ours wrote.

    An earlier export may be replaced as long as each of its files is the one that it wrote.
    """
    if not path.exists() or unfinished(path, last=MARKER):
        return
    if not path.is_dir() or not (path / MARKER).is_file():
        if path.is_dir() and not any(path.iterdir()):
            return
        raise DcodError(
            f"{path} exists and is not an export of this program (no {MARKER} in it); it is "
            "left as it is: set export.path to another directory"
        )
    marker = read_json(path / MARKER)
    check(marker, {"files": _FILES}, source=path / MARKER)
    written = {entry["file"]: entry for entry in marker["files"]}
    for file in path.rglob("*"):
        name = file.name
        if file == path / MARKER or not file.is_file():
            continue
        own = file.parent == path and name in written and file_size(file) == written[name]["bytes"]
        if own and file.suffix != ".safetensors":  # large, and of the same size
            own = file_sha256(file) == written[name]["sha256"]
        if not own:
            raise DcodError(
                f"{file} is not as an export of this program wrote it; {path} is left as it is: "
                "move the file away, or set export.path to another directory"
            )


_FILES = array(mapping({"file": text(), "bytes": whole(0, 1 << 60), "sha256": text(64)}))


def export_path(config: Any) -> Path:
    """Where the run's export is or will be."""
    return as_path(config.export.path or as_path(config.run_dir) / "export")


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
    template: TemplateChoice = OWN,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Write an HF directory under a temporary name, re-open and compare it, then name it.

    tokenizer_source is an HF directory or a .gguf file; card is what the model card reports. An
    earlier export at `path` is replaced once the new one is whole; anything else there is refused.
    Raises DcodError for a model that HF cannot express, and when the files read back differ; then
    no directory appears. Returns the checks.
    """
    path = as_path(path).resolve()
    home = as_path(tokenizer_source)
    tokenizer = load_tokenizer(home, template=template)
    if len(tokenizer) > model_config.vocab_size:
        raise DcodError(
            f"{tokenizer_source}: the tokenizer has {len(tokenizer)} entries, the model "
            f"{model_config.vocab_size} rows; set student.tokenizer to the student's own"
        )
    temporary = path.with_name(f".{path.name}.partial")
    if hosts.first():
        check_destination(path)
        remove_tree(temporary)
        temporary.mkdir(parents=True)
    hosts.barrier("export: directory")
    try:
        options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "max_shard_bytes": max_shard_bytes}
        hf.save_params(temporary, model_config, params, **options)
        if hosts.first():
            _write_small(temporary, model_config, home, tokenizer, template, dtype=dtype)
        hosts.barrier("export: written")
        checks = verify(temporary, model_config, params, tokenizer, dtype=dtype, mesh=mesh)
        if hosts.first():
            about = {"dcod_jax": __version__, "dtype": dtype, "checks": checks, **card}
            (temporary / RECIPE).write_bytes(to_json(about.pop("config")))
            (temporary / "README.md").write_text(card_text(about | card), encoding="utf-8")
            about.pop("base_model")
            about["files"] = [file_entry(file) for file in sorted(temporary.iterdir())]
            (temporary / MARKER).write_bytes(to_json(about))
            publish(temporary, path, last=MARKER)
        hosts.barrier("export: published")
    finally:
        if hosts.first():
            remove_tree(temporary)
    return checks


def _write_small(
    directory: Path,
    model_config: ModelConfig,
    home: Path,
    tokenizer: Tokenizer,
    template: TemplateChoice,
    *,
    dtype: str,
) -> None:
    """Write every file that a user's files give: all but weights, card and marker."""
    (directory / "config.json").write_bytes(to_json(to_hf(model_config, dtype=dtype)))
    _write_tokenizer(directory, home, tokenizer, template=template)
    _write_generation_config(directory, home, model_config, tokenizer)


def _write_tokenizer(
    directory: Path, home: Path, tokenizer: Tokenizer, *, template: TemplateChoice
) -> None:
    """The files of the tokenizer in `home`, with the template and the end that training had."""
    if home.suffix == ".gguf":
        export_tokenizer(home, directory)
    else:
        home = home if home.is_dir() else downloaded(home)
        for name in TOKENIZER_FILES:
            if (home / name).is_file():
                (directory / name).write_bytes((home / name).read_bytes())
    file = directory / "tokenizer_config.json"
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings = before = read_json(file) if file.is_file() else plain
    text = chat_template(tokenizer) or ""
    if template.given:
        settings = {name: value for name, value in settings.items() if name != "chat_template"}
        (directory / "chat_template.jinja").write_bytes(text.encode())
    end = end_of_turn(tokenizer)
    if end not in (None, tokenizer.eos_token_id) and "eos_token" not in text:
        token = str(tokenizer.convert_ids_to_tokens(end))
        made = {MADE_WITH_EOS: tokenizer.init_kwargs.get(MADE_WITH_EOS, tokenizer.eos_token)}
        settings = settings | made | {"eos_token": token}
        named = directory / "special_tokens_map.json"
        if named.is_file():
            named.write_bytes(to_json(read_json(named) | {"eos_token": token}))
    if settings != before:
        file.write_bytes(to_json(settings))


def _write_generation_config(
    directory: Path, home: Path, model_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    earlier = home / "generation_config.json"
    generation = read_json(earlier) if earlier.is_file() else {}
    stops = stop_ids(model_config, tokenizer)
    generation |= {
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
        "pad_token_id": model_config.pad_token_id,
    }
    (directory / "generation_config.json").write_bytes(to_json(generation))


# ---------------------------------------------------------------- checking


def verify(
    directory: Path,
    model_config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Re-open an export and compare it with its source; DcodError with the first difference.

    The logits of the re-opened tensors must equal those of `params` cast to dtype, bit for bit, on
    a row of text and on random rows; config, tokenizer and template must be the same.
    """
    _, reopened = hf.load_model(directory, dtype=jnp.float32, mesh=mesh)
    _check_small(directory, model_config, tokenizer)
    tokens = _check_tokens(tokenizer, batch_shards(mesh))
    compute = jax.jit(lambda params: transformer.logits(model_config, params, tokens, mesh=mesh))
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), tree))

    def logits(params: Params) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(compute(params), tiled=True))

    master, expected, found = logits(params), logits(cast(params)), logits(reopened)
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


def _check_small(directory: Path, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Read config, stop ids, tokenizer and template back; DcodError with the first difference."""
    reopened_config, _ = hf.load_config(directory)
    # generation_config.json adds the tokenizer's own stop token to those of the config.
    stops = stop_ids(model_config, tokenizer)
    if set(reopened_config.eos_token_ids) != set(stops):
        raise DcodError(f"{directory}: stops at {reopened_config.eos_token_ids}, not at {stops}")
    same_stops = dataclasses.replace(reopened_config, eos_token_ids=model_config.eos_token_ids)
    if same_stops != model_config:
        raise DcodError(f"{directory}: config.json reads back as {reopened_config}")
    written = load_tokenizer(directory)
    for fingerprint in (tokenizer_fingerprint, template_fingerprint):
        if fingerprint(written) != fingerprint(tokenizer):
            raise DcodError(
                f"{directory}: the {fingerprint.__name__} of the written files differs from the "
                "student's; are tokenizer.json and tokenizer_config.json of one model?"
            )


def _check_tokens(tokenizer: Tokenizer, shards: int) -> jax.Array:
    """A row of text first, then random ids."""
    text = "Question: 12 + 30 = ? Answer: first 10 + 30 = 40, then 40 + 2 = 42.\n#### 42"
    ids = tokenizer.encode(text, add_special_tokens=False)
    real = np.resize(np.asarray(ids, np.int32), (1, CHECK_LENGTH))
    random = np.random.default_rng(0).integers(
        len(tokenizer), size=(max(CHECK_ROWS, shards) - 1, CHECK_LENGTH), dtype=np.int32
    )
    rows = np.concatenate([real, random])
    return jnp.asarray(rows[: len(rows) // shards * shards])
