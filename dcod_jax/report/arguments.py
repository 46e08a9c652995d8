"""The report's own arguments: --runs names directories, without a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dcod_jax.files import as_path


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of a command line with --runs; None where a recipe names the runs."""
    if not any(word.split("=")[0] == "--runs" for word in argv):
        return None
    parser = argparse.ArgumentParser("dcod report", description=__doc__)
    parser.add_argument("--runs", nargs="+", type=as_path, required=True, help="run directories")
    parser.add_argument("--output", type=as_path, help="default: report.html in the first one")
    parser.add_argument("--traces", type=int, help="traces to show")
    return parser.parse_args(argv)
