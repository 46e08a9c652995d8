"""Show what a trace dataset holds: its manifest, and traces token by token with log-probs.

    dcod inspect DIR                      manifest and the first trace
    dcod inspect DIR --student MODEL      also the student's log-probs and the ratio
    dcod inspect DIR --export traces.jsonl   (or .parquet) every trace, decoded

DIR is a dataset, or the directory above train/ and eval/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dcod_jax.files import as_path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; exits with a message where they contradict each other."""
    parser = argparse.ArgumentParser("dcod inspect", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", help="trace dataset, or the directory above train/ and eval/")
    parser.add_argument("--examples", type=int, default=1, help="traces to show (default 1)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one (default 0)")
    parser.add_argument(
        "--tokens", type=int, default=64, help="tokens to show of a trace; 0: all (default 64)"
    )
    parser.add_argument(
        "--tokenizer", default="", help="HF directory (default: the one that the manifest names)"
    )
    parser.add_argument("--student", default="", help="HF directory or .gguf: show its log-probs")
    parser.add_argument(
        "--checkpoint",
        default="",
        help="run directory: show the log-probs of its newest checkpoint",
    )
    parser.add_argument(
        "--export", default="", help="write all traces to a .jsonl or .parquet file"
    )
    parser.add_argument("--json", action="store_true", help="print only the manifests, as JSON")
    args = parser.parse_args(argv)
    if args.student and args.checkpoint:
        parser.error("give --student or --checkpoint, not both")
    if args.export and as_path(args.export).suffix not in (".jsonl", ".parquet"):
        parser.error(f"--export {args.export}: expected a name that ends in .jsonl or .parquet")
    if min(args.examples, args.start, args.tokens) < 0:
        parser.error("--examples, --start and --tokens must not be negative")
    return args
