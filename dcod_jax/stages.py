"""What stands before and after training: missing inputs, then export, evaluation and the table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dcod_jax import config as configs
from dcod_jax import hosts
from dcod_jax.data.manifest import MANIFEST, read_manifest, replace_file, to_json
from dcod_jax.evals import (
    EvalResult,
    Generation,
    Problem,
    evaluate,
    paired_difference,
    read_generations,
    read_problems,
    summarize,
    write_generations,
)
from dcod_jax.export import export
from dcod_jax.generate_traces import generate_traces, traces_path
from dcod_jax.models import hf
from dcod_jax.paths import Path, as_path
from dcod_jax.prepare import is_prepared, load_tokenizer, prepare
from dcod_jax.progress import track
from dcod_jax.report import report
from dcod_jax.score import score
from dcod_jax.scoring import load_any_tokenizer
from dcod_jax.start import expected_teacher
from dcod_jax.types import DcodError

# ---------------------------------------------------------------- before


def ensure_inputs(config: Any) -> None:
    """Sample, prepare and score what the recipe names and is not there yet.

    On several hosts nothing is made: DcodError with the commands to run first.
    """
    if jax.process_count() > 1:
        _refuse_unfinished(config)
        return
    missing = _missing(config)
    if "generate_traces" in missing:
        generate_traces(config)
    if "prepare" in missing:
        prepare(config)
    if "score" in missing:
        score(config)


def _refuse_unfinished(config: Any) -> None:
    """Process 0 looks for all: hashing the raw traces takes a while."""
    told = json.dumps(_unfinished(config)) if hosts.first() else ""
    unfinished = json.loads(hosts.exchange("look for unfinished steps", told)[0])
    if unfinished:
        commands = "\n".join(f"  python -m dcod_jax.{verb} --config ..." for verb in unfinished)
        raise DcodError(
            f"{configs.dataset_dir(config)} is not ready for training on {jax.process_count()} "
            f"hosts; run these first with the same --config and flags, one after the other (like "
            f"this command on every host; prepare works on process 0 alone):\n{commands}"
        )


def _unfinished(config: Any) -> list[str]:
    """The verbs of _missing whose result is not there yet."""
    verbs = _missing(config)
    if is_prepared(config):
        teachers = [expected_teacher(variant) for _, variant in configs.variants(config)]
        teacher = next(filter(None, teachers), None)
        return ["score"] if teacher and not _scored(config, teacher) else []
    return [v for v in verbs if v != "generate_traces" or not traces_path(config).exists()]


def _missing(config: Any) -> list[str]:
    """Verbs to run before training, in order; each leaves finished work as it is."""
    verbs = []
    if config.generate.prompts and not config.data.traces:
        verbs.append("generate_traces")
    if config.data.traces or verbs:
        verbs.append("prepare")
    elif not _splits(config):
        raise DcodError(
            f"no trace dataset in {configs.dataset_dir(config)}: set data.dataset to one, or "
            "data.traces (raw traces), or generate.prompts with teacher.path"
        )
    teachers = [expected_teacher(variant) for _, variant in configs.variants(config)]
    teacher = next(filter(None, teachers), None)
    if teacher and ("generate_traces" in verbs or not _scored(config, teacher)):
        verbs.append("score")
    return verbs


def _scored(config: Any, fingerprint: str) -> bool:
    """Whether this teacher's log-probs are there, told without loading the teacher."""
    manifests = [read_manifest(path) for path in _splits(config)]
    return bool(manifests) and all(
        manifest["scored"]
        and manifest.get("teacher", {}).get("weights") == fingerprint
        and manifest["top_k"] == config.score.top_k
        for manifest in manifests
    )


def _splits(config: Any) -> list[Path]:
    root = as_path(configs.dataset_dir(config))
    found = [path for path in (root / "train", root / "eval") if (path / MANIFEST).is_file()]
    return found or ([root] if (root / MANIFEST).is_file() else [])


# ---------------------------------------------------------------- after


def finish(config: Any, runs: Sequence[tuple[str, Any]]) -> None:
    """Export every run, grade teacher, start and students on the same problems, print the table."""
    exported = {name: export(variant) for name, variant in runs}
    if config.evaluate.problems:
        models = {"teacher": config.teacher.path, "start": config.student.path}
        models |= {name or "student": str(path) for name, path in exported.items()}
        compare(config, {name: path for name, path in models.items() if path})
    for name, variant in runs:
        if change := held_out_change(as_path(variant.run_dir)):
            print(f"held-out nll{f' {name}' if name else ''}: {change}")
    for name, path in exported.items():
        print(f"exported{f' {name}' if name else ''}: {path}")
    if config.report.at_end:
        report(config)


def held_out_change(run_dir: Path) -> str:
    """First and last held-out nll of a run, "4.2000 -> 3.9000 (steps 0 to 24)"; "" without any."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if "eval/nll" in line]
    if not found:
        return ""
    values = " -> ".join(f"{line['eval/nll']:.4f}" for line in (found[0], found[-1]))
    return f"{values} (steps {found[0]['step']} to {found[-1]['step']})"


def compare(config: Any, models: dict[str, str]) -> None:
    problems = read_problems(
        config.evaluate.problems,
        system_prompt=config.prepare.system_prompt,
        prompt_field=config.prepare.prompt_field,
        answer_field=config.prepare.answer_field,
        limit=config.evaluate.limit,
    )
    folder = as_path(config.run_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, path in models.items():
        results[name] = _grade(config, name, path, problems)
        if hosts.first():
            write_generations(folder / f"{name}.jsonl", results[name].generations)
    students = [name for name in models if name not in ("teacher", "start")]
    baseline = students[0] if len(students) > 1 else "start"
    if hosts.first():
        replace_file(folder / "results.json", to_json(summary(results, baseline=baseline)))
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    console.print(accuracy_table(results, baseline=baseline))
    print(f"every generation with its grade: {folder}")


def summary(results: dict[str, EvalResult], *, baseline: str) -> dict[str, Any]:
    """The table's numbers; difference is accuracy minus the baseline's on the same problems."""
    rows = {}
    for name, result in results.items():
        rows[name] = result.summary()
        if baseline in results and name != baseline:
            difference = paired_difference(results[baseline].generations, result.generations)
            rows[name] |= dict(
                zip(("difference", "difference_low", "difference_high"), difference, strict=True)
            )
    return {"baseline": baseline, "models": rows}


def accuracy_table(results: dict[str, EvalResult], *, baseline: str) -> Table:
    """Greedy accuracy with 95 % intervals, and the paired difference to the baseline."""
    problems = next(iter(results.values())).problems
    table = Table(title=f"Greedy accuracy on {problems} held-out problems")
    table.add_column("model")
    for heading in ("correct", "accuracy", "95 % interval", f"minus {baseline} (paired 95 %)"):
        table.add_column(heading, justify="right")
    for heading in ("no answer", "cut off"):
        table.add_column(heading, justify="right")
    for name, row in summary(results, baseline=baseline)["models"].items():
        change = ""
        if "difference" in row:
            low, high = row["difference_low"], row["difference_high"]
            change = f"{row['difference']:+.1%} ({low:+.1%} to {high:+.1%})"
        table.add_row(
            name,
            f"{row['correct']}",
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            change,
            f"{row['no_answer']:.1%}",
            f"{row['truncated']:.1%}",
        )
    return table


def _tokenizer(config: Any, name: str, path: str) -> Any:
    """The start is asked with the tokenizer it is trained with, every other model with its own."""
    if name == "start":
        return load_tokenizer(config)
    return load_any_tokenizer(as_path(path), chat_template=config.student.chat_template)


def _grade(config: Any, name: str, path: str, problems: Sequence[Problem]) -> EvalResult:
    """The result of all problems; of several processes each answers and grades every n-th."""
    mesh, process, processes = hosts.share(config)
    own = problems[process::processes]
    start = time.monotonic()
    result = _answer(config, name, path, own, mesh) if own else None
    if result is not None and processes == 1:
        return result
    generations = result.generations if result else ()
    folder = as_path(config.run_dir) / "evaluation"
    everything = _gather(folder, name, generations, process=process, processes=processes)
    return summarize(everything, seconds=time.monotonic() - start)


def _answer(
    config: Any, name: str, path: str, problems: Sequence[Problem], mesh: Any
) -> EvalResult:
    model_config, params = hf.load_model(path, dtype=jnp.float32, mesh=mesh)
    tokenizer = _tokenizer(config, name, path)
    enabled = config.train.progress
    with track(f"evaluating {name}", len(problems), unit="problems", enabled=enabled) as advance:
        return evaluate(
            model_config,
            params,
            tokenizer,
            problems,
            max_new_tokens=config.evaluate.max_new_tokens,
            batch_size=config.evaluate.batch_size,
            compute_dtype=config.student.compute_dtype,
            grade_timeout=config.prepare.grade_timeout,
            workers=config.prepare.workers,
            mesh=mesh,
            on_batch=lambda sequences, tokens: advance(sequences),
        )


def _gather(
    folder: Path, name: str, own: Sequence[Generation], *, process: int, processes: int
) -> tuple[Generation, ...]:
    """Every process's generations in the order of the problems, through files they all see."""
    parts = [folder / f".{name}.part-{i}" for i in range(processes)]
    write_generations(parts[process], own)
    hosts.barrier(f"evaluating {name}")
    found = [read_generations(part) for part in parts]
    hosts.barrier(f"reading the evaluation of {name}")
    if hosts.first():
        for part in parts:
            part.unlink()
    count = sum(map(len, found))
    return tuple(found[i % processes][i // processes] for i in range(count))
