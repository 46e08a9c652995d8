"""Write the trained student as a Hugging Face directory, and check it before it gets its name.

Reads the checkpoint of the run, or of each variant of `compare` (export.step; by default the best,
else the newest) and writes export.path (default run_dir/export): weights, config, generation
config, tokenizer, chat template, a model card, the run's config, and what the check found.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dcod_jax import __version__
from dcod_jax import config as configs
from dcod_jax.bounds import array, check, mapping, text, whole
from dcod_jax.data.dataset import read_manifest
from dcod_jax.data.teachers import teacher_paths
from dcod_jax.data.templates import OWN, TemplateChoice, template_of
from dcod_jax.data.tokenizer import (
    MADE_WITH_EOS,
    Tokenizer,
    chat_template,
    downloaded,
    load_tokenizer,
)
from dcod_jax.data.turns import end_of_turn, stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.export.card import RECIPE, card_text
from dcod_jax.export.check import check_small, verify
from dcod_jax.files import (
    Location,
    Path,
    as_path,
    file_entry,
    file_sha256,
    file_size,
    naming,
    publish,
    read_json,
    recover,
    remove_tree,
    scratch,
    to_json,
    unfinished,
)
from dcod_jax.locks import locked
from dcod_jax.models import hf, lora, peft
from dcod_jax.models.config import ModelConfig, to_hf
from dcod_jax.models.gguf_tokenizer import export_tokenizer
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.stores import RemotePath
from dcod_jax.train.checkpoint_reader import read_student
from dcod_jax.train.settings import best_metric, student_source
from dcod_jax.train.setup import dataset_splits
from dcod_jax.types import Params

log = logging.getLogger(__name__)

MARKER = "dcod_jax.json"  # says that a directory is an export of ours, and what was checked
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt tokenizer.model chat_template.jinja"
).split()


# ---------------------------------------------------------------- the verb


def export_runs(config: Any) -> None:
    """The verb: the run, or each variant of `compare`."""
    for _, variant in configs.variants(config):
        export(variant)


def export(config: Any) -> Path:
    """Export the run's checkpoint; returns the directory once it was re-opened and compared."""
    base_model = student_source(config)
    path, home = _destination(config), _tokenizer_home(config)
    hosts.check_joined()
    mesh = make_mesh(**config.mesh)
    hosts.doing(f"exporting {config.run_dir}")
    model_config, params, record = read_student(
        config.run_dir,
        base_model,
        mesh=mesh,
        step=config.export.step if config.export.step >= 0 else None,
        best_metric=best_metric(config),
        merged=not config.export.adapter,
    )
    dtype = "float32" if model_config.lora else config.export.dtype
    with locked(path.with_name(f".{path.name}.lock"), what=f"export.path={path}"), naming(path):
        checks = export_model(
            params,
            model_config,
            path,
            tokenizer_source=home,
            template=template_of(config.student),
            dtype=dtype,
            max_shard_bytes=int(config.export.max_shard_gb * 1e9),
            card={
                "base_model": base_model,
                "step": record.step,
                "metrics": record.metrics,
                "data_changes": record.data["changes"],  # that the run was told to accept
                "data": {
                    name: read_manifest(split) for name, split in dataset_splits(config).items()
                },
                "config": record.config,  # of the run that wrote the checkpoint
            },
            mesh=mesh,
        )
    log.info(
        "%s: step %d in %s, re-opened; its tensors equal those of the training parameters in %s "
        "bit for bit, and its logits differ from those of the trained parameters by at most %.3g",
        path,
        record.step,
        dtype,
        dtype,
        checks["max_logit_difference_from_float32"],
    )
    return path


def rehearse(config: Any) -> None:
    """Write and read back all of the export but its weights, and look at where it will be.

    Raises DcodError for what an export after the training would fail at.
    """
    student = config.student
    base = student_source(config)
    model_config = hf.read_config(base)
    if config.export.adapter:
        model_config = lora.with_adapter(model_config, student.lora)
    home = _tokenizer_home(config)
    tokenizer = load_tokenizer(home, template=template_of(student))
    _destination(config)
    with scratch() as directory:
        write_small(
            directory,
            model_config,
            home,
            tokenizer,
            template_of(student),
            dtype=config.export.dtype,
            base=base,
        )
        check_small(directory, model_config, tokenizer)


def _tokenizer_home(config: Any) -> Path:
    home = as_path(config.student.tokenizer or student_source(config))
    return home.parent if home.name == "config.json" else home


def _destination(config: Any) -> Path:
    """export_path, where an export may be; DcodError where the run reads what is there."""
    path = export_path(config)
    read = {"the start": config.student.path, "the tokenizer": config.student.tokenizer}
    for name, other in (read | teacher_paths(config)).items():
        if other and as_path(other).resolve() == path.resolve():
            raise DcodError(f"{path} is {name} of the run; set export.path to another directory")
    check_destination(path)
    return path


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
        name, plain = file.name, isinstance(file, RemotePath) or not file.is_symlink()
        if file == path / MARKER or (plain and file.is_dir()):
            continue
        own = plain and file.is_file() and file.parent == path and name in written
        own = own and file_size(file) == written[name]["bytes"]
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

    With adapters in model_config, params are these alone and a PEFT directory beside
    card["base_model"] is written. tokenizer_source is an HF directory or a .gguf file; card is what
    the model card reports. An
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
        recover(path)
        check_destination(path)
        remove_tree(temporary)
        temporary.mkdir(parents=True)
    hosts.barrier("export: directory")
    try:
        options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "max_shard_bytes": max_shard_bytes}
        options["form"] = "peft" if model_config.lora else "hf"
        hf.save_params(temporary, model_config, params, **options)
        if hosts.first():
            small: dict[str, Any] = {"dtype": dtype, "base": card["base_model"]}
            write_small(temporary, model_config, home, tokenizer, template, **small)
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


def write_small(
    directory: Path,
    model_config: ModelConfig,
    home: Path,
    tokenizer: Tokenizer,
    template: TemplateChoice,
    *,
    dtype: str,
    base: str,
) -> None:
    """Write every file that a user's files give: all but weights, card and marker."""
    if model_config.lora is None:
        (directory / "config.json").write_bytes(to_json(to_hf(model_config, dtype=dtype)))
    else:
        base = base if "://" in base else os.path.abspath(base)
        settings = peft.to_peft(model_config, base)
        (directory / peft.ADAPTER_CONFIG).write_bytes(to_json(settings))
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
