"""Trace dataset -> shuffled, packed, prefetched host batches (Grain) -> sharded device batches.

The rows of a run are one endless stream: epoch e is the traces shuffled by (seed, e), packed
first-fit, and batches are cut from the stream without regard to where an epoch ends. So the
stream depends on the dataset, seq_len and seed alone, each host takes its slice of each global
batch, and a position is two numbers, the same on every host and for every number of hosts:

    iterator.get_state() -> {"epoch": 1, "row": 640, "stream": "3f0c..."}

"stream" is a hash of what the stream depends on; a state of another one is refused.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import weakref
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from dcod_jax import seeds
from dcod_jax.data import packing
from dcod_jax.data.codec import decode_columns
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.errors import DcodError
from dcod_jax.parallel import mesh as meshes
from dcod_jax.types import Batch

HostBatch = dict[str, np.ndarray]  # the Batch fields, [B / hosts, T] or [B / hosts, C, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a dataset is read: data.* and what the loss needs of it."""

    seq_len: int
    batch_size: int  # rows of the global batch; a host gets its contiguous slice
    head_tokens: int = 0  # supervised tokens in a row; 0: chosen from the dataset
    prefetch: int = 4  # batches that a thread reads ahead; 0: none
    require_scores: bool = True  # refuse a dataset without log-probs
    require_top_k: bool = False  # refuse one without the teacher's top-k, and read it
    teacher_weights: tuple[tuple[str, float], ...] = ()  # of traces in the loss, by their teacher
    require_start: bool = False  # refuse one without the start's log-probs, and read them
    process_index: int = 0
    process_count: int = 1


class RowStream(grain.IterDataset):
    """The rows of every epoch; batches and hosts are cuts through them.

    shuffle (a seed) None: one pass in the dataset's order, the last batch filled up.
    """

    def __init__(self, dataset: TraceDataset, reading: Reading, shuffle: int | None):
        super().__init__()
        lengths, head_tokens = dataset.lengths, reading.head_tokens
        packing.check_lengths(lengths[:, 0], reading.seq_len, source=str(dataset.directory))
        self.dataset, self.reading, self.shuffle = dataset, reading, shuffle
        self.capacity = packing.head_capacity(lengths, reading.seq_len, head_tokens)
        parts = f"{reading.seq_len} {self.capacity} {shuffle} {packing.OPEN_BINS} ".encode()
        self.key = hashlib.sha256(parts + lengths.tobytes()).hexdigest()[:16]
        self.rows = functools.lru_cache(maxsize=2)(self._rows)  # of the epochs a batch touches

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(self)

    def _rows(self, epoch: int) -> list[np.ndarray]:
        """The epoch's rows, each the indices of its traces."""
        lengths = self.dataset.lengths
        order = np.arange(len(lengths))
        if self.shuffle is not None:
            # Raw bits and a stable sort: NumPy promises both to stay the same across versions.
            raw = seeds.bits(self.shuffle, "shuffle", epoch).random_raw(len(lengths))
            order = np.argsort(raw, kind="stable")
        rows = packing.first_fit(
            lengths[order, 0],
            self.reading.seq_len,
            completions=lengths[order, 1],
            capacity=self.capacity,
        )
        return [order[row] for row in rows]

    def read(self, rows: list[np.ndarray]) -> tuple[HostBatch, np.ndarray]:
        """(HostBatch, trace_index) of these rows."""
        traces = np.concatenate(rows)
        top_k = self.dataset.top_k if self.reading.require_top_k else 0
        weighted = self.dataset.manifest.get("weighted") or self.reading.teacher_weights
        columns = decode_columns(
            self.dataset.read_records(traces),
            top_k=top_k,
            spans=self.dataset.spans and self.reading.require_scores,
            start=self.reading.require_start,
            teacher_weights=dict(self.reading.teacher_weights) if weighted else None,
        )
        counts = [len(row) for row in rows]
        batch = packing.fill_rows(columns, counts, self.reading.seq_len, capacity=self.capacity)
        index = np.append(traces, -1).astype(np.int32)  # -1, padding, picks the -1 at the end
        return batch, index[batch.pop("trace_index")]


class _BatchIterator(grain.DatasetIterator):
    """Yields (HostBatch, trace_index) of this host's slice of each global batch."""

    def __init__(self, stream: RowStream):
        super().__init__()
        self._stream = stream
        self._epoch = self._row = 0  # the first row of the next global batch

    def __next__(self) -> tuple[HostBatch, np.ndarray]:
        reading = self._stream.reading
        batch: list[np.ndarray] = []
        while (missing := reading.batch_size - len(batch)) > 0:
            taken = self._stream.rows(self._epoch)[self._row : self._row + missing]
            self._row += len(taken)
            batch += taken
            if not taken and self._stream.shuffle is None:
                break
            if not taken:
                self._epoch, self._row = self._epoch + 1, 0
        if not batch:
            raise StopIteration
        batch += [np.zeros(0, np.int64)] * missing
        share = reading.batch_size // reading.process_count
        start = reading.process_index * share
        return self._stream.read(batch[start : start + share])

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row, "stream": self._stream.key}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["stream"] != self._stream.key:
            raise DcodError(
                f"the data position belongs to stream {state['stream']}, this run reads "
                f"{self._stream.key}: the trace dataset ({self._stream.dataset.directory}), "
                "data.seq_len or seed changed; restore them, or start a new run with "
                "train.init_from"
            )
        self._epoch, self._row = int(state["epoch"]), int(state["row"])


def _open(dataset: TraceDataset, reading: Reading, seed: int | None) -> grain.DatasetIterator:
    if reading.batch_size < 1 or reading.batch_size % reading.process_count:
        raise DcodError(
            f"data.batch_size={reading.batch_size} must be a positive multiple of the "
            f"{reading.process_count} hosts that read; set data.batch_size"
        )
    if seed is not None and seed < 0:
        raise DcodError(f"seed={seed} must not be negative")
    known = dataset.manifest.get("teachers") or []
    unknown = [name for name, _ in reading.teacher_weights if name not in known]
    if unknown and seed is not None:  # the held-out traces may be of fewer teachers
        raise DcodError(
            f"loss.teacher_weights names {', '.join(unknown)}; the traces of {dataset.directory} "
            f"are of {', '.join(known) or 'no named teacher'}"
        )
    if reading.require_scores and not dataset.scored:
        raise DcodError(
            f"{dataset.directory} holds no teacher log-probs, which the loss needs; run "
            "`python -m dcod_jax.score` with the same --config, or set loss.weights.name to "
            "uniform or dft"
        )
    if reading.require_top_k and not dataset.top_k:
        raise DcodError(
            f"{dataset.directory} holds log-probs of the trace tokens only, the loss needs the "
            "teacher's distribution; run `python -m dcod_jax.score` with the same --config, "
            "--config.score.top_k=64 and --config.score.overwrite=true, or set loss.teacher=live"
        )
    if reading.require_start and "start" not in dataset.manifest:
        raise DcodError(
            f"{dataset.directory} holds no log-probs of the student's start, which the loss needs; "
            "run `python -m dcod_jax.score` with the same --config, --config.score.student=true "
            "and, where the teacher scored before, --config.score.overwrite=true"
        )
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        RowStream(dataset, reading, seed), prefetch_buffer_size=reading.prefetch
    )
    batches = iter(ahead)
    atexit.register(_end_thread, weakref.ref(batches))
    return batches


def _end_thread(reference: weakref.ref[grain.DatasetIterator]) -> None:
    """From Python 3.13 on, a thread in native code when the interpreter ends aborts the process."""
    if (batches := reference()) is not None:
        batches.close()


def train_batches(dataset: TraceDataset, *, seed: int, **reading: Any) -> grain.DatasetIterator:
    """Endless iterator of (HostBatch, trace_index [B / hosts, T] int32, -1 in padding).

    `reading`: the fields of Reading. get_state() speaks of what was yielded, not of what was read
    ahead. Raises DcodError for traces longer than seq_len, for a batch the hosts cannot divide, and
    for a dataset without what `reading` requires (teacher_logprobs are 0 where none are required
    and none are there).
    """
    return _open(dataset, Reading(**reading), seed)


def eval_batches(dataset: TraceDataset, **reading: Any) -> grain.DatasetIterator:
    """One pass in the dataset's order, as train_batches; empty rows fill the last batch."""
    return _open(dataset, Reading(**reading), None)


def host_slice(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(process_index, process_count) to read with: hosts that hold the same rows read the same.

    Without model parallelism across hosts this is this host's number and the number of hosts.
    Raises DcodError where two hosts have some rows in common and others not.
    """
    layout = meshes.sharding(mesh, ("batch", None)).devices_indices_map((batch_size, 1))
    rows: dict[int, set[int]] = {}
    for device, (piece, _) in layout.items():
        rows.setdefault(device.process_index, set()).add(piece.start or 0)
    shares = sorted({tuple(sorted(starts)) for starts in rows.values()})
    if len(set().union(*shares)) != sum(map(len, shares)):
        raise DcodError(
            f"hosts share rows of a batch in part, they begin at {' and '.join(map(str, shares))}: "
            f"mesh.{meshes.describe(mesh, 'batch')} leaves {mesh.size // meshes.batch_shards(mesh)}"
            f" devices (mesh.context * tensor) a batch shard, of {jax.local_device_count()} on a "
            "host; one of the two must be a multiple of the other"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def to_device(batch: HostBatch, mesh: Mesh) -> Batch:
    """The global batch, its rows split over the mesh, from each host's slice."""
    layout = meshes.sharding(mesh, ("batch",))
    place = functools.partial(jax.make_array_from_process_local_data, layout)
    return Batch(**{name: place(value) for name, value in batch.items()})
