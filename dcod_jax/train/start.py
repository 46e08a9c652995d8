"""Where a run starts: the student, its data, and its parameters by the restore precedence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dcod_jax import config as configs
from dcod_jax.data.dataset import TraceDataset, check_fingerprints
from dcod_jax.data.tokenizer import student_tokenizer, template_fingerprint, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path
from dcod_jax.losses import distill
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import check_divides, make_mesh, tree_shardings
from dcod_jax.score.scoring import open_teacher
from dcod_jax.train.checkpoint import Checkpointer, Restored
from dcod_jax.train.forward import TeacherModel
from dcod_jax.train.local_checkpoints import LocalCheckpoints
from dcod_jax.train.settings import loss_config
from dcod_jax.train.step import check_batch, init_state
from dcod_jax.types import Params, TrainState

# Keys that may differ between a run and its continuation: they cannot change what is learned
# beyond the order in which floating-point sums are taken.
FREE = (
    "run_dir compare log_level mesh. student.remat train.log_every train.eval train.save_every "
    "train.keep train.local_ train.best_metric train.progress train.microbatches "
    "optim.offload loss.head data.prefetch data.verify_checksums data.traces data.eval data.split "
    "data.dataset teacher. prepare. score. generate. evaluate. drift. report. export. plan. "
    "student.path student.config student.tokenizer train.init_from hosts. profile."
).split()
LIVE = ("teacher.path", "teacher.dtype")  # not free where the teacher runs in the step


@dataclasses.dataclass(frozen=True)
class Student:
    """What is trained, without its parameters."""

    source: str
    config: ModelConfig
    tokenizer: Any
    valid_vocab: int  # the tokenizer's real size; rows of the embedding above it are padding


def preflight(config: Any) -> None:
    """Refuse what cannot train before hours go into sampling and scoring for it."""
    student = load_student(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config.data.batch_size, config.train.microbatches, mesh)
    transformer.check_mesh(student.config, mesh)
    check_divides(mesh, {"data.seq_len": ("length", config.data.seq_len)})
    loss = loss_config(config)
    if loss.teacher == "cached" and DIVERGENCES[loss.divergence].acts_on_student:
        print(
            f"note: loss.divergence={loss.divergence} acts on what the student believes, and a "
            "top-k cache does not hold the teacher's view of that; far from the teacher its "
            "gradient is off by half or more (docs/cached_teacher.md). "
            "loss.teacher=live is exact"
        )


def load_student(config: Any) -> Student:
    """Architecture and tokenizer of student.path or student.config."""
    source = config.student.path or config.student.config
    if not source:
        raise DcodError(
            "no student: set student.path (HF directory or .gguf) or student.config (config.json)"
        )
    path = as_path(source)
    model_config = hf.read_config(path)
    tokenizer = student_tokenizer(config.student)
    if len(tokenizer) > model_config.vocab_size:
        raise DcodError(
            f"the tokenizer has {len(tokenizer)} entries, {source} only "
            f"vocab_size={model_config.vocab_size} rows; set student.tokenizer to its own"
        )
    return Student(source, model_config, tokenizer, len(tokenizer))


def expected_teacher(config: Any) -> str | None:
    """Hash of the teacher whose log-probs the loss must find in the dataset; None: any, or none."""
    needed = distill.needs_cache(loss_config(config))
    if not needed or not config.teacher.path or config.prepare.logprobs == "require":
        return None
    return hf.weights_fingerprint(config.teacher.path)


def open_datasets(config: Any, student: Student) -> tuple[TraceDataset, TraceDataset | None]:
    """(train, held-out or None), checked against the student's tokenizer and template."""
    root = as_path(configs.dataset_dir(config))
    split = (root / "train").is_dir()
    opened = []
    for path in (root / "train", root / "eval") if split else (root,):
        if path.name == "eval" and not path.is_dir():
            continue
        dataset = TraceDataset(path, verify=config.data.verify_checksums)
        check_fingerprints(
            dataset,
            tokenizer=tokenizer_fingerprint(student.tokenizer),
            template=template_fingerprint(student.tokenizer),
            teacher=expected_teacher(config),
        )
        longest = int(dataset.lengths[:, 0].max())
        if longest > student.config.max_position_embeddings:
            raise DcodError(
                f"{path}: a trace has {longest} tokens, the student's max_position_embeddings is "
                f"{student.config.max_position_embeddings}; prepare with a lower data.max_length"
            )
        opened.append(dataset)
    return opened[0], opened[1] if len(opened) > 1 else None


def load_live_teacher(
    config: Any, student: Student, mesh: Any
) -> tuple[TeacherModel | None, tuple[Params, ...]]:
    """The teacher of loss.teacher=live and its frozen parameters, sharded as the student's.

    Raises DcodError when its tokenizer is another one than the student's.
    """
    if config.loss.teacher != "live":
        return None, ()
    teacher = open_teacher(config.teacher, chat_template=config.student.chat_template)
    own, other = (tokenizer_fingerprint(t) for t in (student.tokenizer, teacher.tokenizer))
    if own != other:
        raise DcodError(
            f"loss.teacher=live: {config.teacher.path} has another tokenizer than the student "
            f"({other} and {own}); their token ids must mean the same"
        )
    model_config, params = teacher.load(mesh)
    if config.data.seq_len > model_config.max_position_embeddings:
        raise DcodError(
            f"data.seq_len={config.data.seq_len} exceeds the teacher's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    return TeacherModel(model_config, jnp.dtype(config.teacher.dtype)), (params,)


def start_state(
    config: Any,
    student: Student,
    optimizer: Any,
    mesh: Any,
    checkpointer: Checkpointer,
    local: LocalCheckpoints,
) -> tuple[TrainState, Restored | None]:
    """The state to start from, by the precedence written at the top of checkpoint.py."""
    shardings = tree_shardings(mesh, transformer.logical_axes(student.config))
    shapes = jax.tree.map(
        lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout),
        transformer.param_shapes(student.config),
        shardings,
    )
    options: dict[str, Any] = {
        "mesh": mesh,
        "model_config": student.config,
        "offload": config.optim.offload,
    }
    like = init_state(shapes, optimizer, **options, abstract=True)
    if found := local.restore(like, before=config.train.steps):
        _check_same_run(config, found[1], checkpointer.directory)
        where = f"the local checkpoints in {config.train.local_dir}"
        print(f"resuming {config.run_dir} at step {found[1].step}, from {where}")
        return found
    if checkpointer.steps():
        state, restored = checkpointer.restore(like)
        _check_same_run(config, restored, checkpointer.directory)
        print(f"resuming {config.run_dir} at step {restored.step}")
        return state, restored
    if config.train.init_from:
        source = Checkpointer(config.train.init_from)
        params, restored = source.restore_params(shapes)
        print(f"parameters from {config.train.init_from}, step {restored.step}")
    elif config.student.path:
        _, params = hf.load_model(config.student.path, dtype=jnp.float32, mesh=mesh)
        print(f"parameters from {config.student.path}")
    else:
        params = _random_params(student.config, config.seed, shardings)
        print(f"random parameters for {config.student.config}, seed {config.seed}")
    return init_state(params, optimizer, **options), None


def _random_params(model_config: ModelConfig, seed: int, shardings: Params) -> Params:
    init = jax.jit(lambda key: transformer.init_params(model_config, key), out_shardings=shardings)
    return init(jax.random.key(seed))


def _check_same_run(config: Any, restored: Restored, directory: Path) -> None:
    """A continuation with other settings would be neither run."""
    before = configs.keys(configs.to_config(restored.config))
    endless = config.optim.schedule == "constant" and config.loss.divergence != "taid"
    free = FREE + (["train.steps"] if endless else [])
    changed = [
        f"{key}: {before.get(key)!r} then, {value!r} now"
        for key, value in configs.keys(config).items()
        if before.get(key) != value
        and (not key.startswith(tuple(free)) or (config.loss.teacher == "live" and key in LIVE))
    ]
    if changed:
        raise DcodError(
            f"{directory} belongs to a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or choose another run_dir (train.init_from starts from it)"
        )
