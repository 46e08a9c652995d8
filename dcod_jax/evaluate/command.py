"""Grade models on benchmarks and held-out problems: teacher, start and exported students.

Reads evaluate.problems and evaluate.sets and, of teacher.path, student.path and the run's exports
(one for each variant of compare), those that exist; writes run_dir/evaluation/ (every generation
with its grade, results.json; one folder for each set) and prints the tables. The same command
after an interruption goes on with the blocks of answers that are left.
"""

from __future__ import annotations

from typing import Any

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.benchmarks import BENCHMARKS
from dcod_jax.evaluate.comparison import compare
from dcod_jax.export.command import MARKER, export_path


def evaluate(config: Any) -> None:
    """Evaluate everything the config names that is there."""
    if not config.evaluate.problems and not config.evaluate.sets:
        raise DcodError(
            "evaluate.problems is empty (expected a JSONL file of {prompt, answer}), and so is "
            f"evaluate.sets (expected names: {', '.join(BENCHMARKS)})"
        )
    models = {"teacher": config.teacher.path, "start": config.student.path}
    for name, variant in configs.variants(config):
        path = export_path(variant)
        if (path / MARKER).is_file():
            models[name or "student"] = str(path)
    models = {name: path for name, path in models.items() if path}
    if not models:
        raise DcodError(
            f"nothing to evaluate: no export in {export_path(config)}; set student.path to an HF "
            "directory, or run `python -m dcod_jax.export` first"
        )
    compare(config, models, detailed=True)
