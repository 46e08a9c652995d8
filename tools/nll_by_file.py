"""Held-out nll of several models on several files of traces, by transformers, with intervals.

    python tools/nll_by_file.py --models start=MODEL sft=RUN/sft/export auto=RUN/auto/export \\
        --traces human.jsonl qwen.jsonl

Each line of a file has `prompt` and `completion`. The nll of a trace is the mean over the tokens of
its completion and of the end of its turn, as the model's chat template writes them. The table has
its mean over a file's traces and, in brackets, the paired difference to the second model with
Student's 95 % interval over the traces. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer


def trace_nll(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Mean -log q of one trace's supervised tokens, in nats."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    write = tokenizer.apply_chat_template
    before = write(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = write(messages, tokenize=False)
    if not whole.startswith(before):
        sys.exit("error: the chat template does not write the prompt as the begin of the whole")
    texts = before, whole[len(before) :].rstrip()
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    ids = torch.tensor(head + tail)
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0, len(head) - 1 : -1].log_softmax(-1)
    return -logprobs.gather(1, ids[len(head) :, None]).mean().item()


def nll_of(path: str, files: dict[str, list[dict[str, str]]]) -> dict[str, np.ndarray]:
    """{file: nll of each of its traces} of the model in a directory."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return {
        name: np.array([trace_nll(model, tokenizer, r["prompt"], r["completion"]) for r in rows])
        for name, rows in files.items()
    }


def cell(values: np.ndarray, base: np.ndarray) -> str:
    """Mean, and the mean difference to `base` with its half-width."""
    text, differ = f"{values.mean():.3f}", values - base
    if differ.any():
        half = stats.t.ppf(0.975, len(differ) - 1) * differ.std(ddof=1) / len(differ) ** 0.5
        text += f" ({differ.mean():+.3f} ± {half:.3f})"
    return text


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--models", nargs="+", required=True, help="NAME=DIRECTORY, at least two")
    parser.add_argument("--traces", nargs="+", required=True, help="JSONL files")
    options = parser.parse_args()
    if len(options.models) < 2 or not all("=" in entry for entry in options.models):
        parser.error("--models: expected NAME=DIRECTORY NAME=DIRECTORY ...")
    files = {
        Path(path).stem: [
            json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line
        ]
        for path in options.traces
    }
    models = dict(entry.split("=", 1) for entry in options.models)
    nll = {name: nll_of(path, files) for name, path in models.items()}
    base = nll[list(models)[1]]
    print("| traces | " + " | ".join(models) + " |\n|---" + "|---" * len(models) + "|")
    for file, rows in files.items():
        cells = [cell(nll[name][file], base[file]) for name in models]
        print(f"| {file} ({len(rows)}) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
