"""The time of a compiled step on a chip that is not at hand, and what the estimate assumes."""

from __future__ import annotations

from typing import Any

import jax

from dcod_jax.models import hf, remat
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.counts import flops_per_row
from dcod_jax.plan import hlo, programs
from dcod_jax.plan.programs import Program, Target

DAY = 86400.0
# Share of the peak that kernels are taken to reach; libtpu estimates none.
KERNEL_EFFICIENCY = 0.5
# Matrix products of the backward pass in units of the forward pass. Attention has 2 in its forward
# kernel and 3 (dq) and 4 (dk, dv) in the others.
ATTENTION_BACKWARD, EXPERTS_BACKWARD = 3.5, 2.0


def attention_flops(model: ModelConfig, tokens: int, length: int) -> float:
    """Operations of one causal forward pass of attention over all layers: 4·N·H·(T+1)/2 a token."""
    per_layer = 4 * model.num_heads * model.head_dim * (length + 1) / 2
    return tokens * model.num_layers * per_layer


def experts_flops(model: ModelConfig, tokens: int) -> float:
    """Operations of one forward pass of the experts' products over all layers."""
    if model.mixture is None:
        return 0.0
    per_token = model.mixture.per_token * 3 * model.hidden_size * model.mlp_width
    return 2.0 * tokens * model.num_layers * per_token


def flops_in_kernels(config: Any, tokens: int) -> float:
    """Operations of the kernels of a train step, with what the backward pass recomputes."""
    model, length = programs.student_of(config), config.data.seq_len
    modes = remat.pieces(config.student.remat, model.num_layers)
    attention, experts = (
        sum(layers for mode, layers in modes if mode not in kept) / model.num_layers
        for kept in (("none", "dots", "attention"), ("none", "dots"))
    )
    passes = 1 + attention + ATTENTION_BACKWARD
    total = passes * attention_flops(model, tokens, length)
    passes = 1 + experts + (EXPERTS_BACKWARD if model.lora is None else 1)
    total += passes * experts_flops(model, tokens)
    return total + (teacher_flops(config, tokens, length) if config.loss.teacher == "live" else 0.0)


def teacher_flops(config: Any, tokens: int, length: int) -> float:
    """Operations of the kernels of one forward pass of the teacher."""
    teacher = hf.read_config(config.teacher.path)
    return attention_flops(teacher, tokens, length) + experts_flops(teacher, tokens)


def step_flops(config: Any, model: ModelConfig, head_tokens: int) -> float:
    """Operations of the models in one train step; head_tokens: positions of a row in the head."""
    rows, length = config.data.batch_size, config.data.seq_len
    total = rows * flops_per_row(model, length, head_tokens)
    if config.loss.teacher == "live":
        teacher = hf.read_config(config.teacher.path)
        total += rows * flops_per_row(teacher, length, head_tokens) / 3
    return total


def _seconds(
    target: Target, summary: hlo.Summary, kernel_flops: float, moved: list[dict[str, Any]]
) -> tuple[float | None, list[str]]:
    """(estimated seconds of a step or None, assumptions)."""
    chip = target.chip
    if chip is None or not summary.cycles:
        return None, ["no estimate: only libtpu writes the cycles that it expects"]
    compute = summary.cycles / chip.clock
    lines = [
        f"{compute:.3f} s: libtpu's estimated cycles at {chip.clock / 1e9:.2f} GHz, loop by loop"
    ]
    if summary.kernels:
        kernel = kernel_flops / len(target.devices) / (KERNEL_EFFICIENCY * chip.peak_flops)
        lines.append(
            f"{kernel:.3f} s: kernels of attention and experts, which libtpu does not estimate, at "
            f"{KERNEL_EFFICIENCY:.0%} of the peak, every position of every row in one segment"
        )
        compute += kernel
    beside = alone = 0.0
    for row in moved:
        speed = chip.ici_bandwidth if row["network"] == "ici" else chip.dcn_bandwidth
        if speed is None:
            lines.append(f"time of the data-centre network left out: {chip.name}'s is not known")
            continue
        beside += row["bytes"] * row["overlapped"] / speed
        alone += row["bytes"] * (1 - row["overlapped"]) / speed
    lines.append(
        f"{alone:.3f} s: collectives that nothing runs beside; {beside:.3f} s more run beside "
        "compute, and count only where they take longer than it (full speed of all links)"
    )
    lines.append("not counted: input, host, checkpoints, evaluation, stragglers")
    return max(compute, beside) + alone, lines


def timing(target: Target, program: Program, kernel_flops: float, tokens: int) -> dict[str, Any]:
    """Collectives, estimated seconds and tokens a day of any step."""
    each = len(target.devices) // target.slices
    slice_of = [i // each for i in range(len(target.devices))]
    table = hlo.bytes_by_kind(program.summary, slice_of=slice_of)
    moved = [{"kind": k, "network": n, **row} for (k, n), row in sorted(table.items())]
    seconds, assumptions = _seconds(target, program.summary, kernel_flops, moved)
    return {
        "collectives": moved,
        "seconds": seconds,
        "tokens_per_day": tokens / seconds * DAY if seconds else None,
        "assumptions": assumptions,
    }


def train_numbers(
    config: Any, target: Target, traced: jax.stages.Traced, program: Program
) -> dict[str, Any]:
    """Operations, collectives, estimated seconds, MFU and tokens a day of a train step."""
    model = programs.student_of(config)
    length = config.data.seq_len
    tokens = config.data.batch_size * length
    model_flops = step_flops(config, model, programs.head_tokens(config))
    times = timing(target, program, flops_in_kernels(config, tokens), tokens)
    seconds = times["seconds"]
    peak = target.chip.peak_flops * len(target.devices) if target.chip else None
    return {
        "model_flops": model_flops,
        "executed_flops": programs.matmul_flops(traced.jaxpr),
        "windowed_products": program.summary.windowed,
        "kernels": program.summary.kernels,
        "estimated_cycles": program.summary.cycles,
        "mfu": model_flops / seconds / peak if seconds and peak else None,
        **times,
    }
