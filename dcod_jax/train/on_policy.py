"""GKD's on-policy mode: with probability on_policy.fraction a batch holds the student's own words.

The prompts of the batch at hand are continued by the current student with the repository's sampler
and packed into rows of the same shape; the live teacher then scores them in the train step like
any other batch. Coin and samples follow from (seed, step), so a resumed run repeats them. Several
processes read the whole batch, sample it together and keep their rows. What it costs is counted,
for a comparison with offline training at equal compute.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dcod_jax.data import packing
from dcod_jax.data.codec import Columns
from dcod_jax.data.pipeline import HostBatch, host_slice
from dcod_jax.data.tokenizer import stop_ids
from dcod_jax.sample.sampler import decoding_params, sample
from dcod_jax.train.start import Student
from dcod_jax.types import TrainState


def reading(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The fields of pipeline.Reading: prompts are needed of the whole batch, not of a host's."""
    return own | {"process_index": 0, "process_count": 1} if config.on_policy.fraction else own


class OnPolicy:
    """Turns a batch of traces into one of student samples, now and then."""

    def __init__(self, config: Any, student: Student, mesh: Mesh, *, spent: dict[str, Any]):
        """spent: what an interrupted run had used up, as `spent` of its checkpoint."""
        self.config, self.student, self.mesh = config, student, mesh
        self.host, self.hosts = host_slice(mesh, config.data.batch_size)
        self.spent: dict[str, Any] = {"tokens": 0, "seconds": 0.0} | spent

    def __call__(
        self, step: int, state: TrainState, batch: HostBatch, trace_index: np.ndarray
    ) -> tuple[HostBatch, np.ndarray, dict[str, float]]:
        """The batch to train on, whose trace each position belongs to, and the metrics."""
        if not self.config.on_policy.fraction:
            return batch, trace_index, {}
        drawn = _draws(self.config.seed, step)
        if drawn[0] / 2**64 >= self.config.on_policy.fraction:
            return *self._own_rows(batch, trace_index), self._metrics(on=False)
        start = time.monotonic()
        prompts, sources = _prompts(batch, trace_index)
        settings = self.config.on_policy
        samples = sample(
            decoding_params(
                self.student.config,
                state.params,
                valid_vocab=self.student.valid_vocab,
                compute_dtype=self.config.student.compute_dtype,
                mesh=self.mesh,
            ),
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


def _draws(seed: int, step: int) -> np.ndarray:
    """Two uint64 that follow from (seed, step) alone."""
    return np.random.Philox(np.random.SeedSequence((seed, step))).random_raw(2)


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
    prompts: list[list[int]],
    completions: list[list[int]],
    sources: list[int],
    like: HostBatch,
) -> tuple[HostBatch, np.ndarray, int]:
    """Rows of the shape of `like`, whose trace a position belongs to, and how many had no room.

    A completion is cut where a row ends; a sequence that no row has room for is left out.
    """
    rows, seq_len = like["tokens"].shape
    capacity = like["head_positions"].shape[1]
    kept = [
        completion[: min(seq_len - len(prompt), capacity)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    counts = np.array([len(completion) for completion in kept])
    lengths = np.array([len(prompt) for prompt in prompts]) + counts
    plan = packing.first_fit(
        lengths, seq_len, completions=counts, capacity=capacity, open_bins=rows
    )[:rows]
    order = [i for row in plan for i in row]
    tokens = [np.array(prompts[i] + kept[i], np.int32) for i in order]
    masks = [np.arange(len(ids)) >= len(prompts[i]) for i, ids in zip(order, tokens, strict=True)]
    columns = Columns(
        token_ids=np.concatenate(tokens),
        completion_mask=np.concatenate(masks),
        logprobs=np.zeros(sum(map(len, tokens)), np.float32),
        lengths=lengths[order],
    )
    per_row = [len(row) for row in plan] + [0] * (rows - len(plan))
    batch = packing.fill_rows(columns, per_row, seq_len, capacity=capacity)
    names = np.array([sources[i] for i in order] + [-1], np.int32)  # -1 picks the -1 at the end
    return batch, names[batch.pop("trace_index")], len(prompts) - len(order)
