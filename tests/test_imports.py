"""A file imports from lower levels only (docs/design.md); tools are never imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dcod_jax"

# A file imports from files before it in this order only; the numbers are the levels of the layout.
LEVELS = {
    0: "types paths storage chips hlo",
    1: "mesh epitaph watch hosts",
    2: "models.config models.layers models.attention models.transformer models.cached "
    "models.weights losses.events losses.distributions losses.divergences losses.weights "
    "losses.adaptive losses.head losses.reduce data.manifest data.codec data.score_progress "
    "data.blocks data.records data.packing data.chat data.formats data.traces data.delivered "
    "data.overlap answers eval_stats benchmarks grading progress metrics profiling optim problems "
    "checkpoint local_checkpoints arithmetic drift_curves",
    3: "losses.distill models.gguf models.hf data.pipeline stops sampling decoding generate",
    4: "config_checks config forward train_step scoring evals problem_sets eval_details "
    "filters drift_scores",
    5: "inspect generate_traces prepare score start on_policy export drift "
    "report_data report_traces report comparison stages evaluate lm_eval_model train_log "
    "compiled estimate plan train "
    "study.domain study.plan study.steps study.lab study.tables study.__main__",
}
ORDER = [name for names in LEVELS.values() for name in names.split()]
PLACE = {name: place for place, name in enumerate(ORDER)}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcod_jax"):
            inside = (node.module or "").removeprefix("dcod_jax").lstrip(".")
            if inside in PLACE:
                names.add(inside)
            else:
                names |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("dcod_jax.")
                for alias in node.names
                if alias.name.startswith("dcod_jax.")
            }
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_from_lower_levels_only(path):
    name = module_name(path)
    assert name in PLACE, f"{name} has no place: add it to LEVELS"
    for other in imported(path):
        assert other in PLACE, f"{name} imports {other}, which has no place"
        assert PLACE[other] < PLACE[name], f"{name} imports {other}, which comes after it"


def test_the_package_never_imports_tools_or_configs():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert module.split(".")[0] not in ("tools", "configs", "tests"), path
