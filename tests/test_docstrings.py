"""What a reader is told in the code: every public thing by its docstring, every room's files."""

import ast
import re

import pytest
from test_imports import FILES, PACKAGE, module_name

# Their methods are those of pathlib.Path, as their own docstring says.
AS_ELSEWHERE = {"RemotePath"}
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def undocumented(node, prefix=""):
    """Names of the public classes, functions and methods without a docstring."""
    for inner in node.body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if not isinstance(inner, kinds) or inner.name.startswith("_"):
            continue  # a class says what calling it does
        if ast.get_docstring(inner) is None:
            yield prefix + inner.name
        if isinstance(inner, ast.ClassDef) and inner.name not in AS_ELSEWHERE:
            yield from undocumented(inner, f"{prefix}{inner.name}.")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert not list(undocumented(tree))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_names_each_of_its_files_in_its_docstring(room):
    told = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = {path.stem for path in room.glob("*.py") if not path.stem.startswith("__")}
    assert files <= set(re.findall(r"\w+", told)), room
