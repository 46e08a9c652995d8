"""The train and scoring steps of a config, compiled without data, weights or their devices.

A topology is "v5e:4x4" (libtpu compiles for a slice that is not at hand) or "cpu:8" (the host's
own devices; "gpu:1" likewise). Shapes stand for arrays, so only HF config.json files are read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dcod_jax.errors import DcodError
from dcod_jax.models import hf, lora
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import make_mesh, sharding
from dcod_jax.plan import chips, hlo
from dcod_jax.plan.chips import Chip
from dcod_jax.score import scoring
from dcod_jax.train.checkpointer import sharded_shapes
from dcod_jax.train.forward import TeacherModel, make_forward
from dcod_jax.train.settings import loss_config, student_source
from dcod_jax.train.step import configured_step, init_state
from dcod_jax.types import Batch, Params

log = logging.getLogger(__name__)

LIBTPU = 'pip install "jax[tpu]"'
# What keeps libtpu from looking for a TPU of this host.
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_PREFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of"),
    re.compile(r"total memory required.*?\(([\d.]+)([KMGT])\)"),
)


class DoesNotFitError(Exception):
    """The compiler refused a program that needs more memory than a device has."""

    def __init__(self, needed: float | None):
        super().__init__(f"needs {needed} bytes")
        self.needed = needed  # bytes; None where the compiler does not say


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, and what is known of them."""

    topology: str
    devices: tuple[Any, ...]
    chip: Chip | None  # None for the host's own devices
    limit: float | None  # bytes of memory a device; None: unknown
    slices: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program: bytes on a device, and what its HLO text says.

    memory has "arguments"; "peak", all that is allocated on the device, arguments included;
    "temporaries", the rest of it; and "host", bytes of the host.
    """

    memory: dict[str, int]
    summary: hlo.Summary
    text: str = dataclasses.field(repr=False)


def target(config: Any) -> Target:
    """Devices of plan.topology; raises DcodError where they cannot be described."""
    name, slices = config.plan.topology, config.plan.slices
    kind, _, shape = name.partition(":")
    limit = config.plan.hbm_gib * chips.GIB or None
    if kind in ("cpu", "gpu"):
        try:
            devices = jax.devices(kind)
        except RuntimeError:  # no such backend
            devices = []
        if not shape.isdigit() or not 1 <= int(shape) <= len(devices):
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={shape or 'N'}"
            more = {"cpu": f"start it with {flag}", "gpu": "pip install '.[gpu]', or name fewer"}
            raise DcodError(
                f"plan.topology={name!r}: the host has {len(devices)} {kind.upper()} devices; "
                f"{more[kind]}"
            )
        limit = limit or memory_limit(config, devices[0])
        return Target(name, tuple(devices[: int(shape)]), None, limit, slices)
    chip = next((chip for chip in chips.CHIPS.values() if chip.name == kind), None)
    if chip is None or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        known = ", ".join(f"{c.name}:AxB" for c in chips.CHIPS.values())
        raise DcodError(f"plan.topology={name!r} is not known: {known} (or AxBxC), cpu:N or gpu:N")
    sides = [int(side) for side in shape.split("x")]
    if len(sides) > chip.dimensions or not 0 < math.prod(sides) <= chip.largest:
        raise DcodError(
            f"plan.topology={name!r}: {chip.name} slices have {chip.dimensions} dimensions and at "
            f"most {chip.largest} chips, this is {shape} = {math.prod(sides)}; several slices are "
            "--num-slices"
        )
    devices = _describe(name, chip, slices)
    return Target(name, devices, chip, limit or chip.hbm_usable, slices)


def _describe(name: str, chip: Chip, slices: int) -> tuple[Any, ...]:
    """Devices of a topology, as libtpu describes them."""
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu raises what it likes
        text = str(error)
        if importlib.util.find_spec("libtpu") is None:
            raise DcodError(
                f"plan.topology={name}: TPU programs are compiled by libtpu, which is not "
                f"installed: {LIBTPU} ({text.splitlines()[0]})"
            ) from None
        raise DcodError(f"plan.topology={name} ({slices} slices): {text}") from None
    return tuple(found.devices)


# ---------------------------------------------------------------- what is compiled


def student_of(config: Any) -> ModelConfig:
    """Architecture of the student; no weights are read."""
    return lora.with_adapter(hf.read_config(student_source(config)), config.student.lora)


def _shapes(model: ModelConfig, dtype: DTypeLike, mesh: Mesh) -> Params:
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, dtype, sharding=one.sharding),
        sharded_shapes(model, mesh),
    )


def head_tokens(config: Any) -> int:
    """Positions of a row that the head is compiled for; without data.head_tokens all of them."""
    return min(config.data.head_tokens or config.data.seq_len, config.data.seq_len)


def batch_shapes(config: Any, mesh: Mesh) -> Batch:
    """A global batch as the pipeline makes it."""
    layout = sharding(mesh, ("batch",))
    rows, length, head = config.data.batch_size, config.data.seq_len, head_tokens(config)

    def shape(dtype: DTypeLike, *dims: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=layout)

    loss = loss_config(config)
    cache: dict[str, Any] = {}
    if loss.needs_top_k:
        k = config.score.top_k
        cache = {
            "topk_ids": shape(jnp.int32, head, k),
            "topk_logprobs": shape(jnp.bfloat16, head, k),
            "tail_logprobs": shape(jnp.float32, head),
        }
    if loss.weights.needs_start:
        cache["start_logprobs"] = shape(jnp.float32, length)
    ids = shape(jnp.int32, length)
    return Batch(
        tokens=ids,
        targets=ids,
        loss_mask=shape(jnp.bool_, length),
        segment_ids=ids,
        positions=ids,
        teacher_logprobs=shape(jnp.float32, length),
        head_positions=shape(jnp.int32, head) if head < length else None,
        **cache,
    )


def train_program(config: Any, devices: Sequence[Any], *, valid_vocab: int | None = None) -> Any:
    """The train step of the train verb, traced on shapes: .jaxpr, .lower()."""
    mesh = make_mesh(**config.mesh, devices=devices)
    model = student_of(config)
    teacher, frozen = None, ()
    if config.loss.teacher == "live":
        architecture = hf.read_config(config.teacher.path)
        teacher = TeacherModel(architecture, jnp.dtype(config.teacher.dtype))
        frozen = (_shapes(architecture, teacher.compute_dtype, mesh),)
    if model.lora is not None:
        dtype = jnp.dtype(config.student.compute_dtype)
        frozen += (_shapes(lora.without_adapter(model), dtype, mesh),)
    vocab = valid_vocab or model.vocab_size
    forward = make_forward(config, model, mesh=mesh, valid_vocab=vocab, teacher=teacher)
    step: Any
    optimizer, step = configured_step(config, forward)
    params = _shapes(model, jnp.float32, mesh)
    options: dict[str, Any] = {"model_config": model, "offload": config.optim.offload}
    state = init_state(params, optimizer, mesh=mesh, abstract=True, **options)
    return step.trace(state, batch_shapes(config, mesh), *frozen)


def score_program(
    config: Any, devices: Sequence[Any]
) -> tuple[jax.stages.Traced, tuple[int, int]] | None:
    """(the scoring step of the longest traces, its [rows, length]); None without a teacher."""
    if not config.teacher.path:
        return None
    mesh = make_mesh(**config.mesh, devices=devices)
    model = hf.read_config(config.teacher.path)
    batch = scoring.batches_by_length(
        [config.data.max_length - 1] * config.score.batch_tokens,
        batch_tokens=config.score.batch_tokens,
        shards=scoring.batch_shards(mesh),
    )[0]
    settings = scoring.score_settings(
        config,
        compute_dtype=config.teacher.dtype,
        valid_vocab=model.vocab_size,
        top_k=config.score.top_k,
        kernel=config.student.attention,
    )
    layout = sharding(mesh, ("batch", None))
    ids = jax.ShapeDtypeStruct((batch.rows, batch.length), jnp.int32, sharding=layout)
    params = _shapes(model, jnp.dtype(config.teacher.dtype), mesh)
    traced = scoring.score_step.trace(model, params, ids, ids, ids, settings=settings, mesh=mesh)
    return traced, (batch.rows, batch.length)


# ---------------------------------------------------------------- compiling


def compile_program(traced: jax.stages.Traced, *, limit: float | None = None) -> Program:
    """Compile a traced step; raises DoesNotFitError where a device has too little memory."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(bytes_needed(str(error))) from None
    memory = allocated(compiled)
    if limit is not None and memory["peak"] > limit:
        raise DoesNotFitError(float(memory["peak"]))
    text = compiled.as_text() or ""
    return Program(memory, hlo.Summary(text), text)


def allocated(compiled: Any) -> dict[str, int]:
    """Program.memory of a compiled program.

    libtpu's peak_memory_in_bytes is the sum that it holds against a chip's memory; its
    temp_size_in_bytes is more than it allocates. Elsewhere arguments, outputs and temporaries
    add up to what is allocated, and peak_memory_in_bytes leaves the temporaries out.
    """
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    peak = arguments + found.temp_size_in_bytes
    peak += found.output_size_in_bytes - found.alias_size_in_bytes
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform == "tpu":
        peak = found.peak_memory_in_bytes
    host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    return {"arguments": arguments, "temporaries": peak - arguments, "peak": peak, "host": host}


def memory_limit(config: Any, device: Any) -> float | None:
    """Bytes of memory of a device: plan.hbm_gib, what it reports, its chip's; None: unknown."""
    if config.plan.hbm_gib:
        return config.plan.hbm_gib * chips.GIB
    chip = chips.CHIPS.get(device.device_kind)
    reported = None if device.platform == "cpu" else device.memory_stats()
    if reported and "bytes_limit" in reported:
        return float(reported["bytes_limit"])
    return chip.hbm_usable if chip else None


def bytes_needed(message: str) -> float | None:
    """Bytes that a RESOURCE_EXHAUSTED message speaks of: "Used 21.2G of 15.75G hbm"."""
    found = next(filter(None, (pattern.search(message) for pattern in _NEEDED)), None)
    return float(found[1]) * _PREFIXES[found[2]] if found else None


# ---------------------------------------------------------------- operations


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Operations of a jaxpr's matrix products, loops multiplied; Pallas kernels are not seen."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            depth = math.prod(operand.shape[dimension] for dimension in contracted)
            total += 2.0 * product.size * depth
        elif equation.primitive.name != "pallas_call":
            times = equation.params.get("length", 1)  # of a scan
            if equation.primitive.name == "shard_map":
                times = equation.params["mesh"].size
            parameters = jax.tree.leaves(tuple(equation.params.values()))
            inner = [getattr(one, "jaxpr", one) for one in parameters]
            total += times * sum(matmul_flops(one) for one in inner if isinstance(one, Jaxpr))
    return total
