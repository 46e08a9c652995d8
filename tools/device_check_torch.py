"""The peer of device_check.py: transformers' model in torch, on the same shapes and tokens.

Weights and AdamW's moments are float32 and products bfloat16 (autocast), as in our step; attention
is torch's scaled_dot_product_attention. `rows` takes a row as one sequence, so that the flash
kernel applies and traces see each other: the least that torch's step can take. `packed` gives the
traces' positions, from which transformers makes the mask of packed rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Variant -> (packed, compiled, gradient checkpointing); the first are the fastest where they fit.
VARIANTS = {
    "rows, compiled": (False, True, False),
    "rows, checkpointed": (False, False, True),
    "packed, checkpointed": (True, False, True),
    "rows": (False, False, False),
}


def run(
    shape: dict[str, Any],
    made: dict[str, Any],
    options: dict[str, Any],
    *,
    report: Callable[[dict[str, Any]], None],
) -> list[str]:
    """Measures each variant and reports it; the names of those that ran."""
    device = "cpu" if options.get("rehearse") else "cuda"
    if "new" in options:
        report({"variant": "generate", **_decode(shape, made, options, device)})
        return ["generate"]
    done = []
    for name, settings in VARIANTS.items():
        if options.get("rehearse") and settings[1]:
            continue  # torch.compile needs a C compiler, and minutes
        try:
            record = _train(shape, made, device, *settings)
        except torch.OutOfMemoryError as error:
            report({"variant": name, "error": str(error).splitlines()[0]})
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        report({"variant": name, **record})
        done.append(name)
    return done


def _model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):  # billions of random numbers take a CPU a minute
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def _peak(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"peak_gib": None}
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _train(
    shape: dict[str, Any],
    made: dict[str, Any],
    device: str,
    packed: bool,
    compiled: bool,
    checkpointed: bool,
) -> dict[str, Any]:
    """Median milliseconds of 5 steps after 2."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = _model(shape, device, torch.float32)
    model.config.use_cache = False
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(made["ids"][:, :-1]).long().to(device)}
    if packed:
        inputs["position_ids"] = torch.from_numpy(made["positions"]).long().to(device)
    forward: Any = torch.compile(model) if compiled else model
    seconds, first = [], 0.0
    for _ in range(7):
        start = _wait(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(_wait(device) - start)
        first = first or seconds[0]
    median = statistics.median(seconds[2:])
    return {
        "ms": median * 1e3,
        "tokens_per_s": inputs["input_ids"].numel() / median,
        "compile_s": first - median,
        "loss": float(loss.detach()),
        **_peak(device),
    }


def _decode(
    shape: dict[str, Any], made: dict[str, Any], options: dict[str, Any], device: str
) -> dict[str, Any]:
    """transformers' generate, greedy, no token ends a row; the second call is measured."""
    model = _model(shape, device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.from_numpy(made["ids"][:, :-1]).long().to(device)
    new = options["new"]
    seconds = []
    for _ in range(2):
        start = _wait(device)
        with torch.no_grad():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
            )
        seconds.append(_wait(device) - start)
        assert out.shape[1] == tokens.shape[1] + new
    return {
        "ms": seconds[1] * 1e3,
        "tokens_per_s": tokens.shape[0] * new / seconds[1],
        "compile_s": seconds[0] - seconds[1],
        **_peak(device),
    }
