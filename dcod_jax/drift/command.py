"""How far a student's errors compound on its own text: ExAccErr against the teacher, by length.

Samples continuations of drift.prompts (or evaluate.problems) from the teacher and from each student
(student.path as "start", and the run's exports), takes KL(teacher‖student) along both, and prints
ExAccErr with 95 % intervals (docs/drift.md). Writes run_dir/drift.json and, for every sequence,
run_dir/drift/<student>.npz; an interrupted run goes on after the last finished block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dcod_jax import seeds
from dcod_jax.copies import read_arrays
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    student_tokenizer,
    tokenizer_fingerprint,
)
from dcod_jax.data.turns import stop_ids
from dcod_jax.drift.curves import Curve, drift_curves, excess_difference, position_means
from dcod_jax.drift.scores import (
    DriftModel,
    DriftSettings,
    Measured,
    Scored,
    empty,
    measure,
    to_samples,
)
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.command import exported_students
from dcod_jax.evaluate.metrics import number_table, show
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.evaluate.prompts import PromptForm, encode_prompts
from dcod_jax.export.command import export_path
from dcod_jax.files import Path, as_path, atomic_write, check_own, replace_file, to_json
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.models import hf
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.sample.sampler import Sample
from dcod_jax.score.teacher import Teacher, open_teacher

log = logging.getLogger(__name__)

RESULT = "drift.json"
SIDES = ("student", "teacher")  # whose sequences they are
LEAST = 10  # sequences alive in both sets up to which a length is reported
LENGTHS = (16, 64, 256, 1024)  # rows of the table, and the longest length reported
BLOCK_BATCHES = 4  # sampling batches between two saved blocks


def drift(config: Any) -> dict[str, Any]:
    """Measure every student that exists; returns what drift.json holds."""
    if jax.process_count() > 1:
        raise DcodError("drift runs on one process; start it on one host")
    results = check_own(as_path(config.run_dir) / RESULT, '"baseline"', '"models"')
    teacher = open_teacher(config.teacher, template=template_of(config.student))
    tokenizer = student_tokenizer(config.student)
    students = _students(config)
    prompts = _prompts(config, tokenizer, [teacher.path, *students.values()])
    _check_tokenizer("teacher", teacher.path, teacher.tokenizer, tokenizer)
    for name, path in students.items():
        if name != "start":  # which is asked with the tokenizer that it is trained with
            own = load_tokenizer(path, template=template_of(config.student))
            _check_tokenizer(name, path, own, tokenizer)
    folder = as_path(config.run_dir) / "drift"
    with locked(folder / ".lock", what=str(folder)):
        run = _Run(config, teacher, tokenizer, prompts, folder)
        measured = {name: run.student(name, path) for name, path in students.items()}
    result = summary(config, measured, prompts=len(prompts), teacher=teacher.name)
    replace_file(results, to_json(result))
    show(table(result))
    log.info("curves: %s; every sequence: %s", results, folder)
    return result


# ---------------------------------------------------------------- what exists


def _prompts(config: Any, tokenizer: Tokenizer, models: Sequence[Path]) -> list[list[int]]:
    """Token ids of the prompts, each of which has to leave room in every model."""
    path = config.drift.prompts or config.evaluate.problems
    if not path:
        raise DcodError("drift.prompts and evaluate.problems are empty; expected a prompts JSONL")
    problems = read_problems(
        path,
        system_prompt=config.prepare.system_prompt,
        prompt_field=config.prepare.prompt_field,
        limit=config.drift.limit,
        need_answer=False,
    )
    key, most = "drift.max_new_tokens", config.drift.max_new_tokens
    options = {"form": PromptForm(), "key": key, "max_new_tokens": most}
    return encode_prompts(problems, tokenizer, *map(hf.read_config, models), **options)


def _students(config: Any) -> dict[str, Path]:
    """The start and the run's exports, as far as they exist."""
    found = {"start": as_path(config.student.path)} if config.student.path else {}
    found |= exported_students(config)
    if not found:
        raise DcodError(
            f"no student to measure: no export in {export_path(config)}; set student.path to an "
            "HF directory, or run `python -m dcod_jax.export` first"
        )
    return found


def _check_tokenizer(name: str, path: Path, own: Tokenizer, tokenizer: Tokenizer) -> None:
    """Every model must mean the same by a token id; a template of its own does not matter."""
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise DcodError(
            f"{name} ({path}) has another tokenizer than the student; KL between distributions "
            "over different tokens means nothing"
        )


# ---------------------------------------------------------------- measuring, block by block


class _Run:
    """The loaded teacher, its sequences, and the blocks on the disk."""

    def __init__(
        self,
        config: Any,
        teacher: Teacher,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        folder: Path,
    ):
        self.config, self.source, self.folder = config, teacher, folder
        self.tokenizer, self.prompts = tokenizer, prompts
        self.mesh = make_mesh(**config.mesh)
        self.teacher: DriftModel | None = None
        self.drawn: list[Sample] = []  # the teacher's sequences of the first prompts

    def student(self, name: str, path: Path) -> Measured:
        """Both prefix sets of one student, read where they were measured before."""
        request = self._request(path)
        final = self.folder / f"{name}.npz"
        if done := _read(final, request, self._names(0, self.prompts)):
            self._remove_parts(name)  # of a run that was killed when it had written the whole
            log.info("%s: measured before; nothing to do", final)
            self._keep(0, done.teacher)
            return done
        names = {
            self.folder / f"{name}.part-{block:06d}.npz": self._names(block, members)
            for block, members in self._blocks()
        }
        parts, found = list(names), [_read(part, request, of) for part, of in names.items()]
        before = sum(part is not None for part in found)
        if before:
            log.info("%s: going on after %d of %d blocks", name, before, len(parts))
        total = len(self.prompts) * self.config.drift.samples * 4
        done, shown = total * before // len(parts), self.config.train.progress
        with track(f"drift {name}", total, unit="passes", done=done, enabled=shown) as advance:
            student: DriftModel | None = None
            for place, (block, members) in enumerate(self._blocks()):
                if (kept := found[place]) is None:
                    if student is None:
                        loaded = hf.load_model(path, dtype=jnp.float32, mesh=self.mesh)
                        student = DriftModel(*loaded, self.config.student.compute_dtype)
                    found[place] = kept = self._measure(student, block, members, advance)
                    _write(parts[place], kept, request)
                self._keep(block, kept.teacher)
        whole = _join([part for part in found if part is not None])
        _write(final, whole, request)
        self._remove_parts(name)
        return whole

    def _remove_parts(self, name: str) -> None:
        for part in list(self.folder.glob(f"{name}.part-[0-9]*.npz*")):
            part.unlink(missing_ok=True)

    def _names(self, first: int, prompts: Sequence[object]) -> np.ndarray:
        """Which prompt each sequence of a block continues."""
        return np.repeat(first + np.arange(len(prompts)), self.config.drift.samples)

    def _blocks(self) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
        """(first prompt, prompts) of each block."""
        settings = self.config.drift
        size = max(1, BLOCK_BATCHES * settings.batch_size // settings.samples)
        for start in range(0, len(self.prompts), size):
            yield start, self.prompts[start : start + size]

    def _measure(
        self,
        student: DriftModel,
        block: int,
        prompts: Sequence[Sequence[int]],
        advance: Callable[[int], None],
    ) -> Measured:
        if self.teacher is None:
            self.teacher = DriftModel(*self.source.load(self.mesh), self.source.dtype)
        settings = self.config.drift
        stops = {*stop_ids(self.teacher.config, self.source.tokenizer)}
        stops |= {*stop_ids(student.config, self.tokenizer)}
        known = self.drawn[block * settings.samples :][: len(prompts) * settings.samples] or None
        if known is not None:
            advance(len(known))
        drawing = DriftSettings(
            mesh=self.mesh,
            max_new_tokens=settings.max_new_tokens,
            seed=seeds.key_seed(self.config.seed, "drift"),
            eos_ids=sorted(stops),
            valid_vocab=len(self.tokenizer),
            samples=settings.samples,
            batch_size=settings.batch_size,
            batch_tokens=self.config.score.batch_tokens,
            head_chunk=self.config.loss.head_chunk,
        )
        return measure(
            self.teacher,
            student,
            prompts,
            drawing,
            teacher_samples=known,
            first_prompt=block,
            on_batch=advance,
        )

    def _keep(self, first_prompt: int, scored: Scored) -> None:
        """Remember the teacher's sequences for the next student."""
        if len(self.drawn) == first_prompt * self.config.drift.samples:
            self.drawn += to_samples(scored)

    def _request(self, path: Path) -> dict[str, Any]:
        """All that the numbers depend on."""
        settings = self.config.drift
        ids = json.dumps([list(prompt) for prompt in self.prompts]).encode()
        return {
            "teacher": self.source.provenance(),
            "student": hf.weights_fingerprint(path),
            "compute_dtype": self.config.student.compute_dtype,
            "prompts": hashlib.sha256(ids).hexdigest(),
            "seed": seeds.key_seed(self.config.seed, "drift"),
            "samples": settings.samples,
            "max_new_tokens": settings.max_new_tokens,
            "stops": stop_ids(hf.read_config(path), self.tokenizer),
        }


def _arrays(measured: Measured) -> dict[str, np.ndarray]:
    """{"<side>.<field of Scored>": array}."""
    sides = {side: vars(getattr(measured, side)) for side in SIDES}
    return {f"{s}.{name}": values for s, fields in sides.items() for name, values in fields.items()}


def _measured(arrays: Mapping[str, np.ndarray]) -> Measured:
    """The inverse of _arrays."""
    names = [field.name for field in dataclasses.fields(Scored)]
    return Measured(*(Scored(*(arrays[f"{side}.{name}"] for name in names)) for side in SIDES))


def _join(parts: Sequence[Measured]) -> Measured:
    arrays = [_arrays(part) for part in parts]
    return _measured({name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]})


def _write(path: Path, measured: Measured, request: dict[str, Any]) -> None:
    contents: dict[str, Any] = {"request": np.array(to_json(request).decode()), **_arrays(measured)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **contents)


def _fault(arrays: Mapping[str, np.ndarray], prompts: np.ndarray, width: int) -> str:
    """The first array that is no measurement of sequences of these prompts, or ""."""
    like = empty(len(prompts), width)
    for name, wanted in _arrays(Measured(like, like)).items():
        found, field = arrays.get(name), name.partition(".")[2]
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            return f"{name} is not {wanted.dtype}{list(wanted.shape)}"
        odd = (
            (field == "prompt" and (found != prompts).any())
            or (field == "length" and not 0 <= found.min() <= found.max() <= width)
            or (field == "kl" and not np.isfinite(found).all())
        )
        if odd:
            return f"a value of {name} is impossible"
    return ""


def _read(path: Path, request: dict[str, Any], prompts: np.ndarray) -> Measured | None:
    """What _write wrote of these sequences; None where there is nothing.

    Another request's answer is told and is None, too.
    """
    if not path.is_file():
        return None
    arrays = read_arrays(path, mend="move it away")
    if str(arrays.get("request")) == to_json(request).decode():
        if fault := _fault(arrays, prompts, request["max_new_tokens"]):
            raise DcodError(f"{path}: not what drift wrote ({fault}); move it away")
        return _measured(arrays)
    log.info("%s is of other models or settings: measured anew", path)
    return None


# ---------------------------------------------------------------- numbers and table


def summary(
    config: Any, measured: dict[str, Measured], *, prompts: int, teacher: str
) -> dict[str, Any]:
    """Curves of every student; null is what is not available."""
    resampling = {"resamples": config.drift.resamples, "seed": config.seed}
    models: dict[str, Any] = {}
    baseline = next((name for name in measured if name != "start"), "start")
    for name, one in measured.items():
        curves = drift_curves(*one.kls(), **resampling)
        row: dict[str, Any] = {
            "reach": curves.reach(LEAST),
            "student_alive": curves.student_alive.tolist(),
            "teacher_alive": curves.teacher_alive.tolist(),
        }
        for field in ("student_kl", "teacher_kl", "accumulated", "reference", "excess"):
            row[field] = _json(getattr(curves, field))
        ratios = {side: getattr(one, side).log_ratios() for side in SIDES}
        row["log_ratio"] = {s: _json(position_means(r, **resampling)) for s, r in ratios.items()}
        if name != baseline:
            pair = measured[baseline].kls(), one.kls()
            row["difference"] = _json(excess_difference(*pair, **resampling))
        models[name] = row
    return {
        "teacher": teacher,
        "baseline": baseline,
        "prompts": prompts,
        "samples": config.drift.samples,
        "max_new_tokens": config.drift.max_new_tokens,
        "resamples": config.drift.resamples,
        "least": LEAST,
        "models": models,
    }


def _json(curve: Curve) -> dict[str, list[float | None]]:
    return {name: _numbers(values) for name, values in dataclasses.asdict(curve).items()}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(x) if math.isfinite(x) else None for x in values]


def table(result: dict[str, Any]) -> Table:
    """R, E and ExAccErr of every student at a few lengths, up to the longest that all reach."""
    reach = min(row["reach"] for row in result["models"].values())
    count = result["prompts"] * result["samples"]
    headings = ["tokens", "own alive", "R (nats)", "E (nats)", "ExAccErr", "95 % interval"]
    if len(result["models"]) > 1:
        headings.append(f"minus {result['baseline']} (95 %)")
    title = f"Excess accumulated error (ExAccErr) on {count} sequences of each model"
    out = number_table(title, "student", *headings)
    for name, row in result["models"].items():
        for length in sorted({n for n in LENGTHS if n < reach} | {max(reach, 1)}):
            cells = [name, f"{length}", f"{row['student_alive'][length - 1]}"]
            cells += [_cell(row[key]["value"][length - 1]) for key in ("accumulated", "reference")]
            value, low, high = (row["excess"][k][length - 1] for k in ("value", "low", "high"))
            cells += [_cell(value, "%"), _span(low, high)]
            if "difference" in row:
                value, low, high = (row["difference"][k][length - 1] for k in row["difference"])
                cells.append(f"{_cell(value, '%', sign='+')} ({_span(low, high, sign='+')})")
            out.add_row(*cells)
    return out


def _cell(value: float | None, unit: str = "", *, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.1f} {unit}" if unit else f"{value:.3f}"


def _span(low: float | None, high: float | None, *, sign: str = "") -> str:
    if low is None or high is None:
        return "–"
    return f"{low:{sign}.1f} to {high:{sign}.1f} %"
