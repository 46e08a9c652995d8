"""Write the table of divergences in docs/losses.md from the registry.

python tools/make_losses_doc.py           # between the two marker comments, in place
python tools/make_losses_doc.py --check   # exit 1 when the file is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcod_jax.config import comments
from dcod_jax.losses.divergences import DIVERGENCES, Divergence

PAGE = Path(__file__).resolve().parents[1] / "docs" / "losses.md"
BEGIN = "<!-- from dcod_jax/losses/divergences.py by tools/make_losses_doc.py; do not edit -->"
END = "<!-- end of the generated table -->"
HEAD = ("`loss.divergence`", "formula", "needs of the teacher", "knob", "choose it when", "source")


def _keys(entry: Divergence) -> str:
    """The config keys of the knob; TAID's interpolation is a state that four keys steer."""
    known = comments()
    prefix = "loss.taid_" if entry.knob == "interpolation" else f"loss.{entry.knob}"
    return ", ".join(f"`{key}`" for key in known if entry.knob and key.startswith(prefix)) or "none"


def table() -> str:
    """Markdown rows, one for each entry of the registry."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for name, entry in DIVERGENCES.items():
        needs = "log p of the trace token, or nothing" if entry.value is None else "top-k or live"
        needs = "live; top-k for a student near it" if entry.acts_on_student else needs
        cells = (f"`{name}`", entry.formula, needs, _keys(entry), entry.choose, entry.source)
        rows.append(tuple(cell.replace("|", "\\|") for cell in cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def updated(page: str) -> str:
    """The page with what stands between the markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"error: {PAGE} must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


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
