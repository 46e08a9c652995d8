"""What a run is set up with: the student, the datasets, the live teacher and the parameters."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dcod_jax import config as configs
from dcod_jax import seeds
from dcod_jax.data.dataset import MANIFEST, TraceDataset, check_fingerprints, split_paths
from dcod_jax.data.teachers import teacher_entries
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path, check_own
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.models import hf, lora, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.tensor_files import weight_map
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import check_divides, make_mesh
from dcod_jax.score.alignment import ONLY_TEXT
from dcod_jax.score.teacher import expected_weights, open_teacher
from dcod_jax.train import learned_from
from dcod_jax.train.checkpoint_reader import (
    check_base,
    find_run,
    read_params,
    read_record,
    read_student,
)
from dcod_jax.train.checkpointer import Record, Snapshot, finished, sharded_shapes
from dcod_jax.train.checkpoints import Checkpoints
from dcod_jax.train.forward import TeacherModel
from dcod_jax.train.held_out import questions
from dcod_jax.train.metrics import TRACES
from dcod_jax.train.settings import loss_config, student_source
from dcod_jax.train.step import check_batch, init_state
from dcod_jax.types import Params

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they change what is learned only by the
# order of floating-point sums.
FREE = (
    "run_dir compare log_level compilation_cache mesh. student.remat student.attention "
    "train.gradient_sums train.log_every train.eval train.save_every train.keep train.local_ "
    "train.best_metric "
    "train.progress train.microbatches optim.offload optim.max_skipped loss.head data.prefetch "
    "data.verify_checksums data.traces data.eval data.split "
    "data.dataset teacher. prepare. score. generate. evaluate. drift. report. export. plan. tune. "
    "student.path student.config student.tokenizer train.init_from train.accept_changed_data "
    "train.on_damaged_checkpoint hosts. profile."
).split()
LIVE = ("teacher.path", "teacher.dtype")  # not free where the teacher is part of the step


@dataclasses.dataclass(frozen=True)
class Student:
    """What is trained, without its parameters."""

    config: ModelConfig
    tokenizer: Tokenizer
    valid_vocab: int  # the tokenizer's real size; rows of the embedding above it are padding


# File of run_dir -> what says that it is of an earlier start of this program.
OWN_FILES = {
    "config.json": ('"run_dir"', '"on_policy"'),
    "metrics.jsonl": ('"step"',),
    TRACES: ('"step"', '"most"'),
    "goodput.json": ('"attempts"', '"total"'),
    "remat.json": ('"program"', '"peak"'),
}


def preflight(config: Any) -> None:
    """Refuse what cannot train before hours go into sampling and scoring for it."""
    run_dir = as_path(config.run_dir)
    for name, marks in OWN_FILES.items():
        check_own(run_dir / name, *marks)
    goes_on = bool(finished(run_dir / "checkpoints"))
    if not (run_dir / "config.json").is_file() and not goes_on:
        check_own(run_dir / "metrics.jsonl", "config.json beside it")  # it is another program's
    if config.train.init_from and not goes_on:
        find_run(config.train.init_from, key="train.init_from")
    student = load_student(config)
    opened = [config.teacher.path] if config.loss.teacher == "live" else []
    if not (config.train.init_from or goes_on):
        opened.append(config.student.path)
    for place in map(as_path, filter(None, opened)):
        if place.is_dir():
            weight_map(place)
    mesh = make_mesh(**config.mesh)
    questions(config, student.config, student.tokenizer)
    check_batch(config.data.batch_size, config.train.microbatches, mesh)
    transformer.check_mesh(student.config, mesh)
    check_divides(mesh, {"data.seq_len": ("length", config.data.seq_len)})
    loss = loss_config(config)
    for entry in teacher_entries(config):
        place = entry.tokenizer or entry.path
        compared = loss.needs_distribution or loss.teacher == "live"
        if compared and place and as_path(place).exists():
            _check_shared(config, student, load_tokenizer(place))
    if loss.teacher == "cached" and DIVERGENCES[loss.divergence].acts_on_student:
        log.warning(
            "loss.divergence=%s depends on the teacher's probabilities of the tokens that the "
            "student believes in, and a top-k cache does not hold them; far from the teacher its "
            "gradient is off by half or more (docs/cached_teacher.md). loss.teacher=live is exact",
            loss.divergence,
        )


def load_student(config: Any) -> Student:
    """Architecture and tokenizer of student.path or student.config."""
    source = student_source(config)
    model_config = lora.with_adapter(hf.read_config(source), config.student.lora)
    tokenizer = student_tokenizer(config.student)
    if len(tokenizer) > model_config.vocab_size:
        raise DcodError(
            f"the tokenizer has {len(tokenizer)} entries, {source} only "
            f"vocab_size={model_config.vocab_size} rows; set student.tokenizer to its own"
        )
    return Student(model_config, tokenizer, len(tokenizer))


def expected_teacher(config: Any, told: dict[str, Any] | None) -> str | None:
    """Hash of the teacher whose log-probs are needed; None: of any. told: the manifest's."""
    needed = loss_config(config).needs_cache and config.prepare.logprobs != "require"
    entries = teacher_entries(config)
    return expected_weights(entries, told) if needed and entries else None


def expected_start(config: Any) -> str | None:
    """Hash of the start whose log-probs the loss needs in the dataset; None: of none."""
    needed = loss_config(config).weights.needs_start
    return hf.weights_fingerprint(as_path(config.student.path)) if needed else None


def dataset_splits(config: Any) -> dict[str, Path]:
    """{"train": ..., "eval": ...} of the trace dataset, as far as they are finished."""
    paths = split_paths(as_path(configs.dataset_dir(config)))
    found = zip(("train", "eval"), paths, strict=False)
    return {name: path for name, path in found if (path / MANIFEST).is_file()}


def open_datasets(config: Any, student: Student) -> tuple[TraceDataset, TraceDataset | None]:
    """(train, held-out or None), checked against the student's tokenizer and template."""
    opened = []
    for path in split_paths(as_path(configs.dataset_dir(config))):
        # All see the same files; a copy of a store's is compared with its hash when it is opened.
        dataset = TraceDataset(path, verify=config.data.verify_checksums and hosts.first())
        check_fingerprints(
            dataset,
            tokenizer=tokenizer_fingerprint(student.tokenizer),
            template=template_fingerprint(student.tokenizer),
            teacher=expected_teacher(config, dataset.manifest.get("teacher")),
            start=expected_start(config),
        )
        longest = int(dataset.lengths[:, 0].max())
        if longest > student.config.max_position_embeddings:
            raise DcodError(
                f"{path}: a trace has {longest} tokens, the student's max_position_embeddings is "
                f"{student.config.max_position_embeddings}; prepare with a lower data.max_length"
            )
        opened.append(dataset)
    return opened[0], opened[1] if len(opened) > 1 else None


def _check_shared(config: Any, student: Student, other: Tokenizer) -> None:
    """Refuse a loss that compares two vocabularies token by token."""
    own, theirs = (tokenizer_fingerprint(t) for t in (student.tokenizer, other))
    if own != theirs:
        raise DcodError(
            f"loss.teacher={config.loss.teacher}, loss.divergence={config.loss.divergence}: the "
            f"teacher has another tokenizer than the student ({theirs} and {own}): {ONLY_TEXT} "
            "and score stores (loss.teacher=cached)"
        )


def load_live_teacher(
    config: Any, student: Student, mesh: Mesh
) -> tuple[TeacherModel | None, tuple[Params, ...]]:
    """The teacher of loss.teacher=live and its frozen parameters, sharded as the student's."""
    if config.loss.teacher != "live":
        return None, ()
    teacher = open_teacher(config.teacher, template=template_of(config.student))
    _check_shared(config, student, teacher.tokenizer)
    model_config, params = teacher.load(mesh)
    if config.data.seq_len > model_config.max_position_embeddings:
        raise DcodError(
            f"data.seq_len={config.data.seq_len} exceeds the teacher's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    return TeacherModel(model_config, jnp.dtype(config.teacher.dtype)), (params,)


def load_base(config: Any, student: Student, mesh: Mesh) -> tuple[Params, ...]:
    """The frozen parameters that adapters are trained beside, in the compute dtype; () without."""
    if student.config.lora is None:
        return ()
    dtype = jnp.dtype(config.student.compute_dtype)
    return (hf.load_model(config.student.path, dtype=dtype, mesh=mesh)[1],)


def initial_snapshot(
    config: Any,
    student: Student,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    learns_from: dict[str, Any],
) -> Snapshot:
    """The run that the loop continues, with parameters from the first of these that exists.

    1. run_dir's newest checkpoint, or a newer one on the processes' own disks: the whole run;
    2. train.init_from: the parameters of another run's newest checkpoint, at step 0;
    3. student.path: HF or GGUF weights, where all of them are trained;
    4. random ones: of student.config, or new adapters beside student.path.
    """
    shapes = sharded_shapes(student.config, mesh)
    options: dict[str, Any] = {"mesh": mesh, "model_config": student.config}
    options["offload"] = config.optim.offload
    like = init_state(shapes, optimizer, **options, abstract=True)
    if found := checkpoints.restore(like, before=config.train.steps):
        _check_same_run(config, found.config, checkpoints.shared.directory)
        local = checkpoints.local.newest  # 0 unless the run was restored from there
        where = f", from the local checkpoints in {config.train.local_dir}" if local else ""
        log.info("resuming %s at step %d%s", config.run_dir, found.step, where)
        data = learned_from.goes_on_with(
            learns_from,
            found,
            checkpoints.shared.directory,
            accept=config.train.accept_changed_data,
            steps=config.train.steps,
        )
        return dataclasses.replace(found, config=config.to_dict(), data=data)
    if config.train.init_from:
        params, record = _from_run(config, student, shapes, mesh)
        log.info("parameters from %s, step %d", config.train.init_from, record.step)
    elif config.student.path and student.config.lora is None:
        _, params = hf.load_model(config.student.path, dtype=jnp.float32, mesh=mesh)
        log.info("parameters from %s", config.student.path)
    else:
        key, adapters = seeds.key_seed(config.seed, "init"), student.config.lora
        params = lora.init_trained(student.config, jax.random.key(key), mesh)
        what = f"random parameters for {config.student.config}"
        what = f"new adapters of rank {adapters.rank}" if adapters else what
        log.info("%s, seed %d", what, config.seed)
    state = init_state(params, optimizer, **options)
    data = {"parts": learns_from, "changes": []}
    return Snapshot(state=state, step=0, config=config.to_dict(), data=data)


def _from_run(config: Any, student: Student, shapes: Params, mesh: Mesh) -> tuple[Params, Record]:
    """Parameters of train.init_from: those of its student, or adapters of the same base."""
    place, source = config.train.init_from, student_source(config)
    if student.config.lora is None:
        return read_student(place, source, mesh=mesh, key="train.init_from")[1:]
    run = read_record(place, key="train.init_from")
    check_base(run, source, hf.weights_fingerprint(source))
    return read_params(place, shapes, key="train.init_from")


def _check_same_run(config: Any, earlier: dict[str, Any], directory: Path) -> None:
    """Refuse other settings than the run's; a key that it did not have must be at its default."""
    before = configs.keys(configs.to_config(earlier))
    endless = config.optim.schedule == "constant" and config.loss.divergence != "taid"
    free = FREE + (["train.steps"] if endless else [])
    defaults = configs.keys(configs.load_recipe(configs.BASE))
    now = configs.keys(config)
    new = [key for key in now.keys() - before.keys() if now[key] == defaults.get(key)]
    new = [key for key in new if not key.startswith(tuple(free))]
    if new:
        log.info("%s is of an earlier version, without %s", directory, ", ".join(sorted(new)))
    changed = [
        f"{key}: {before.get(key, 'unknown')!r} then, {value!r} now"
        for key, value in now.items()
        if key not in new
        and before.get(key) != value
        and (not key.startswith(tuple(free)) or (config.loss.teacher == "live" and key in LIVE))
    ]
    if changed:
        raise DcodError(
            f"{directory} belongs to a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or choose another run_dir (train.init_from starts from it)"
        )
