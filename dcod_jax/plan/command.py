"""Compile a recipe's programs for a TPU slice that is not at hand, and say what they would need.

    pip install "jax[tpu]"
    python -m dcod_jax.plan --config my_recipe.py --topology v5e:4x4 [--num-slices 2]

Compiles the real train step, and with teacher.path the scoring step, and prints memory of a device
against its limit, operations, bytes by collective, an estimated step time with its assumptions, and
the largest batch that fits. A recipe that does not fit is compiled again with the cheapest
remedies. Only config.json files are read, no weights. Writes run_dir/plan.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path, check_own, replace_file
from dcod_jax.models import hf
from dcod_jax.models import remat as remats
from dcod_jax.models.counts import num_params
from dcod_jax.parallel.mesh import batch_shards, make_mesh, parts
from dcod_jax.plan import estimate, programs
from dcod_jax.plan.chips import GIB
from dcod_jax.plan.programs import DoesNotFitError, Target

log = logging.getLogger(__name__)

MAX_COMPILATIONS = 13  # of the search for the largest batch


def plan(config: Any) -> dict[str, Any]:
    """Compile, search, print tables and write run_dir/plan.json; returns its content."""
    if not config.plan.topology:
        raise DcodError("plan.topology is empty: --topology v5e:4x4 (or v5p:2x2x4, ..., cpu:8)")
    path = check_own(as_path(config.run_dir) / "plan.json", '"topology"', '"attempts"')
    if not config.plan.topology.startswith("gpu:"):
        jax.config.update("jax_platforms", "cpu")  # also on a TPU host: its chips are left alone
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold such programs
    target = programs.target(config)
    config = configs.replace(config, {"mesh.slices": target.slices})
    attempts, fitting, report = _first_fit(config, target)
    result: dict[str, Any] = {
        "topology": target.topology,
        "slices": target.slices,
        "devices": len(target.devices),
        "parameters": num_params(programs.student_of(config)),
        "active_parameters": num_params(programs.student_of(config), active=True),
        "memory_limit": target.limit,
        "attempts": attempts,
        "train": report,
        "score": None,
        "largest_batch": None,
        "jax": jax.__version__,
    }
    if fitting is not None and report is not None:
        _say(f"student: {result['parameters']:,} parameters")
        _show_memory("train step", report, target)
        _show_collectives(report)
        _say(
            f"operations of a step: {report['model_flops']:.3e} of the model, "
            f"{report['executed_flops']:.3e} in matrix products outside kernels (recomputation and "
            "teacher included)"
        )
        _say_speed(fitting.data.seq_len, report)
        result["score"] = _score(fitting, target)
        if config.plan.largest_batch:
            result["largest_batch"] = _largest(fitting, target, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    log.info("written: %s", path)
    if fitting is None:
        raise DcodError(
            f"nothing fits {target.topology} ({len(target.devices)} devices of "
            f"{_size(target.limit)}): take a larger slice, or a shorter data.seq_len"
        )
    return result


# ---------------------------------------------------------------- one compile


def _try(config: Any, target: Target) -> dict[str, Any]:
    """Numbers of the train step of a config; raises DoesNotFitError."""
    traced = programs.train_program(config, target.devices)
    program = programs.compile_program(traced, limit=target.limit)
    return program.memory | estimate.train_numbers(config, target, traced, program)


def _size(size: float | int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


# ---------------------------------------------------------------- what fits


def remedies(config: Any, devices: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(setting, changed keys), the cheapest first; each adds to the changes before it."""
    changes: dict[str, Any] = {}
    begin = remats.NAMES.index(config.student.remat.partition(":")[0])
    for remat in remats.NAMES[begin + 1 : -1]:
        changes["student.remat"] = remat
        yield f"student.remat={remat}", dict(changes)
    mesh = make_mesh(**config.mesh, devices=devices)  # its axes have sizes where a key has -1
    pieces = config.train.microbatches
    while config.data.batch_size % (pieces * 2 * batch_shards(mesh)) == 0:
        pieces *= 2
        changes["train.microbatches"] = pieces
        yield f"train.microbatches={pieces}", dict(changes)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    others = parts(mesh, "embed") // fsdp
    widths = [programs.student_of(config).hidden_size]
    if config.loss.teacher == "live":
        widths.append(hf.read_config(config.teacher.path).hidden_size)
    while data % 2 == 0 and not any(n % (2 * fsdp * others) for n in widths):
        data, fsdp = data // 2, fsdp * 2
        changes |= {"mesh.fsdp": fsdp, "mesh.data": data}
        given = "" if config.mesh.data == -1 else f", mesh.data={data}"
        yield f"mesh.fsdp={fsdp}{given}", dict(changes)
    for key, value in (("student.remat", "offload"), ("optim.offload", True)):
        if configs.replace(config, {key: value}) != config:
            changes[key] = value
            yield f"{key}={str(value).lower()}", dict(changes)


def _first_fit(
    config: Any, target: Target
) -> tuple[list[dict[str, Any]], Any | None, dict[str, Any] | None]:
    """(attempts, the recipe with the first remedy that fits, its numbers)."""
    attempts: list[dict[str, Any]] = []
    rows, fitting, report = [], None, None
    begin: dict[str, Any] = {}
    if config.student.remat == "auto":
        begin["student.remat"] = remats.NAMES[0]
        config = configs.replace(config, begin)
    for setting, changes in [("as the recipe says", begin), *remedies(config, target.devices)]:
        changed = configs.replace(config, changes)
        log.info("compiling the train step: %s", setting)
        attempts.append({"setting": setting, "changes": changes})
        try:
            report = _try(changed, target)
        except DoesNotFitError as error:
            attempts[-1]["needs"] = error.needed
            rows.append((setting, f"{_size(error.needed)}: too much", ""))
            continue
        fitting, seconds = changed, report["seconds"]
        attempts[-1] |= {"needs": report["peak"], "seconds": seconds}
        step = f"{seconds:.3f} s" if seconds else "no estimate"
        rows.append((setting, _size(report["peak"]), step))
        break
    title = f"what fits {target.topology}: {_size(target.limit)} a device; changes add up"
    _show(title, ("setting", "needs", "step"), rows)
    if fitting is not None and attempts[-1]["changes"]:
        words = (f"--config.{key}={value}" for key, value in attempts[-1]["changes"].items())
        _say("what follows is with", *words)
    return attempts, fitting, report


def _largest(config: Any, target: Target, report: dict[str, Any]) -> dict[str, Any] | None:
    """The most rows of a global batch that compile within the limit.

    Each row adds the same memory, so the next guess lies on the line through the last two sizes.
    The result was compiled, and one step more was refused.
    """
    if target.limit is None:
        log.info("largest batch: no memory limit is known (set plan.hbm_gib)")
        return None
    mesh = make_mesh(**config.mesh, devices=target.devices)
    unit = batch_shards(mesh) * config.train.microbatches
    fits, refused, compiles = config.data.batch_size // unit, None, 0
    peaks, guess = {fits: report["peak"]}, fits * 2
    while (refused is None or refused - fits > 1) and compiles < MAX_COMPILATIONS:
        changed = configs.replace(config, {"data.batch_size": guess * unit})
        compiles += 1
        try:
            peaks[guess] = _try(changed, target)["peak"]
            fits, needs = guess, _size(peaks[guess])
        except DoesNotFitError as error:
            refused, needs = guess, f"{_size(error.needed)}, too much"
        log.info("largest batch: %d rows need %s", guess * unit, needs)
        guess = _guess(peaks, fits, refused, target.limit)
    _say(
        f"largest batch: {fits * unit} rows ({fits} a micro-batch of a device, "
        f"{_size(peaks[fits])}); {refused and refused * unit} did not fit; {compiles} compiles"
    )
    return {"rows": fits * unit, "peak": peaks[fits], "refused": refused and refused * unit}


def _guess(peaks: dict[int, int], fits: int, refused: int | None, limit: float) -> int:
    """Where the line through the two largest sizes that fit meets the limit, between the bounds."""
    known = sorted(peaks)[-2:]
    guess = fits * 2 if refused is None else (fits + refused) // 2
    if len(known) == 2 and peaks[known[1]] > peaks[known[0]]:
        slope = (peaks[known[1]] - peaks[known[0]]) / (known[1] - known[0])
        guess = known[1] + int((limit - peaks[known[1]]) / slope)
    highest = refused - 1 if refused is not None else fits * 8
    return min(max(guess, fits + 1), max(highest, fits + 1))


# ---------------------------------------------------------------- the scoring step


def _score(config: Any, target: Target) -> dict[str, Any] | None:
    found = programs.score_program(config, target.devices)
    if found is None:
        log.info("scoring step: no teacher.path, not compiled")
        return None
    traced, (rows, length) = found
    try:
        program = programs.compile_program(traced, limit=target.limit)
    except DoesNotFitError as error:
        log.warning(
            "scoring step of %d x %d tokens: %s, too much; lower score.batch_tokens or raise "
            "mesh.fsdp",
            *(rows, length, _size(error.needed)),
        )
        return {"rows": rows, "length": length, "needs": error.needed, "fits": False}
    flops = estimate.teacher_flops(config, rows * length, length)
    report = program.memory | estimate.timing(target, program, flops, rows * length)
    _show_memory(f"scoring step, {rows} x {length} tokens", report, target)
    _say_speed(length, report)
    return report | {"rows": rows, "length": length, "fits": True}


# ---------------------------------------------------------------- printing


def _say(*words: str) -> None:
    Console(width=100).print(*words, soft_wrap=True, highlight=False)


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def _show_memory(title: str, report: dict[str, Any], target: Target) -> None:
    rows = []
    for key in ("arguments", "temporaries", "peak", "host"):
        share = f"{report[key] / target.limit:.0%}" if target.limit and key != "host" else ""
        rows.append((key, _size(report[key]), share))
    rows.append(("limit", _size(target.limit), ""))
    _show(f"{title}: memory of a device", ("kind", "size", "of the limit"), rows)


def _show_collectives(report: dict[str, Any]) -> None:
    rows = [
        (r["kind"], r["network"], f"{r['count']:.0f}", _size(r["bytes"]), f"{r['overlapped']:.0%}")
        for r in report["collectives"]
    ]
    columns = ("kind", "network", "number", "received", "beside compute")
    _show("collectives of a device and step", columns, rows)


def _say_speed(length: int, report: dict[str, Any]) -> None:
    """The estimated time of a step with rows of `length` tokens, and its assumptions."""
    if report["seconds"]:
        share = f"MFU {report['mfu']:.1%}, " if "mfu" in report else ""
        _say(
            f"step: {report['seconds']:.3f} s estimated, {share}"
            f"{report['tokens_per_day'] / 1e9:.2f} G tokens a day "
            f"(rows of {length}, padding included)"
        )
    for line in report["assumptions"]:
        _say(f"  assumed: {line}")
