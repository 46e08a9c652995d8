"""Write a pruned copy of a model as an HF directory, with what was kept in its card."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dcod_jax import __version__
from dcod_jax.data.templates import OWN
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.export.check import check_small
from dcod_jax.export.command import write_small
from dcod_jax.files import Path, as_path, naming, publish, scratch
from dcod_jax.init_student import prune
from dcod_jax.models import hf
from dcod_jax.models.config import ModelConfig
from dcod_jax.models.counts import num_params
from dcod_jax.types import Params

MAX_SHARD_BYTES = 4 * 10**9


def init_student(args: argparse.Namespace) -> Path:
    """Read, prune and write; returns the directory, which appears whole or not at all."""
    out, source = as_path(args.out), as_path(args.model)
    if not isinstance(out, pathlib.Path) or out.exists():
        raise DcodError(f"{out} must be a local directory that is not there yet; choose another")
    tokenizer, before = load_tokenizer(source), hf.read_config(source)
    if len(tokenizer) > before.vocab_size:
        raise DcodError(
            f"{source}: the tokenizer has {len(tokenizer)} entries, the model {before.vocab_size} "
            "rows; rows are not added here: give a model that has been trained with them"
        )
    layers = list(range(before.num_layers))
    if args.layers:
        layers = prune.chosen_layers(args.layers, before.num_layers)
    raw = {} if args.dtype or source.suffix == ".gguf" else hf.load_config(source)[1]
    stored = raw.get("dtype") or raw.get("torch_dtype")
    dtype = args.dtype or (stored if stored in ("bfloat16", "float16") else "float32")
    texts = prune.texts_of(args.data, args.traces, before, tokenizer) if args.data else []
    config, params = _pruned(args, *hf.load_model(source, dtype=jnp.dtype(dtype)), layers, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out), scratch(out.parent) as directory:
        made = directory / "model"
        hf.save_params(made, config, params, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
        write_small(made, config, source, tokenizer, OWN, dtype=dtype, base="")
        check_small(made, config, tokenizer)
        (made / "README.md").write_text(_card(args, before, config, layers), encoding="utf-8")
        publish(made, out, last="config.json")
    print(f"wrote {out}: {num_params(config):,} of {num_params(before):,} parameters, {dtype}")
    return out


def _pruned(
    args: argparse.Namespace,
    config: ModelConfig,
    params: Params,
    layers: list[int],
    texts: Sequence[np.ndarray],
) -> tuple[ModelConfig, Params]:
    """The activations, where texts are given, are those of the whole model."""
    heads = channels = None
    if texts:
        heads, channels = (x[layers] for x in prune.mean_activations(config, params, texts))
    config, params = prune.keep_layers(config, params, layers)
    if args.heads or args.kv_heads:
        some = (args.heads, args.kv_heads)
        config, params = prune.keep_heads(config, params, *some, scores=heads)
    if args.mlp:
        config, params = prune.keep_channels(config, params, args.mlp, scores=channels)
    return config, params


def _card(
    args: argparse.Namespace, before: ModelConfig, config: ModelConfig, layers: list[int]
) -> str:
    pairs = (
        ("heads of a layer", "num_heads"),
        ("kv groups of a layer", "num_kv_heads"),
        ("MLP channels of a layer", "intermediate_size"),
    )
    largest = f"mean activations on {args.traces} traces of `{args.data}`"
    largest = "weights" if args.choose == "weights" else largest
    kept = "".join(
        f"- {what}: {getattr(config, key)} of {getattr(before, key)}, those of the largest "
        f"{largest}\n"
        for what, key in pairs
        if getattr(config, key) != getattr(before, key)
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [dcod_jax]
---

# A start for distillation

Made with dcod_jax {__version__} from `{args.model}` by leaving out parts of it. It was not trained
since.

- layers: {len(layers)} of {before.num_layers}: {", ".join(map(str, layers))}
{kept}- parameters: {num_params(config):,} of {num_params(before):,}
"""
