"""What was written is opened again and compared with what was trained, before it gets its name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcod_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.data.turns import stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.files import Path
from dcod_jax.models import hf, lora, peft, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import batch_shards
from dcod_jax.types import Params

CHECK_ROWS, CHECK_LENGTH = 4, 48


def verify(
    directory: Path,
    model_config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Re-open an export and compare it with its source; DcodError with the first difference.

    Every tensor must be that of `params` cast to dtype, bit for bit, and config, tokenizer and
    template the same. The logits of a row of text and of random rows must be finite; beside params
    one copy in a narrower dtype, or of the base of adapters, is held for them.
    """
    check_small(directory, model_config, tokenizer)
    form = "peft" if model_config.lora else "hf"
    hf.check_saved(directory, model_config, params, dtype=dtype, form=form)
    tokens = _check_tokens(tokenizer, batch_shards(mesh))

    @functools.partial(jax.jit, static_argnums=0)
    def compute(model: ModelConfig, params: Params) -> jax.Array:
        return transformer.logits(model, params, tokens, mesh=mesh)  # in float32

    def logits(params: Params, model: ModelConfig = model_config) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(compute(model, params), tiled=True))

    if model_config.lora is not None:
        settings = peft.read(directory)
        base = hf.load_model(settings["base_model_name_or_path"], dtype=dtype, mesh=mesh)[1]
        master = logits(lora.join(params, base))
        del base
        merged = hf.load_model(directory, dtype=dtype, mesh=mesh)[1]
        found = logits(merged, lora.without_adapter(model_config))
    else:
        master = found = logits(params)
        if jnp.dtype(dtype) != jnp.float32:
            found = logits(jax.jit(lambda x: jax.tree.map(lambda y: y.astype(dtype), x))(params))
    if not np.isfinite(found).all():
        raise DcodError(
            f"the parameters in {dtype} give logits that are not finite; set export.dtype=float32, "
            "or look at the run: its parameters may have diverged"
        )
    return {
        "tensors_equal_in_dtype": True,
        "max_logit_difference_from_float32": float(np.abs(master - found).max()),
        "rows": list(tokens.shape),
    }


def check_small(directory: Path, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Read config, stop ids, tokenizer and template back; DcodError with the first difference."""
    reopened_config, _ = hf.load_config(directory)
    # generation_config.json adds the tokenizer's own stop token to those of the config.
    stops = stop_ids(model_config, tokenizer)
    if set(reopened_config.eos_token_ids) != set(stops):
        raise DcodError(f"{directory}: stops at {reopened_config.eos_token_ids}, not at {stops}")
    same_stops = dataclasses.replace(reopened_config, eos_token_ids=model_config.eos_token_ids)
    if same_stops != lora.without_adapter(model_config):
        raise DcodError(f"{directory}: config.json reads back as {reopened_config}")
    written = load_tokenizer(directory)
    for fingerprint in (tokenizer_fingerprint, template_fingerprint):
        if fingerprint(written) != fingerprint(tokenizer):
            raise DcodError(
                f"{directory}: the {fingerprint.__name__} of the written files differs from the "
                "student's; are tokenizer.json and tokenizer_config.json of one model?"
            )


def _check_tokens(tokenizer: Tokenizer, shards: int) -> jax.Array:
    """A row of text first, then random ids."""
    text = "Question: 12 + 30 = ? Answer: first 10 + 30 = 40, then 40 + 2 = 42.\n#### 42"
    ids = tokenizer.encode(text, add_special_tokens=False)
    real = np.resize(np.asarray(ids, np.int32), (1, CHECK_LENGTH))
    random = np.random.default_rng(0).integers(
        len(tokenizer), size=(max(CHECK_ROWS, shards) - 1, CHECK_LENGTH), dtype=np.int32
    )
    rows = np.concatenate([real, random])
    return jnp.asarray(rows[: len(rows) // shards * shards])
