"""Models graded on the same problems: every set and model resumable, one table for each set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dcod_jax.data.blocks import BlockFiles
from dcod_jax.data.tokenizer import (
    load_tokenizer,
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.evaluate.details import detail_tables, details
from dcod_jax.evaluate.generations import (
    EvalResult,
    Sampling,
    answer,
    paired_difference,
    read_generations,
    sampling_of,
    summarize,
    to_line,
)
from dcod_jax.evaluate.grading import Grader
from dcod_jax.evaluate.problem_sets import (
    PLAIN_STOP,
    ProblemSet,
    check_exemplars,
    content,
    problem_sets,
    prompt_form,
)
from dcod_jax.files import Path, as_path, rename, replace_file, to_json
from dcod_jax.logs import track
from dcod_jax.models import hf
from dcod_jax.parallel import hosts
from dcod_jax.sample.decoding import DecodingParams
from dcod_jax.sample.sampler import check_room, decoding_params

BATCHES_IN_BLOCK = 4  # decoded between two appends to the file of generations


class _Model:
    """One model of the comparison; its weights are read when a set is not answered yet."""

    def __init__(self, config: Any, name: str, path: str):
        self.config, self.name, self.path = config, name, as_path(path)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The start is asked with the tokenizer it is trained with, others with their own."""
        if self.name == "start":
            return student_tokenizer(self.config.student)
        return load_tokenizer(self.path, chat_template=self.config.student.chat_template)

    @functools.cached_property
    def weights(self) -> str:
        return hf.weights_fingerprint(self.path)

    @functools.cached_property
    def share(self) -> tuple[Any, int, int]:
        """(mesh, i, n): this process answers every n-th block from i on, on this mesh."""
        return hosts.share(self.config)

    @functools.cached_property
    def loaded(self) -> DecodingParams:
        mesh, *_ = self.share
        model_config, params = hf.load_model(self.path, dtype=jnp.float32, mesh=mesh)
        return decoding_params(
            model_config,
            params,
            valid_vocab=len(self.tokenizer),
            compute_dtype=self.config.student.compute_dtype,
            mesh=mesh,
        )


def compare(config: Any, models: dict[str, str], *, detailed: bool = False) -> None:
    """Grade {name: path} on evaluate.problems and evaluate.sets; write and print the results.

    run_dir/evaluation has the generations of evaluate.problems and results.json, and a folder of
    that kind for each set. What is already answered with the same settings is not asked again.
    """
    sets = problem_sets(config)
    folder = as_path(config.run_dir) / "evaluation"
    results: dict[str, dict[str, EvalResult]] = {s.name: {} for s in sets}
    with Grader(timeout=config.prepare.grade_timeout, workers=config.prepare.workers) as grader:
        for name, path in models.items():
            model = _Model(config, name, path)
            for problem_set in sets:
                home = folder / problem_set.name
                home.mkdir(parents=True, exist_ok=True)
                results[problem_set.name][name] = grade_set(
                    config, model, problem_set, home, grader
                )
    students = [name for name in models if name not in ("teacher", "start")]
    baseline = students[0] if len(students) > 1 else "start"
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    for problem_set in sets:
        own = results[problem_set.name]
        numbers = summary(own, baseline=baseline)
        if hosts.first():
            replace_file(folder / problem_set.name / "results.json", to_json(numbers))
        title = _title(config, problem_set)
        console.print(accuracy_table(numbers, title=title))
        if detailed:
            shown = {name: row["details"] for name, row in numbers["models"].items()}
            console.print(*detail_tables(problem_set.name or "problems", shown))
    print(f"every generation with its grade: {folder}")


def _title(config: Any, problem_set: ProblemSet) -> str:
    settings, count = config.evaluate, len(problem_set.problems)
    kind = "accuracy" if settings.samples == 1 else f"pass@1 of {settings.samples} answers"
    how = "Greedy" if settings.temperature == 0 else f"Temperature {settings.temperature:g}"
    name = f"{problem_set.name}: " if problem_set.name else ""
    held_out = "" if problem_set.name else "held-out "
    return f"{name}{how} {kind} on {count} {held_out}problems"


# ---------------------------------------------------------------- one set, one model


def _sampling(config: Any) -> Sampling:
    """The plain form stops at the next question."""
    stop = (PLAIN_STOP,) if config.evaluate.form == "plain" else ()
    return sampling_of(config.evaluate, seed=config.seed, stop=stop)


def _request(config: Any, model: _Model, problem_set: ProblemSet) -> dict[str, Any]:
    """What the answers follow from; the batch size and the mesh are not in it."""
    form = prompt_form(config, problem_set)
    return {
        "problems": hashlib.sha256(content(problem_set).encode()).hexdigest(),
        "weights": model.weights,
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "template": template_fingerprint(model.tokenizer),
        "prompt": dataclasses.asdict(form),
        "sampling": dataclasses.asdict(_sampling(config)),
        "max_new_tokens": config.evaluate.max_new_tokens,
        "compute_dtype": config.student.compute_dtype,
        "grade_timeout": config.prepare.grade_timeout,
    }


def grade_set(
    config: Any, model: _Model, problem_set: ProblemSet, folder: Path, grader: Grader
) -> EvalResult:
    """The graded answers of one model to one set, from folder/<model>.jsonl as far as it is there.

    An interrupted evaluation goes on with the blocks that are left. Answers that were given under
    other settings are kept as <model>.previous.jsonl and asked again.
    """
    check_exemplars(prompt_form(config, problem_set).exemplars, problem_set)
    path = folder / f"{model.name}.jsonl"
    files = BlockFiles([path], _request(config, model, problem_set))
    manifest, other = files.finished()
    if manifest is None:
        hosts.barrier(f"look for the answers of {model.name}")
        if other and hosts.first():
            previous = folder / f"{model.name}.previous.jsonl"
            rename(path, previous)
            print(f"{path} was written {other}: kept as {previous.name}, asked again")
        _answer_rest(config, model, problem_set, files, grader)
        manifest = files.finish()
    return summarize(read_generations(path), seconds=manifest["seconds"])


def _answer_rest(
    config: Any, model: _Model, problem_set: ProblemSet, files: BlockFiles, grader: Grader
) -> None:
    sampling, form = _sampling(config), prompt_form(config, problem_set)
    asked = [(p, k) for p in problem_set.problems for k in range(sampling.samples)]
    prompts = [form.prompt(model.tokenizer, problem) for problem in problem_set.problems]
    check_room(
        hf.read_config(model.path),
        prompts,
        [f"{problem.source}: the prompt" for problem in problem_set.problems],
        max_new_tokens=config.evaluate.max_new_tokens,
        key="evaluate.max_new_tokens",
    )
    _, process, processes = model.share
    most = -(-len(asked) // processes)  # so that no process is left without any
    done, left = files.pending(len(asked), min(BATCHES_IN_BLOCK * config.evaluate.batch_size, most))
    label = f"evaluating {model.name}" + (f" on {problem_set.name}" if problem_set.name else "")
    if done and hosts.first():
        print(f"{label}: going on behind {done} answers")
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
                max_new_tokens=config.evaluate.max_new_tokens,
                batch_size=config.evaluate.batch_size,
                grader=grader,
                on_batch=lambda sequences, tokens: bar(sequences),
            )
            if processes > 1 or hosts.first():
                counts = {"answered": len(block), "seconds": time.monotonic() - began}
                files.write(block, ["".join(map(to_line, generations))], counts)


# ---------------------------------------------------------------- numbers and table


def summary(results: dict[str, EvalResult], *, baseline: str) -> dict[str, Any]:
    """The tables' numbers; difference is accuracy minus the baseline's on the same problems."""
    rows = {}
    for name, result in results.items():
        rows[name] = result.summary() | {"details": details(result.generations)}
        if baseline in results and name != baseline:
            difference = paired_difference(results[baseline].generations, result.generations)
            rows[name] |= dict(
                zip(("difference", "difference_low", "difference_high"), difference, strict=True)
            )
    return {"baseline": baseline, "models": rows}


def accuracy_table(numbers: dict[str, Any], *, title: str) -> Table:
    """Accuracy with 95 % intervals, and the paired difference to the baseline; from `summary`."""
    baseline = numbers["baseline"]
    table = Table(title=title)
    table.add_column("model")
    for heading in ("correct", "accuracy", "95 % interval", f"minus {baseline} (paired 95 %)"):
        table.add_column(heading, justify="right")
    for heading in ("no answer", "cut off"):
        table.add_column(heading, justify="right")
    for name, row in numbers["models"].items():
        change = ""
        if "difference" in row:
            low, high = row["difference_low"], row["difference_high"]
            change = f"{row['difference']:+.1%} ({low:+.1%} to {high:+.1%})"
        answers = "" if row["samples"] == 1 else f" of {row['samples'] * row['problems']}"
        table.add_row(
            name,
            f"{row['correct']}{answers}",
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            change,
            f"{row['no_answer']:.1%}",
            f"{row['truncated']:.1%}",
        )
    return table
