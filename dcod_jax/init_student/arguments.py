"""Make a smaller student from a model: fewer layers, heads, kv groups and MLP channels.

    dcod init_student models/Qwen2.5-7B models/start --layers 20 --mlp 9472
    dcod init_student MODEL OUT --layers 0-11,18-29     (these layers)
    dcod init_student MODEL OUT --layers even:12        (12 layers, evenly spread)

    dcod init_student MODEL OUT --mlp 9472 --choose activations --data runs/x/dataset/train

MODEL is an HF or PEFT directory or a .gguf file. A number of layers drops a run of them behind the
first 40 %. Heads and channels with the smallest weights go, in each layer its own, or those with
the smallest activations on the traces of a dataset; the vocabulary stays as it is. OUT is an HF
directory with the tokenizer and a card that says what was kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; exits with a message where one is missing."""
    parser = argparse.ArgumentParser("dcod init_student", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="HF or PEFT directory or .gguf file to start from")
    parser.add_argument("out", help="directory to write, which must not exist")
    parser.add_argument("--layers", default="", help="N, even:N or a list such as 0-11,18-29")
    parser.add_argument("--heads", type=int, default=0, help="query heads of a layer to keep")
    parser.add_argument("--kv-heads", type=int, default=0, help="kv groups of a layer to keep")
    parser.add_argument("--mlp", type=int, default=0, help="MLP channels of a layer to keep")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="of the written weights (default: the model's own)",
    )
    parser.add_argument("--choose", choices=("weights", "activations"), default="weights")
    parser.add_argument("--data", default="", help="trace dataset for --choose activations")
    parser.add_argument("--traces", type=int, default=64, help="so many of them (default: 64)")
    args = parser.parse_args(argv)
    if (args.choose == "activations") != bool(args.data) or args.traces < 1:
        parser.error(
            "--choose activations needs --data, a trace dataset, which --choose weights does not "
            "read; --traces must be at least 1"
        )
    return args
