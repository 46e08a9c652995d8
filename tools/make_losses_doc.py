"""Write the tables of divergences and weights in docs/losses.md from the registries.

python tools/make_losses_doc.py           # between the marker comments, in place
python tools/make_losses_doc.py --check   # exit 1 when the file is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcod_jax.config import comments
from dcod_jax.losses.divergences import DIVERGENCES, Divergence
from dcod_jax.losses.weights import WEIGHTS, Weight

PAGE = Path(__file__).resolve().parents[1] / "docs" / "losses.md"
MARKER = "<!-- from dcod_jax/losses/{}.py by tools/make_losses_doc.py; do not edit -->"
END = "<!-- end of the generated table -->"


def _keys(*prefixes: str) -> str:
    """The config keys that begin so; TAID's interpolation is a state that four keys steer."""
    return ", ".join(f"`{key}`" for key in comments() if key.startswith(prefixes)) or "none"


def _of_divergence(entry: Divergence) -> tuple[str, str]:
    needs = "log p of the trace token, or nothing" if entry.value is None else "top-k or live"
    needs = "live; top-k for a student near it" if entry.acts_on_student else needs
    name = "taid_" if entry.parameter == "interpolation" else entry.parameter
    return needs, _keys(f"loss.{name}") if name else "none"


NEEDS = {
    "ratio": "log p of the trace token",
    "teacher": "log p of the trace token",
    "student entropy": "nothing; the entropy of q",
    "top_entropy": "nothing; the 20 largest logits of q",
}


def _of_weight(entry: Weight) -> tuple[str, str]:
    needs = NEEDS.get(entry.reads, "nothing")
    return needs, _keys(*(f"loss.weights.{name}" for name in entry.parameters))


def table(key: str) -> str:
    """Markdown rows, one for each entry of the registry behind a config key."""
    head = (f"`{key}`", "formula", "needs of the teacher", "keys", "choose it when", "source")
    rows = [head, ("---",) * len(head)]
    for name, entry in (DIVERGENCES if key == "loss.divergence" else WEIGHTS).items():
        of = _of_divergence(entry) if isinstance(entry, Divergence) else _of_weight(entry)
        cells = (f"`{name}`", entry.formula, *of, entry.choose, entry.source)
        rows.append(tuple(cell.replace("|", "\\|") for cell in cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def updated(page: str) -> str:
    """The page with new tables between the markers."""
    for file, key in (("divergences", "loss.divergence"), ("weights", "loss.weights.name")):
        begin = MARKER.format(file)
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"error: {PAGE} must hold the lines {begin} and {END}, in this order")
        page = f"{before}{begin}\n\n{table(key)}\n\n{END}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if options.check and updated(page) != page:
        sys.exit(f"error: {PAGE} is not up to date: python tools/make_losses_doc.py")
    if not options.check:
        PAGE.write_text(updated(page), encoding="utf-8")


if __name__ == "__main__":
    main()
