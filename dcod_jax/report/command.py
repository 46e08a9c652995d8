"""One self-contained HTML page about one run or several side by side.

    dcod report --config RECIPE                       the recipe's runs
    dcod report --runs DIR [DIR ...] [--output FILE]  any runs' directories

Loss, weights, effective sample size, accuracy with intervals, drift curves, time, and traces
coloured by token weight. Reads what the runs' directories hold; writes report.path (default:
report.html in the run directory, the first of --runs). The page needs no network.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from dcod_jax import __version__
from dcod_jax import config as configs
from dcod_jax.compilation_cache import keep_programs
from dcod_jax.config import BASE, load_recipe
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path, check_own, replace_file
from dcod_jax.report.data import (
    Run,
    drifts,
    evaluations,
    find_runs,
    goodput,
    run_record,
    skipped,
    weighed,
)
from dcod_jax.report.traces import histogram, see, shown

log = logging.getLogger(__name__)

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets" / "report"
WEIGHED = 256  # held-out traces behind the weight histogram
GENERATOR = 'content="dcod_jax report"'  # of page.html, which tells our pages from others
VENDOR = "vendor/"  # the chart library, with its licence
STYLES = (VENDOR + "uPlot.min.css", "style.css")
SCRIPTS = (VENDOR + "uPlot.min.js", "charts.js", "tables.js", "traces.js", "main.js")


def report(config: Any) -> Path | None:
    """Write the page of the config's runs and report.runs; None where another process does."""
    if jax.process_index():
        return None
    own = [as_path(variant.run_dir) for _, variant in configs.variants(config)]
    runs = find_runs([*own, *(as_path(other) for other in config.report.runs)])
    path = as_path(config.report.path or as_path(config.run_dir) / "report.html")
    return write(runs, path, settings=config.report)


def write(runs: Sequence[Run], path: Path, *, settings: Any) -> Path:
    """Write the page of these runs; settings is the report section of a config."""
    check_own(path, GENERATOR)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page(collect(runs, settings=settings)).encode(errors="backslashreplace"))
    log.info("report: %s", path)
    return path


# ---------------------------------------------------------------- data


def collect(runs: Sequence[Run], *, settings: Any) -> dict[str, Any]:
    """Everything the page shows, as JSON values; null stands for what is missing."""
    records, notes = [], []
    traces: dict[tuple[str, str], dict[str, Any]] = {}  # runs of one dataset share them
    for place, run in enumerate(runs):
        record = run_record(run, notes, points=settings.points)
        record |= {"histogram": None, "seen": "", "goodput": goodput(run, notes)}
        record |= {"weighed": weighed(run, notes)}
        notes += skipped(record)
        records.append(record)
        if not settings.traces:
            continue
        try:
            if jax.process_count() > 1:
                raise DcodError("on several processes; run `python -m dcod_jax.report` on one host")
            seen = see(run, count=max(settings.traces, WEIGHED))
        except DcodError as error:
            notes.append(f"{run.name}: traces are not shown: {error}")
            continue
        record |= {"histogram": histogram(seen), "seen": seen.source}
        if seen.missing:
            notes.append(f"{run.name}: no weights: {seen.missing}")
        for one in shown(seen, count=settings.traces):
            student = {"run": place, "student": one.pop("student"), "weights": one.pop("weights")}
            key = (configs.dataset_dir(run.config), one["id"])
            traces.setdefault(key, one | {"runs": []})["runs"].append(student)
    return {
        "title": " and ".join(dict.fromkeys(run.root.name for run in runs)),
        "about": f"dcod_jax {__version__}: " + ", ".join(str(run.path) for run in runs),
        "runs": records,
        "evaluations": evaluations(runs, notes),
        "drifts": drifts(runs, notes, points=settings.points),
        "traces": list(traces.values()),
        "notes": notes,
    }


# ---------------------------------------------------------------- page


def page(data: dict[str, Any]) -> str:
    """The HTML text; its policy allows only the page's own style and scripts, by their hashes."""
    style = "\n".join(map(_asset, STYLES))
    script = f"/*\n{_asset(VENDOR + 'LICENSE')}*/\n" + "\n".join(map(_asset, SCRIPTS))
    parts = {
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(f"dcod_jax report: {data['title']}"),
        "style": style,
        "data": embedded(data),
        "script": script,
    }
    # One pass: a text that looks like a placeholder stays what it is.
    return re.sub(r"%([a-z]+)%", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that holds it: < > & are written as escapes."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def report_runs(args: argparse.Namespace) -> None:
    """The verb with --runs: a page of these directories, whatever their configs."""
    recipe = load_recipe(BASE)
    keep_programs(recipe.compilation_cache)
    settings = recipe.report
    settings.traces = args.traces if args.traces is not None else settings.traces
    write(find_runs(args.runs), args.output or args.runs[0] / "report.html", settings=settings)
