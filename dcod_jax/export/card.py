"""The model card of an export: the start, the checkpoint, the data, the recipe and the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dcod_jax import __version__

RECIPE = "dcod_jax_config.json"  # the resolved config


def card_text(about: dict[str, Any]) -> str:
    """The model card: the start, the checkpoint, the data, the recipe and the results."""
    checks, dtype = about["checks"], about["dtype"]
    rows, length = checks["rows"]
    data = "\n\n".join(
        "\n".join([f"**{split}**", "", *_data_lines(manifest)])
        for split, manifest in about["data"].items()
    )
    results = "".join(f"- {key}: {value:.6g}\n" for key, value in sorted(about["metrics"].items()))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, dcod_jax]
---

# Distilled student

Made with dcod_jax {__version__} by offline distillation from the traces of a fixed teacher.

- start: `{about["base_model"]}`
- checkpoint: step {about["step"]}, tensors in {dtype}
{results}- check: read back, every tensor is that of the training parameters in {dtype} bit for bit;
  on {rows} rows of {length} tokens the logits of the float32 parameters differ from theirs by at
  most {checks["max_logit_difference_from_float32"]:.3g}

## Data

{data or "The trace dataset was not found when this card was written."}

## Recipe

The resolved config of the training run, also in `{RECIPE}`:

```json
{json.dumps(about["config"], indent=1, sort_keys=True)}
```
"""


def _data_lines(manifest: dict[str, Any]) -> Sequence[str]:
    totals, teacher = manifest["totals"], manifest.get("teacher")
    lines = [
        f"- {totals['records']:,} traces, {totals['tokens']:,} tokens, "
        f"{totals['completion_tokens']:,} of them written by the teacher",
    ]
    if teacher:
        for name, about in (teacher.get("teachers") or {"": teacher}).items():
            traces = manifest.get("by_teacher", {}).get(name, {}).get("traces")
            told = {"traces": traces} | about
            named = ", ".join(f"{key} `{value}`" for key, value in told.items() if value)
            lines.append(f"- teacher{name and ' ' + name}: {named}")
    if "mean_logprob" in manifest:
        lines.append(f"- mean log-prob that the teacher gives them: {manifest['mean_logprob']:.4f}")
    if "counts" in manifest:
        lines.append(f"- counts: `{json.dumps(manifest['counts'], sort_keys=True)}`")
    for name in ("tokenizer", "template"):
        if name in manifest:
            lines.append(f"- {name}: `{manifest[name]['fingerprint']}`")
    return lines
