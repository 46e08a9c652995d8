"""Scores a run's traces with its student: log q, log p and weight of every completion token."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dcod_jax import config as configs
from dcod_jax.data.dataset import MANIFEST, TraceDataset, check_fingerprints
from dcod_jax.data.teachers import TEACHER
from dcod_jax.data.tokenizer import load_tokenizer, student_tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.export.command import MARKER, export_path
from dcod_jax.files import Path, as_path
from dcod_jax.losses import weights
from dcod_jax.losses.weights import AUTO, Tempering, Tokens, WeightConfig
from dcod_jax.models import hf
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.report.data import Run
from dcod_jax.score.scoring import score_settings, score_traces
from dcod_jax.train.checkpoint_reader import read_student
from dcod_jax.train.checkpointer import finished
from dcod_jax.train.metrics import read_metrics
from dcod_jax.train.settings import loss_config, student_source
from dcod_jax.types import Params, Trace

BINS = 40
_LATE = 1 << 30  # a step after any warmup
_weigh = jax.jit(weights.weigh, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Traces of one run's dataset, scored by its student."""

    source: str  # the parameters, in words
    split: str
    traces: list[Trace]
    tokenizer: Any
    student: list[np.ndarray]  # log q of each trace's completion tokens
    weights: list[np.ndarray] | None  # of the same tokens, before the batch normalisation
    missing: str  # why there are no weights; ""


def see(run: Run, *, count: int) -> Seen:
    """The first held-out (else training) traces, weighed by the run's export or checkpoint."""
    _check_config(run)
    dataset = _dataset(run)
    # The run may have been moved since.
    exports = export_path(run.config), run.path / "export"
    export = next((path for path in exports if (path / MARKER).is_file()), None)
    tokenizer = load_tokenizer(export) if export else student_tokenizer(run.config.student)
    check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(tokenizer))
    traces = dataset.read(range(min(count, len(dataset))))
    source, model_config, params, mesh = _student(run, export)
    dtype = run.config.student.compute_dtype
    settings = score_settings(run.config, compute_dtype=dtype, valid_vocab=len(tokenizer))
    scored = score_traces(model_config, params, traces, settings=settings, mesh=mesh)
    student = [np.asarray(trace.logprobs, np.float32) for trace in scored]
    cfg = loss_config(run.config).weights
    found, missing = None, ""
    if cfg.needs_teacher and any(trace.logprobs is None for trace in traces):
        missing = (
            f"{dataset.directory} has no teacher log-probs, which {cfg.name} weights need; run "
            "`python -m dcod_jax.score`"
        )
    elif cfg.needs_start and any(trace.start_logprobs is None for trace in traces):
        missing = (
            f"{dataset.directory} has no log-probs of the start, which loss.weights.ratio="
            f"{cfg.ratio} needs; run `python -m dcod_jax.score` with score.student=True"
        )
    elif {"entropy", "top_entropy"} & cfg.reads:
        missing = f"{cfg.name} weights read an entropy of the student, which is not computed here"
    else:
        found = token_weights(cfg, student, traces, tempering=_tempering(run, cfg))
    return Seen(source, dataset.directory.name, traces, tokenizer, student, found, missing)


def token_weights(
    cfg: WeightConfig,
    student: Sequence[np.ndarray],
    traces: Sequence[Trace],
    *,
    tempering: Tempering | None = None,
) -> list[np.ndarray]:
    """The train step's weight of every completion token, before the batch normalisation."""
    shape = (len(student), max(len(one) for one in student))
    log_q, log_p, log_start = (np.zeros(shape, np.float32) for _ in range(3))
    mask, starts = np.zeros(shape, bool), np.ones(shape, np.int32)
    for row, (one, trace) in enumerate(zip(student, traces, strict=True)):
        log_q[row, : len(one)] = one
        if trace.logprobs is not None:
            log_p[row, : len(one)] = trace.logprobs
        if trace.start_logprobs is not None:
            log_start[row, : len(one)] = trace.start_logprobs
        if trace.span_starts is not None:
            starts[row, : len(one)] = trace.span_starts
        mask[row, : len(one)] = True
    spans = starts.cumsum(axis=1, dtype=np.int32)
    parts = (log_q, log_p, mask, mask.astype(np.int32), spans, log_start)
    tokens = Tokens(*map(jnp.asarray, parts))
    found = np.asarray(_weigh(cfg, tokens, _LATE, tempering))
    return [found[row, : len(one)] for row, one in enumerate(student)]


def _tempering(run: Run, cfg: WeightConfig) -> Tempering | None:
    """Temperature and offset of the last logged step, where they are automatic."""
    if not cfg.automatic:
        return None
    lines = read_metrics(run.path / "metrics.jsonl")
    found = collections.deque((x for x in lines if "weights/temperature" in x), maxlen=1)
    if not found:
        raise DcodError(
            f"{run.path}/metrics.jsonl has no weights/temperature, and loss.weights.temperature or "
            f"offset is {AUTO!r}; train at least one step"
        )
    return Tempering(found[0]["weights/temperature"], found[0]["weights/offset"])


# ---------------------------------------------------------------- parts of a run


def _check_config(run: Run) -> None:
    """Refuse a config.json without the settings that weights and log-probs follow from."""
    known, own = configs.keys(configs.load_recipe(configs.BASE)), configs.keys(run.config)
    sections = ("student.", "data.", "score.", "loss.", "train.", "export.")
    odd = [key for key in known | own if (key in known) != (key in own) if key.startswith(sections)]
    odd += [
        key
        for key in known.keys() & own.keys() - set(configs.AUTOMATIC)
        if type(own[key]) is not type(known[key])
        and {type(own[key]), type(known[key])} != {int, float}
    ]
    if odd:
        raise DcodError(
            f"{run.path}/config.json is of another version of dcod_jax, which differs in "
            f"{', '.join(odd[:3])}"
        )
    configs.check(run.config)


def _dataset(run: Run) -> TraceDataset:
    root = as_path(configs.dataset_dir(run.config))
    # Beside the run and its variants as well: it may have been moved since.
    for home in (root, run.path / "dataset", run.path.parent / "dataset"):
        for path in (home / "eval", home / "train", home):
            if (path / MANIFEST).is_file():
                return TraceDataset(path, verify=False)
    raise DcodError(f"no trace dataset in {root}")


def _student(run: Run, export: Path | None) -> tuple[str, ModelConfig, Params, Mesh]:
    """(source, architecture, parameters, mesh), split over all devices."""
    mesh = make_mesh(1, -1)
    if export:
        return f"export {export}", *hf.load_model(export, dtype=jnp.float32, mesh=mesh), mesh
    if not finished(run.path / "checkpoints"):
        raise DcodError(f"{run.path} has neither an export nor a finished checkpoint")
    model_config, params, record = read_student(run.path, student_source(run.config), mesh=mesh)
    return f"checkpoint of step {record.step}", model_config, params, mesh


# ---------------------------------------------------------------- for the page


def histogram(seen: Seen) -> dict[str, Any] | None:
    """Counts of the weights in equal bins that begin or end at 0, their mean and their ESS."""
    if seen.weights is None:
        return None
    values = np.concatenate(seen.weights).astype(np.float64)
    low, top = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    square = float((values**2).sum())
    counts, edges = np.histogram(values, bins=BINS, range=(low, top if top > low else 1.0))
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "tokens": len(values),
        "traces": len(seen.traces),
        "mean": float(values.mean()),
        "ess": float(values.sum() ** 2 / (len(values) * square)) if square else None,
    }


def shown(seen: Seen, *, count: int) -> list[dict[str, Any]]:
    """The first traces for the page: texts of all tokens, numbers of the completion's."""
    decode = seen.tokenizer.backend_tokenizer.decode
    return [
        {
            "id": " of ".join(filter(None, (trace.id, str(trace.meta.get(TEACHER, ""))))),
            "split": seen.split,
            "texts": [
                decode([token], skip_special_tokens=False) for token in trace.token_ids.tolist()
            ],
            "completion": np.flatnonzero(trace.completion_mask).tolist(),
            "teacher": _rounded(trace.logprobs),
            "student": _rounded(seen.student[i]),
            "weights": _rounded(None if seen.weights is None else seen.weights[i]),
        }
        for i, trace in enumerate(seen.traces[:count])
    ]


def _rounded(values: np.ndarray | None) -> list[float | None] | None:
    if values is None:
        return None
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in values]
