"""docs/quickstart.ipynb, executed from top to bottom on a few prompts and steps."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from host_runs import of_xla
from nbclient import NotebookClient

from dcod_jax.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all its cells, run in an empty folder."""
    place = tmp_path_factory.mktemp("notebook")
    lines = (ASSETS / "competent" / "prompts.jsonl").read_text().splitlines(keepends=True)
    (place / "prompts.jsonl").write_text("".join(lines[:96]))
    recipe = load_recipe(ROOT / "dcod_jax" / "configs" / "quickstart.py")
    flags = {
        # Two of the entries: each compiles a step of its own.
        "compare": f"'{recipe.compare[0]}, {recipe.compare[2]}'",
        "generate.prompts": place / "prompts.jsonl",
        "generate.batch_size": 32,
        "train.steps": 4,
        "train.log_every": 1,
        "train.eval_every": 2,
        "evaluate.limit": 24,
        "evaluate.batch_size": 24,
        "report.traces": 2,
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCOD_NOTEBOOK_FLAGS", " ".join(f"--config.{k}={v}" for k, v in flags.items()))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("IPYTHONDIR", str(place / "ipython"))
        for name, value in of_xla(1).items():
            patch.setenv(name, value)
        client.execute()
    return place, notebook


def texts(notebook, kind):
    """All outputs of one kind, as the browser gets them."""
    return [
        "".join(output["data"][kind])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def test_the_table_and_the_report_are_shown(executed):
    place, notebook = executed
    results = json.loads(
        (place / "runs" / "quickstart-notebook" / "evaluation" / "results.json").read_text()
    )
    shown = next(text for text in texts(notebook, "text/markdown") if text.startswith("| model"))
    assert set(results["models"]) == {"teacher", "start", "sft", "discord-trace"}
    for name, row in results["models"].items():
        assert f"| {name} | {row['correct']} | " in shown
    page = next(text for text in texts(notebook, "text/html") if "<iframe" in text)
    assert "srcdoc=" in page
    assert "discord-trace" in page
    assert "<script" not in page  # the page is one escaped attribute


def test_the_last_cell_prints_one_block_to_send_back(executed):
    _, notebook = executed
    text = "".join(output["text"] for output in notebook.cells[-1].outputs)
    assert text.startswith("----- dcod_jax quickstart: copy from here -----\n")
    assert text.endswith("----- to here -----\n")
    for wanted in (
        r"^jax \d",
        r"backend cpu, devices 1",
        r"^discord-trace: step 4, ",
        r"^\| teacher \|",
    ):
        assert re.search(wanted, text, re.M), wanted


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
