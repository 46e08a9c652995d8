"""Grade models on benchmarks and held-out problems: teacher, start and exported students.

Grades teacher.path, student.path and every export of the run, as far as they exist, on
evaluate.problems and evaluate.sets. Writes run_dir/evaluation/: every generation
with its grade and results.json, in one folder for each set. Prints the tables. The same command
after an interruption goes on with the blocks of answers that are left.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import time
from typing import Any

import jax.numpy as jnp

from dcod_jax import config as configs
from dcod_jax import seeds
from dcod_jax.data.blocks import BlockFiles
from dcod_jax.data.teachers import teacher_paths
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.benchmarks import BENCHMARKS
from dcod_jax.evaluate.generations import (
    Generation,
    Sampling,
    answer,
    evaluation_sampling,
    read_generations,
    to_line,
)
from dcod_jax.evaluate.grading import RULES
from dcod_jax.evaluate.metrics import (
    accuracy_table,
    detail_tables,
    measure,
    paired_difference,
    show,
)
from dcod_jax.evaluate.problems import ProblemSet, problem_sets
from dcod_jax.evaluate.prompts import prompt_form, set_prompts
from dcod_jax.export.command import MARKER, export_path
from dcod_jax.files import Path, as_path, check_own, rename, replace_file, to_json
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.models import hf
from dcod_jax.parallel import hosts
from dcod_jax.sample.decoding import DecodingParams
from dcod_jax.sample.sampler import decoding_params

log = logging.getLogger(__name__)

BATCHES_IN_BLOCK = 4  # decoded between two appends to the file of generations


def evaluate(config: Any) -> None:
    """Evaluate every model and set that the config names and that exists."""
    if not config.evaluate.problems and not config.evaluate.sets:
        raise DcodError(
            "evaluate.problems is empty (expected a JSONL file of {prompt, answer}), and so is "
            f"evaluate.sets (expected names: {', '.join(BENCHMARKS)})"
        )
    paths = teacher_paths(config) | {"start": config.student.path}
    paths |= {name: str(path) for name, path in exported_students(config).items()}
    paths = {name: path for name, path in paths.items() if path}
    if not paths:
        raise DcodError(
            f"nothing to evaluate: no export in {export_path(config)}; set student.path to an HF "
            "directory, or run `python -m dcod_jax.export` first"
        )
    compare(config, paths, detailed=True)


def exported_students(config: Any) -> dict[str, Path]:
    """The exports that exist: "student", or one for each variant of compare."""
    found = {name or "student": export_path(one) for name, one in configs.variants(config)}
    return {name: path for name, path in found.items() if (path / MARKER).is_file()}


def compare(config: Any, paths: dict[str, str], *, detailed: bool = False) -> None:
    """Grade {model name: path} on every set; write and print the results.

    run_dir/evaluation has the generations of evaluate.problems and results.json, and a folder of
    that kind for each set. What is already answered with the same settings is not asked again.
    """
    sets = problem_sets(config)
    folder = as_path(config.run_dir) / "evaluation"
    for problem_set in sets:
        check_own(folder / problem_set.name / "results.json", '"baseline"', '"models"')
    answers: dict[str, dict[str, tuple[list[Generation], float]]] = {s.name: {} for s in sets}
    with locked(folder / ".lock", what=str(folder)):
        hosts.barrier("the lock of evaluation")
        for name, path in paths.items():
            model = _EvaluatedModel(config, name, path)
            for problem_set in sets:
                home = folder / problem_set.name
                home.mkdir(parents=True, exist_ok=True)
                answers[problem_set.name][name] = grade_set(config, model, problem_set, home)
    students = [name for name in paths if name not in {"start", *teacher_paths(config)}]
    baseline = students[0] if len(students) > 1 else "start"
    for problem_set in sets:
        rows = compared_rows(answers[problem_set.name], baseline=baseline)
        if hosts.first():
            results = {"baseline": baseline, "skipped": problem_set.skipped, "models": rows}
            replace_file(folder / problem_set.name / "results.json", to_json(results))
        show(accuracy_table(_title(config, problem_set), rows, baseline=baseline))
        if detailed:
            show(*detail_tables(problem_set.name or "problems", rows))
    log.info("every generation with its grade: %s", folder)


def compared_rows(
    answers: dict[str, tuple[list[Generation], float]], *, baseline: str
) -> dict[str, dict[str, Any]]:
    """The metrics of each model, from its generations and the seconds they took.

    difference is the accuracy minus the baseline's on the same problems.
    """
    rows = {}
    for name, (generations, seconds) in answers.items():
        rows[name] = measure(generations, seconds=seconds)
        if baseline in answers and name != baseline:
            difference = paired_difference(answers[baseline][0], generations)
            keys = ("difference", "difference_low", "difference_high")
            rows[name] |= dict(zip(keys, difference, strict=True))
    return rows


def _title(config: Any, problem_set: ProblemSet) -> str:
    settings, count = config.evaluate, len(problem_set.problems)
    kind = "accuracy" if settings.samples == 1 else f"pass@1 of {settings.samples} answers"
    how = "Greedy" if settings.temperature == 0 else f"Temperature {settings.temperature:g}"
    if problem_set.name:
        return f"{problem_set.name}: {how} {kind} on {count} problems"
    return f"{how} {kind} on {count} held-out problems"


# ---------------------------------------------------------------- one set, one model


class _EvaluatedModel:
    """One model of the comparison; its parameters are read when a set is not answered yet."""

    def __init__(self, config: Any, name: str, path: str):
        self.config, self.name, self.path = config, name, as_path(path)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The start is asked with the tokenizer it is trained with, others with their own."""
        if self.name == "start":
            return student_tokenizer(self.config.student)
        return load_tokenizer(self.path, template=template_of(self.config.student))

    @functools.cached_property
    def fingerprint(self) -> str:
        return hf.weights_fingerprint(self.path)

    @functools.cached_property
    def share(self) -> tuple[Any, int, int]:
        """(mesh, i, n): this process answers every n-th block from i on, on this mesh."""
        return hosts.share(self.config)

    @functools.cached_property
    def loaded(self) -> DecodingParams:
        mesh, *_ = self.share
        dtype = jnp.dtype(self.config.student.compute_dtype)
        model_config, params = hf.load_model(self.path, dtype=dtype, mesh=mesh)
        return decoding_params(
            model_config, params, valid_vocab=len(self.tokenizer), compute_dtype=dtype, mesh=mesh
        )


def _sampling(config: Any) -> Sampling:
    return evaluation_sampling(config, seed=seeds.key_seed(config.seed, "evaluate"))


def _request(config: Any, model: _EvaluatedModel, problem_set: ProblemSet) -> dict[str, Any]:
    """What the answers follow from; the batch size and the mesh are not in it."""
    rows = [[p.id, p.messages, p.answer, p.tolerance] for p in problem_set.problems]
    asked = json.dumps(rows, ensure_ascii=False, sort_keys=True)
    return {
        "problems": hashlib.sha256(asked.encode()).hexdigest(),
        "weights": model.fingerprint,
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "template": template_fingerprint(model.tokenizer),
        "prompt": dataclasses.asdict(prompt_form(config, problem_set)),
        "sampling": dataclasses.asdict(_sampling(config)),
        "max_new_tokens": config.evaluate.max_new_tokens,
        "compute_dtype": config.student.compute_dtype,
        "grading": [RULES, config.evaluate.grade_truncated],
    }


def grade_set(
    config: Any, model: _EvaluatedModel, problem_set: ProblemSet, folder: Path
) -> tuple[list[Generation], float]:
    """(graded answers of one model to one set, seconds), kept in folder/<model>.jsonl.

    An interrupted evaluation goes on with the blocks that are left. Answers that were given under
    other settings are kept as <model>.previous.jsonl and asked again.
    """
    path = folder / f"{model.name}.jsonl"
    request = _request(config, model, problem_set)
    files = BlockFiles([path], request, counts=("answered", "seconds"))
    manifest, other = files.finished()
    if manifest is None:
        hosts.barrier(f"look for the answers of {model.name}")
        if other and hosts.first():
            numbers = itertools.chain([""], itertools.count(2))
            names = (folder / f"{model.name}.previous{number}.jsonl" for number in numbers)
            previous = next(path for path in names if not path.exists())
            rename(path, previous)
            log.info("%s was written %s: kept as %s, asked again", path, other, previous.name)
        _answer_rest(config, model, problem_set, files)
        manifest = files.finish()
    return read_generations(path), manifest["seconds"]


def _answer_rest(
    config: Any, model: _EvaluatedModel, problem_set: ProblemSet, files: BlockFiles
) -> None:
    settings, sampling = config.evaluate, _sampling(config)
    asked = [(p, k) for p in problem_set.problems for k in range(sampling.samples)]
    prompts = set_prompts(config, problem_set, model.tokenizer, hf.read_config(model.path))
    _, process, processes = model.share
    most = -(-len(asked) // processes)  # so that no process is left without any
    done, left = files.pending(len(asked), min(BATCHES_IN_BLOCK * settings.batch_size, most))
    label = f"evaluating {model.name}" + (f" on {problem_set.name}" if problem_set.name else "")
    if done:
        log.info("%s: going on after %d answers", label, done)
    own = left[process::processes]
    total, enabled = sum(map(len, own)), config.train.progress
    with track(label, total, unit="answers", enabled=enabled) as bar:
        for block in own:
            began = time.monotonic()
            generations = answer(
                model.loaded,
                model.tokenizer,
                [asked[i] for i in block],
                [prompts[i // sampling.samples] for i in block],
                indices=block,
                sampling=sampling,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                grade_truncated=settings.grade_truncated,
                on_batch=lambda sequences, tokens: bar(sequences),
            )
            if processes > 1 or hosts.first():
                counts = {"answered": len(block), "seconds": time.monotonic() - began}
                files.write(block, ["".join(map(to_line, generations))], counts)
