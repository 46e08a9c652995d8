"""On-policy distillation (GKD): some batches hold completions sampled from the student.

With probability on_policy.fraction the current student continues the prompts of the batch, and its
completions are packed into rows of the same shape; the live teacher scores them in the train step.
Choice and samples follow from (seed, step), so a resumed run repeats them. Several processes read
the whole batch, sample it together and keep their rows. The cost of sampling is counted, for a
comparison with offline training at equal compute.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dcod_jax import seeds
from dcod_jax.data import packing
from dcod_jax.data.codec import Columns
from dcod_jax.data.pipeline import HostBatch, host_slice
from dcod_jax.data.turns import stop_ids
from dcod_jax.sample.sampler import sample
from dcod_jax.train.held_out import copy_to_sample
from dcod_jax.train.setup import Student
from dcod_jax.types import Params, TrainState


class OnPolicy:
    """Replaces a batch of traces by one of student samples with probability on_policy.fraction."""

    def __init__(
        self,
        config: Any,
        student: Student,
        mesh: Mesh,
        *,
        spent: dict[str, Any],
        base: tuple[Params, ...] = (),
    ):
        """spent: the cost so far, counted on here; base: as held_out.copy_to_sample has it."""
        self.config, self.student, self.mesh, self.base = config, student, mesh, base
        self.host, self.hosts = host_slice(mesh, config.data.batch_size)
        self.spent = spent
        spent.setdefault("tokens", 0)
        spent.setdefault("seconds", 0.0)

    def __call__(
        self, step: int, state: TrainState, batch: HostBatch, trace_index: np.ndarray
    ) -> tuple[HostBatch, np.ndarray, dict[str, float]]:
        """(the batch to train on, the trace of each position, metrics) of a batch of traces."""
        if not self.config.on_policy.fraction:
            return batch, trace_index, {}
        drawn = seeds.bits(self.config.seed, "on_policy", step).random_raw(2)
        if drawn[0] / 2**64 >= self.config.on_policy.fraction:
            return *self._own_rows(batch, trace_index), self._metrics(on=False)
        start = time.monotonic()
        prompts, sources = _prompts(batch, trace_index)
        settings, of = self.config.on_policy, (self.config, self.student.config, self.mesh)
        vocab = self.student.valid_vocab
        samples = sample(
            copy_to_sample(*of, state, base=self.base, valid_vocab=vocab),
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=int(drawn[1] >> 33),
            batch_size=self.config.generate.batch_size,
            eos_ids=stop_ids(self.student.config, self.student.tokenizer),
        )
        completions = [s.token_ids for s in samples]
        own, index, left_out = _pack(prompts, completions, sources, batch)
        self.spent["tokens"] += sum(len(ids) for ids in completions)
        self.spent["seconds"] += time.monotonic() - start
        unfinished = sum(not s.finished for s in samples) / len(samples)
        more = {"on_policy/unfinished": unfinished, "on_policy/left_out": float(left_out)}
        return *self._own_rows(own, index), self._metrics(on=True) | more

    def _own_rows(self, batch: HostBatch, trace_index: np.ndarray) -> tuple[HostBatch, np.ndarray]:
        """This host's rows of the whole batch."""
        share = len(trace_index) // self.hosts
        rows = slice(self.host * share, (self.host + 1) * share)
        return {name: value[rows] for name, value in batch.items()}, trace_index[rows]

    def _metrics(self, *, on: bool) -> dict[str, float]:
        return {
            "on_policy/batch": float(on),
            "on_policy/tokens_generated": float(self.spent["tokens"]),
            "time/on_policy_seconds": self.spent["seconds"],
        }


def _prompts(batch: HostBatch, trace_index: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Prompt of every trace in the batch (up to its first supervised position) and its index."""
    prompts, sources = [], []
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, int(segments.max()) + 1):
            places = np.flatnonzero(segments == segment)
            supervised = places[batch["loss_mask"][row, places]]
            prompts.append(batch["tokens"][row, places[0] : supervised[0] + 1].tolist())
            sources.append(int(trace_index[row, places[0]]))
    return prompts, sources


def _pack(
    prompts: list[list[int]], completions: list[list[int]], sources: list[int], like: HostBatch
) -> tuple[HostBatch, np.ndarray, int]:
    """(rows of the shape of `like`, the trace of each position, how many had no room)."""
    rows, seq_len = like["tokens"].shape
    capacity = like["head_positions"].shape[1]
    kept = [
        completion[: min(seq_len - len(prompt), capacity)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    counts = np.array([len(completion) for completion in kept])
    lengths = np.array([len(prompt) for prompt in prompts]) + counts
    packed = packing.first_fit(
        lengths, seq_len, completions=counts, capacity=capacity, open_bins=rows
    )[:rows]
    order = [i for row in packed for i in row]
    tokens = [np.array(prompts[i] + kept[i], np.int32) for i in order]
    masks = [np.arange(len(ids)) >= len(prompts[i]) for i, ids in zip(order, tokens, strict=True)]
    columns = Columns(
        token_ids=np.concatenate(tokens),
        completion_mask=np.concatenate(masks),
        logprobs=np.zeros(sum(map(len, tokens)), np.float32),
        lengths=lengths[order],
    )
    per_row = [len(row) for row in packed] + [0] * (rows - len(packed))
    batch = packing.fill_rows(columns, per_row, seq_len, capacity=capacity)
    if "trace_weights" in like:  # they are of the traces, not of the student's own text
        batch["trace_weights"] = np.ones_like(like["trace_weights"])
    names = np.array([sources[i] for i in order] + [-1], np.int32)  # -1 picks the -1 at the end
    return batch, names[batch.pop("trace_index")], len(prompts) - len(order)
