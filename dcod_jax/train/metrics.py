"""Numbers of a run: weight statistics on the device, files on the host.

A value that is not available is NaN on the device and absent in the files, never 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dcod_jax.bounds import check, mapping, number, whole
from dcod_jax.copies import Mirror
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path, atomic_write, from_json, refusals
from dcod_jax.losses import adaptive, reduce, weights
from dcod_jax.losses.distill import LossConfig, tokens_of
from dcod_jax.losses.reduce import Sums, TokenStats
from dcod_jax.types import Batch, LossState

# First position within the completion of each bucket: [0,16), [16,32), ..., [1024, ∞).
POSITION_BUCKETS = (0, 16, 32, 64, 128, 256, 512, 1024)
_LONGEST = 1 << 24  # bytes of a line
TRACES = "trace_weights.jsonl"  # of a run: the traces of most and of least weight
SYNC_SECONDS = 60.0  # between two copies of a growing file to a store
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
BINS, SMALLEST, LARGEST = 4096, 1e-4, 1e4  # of a histogram of weights: uniform in their asinh


def is_logged(step: Any, every: int, steps: int) -> Any:
    """Whether the numbers of a step (from 1 on, a number or traced) go into metrics.jsonl."""
    whole = step % every == 0
    return whole | (step == steps) if steps % every else whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepMetrics(Mapping[str, Any]):
    """{name: scalar} of a step, in one float32 array on every device: one transfer fetches it."""

    array: Any  # float32 [N], on the device or fetched
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    token_weights: Any = None  # [B, C] of a compact batch, sharded by rows; log steps fetch it

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.array[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def pack(measured: Mapping[str, Array]) -> Float[Array, " N"]:
    """The values as one float32 array, in their order."""
    return jnp.stack([value.astype(jnp.float32) for value in measured.values()])


def packed_where(
    wanted: Bool[Array, ""] | bool, measure: Callable[[], dict[str, Array]]
) -> tuple[tuple[str, ...], Float[Array, " N"]]:
    """(names, values) of measure(), which a device computes only where wanted; else NaN."""
    if wanted is True:
        found = measure()
        return tuple(found), pack(found)
    names: list[str] = []

    def packed() -> Array:
        found = measure()
        names[:] = found  # traced by the next line, and in the branch
        return pack(found)

    nothing = jnp.full(jax.eval_shape(packed).shape, jnp.nan, jnp.float32)
    return tuple(names), jax.lax.cond(wanted, packed, lambda: nothing)


def quantile_of(ordered: Array, count: Array, quantile: float) -> Array:
    """Linear interpolation among the first `count` values, as numpy does it; NaN without any."""
    return _interpolated(lambda rank: ordered[rank.astype(jnp.int32)], count, quantile)


def _interpolated(ranked: Callable[[Array], Array], count: Array, quantile: float) -> Array:
    """The quantile of values of which ranked(i) is the i-th in order."""
    place, last = quantile * (count - 1.0), jnp.maximum(count - 1, 0)
    low = jnp.floor(place)
    below, above = ranked(jnp.maximum(low, 0)), ranked(jnp.minimum(jnp.maximum(low + 1, 0), last))
    return jnp.where(count > 0, below + (place - low) * (above - below), jnp.nan)


def quantiles(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], wanted: Mapping[str, float]
) -> dict[str, Float[Array, ""]]:
    """Quantiles with numpy's interpolation, of values of which each stands for its bin's mean.

    Up to 1e4 a bin is at most 1 % wide (1e-6 near 0), so a quantile is that exact. Rows
    have histograms of their own, which are added: nothing is sorted or gathered. NaN without any.
    """
    scaled = jnp.arcsinh(values / SMALLEST) / math.asinh(LARGEST / SMALLEST)
    bins = jnp.clip((scaled + 1) / 2 * BINS, 0, BINS - 1).astype(jnp.int32)

    def histograms(amounts: Array) -> Array:
        """[BINS] of all rows; of a scatter over a batch each device makes that of its rows."""
        empty = jnp.zeros(BINS, amounts.dtype)
        return jax.vmap(lambda row, of: empty.at[row].add(of))(bins, amounts).sum(0)

    counts = histograms(mask.astype(jnp.int32))
    sums = histograms(jnp.where(mask, values, 0.0))
    means, upto = sums / jnp.maximum(counts, 1), jnp.cumsum(counts)

    def ranked(rank: Array) -> Array:
        return means[jnp.minimum(jnp.searchsorted(upto, rank, side="right"), BINS - 1)]

    return {name: _interpolated(ranked, upto[-1], quantile) for name, quantile in wanted.items()}


def weight_statistics(
    raw_weights: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    student_logprobs: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    completion_positions: Float[Array, "B T"],
) -> dict[str, Float[Array, ""]]:
    """Statistics over the completion tokens of the global batch; call it inside jit.

    weights are final but for the batch normalisation, raw_weights before warmup and any
    normalisation (for the saturated shares); completion_positions count within a completion.
    ess = (Σw)²/(n Σw²) is 1 when all weights are equal; confident_mass is the share of Σw on
    tokens with q > 0.9, confident_tokens the share of such tokens.
    """
    mask = loss_mask.astype(jnp.float32)
    count = mask.sum()

    def mean(values: Array) -> Array:
        return jnp.where(loss_mask, values, 0.0).sum() / count

    average = mean(weights)
    confident = student_logprobs > math.log(0.9)
    statistics = {
        "mean": average,
        "std": jnp.sqrt(mean(jnp.square(weights - average))),
        **quantiles(weights, loss_mask, QUANTILES),
        "ess": jnp.square(average) / mean(jnp.square(weights)),
        "saturated_low": mean(raw_weights < 0.01),
        "saturated_high": mean(raw_weights > 0.99),
        "confident_tokens": mean(confident),
        "confident_mass": mean(jnp.where(confident, weights, 0.0)) / average,
    }
    edges = jnp.asarray((*POSITION_BUCKETS, math.inf), jnp.float32)
    place = completion_positions[..., None]
    inside = loss_mask[..., None] & (place >= edges[:-1]) & (place < edges[1:])
    totals = jnp.where(inside, weights[..., None], 0.0).sum((0, 1)) / inside.sum((0, 1))
    for index, first in enumerate(POSITION_BUCKETS):
        statistics[f"position_{first:04d}"] = totals[index]
    return {f"weights/{name}": value for name, value in statistics.items()}


def measure(
    cfg: LossConfig, small: Batch, sums: Sums, stats: TokenStats, loss_state: LossState
) -> dict[str, Array]:
    """Metrics of a compact batch that only log steps need: scalars, NaN where there is none."""
    mask = small.loss_mask
    read = (stats.student_logprobs, stats.teacher_logprobs, stats.extra)
    scoped = weights.scoped_signal(cfg.weights, tokens_of(small, *read))
    bounded = weights.raw(cfg.weights, scoped, loss_state)
    order = weights.segment_cumsum(mask.astype(jnp.float32), small.segment_ids) - 1.0
    measured = {
        "nll": reduce.mean_nll(sums),
        **weight_statistics(bounded, stats.weights, stats.student_logprobs, mask, order),
    }
    if cfg.needs_distribution:
        measured["divergence"] = sums.divergence / sums.count
    if cfg.needs_distribution and small.tail_logprobs is not None:
        inside = 1.0 - jnp.exp(small.tail_logprobs)
        measured["teacher/captured_mass"] = jnp.where(mask, inside, 0.0).sum() / sums.count
    if cfg.weights.needs_teacher:
        r = stats.student_logprobs - stats.teacher_logprobs
        measured["weights/log_ratio"] = jnp.where(mask, r, 0.0).sum() / sums.count
    if cfg.weights.automatic:
        used = weights.fixed(cfg.weights, loss_state)
        measured["weights/temperature"] = jnp.asarray(used.temperature)
        measured["weights/offset"] = jnp.asarray(used.offset)
    if cfg.interpolates:
        measured["taid/interpolation"] = adaptive.interpolation(cfg.taid, loss_state)
    return measured


def available(values: Mapping[str, Any]) -> dict[str, float]:
    """Host floats of the values that are finite numbers: None, NaN and ±inf are left out."""
    floats = {key: float(value) for key, value in values.items() if value is not None}
    return {key: value for key, value in floats.items() if math.isfinite(value)}


# tensorboardX imports these if it can, and does nothing with them here: seconds of a start.
UNUSED = ("torch", "google.cloud.storage", "boto3")


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Imports go as where these modules are not installed; one that is loaded already stays."""
    hidden = [module for module in modules if module not in sys.modules]
    for module in hidden:
        sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


class Board:
    """TensorBoard's file of events, written where they are added.

    The package's own writer has a thread for it: on a full disk that one dies, and its queue, once
    full, stops the run.
    """

    def __init__(self, folder: pathlib.Path, start: int, *, suffix: str):
        with _without(*UNUSED):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
            from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._file, self._scalar = EventsWriter(str(folder / "events"), suffix), scalar
        # Of a module that is made at run time.
        self._event, session = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))
        # A session that begins hides what an interrupted run wrote after its last checkpoint.
        begins = session(status=session.START)
        self._file.write_event(self._event(step=start + 1, session_log=begins))
        self.flush, self.close = self._file.flush, self._file.close

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        for key, value in values.items():
            summary = self._scalar(key, value)
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))


class MetricsWriter:
    """Appends to run_dir/metrics.jsonl and run_dir/tensorboard, one line for each write.

    The names of traces, which are no numbers, go into run_dir/trace_weights.jsonl in the same way.

    Opened for a run that goes on from step `start`: lines of later steps are dropped, and a line of
    `start` itself is not written again; step 0 begins anew. So a restarted run's file equals an
    uninterrupted one but for the clock's fields. Only the first process writes.

    A store cannot append: there both are kept on this machine's disk and sent whole when a minute
    has passed since the last time, in sync() and in close().
    """

    def __init__(self, run_dir: Location, start: int = 0):
        self.enabled = jax.process_index() == 0
        if not self.enabled:
            return
        self.mirror = Mirror(as_path(run_dir), fetch=("metrics.jsonl", TRACES))
        self._sent = time.monotonic()
        run_dir = self.mirror.directory
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = _keep_lines(path := run_dir / "metrics.jsonl", start)
        self._written = [line.keys() for line in kept]
        self._start = start
        self.file = path.open("a", encoding="utf-8")
        _keep_lines(path := run_dir / TRACES, start)
        self.traces = path.open("a", encoding="utf-8")
        # The suffix keeps a restart within the same second from replacing the file in a store.
        self.board = Board(run_dir / "tensorboard", start, suffix=f".{start}")

    def write(
        self, step: int, values: Mapping[str, Any], traces: Mapping[str, Any] | None = None
    ) -> None:
        """One line of the available values; `traces` is a line of trace_weights.jsonl."""
        found = available(values)
        line = {"step": step, **found}
        if not self.enabled or (step == self._start and line.keys() in self._written):
            return
        with self._told():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.board.write(step, found)
            if traces:
                self.traces.write(json.dumps({"step": step, **traces}) + "\n")
                self.traces.flush()
        if time.monotonic() - self._sent > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Send what has grown to the store; nothing where run_dir is local."""
        if self.enabled:
            with self._told():
                self.board.flush()
                self.mirror.send()
            self._sent = time.monotonic()

    def close(self) -> None:
        """Send the rest and close the files."""
        if self.enabled:
            with self._told():
                self.file.close()
                self.traces.close()
                self.board.close()
                self.mirror.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The system's refusal names no file where it comes late: that is added."""
        try:
            yield
        except OSError as error:
            raise DcodError(
                f"cannot write {self.file.name} or the events beside it: {error}; free space and "
                "start the same command again"
            ) from error


def _keep_lines(path: Path, start: int) -> list[dict[str, Any]]:
    """Leave the lines up to a step in the file, and return those of it; step 0 begins anew."""
    last: list[dict[str, Any]] = []
    with (
        refusals(path),
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for line in read_metrics(path) if start and path.exists() else ():
            if line["step"] <= start:
                file.write(json.dumps(line) + "\n")
                last += [line] if line["step"] == start else []
    return last


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file; one that a killed process wrote in part is left out."""
    # Of traces the lines name what is no number.
    values = None if path.name == TRACES else number(-math.inf, math.inf)
    bounds = {"line": mapping({"step": whole(0, 1 << 53)}, items=values)}
    for place, found in json_lines(path):
        check({"line": found}, bounds, source=f"{path}:{place} (take the line out)")
        yield found


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of the whole lines; DcodError names one that is no JSON."""
    for place, line in whole_lines(path):
        try:
            yield place, from_json(line)
        except ValueError as error:
            raise DcodError(f"{path}:{place}: not JSON ({error}); take the line out") from None


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a growing file, whose last line counts when its end is there; a line of
    more than _LONGEST bytes comes in pieces."""
    with path.open("rb") as file:
        for place, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
            if line.endswith(b"\n") or len(line) == _LONGEST:
                yield place, line
