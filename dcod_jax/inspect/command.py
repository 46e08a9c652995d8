"""What `inspect` prints and exports; its arguments are in arguments.py."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcod_jax.data import chat
from dcod_jax.data.codec import bytes_per_token
from dcod_jax.data.conversation import FIELDS
from dcod_jax.data.dataset import TraceDataset, check_fingerprints, read_manifest, split_paths
from dcod_jax.data.tokenizer import Tokenizer, decode, load_tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.files import Location, Path, as_path, atomic_write, check_own, refusals
from dcod_jax.types import Trace

EXPORT_BATCH = 512  # traces read, scored and written together
NOT_SCORED = "not scored"
ARRAYS = (
    *("token_ids", "completion_mask", "logprobs", "span_starts"),
    *("topk_ids", "topk_logprobs", "tail_logprobs"),
)
Scorer = Callable[[list[Trace]], list[np.ndarray]]  # log-probs of each trace's completion tokens


def inspect(args: argparse.Namespace) -> None:
    """The verb: manifest, marked traces, export."""
    console = Console()
    paths = split_paths(as_path(args.directory))
    if args.json:
        found = {path.name: read_manifest(path) for path in paths}
        print(json.dumps(found if len(found) > 1 else found[paths[0].name], indent=2))
        return
    datasets = [TraceDataset(path) for path in paths]
    tokenizer = _tokenizer(args, datasets, console)
    student = _student(args, datasets)
    for dataset in datasets:
        print_manifest(dataset, console)
        for number in range(args.start, min(args.start + args.examples, len(dataset))):
            [trace] = dataset.read([number])
            scores = student([trace])[0] if student else None
            print_trace(trace, console, tokenizer=tokenizer, student=scores, limit=args.tokens)
        if args.start >= len(dataset) and args.examples:
            console.print(f"no trace {args.start}: {dataset.directory} has {len(dataset)} traces")
    if args.export:
        count = export(datasets, as_path(args.export), tokenizer=tokenizer, student=student)
        console.print(f"{args.export}: {count} traces")


def _load_tokenizer(source: Location, datasets: Sequence[TraceDataset]) -> Tokenizer:
    """Raises DcodError where it is not the tokenizer of the datasets."""
    tokenizer = load_tokenizer(source)
    for dataset in datasets:
        check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(tokenizer))
    return tokenizer


def _tokenizer(
    args: argparse.Namespace, datasets: Sequence[TraceDataset], console: Console
) -> Tokenizer | None:
    """The dataset's tokenizer, or None (said so) where the manifest's path leads nowhere."""
    source = args.tokenizer or (datasets[0].manifest.get("tokenizer") or {}).get("source", "")
    if args.tokenizer or (source and as_path(source).exists()):
        return _load_tokenizer(source, datasets)
    console.print(
        f"The tokenizer {source or '(the manifest names none)'} is not here: tokens are shown "
        "as ids; give --tokenizer",
        markup=False,
    )
    return None


def _student(args: argparse.Namespace, datasets: Sequence[TraceDataset]) -> Scorer | None:
    """Scores traces with the model of --student or --checkpoint, in float32."""
    if not args.student and not args.checkpoint:
        return None
    # Models and their compiler are loaded only when they are needed.
    import jax.numpy as jnp

    from dcod_jax.models import hf
    from dcod_jax.score.scoring import ScoreSettings, score_traces

    if args.checkpoint:
        config, params, home = _read_checkpoint(args.checkpoint)
    else:
        home = as_path(args.student)
        config, params = hf.load_model(home, dtype=jnp.float32)
    settings = ScoreSettings(
        top_k=0,
        batch_tokens=8192,
        head_chunk=512,
        compute_dtype="float32",
        valid_vocab=len(_load_tokenizer(args.tokenizer or home, datasets)),
    )

    def score(traces: list[Trace]) -> list[np.ndarray]:
        scored = score_traces(config, params, traces, settings=settings)
        return [np.asarray(trace.logprobs) for trace in scored]

    return score


def _read_checkpoint(run_dir: str) -> tuple[Any, Any, Path]:
    """(model config, parameters, tokenizer directory) of a run's newest checkpoint."""
    from dcod_jax.train.checkpoint_reader import read_record, read_student

    student = read_record(run_dir, key="--checkpoint").config.get("student")
    if not student:
        raise DcodError(f"--checkpoint={run_dir}: its record does not say of which student it is")
    source = as_path(student["path"] or student["config"])
    config, params, _ = read_student(run_dir, source, mesh=None, key="--checkpoint")
    return config, params, as_path(student["tokenizer"] or source)


def print_manifest(dataset: TraceDataset, console: Console) -> None:
    """Print what the dataset's manifest says, one row for each entry."""
    table = Table(title=Text(str(dataset.directory)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _manifest_rows(dataset):
        table.add_row(Text(name), Text(value))
    console.print(table)


def _manifest_rows(dataset: TraceDataset) -> Iterator[tuple[str, str]]:
    manifest, lengths = dataset.manifest, dataset.lengths[:, 0]
    totals, shards = manifest["totals"], manifest["shards"]
    yield "traces", f"{totals['records']:,}"
    yield "tokens", f"{totals['tokens']:,}, of them completion {totals['completion_tokens']:,}"
    yield "trace length", f"mean {lengths.mean():.1f}, {lengths.min()} to {lengths.max()}"
    size = sum(shard["bytes"] for shard in shards)
    yield "shards", f"{len(shards)} in {size / 1e6:,.1f} MB, checksums verified"
    for name in ("tokenizer", "template"):
        yield name, _fields(manifest.get(name) or {"fingerprint": "not recorded"})
    counts = dict(manifest.get("counts") or {})
    dropped = {f"dropped: {k}": n for k, n in sorted(counts.pop("dropped", {}).items())}
    for name, value in (counts | dropped).items():
        yield name, _fields(value) if isinstance(value, dict) else f"{value:,}"
    for source in manifest.get("sources") or []:
        yield "source", _fields(source)
    if not manifest["scored"]:
        yield "teacher log-probs", NOT_SCORED
        return
    teacher: dict[str, Any] = manifest.get("teacher") or {"name": "delivered with the traces"}
    for name, value in sorted(teacher.items()):
        if name != "teachers":
            yield f"teacher {name}", str(value)
    for name, value in (teacher.get("teachers") or {}).items():
        yield f"teacher {name}", _fields(value)
    for name, value in (manifest.get("by_teacher") or {}).items():
        yield f"of {name}", _fields(value)
    if "mean_logprob" in manifest:
        yield "mean log-prob", f"{manifest['mean_logprob']:.4f}"
    top_k = manifest["top_k"]
    kept = f"top-{top_k} and tail" if top_k else "trace token only"
    yield "stored", f"{kept}, {bytes_per_token(top_k)} bytes a completion token"
    if "captured_mass" in manifest:
        yield "captured mass", f"{manifest['captured_mass']:.4%}"


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(values.items()))


def print_trace(
    trace: Trace,
    console: Console,
    *,
    tokenizer: Tokenizer | None,
    student: np.ndarray | None,
    limit: int,
) -> None:
    """The text with its supervised part between « and », then a line for each token."""
    shown = {key: value for key, value in trace.meta.items() if key not in FIELDS}
    meta = ", ".join(f"{key}={value}" for key, value in shown.items())
    console.print(Text(f"\ntrace {trace.id}  {meta}", style="bold"))
    if tokenizer is not None:
        console.print(Text(chat.render_sample(tokenizer, trace)))
    table = Table()
    names = ("place", "token", "supervised", "teacher log p", "student log q", "log q - log p")
    for name in names if student is not None else names[:4]:
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    entries = np.cumsum(trace.completion_mask) - 1
    shown = trace.token_ids[: limit or None].tolist()
    for place, token_id in enumerate(shown):
        text = str(token_id) if tokenizer is None else repr(decode(tokenizer, [token_id]))
        cells = []
        if trace.completion_mask[place]:
            cells = ["yes", *_scores(trace.logprobs, student, int(entries[place]))]
        table.add_row(str(place), Text(text), *cells)
    console.print(table)
    if len(shown) < len(trace.token_ids):
        console.print(f"{len(trace.token_ids) - len(shown)} more tokens; --tokens 0 shows all")


def _scores(teacher: np.ndarray | None, student: np.ndarray | None, entry: int) -> list[str]:
    p = NOT_SCORED if teacher is None else f"{teacher[entry]:.4f}"
    if student is None:
        return [p]
    q = f"{student[entry]:.4f}"
    return [p, q, "" if teacher is None else f"{student[entry] - teacher[entry]:+.4f}"]


def export(
    datasets: Sequence[TraceDataset],
    path: Path,
    *,
    tokenizer: Tokenizer | None = None,
    student: Scorer | None = None,
) -> int:
    """Write every trace as a line or row, atomically; returns how many.

    Fields: split, id, text (null without a tokenizer), token_ids, completion_mask, and for each
    completion token logprobs, topk_ids, topk_logprobs, tail_logprobs, student_logprobs (null where
    there are none); meta as it was stored (JSON text in Parquet, whose columns have one type).
    """
    check_own(path, "token_ids", "completion_mask")
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    with refusals(path), atomic_write(path) as temporary:
        write(temporary, _batches(datasets, tokenizer, student))
    return sum(map(len, datasets))


def _batches(
    datasets: Sequence[TraceDataset], tokenizer: Tokenizer | None, student: Scorer | None
) -> Iterator[list[dict[str, Any]]]:
    for dataset in datasets:
        for start in range(0, len(dataset), EXPORT_BATCH):
            traces = dataset.read(range(start, min(start + EXPORT_BATCH, len(dataset))))
            scores = student(traces) if student else [None] * len(traces)
            yield [
                _record(trace, dataset.directory.name, tokenizer, score)
                for trace, score in zip(traces, scores, strict=True)
            ]


def _record(
    trace: Trace, split: str, tokenizer: Tokenizer | None, student: np.ndarray | None
) -> dict[str, Any]:
    arrays = {name: getattr(trace, name) for name in ARRAYS} | {"student_logprobs": student}
    if trace.topk_logprobs is not None:
        arrays["topk_logprobs"] = trace.topk_logprobs.astype(np.float32)
    return {
        "split": split,
        "id": trace.id,
        "text": None if tokenizer is None else decode(tokenizer, trace.token_ids.tolist()),
        **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        "meta": trace.meta,
    }


def _write_jsonl(path: pathlib.Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in itertools.chain.from_iterable(batches):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(path: pathlib.Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    floats, ints, bools = map(pa.list_, (pa.float32(), pa.int32(), pa.bool_()))
    types = {
        **dict.fromkeys(("split", "id", "text"), pa.string()),
        **dict.fromkeys((*ARRAYS, "student_logprobs"), floats),
        **{"token_ids": ints, **dict.fromkeys(("completion_mask", "span_starts"), bools)},
        **{"topk_ids": pa.list_(ints), "topk_logprobs": pa.list_(floats), "meta": pa.string()},
    }
    schema = pa.schema(types)
    with parquet.ParquetWriter(path, schema) as file:
        for batch in batches:
            rows = [row | {"meta": json.dumps(row["meta"], ensure_ascii=False)} for row in batch]
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
