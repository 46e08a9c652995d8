"""Which traces the weights of a step favour: effective number, shares by source and teacher, ids.

A trace's weight is the mean of its tokens' weights before the batch normalisation. Only log steps
come here: they fetch the tokens' weights of this process's rows.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.teachers import TEACHER
from dcod_jax.parallel import hosts

SHOWN = 3  # traces of most and of least weight
KINDS = 12  # sources, and teachers, named apart; the rest are "other"
_PLACE = re.compile(r"(:\d+|\[\d+\])$")  # behind the file of a record


def trace_weights(
    weights: Float[np.ndarray, "R C"],
    trace_index: Int[np.ndarray, "R T"],
    head_positions: Shaped[np.ndarray, "R C"],
) -> list[tuple[int, float, int]]:
    """(trace, mean weight, tokens) of each trace in these rows of a compact batch."""
    inside = head_positions < trace_index.shape[1]
    places = np.where(inside, head_positions, 0)
    index = np.take_along_axis(trace_index, places, axis=1)[inside]
    traces, which = np.unique(index, return_inverse=True)
    tokens = np.bincount(which, minlength=len(traces))
    sums = np.bincount(which, weights[inside].astype(np.float64), minlength=len(traces))
    return list(zip(traces.tolist(), (sums / tokens).tolist(), tokens.tolist(), strict=True))


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array, sharded by rows alone, that this process holds, in their order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def summary(
    own: Iterable[tuple[int, float, int]], dataset: TraceDataset
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, {"most": [[id, weight], ...], "least": ...}) of the batch; all processes call it.

    weights/traces_effective = (Σ m)²/Σ m² over the traces' weights m: their number when all are
    equal. weights/source/<name> is that source's share of Σ of the tokens' weights and
    tokens/source/<name> its share of the tokens; both only where there are two sources or more.
    """
    everyone = hosts.exchange("the traces' weights", list(own))
    rows = sorted(tuple(row) for rows in everyone for row in rows)
    if not rows:
        return {}, {}
    traces = dataset.read([row[0] for row in rows])
    means = np.array([mean for _, mean, _ in rows])
    counts = np.array([count for *_, count in rows])
    squares = float(np.square(means).sum())
    metrics = {"weights/traces": float(len(rows))}
    if squares > 0:
        metrics["weights/traces_effective"] = float(np.square(means.sum()) / squares)
    sources = [_PLACE.sub("", str(trace.meta.get("source", ""))) or "unknown" for trace in traces]
    teachers = [str(trace.meta.get(TEACHER, "unknown")) for trace in traces]
    for kind, names in (("source", sources), ("teacher", teachers)):
        for what, amounts in (("weights", means * counts), ("tokens", counts)):
            metrics |= _shares(f"{what}/{kind}", names, counts, amounts)
    order = sorted(range(len(rows)), key=lambda i: (-means[i], i))
    name = [[traces[i].id, round(float(means[i]), 6)] for i in order]
    return metrics, {"most": name[:SHOWN], "least": name[::-1][:SHOWN]}


def _shares(
    label: str, names: list[str], counts: np.ndarray, amounts: np.ndarray
) -> dict[str, float]:
    """{label/<name>: share of the amounts}; the names of fewest tokens are one, "other"."""
    tokens: collections.Counter[str] = collections.Counter()
    for name, count in zip(names, counts, strict=True):
        tokens[name] += int(count)
    if len(tokens) < 2 or not amounts.sum() > 0:
        return {}
    kept = {name for name, _ in tokens.most_common(KINDS)}
    shares: dict[str, float] = {}
    for name, amount in zip(names, amounts, strict=True):
        key = f"{label}/{name if name in kept else 'other'}"
        shares[key] = shares.get(key, 0.0) + float(amount / amounts.sum())
    return shares
