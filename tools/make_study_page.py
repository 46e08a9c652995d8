"""Write the tables of docs/study*.md from the results in docs/study.

    python tools/make_study_page.py            # in place
    python tools/make_study_page.py --recipe study --results runs/study/results.jsonl
    python tools/make_study_page.py --check    # exit 1 when not up to date

The second command takes the results of a study over first.

All runs have the same problems and all arms the same seeds, so two arms are compared in pairs: a
difference D[seed, problem] in {-1, 0, 1}.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from study_results import Arm, Estimate, Line, Pick, Study, arm_of, drift, seed_mean

from dcod_jax.errors import DcodError
from dcod_jax.study.conditions import MAIN, read_results
from dcod_jax.study.domain import SETS

DOCS = Path(__file__).resolve().parents[1] / "docs"
# {recipe: (its results file in docs/study, pages with tables)}
STUDIES = {
    "study": ("results.jsonl", ("study.md", "study_tables.md")),
    "study_letters": ("letters.jsonl", ("study_letters.md",)),
    "study_styles": ("styles.jsonl", ("study_styles.md",)),
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: Estimate, *, scale: float = 1.0, sign: bool = False) -> str:
    """Mean and interval; with sign in bold where the interval excludes 0."""
    texts = [format(scale * x, "+.1f" if sign else ".1f").replace("-", "−") for x in value]
    if math.isnan(value.low):
        return texts[0]
    text = "{} ({} to {})".format(*texts)
    return f"**{text}**" if sign and (value.low > 0 or value.high < 0) else text


def percent(value: Estimate) -> str:
    """0.865 with its interval -> "86.5 (84.0 to 89.0)"; bounds are cut to 0 and 100."""
    return number(Estimate(value.mean, max(value.low, 0.0), min(value.high, 1.0)), scale=100.0)


def points(value: Estimate) -> str:
    """Percentage points with sign."""
    return number(value, scale=100.0, sign=True)


def arm_table(
    study: Study,
    names: Sequence[str],
    head: Sequence[str],
    cells: Callable[[Arm], Sequence[str] | None],
) -> str:
    """One row for each arm of these conditions; without those whose cells are None."""
    arms = [arm for name in names for arm in study.arms(name)]
    rows = [[arm[0], f"`{arm[1]}`", *found] for arm in arms if (found := cells(arm)) is not None]
    return table(["condition", "arm", *head], rows)


def accuracy_table(study: Study, names: Sequence[str]) -> str:
    """Accuracy on the three sets, percent."""

    def cells(arm: Arm) -> list[str]:
        accuracies = (percent(study.accuracy(arm, name)) for name in SETS)
        return [f"{len(study.runs[arm])}", *accuracies]

    return arm_table(study, names, ["seeds", *SETS], cells)


def difference_table(study: Study, names: Sequence[str]) -> str:
    """Paired differences of accuracy, percentage points, and of the two drift numbers."""

    def cells(arm: Arm) -> list[str] | None:
        base = study.base(arm)
        if base is None:
            return None
        drifts = [study.paired(arm, base, drift(key)) for key in ("excess", "accumulated")]
        return [
            f"`{base[1]}`",
            *(points(study.difference(arm, base, name)) for name in SETS),
            *("n/a" if value is None else number(value, sign=True) for value in drifts),
        ]

    head = ["minus", *SETS, "ExAccErr, points", "error on own prefixes, nats"]
    return arm_table(study, names, head, cells)


def gain_table(study: Study, names: Sequence[str]) -> str:
    """Paired differences to the start, percentage points."""

    def cells(arm: Arm) -> list[str]:
        return [points(study.gain(arm, name)) for name in SETS]

    return arm_table(study, names, [f"{name}, minus start" for name in SETS], cells)


CHOSEN, OTHERS = "sft+auto", ("sft", "sft+sigmoid")


def chosen_table(study: Study, names: Sequence[str]) -> str:
    """The chosen weight against SFT and the sigmoid of each token, on problems in and longer."""
    sets = ("in", "longer")
    rows = []
    for condition in names:
        arms = [(condition, arm) for arm in (*OTHERS, CHOSEN)]
        if not all(arm in study.runs for arm in arms):
            continue
        for name in sets:
            start = f"{100 * study.starts(condition, name).mean():.1f}"
            means = [f"{100 * study.accuracy(arm, name).mean:.1f}" for arm in arms]
            differ = [points(study.difference(arms[-1], arm, name)) for arm in arms[:-1]]
            rows.append([condition, name, start, *means, *differ])
    head = ["condition", "set", "start", "SFT", "token", "auto", "auto − SFT", "auto − token"]
    return table(head, rows)


def picked_table(study: Study, names: Sequence[str]) -> str:
    """What validation alone picks among SFT, token and auto, and what the pick ends above them."""
    rows = []
    for condition in names:
        arms = {arm: (condition, arm) for arm in (*OTHERS, CHOSEN)}
        if not all(arm in study.runs for arm in arms.values()):
            continue
        own = [line for line in study.tunes if line["condition"] == condition]
        grids = own or [line for line in study.tunes if line["condition"] == MAIN]
        cost = sum(line["train_cpu"] + line["eval_cpu"] for line in own if line["arm"] in arms)
        best = {
            arm: max(rate_means([line for line in grids if line["arm"] == arm]).values(), default=0)
            for arm in arms
        }
        pick = max(best, key=lambda arm: best[arm])
        for name in ("in", "longer"):
            differ = [
                "the same" if arm == pick else points(study.difference(arms[pick], arms[arm], name))
                for arm in OTHERS
            ]
            mean = f"{100 * study.accuracy(arms[pick], name).mean:.1f}"
            rows.append([condition, name, f"`{pick}`", mean, *differ, f"{cost:.0f}" if own else ""])
    head = ["condition", "set", "picked", "accuracy", "minus SFT", "minus token", "grid, CPU-s"]
    return table(head, rows)


def rate_means(tunes: Sequence[Line]) -> dict[float, float]:
    """{rate: mean validation accuracy} of one arm's tuning runs."""
    return {
        rate: float(np.mean([x["accuracy"]["validation"] for x in tunes if x["rate"] == rate]))
        for rate in sorted({line["rate"] for line in tunes})
    }


def drift_table(study: Study, names: Sequence[str]) -> str:
    """ExAccErr and its parts."""

    def cells(arm: Arm) -> list[str]:
        values = [study.of(arm, drift(key)) for key in ("excess", "accumulated", "reference")]
        return [f"{len(values[0])}", *(number(seed_mean(v)) if v else "n/a" for v in values)]

    return arm_table(study, names, ["seeds", "ExAccErr, %", "R, nats", "E, nats"], cells)


# Column of the cost table -> (number of a run, its format).
COSTS: dict[str, tuple[Pick, str]] = {
    "train CPU-s": (lambda line: line["train_cpu"], ".1f"),
    "tokens trained on": (lambda line: line["tokens"], ",.0f"),
    "tokens generated": (lambda line: line["generated"], ",.0f"),
    "effective sample size": (lambda line: line["curves"].get("ess"), ".2f"),
    "weight of tokens of q ≤ 0.9": (lambda line: line["curves"].get("unknown_weight"), ".2f"),
    "nll at the end": (lambda line: line["curves"]["nll"], ".2f"),
}


def cost_table(study: Study, names: Sequence[str]) -> str:
    """Costs and weights of a run, means over the seeds."""

    def cells(arm: Arm) -> list[str]:
        found = [f"{next(iter(study.runs[arm].values()))['rate']:g}"]
        for pick, form in COSTS.values():
            values = study.of(arm, pick)
            found.append(format(float(np.mean(values)), form) if values else "n/a")
        return found

    return arm_table(study, names, ["rate", *COSTS], cells)


def rates_table(study: Study, _: Sequence[str]) -> str:
    """The learning-rate grids: mean validation accuracy of the tuning runs, percent."""
    rates = sorted({line["rate"] for line in study.tunes})
    rows = []
    for condition, arm in dict.fromkeys(map(arm_of, study.tunes)):
        grid = rate_means([line for line in study.tunes if arm_of(line) == (condition, arm)])
        means = [round(grid[rate], 9) if rate in grid else None for rate in rates]
        place = means.index(max(value for value in means if value is not None))
        cells = ["" if value is None else f"{100 * value:.1f}" for value in means]
        cells[place] = f"**{cells[place]}**"
        rows.append([condition, f"`{arm}`", *cells])
    return table(["condition", "arm", *(f"{rate:g}" for rate in rates)], rows)


def references_table(study: Study, _: Sequence[str]) -> str:
    """Accuracy of starts (mean, lowest to highest) and teacher, percent, and the traces."""
    head = ["condition", *(f"start, {x}" for x in SETS), *(f"teacher, {x}" for x in SETS)]
    rows = []
    for line in study.references:
        if line["condition"] not in study.conditions:
            continue
        starts = [100 * study.starts(line["condition"], name) for name in SETS]
        cells = [f"{x.mean():.1f} ({x.min():.1f} to {x.max():.1f})" for x in starts]
        cells += [f"{100 * line['teacher'][name]:.1f}" for name in SETS]
        for counts in (line["counts"], line["styles"]):
            cells.append(", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
        rows.append([line["condition"], *cells])
    return table([*head, "samples", "styles"], rows)


def progress_table(study: Study, _: Sequence[str]) -> str:
    """Which parts were run: test runs by condition."""
    rows = []
    for condition in dict.fromkeys(condition for condition, _ in study.settings):
        counts = [f"`{arm[1]}` {len(study.runs[arm])}" for arm in study.arms(condition)]
        rows.append([condition, ", ".join(counts) or "none yet"])
    return table(["condition", "test runs (seeds) of each arm"], rows)


BLOCKS: dict[str, Callable[[Study, Sequence[str]], str]] = {
    "progress": progress_table,
    "rates": rates_table,
    "references": references_table,
    "accuracy": accuracy_table,
    "chosen": chosen_table,
    "picked": picked_table,
    "differences": difference_table,
    "gains": gain_table,
    "drift": drift_table,
    "cost": cost_table,
}


def fill_page(page: str, study: Study) -> str:
    """The page with the tables between its marker comments replaced.

    A marker is `<!-- study: BLOCK condition, condition -->`, ended by `<!-- end -->`; no condition
    means all that have a test run. Raises DcodError for a block that is not in BLOCKS.
    """

    def fill(found: re.Match[str]) -> str:
        block, wanted = found[1], [name.strip() for name in found[2].split(",") if name.strip()]
        if block not in BLOCKS:
            raise DcodError(f"study page: no table {block!r}; there are {', '.join(BLOCKS)}")
        names = [name for name in (wanted or study.conditions) if name in study.conditions]
        missing = [name for name in wanted if name not in names]
        text = BLOCKS[block](study, names) if names else ""
        if missing:
            text += f"\n\nNot run: {', '.join(missing)}."
        mark = f"<!-- study: {' '.join([block, ', '.join(wanted)]).rstrip()} -->"
        return f"{mark}\n\n{text.strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- study: (\S+) ?(.*?) ?-->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    about, *_ = str(__doc__).split("\nAll runs")
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=STUDIES, help="write this study's pages only")
    parser.add_argument("--results", type=Path, help="its results, copied to docs/study first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.results and not options.recipe:
        parser.error("--results needs --recipe, the study that it is of")
    for recipe in [options.recipe] if options.recipe else STUDIES:
        file, names = STUDIES[recipe]
        results = DOCS / "study" / file
        if options.results and not options.check:
            results.parent.mkdir(exist_ok=True)
            shutil.copyfile(options.results, results)
        try:
            study = Study(read_results(results))
            for path in (DOCS / name for name in names):
                page = path.read_text(encoding="utf-8")
                filled = fill_page(page, study)
                if options.check and filled != page:
                    sys.exit(f"error: {path} is not up to date: python tools/make_study_page.py")
                if not options.check:
                    path.write_text(filled, encoding="utf-8")
        except DcodError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
