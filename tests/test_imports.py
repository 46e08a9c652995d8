"""A file imports from lower levels only (docs/design.md); tools are never imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dcod_jax"

LEVELS = {
    0: "types",
    1: "mesh",
    2: "models.config models.layers models.transformer losses.divergences losses.weights "
    "losses.head losses.reduce data.chat data.manifest data.traces data.records data.packing "
    "data.overlap grading optim metrics checkpoint arithmetic",
    3: "losses.distill models.hf models.gguf data.pipeline generate",
    4: "config train_step scoring evals",
    5: "train prepare score generate_traces evaluate export inspect stages start",
}
# Same level, allowed in this direction only: a module is built of these.
WITHIN = {
    "models.transformer": {"models.config", "models.layers"},
    "models.layers": {"models.config"},
    "losses.head": {"losses.divergences"},
    "data.records": {"data.manifest"},
    "data.packing": {"data.records"},
    "models.hf": {"models.gguf"},
    "evals": {"config"},
    "scoring": {"config"},
    "train": {"stages", "start"},
    "start": {"prepare"},
    "stages": {"prepare", "score", "generate_traces", "evaluate", "export"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcod_jax"):
            inside = (node.module or "").removeprefix("dcod_jax").lstrip(".")
            if inside in LEVEL_OF:
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
    assert name in LEVEL_OF, f"{name} has no level: add it to LEVELS"
    for other in imported(path):
        assert other in LEVEL_OF, f"{name} imports {other}, which has no level"
        lower = LEVEL_OF[other] < LEVEL_OF[name] or other in WITHIN.get(name, ())
        assert lower, f"{name} (level {LEVEL_OF[name]}) imports {other} (level {LEVEL_OF[other]})"


def test_the_package_never_imports_tools_or_configs():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert module.split(".")[0] not in ("tools", "configs", "tests"), path
