"""Write the tables of docs/study.md from docs/study/results.jsonl.

python tools/make_study_page.py                                    # in place
python tools/make_study_page.py --results runs/study/results.jsonl # take these results over first
python tools/make_study_page.py --check                            # exit 1 when not up to date
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from dcod_jax.errors import DcodError
from dcod_jax.study.conditions import read_results
from dcod_jax.study.tables import Study, fill_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RESULTS = DOCS / "study.md", DOCS / "study" / "results.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="results file to copy to docs/study first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.results and not options.check:
        RESULTS.parent.mkdir(exist_ok=True)
        shutil.copyfile(options.results, RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    try:
        filled = fill_page(page, Study(tuple(read_results(RESULTS))))
    except DcodError as error:
        sys.exit(f"error: {error}")
    if options.check and filled != page:
        sys.exit(f"error: {PAGE} is not up to date: python tools/make_study_page.py")
    if not options.check:
        PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
