"""JSON files that nest 100,000 deep, or hold what no run wrote, are named, whichever they are."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcod_jax.copies import read_arrays
from dcod_jax.data import blocks, dataset, scores
from dcod_jax.data.blocks import BlockFiles
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import problems
from dcod_jax.evaluate.generations import read_generations
from dcod_jax.files import read_json, to_json
from dcod_jax.models import hf, lora
from dcod_jax.models.config import from_hf
from dcod_jax.study import conditions
from dcod_jax.train import checksums, learned_from, metrics
from dcod_jax.train.checkpoint_reader import read_record
from dcod_jax.train.checkpointer import finished
from dcod_jax.train.profiling import PARTS, Goodput
from dcod_jax.tune.command import _Results


def _manifest(path):
    return dataset.read_manifest(path.parent)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("any.json", read_json),
        ("manifest.json", _manifest),
        ("config.json", hf.load_config),
        ("problems.jsonl", lambda path: list(problems.read_records(path))),
        ("metrics.jsonl", lambda path: list(metrics.read_metrics(path))),
        ("results.jsonl", conditions.read_results),
    ],
)
def test_deep_nesting_is_named(tmp_path, name, read) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DcodError, match=r"nested (too|more than 200) deep"):
        read(path)


LORA = {"rank": 1, "alpha": 1.0, "rslora": False, "targets": ["q_proj"]}
STUDENT = {"path": "", "config": "", "tokenizer": "", "compute_dtype": "float32", "lora": LORA}
RUN = {"step": 8, "config": {"student": STUDENT}, "metrics": {"eval/nll": 1.0}}
RUN |= {"progress": {"iterator": {}, "tokens_seen": 1, "on_policy": {"tokens": 1}}}
RUN["progress"]["data"] = {"parts": {"tokenizer": "x"}, "changes": [{}]}
REQUEST = {"teacher": {}, "settings": {}, "source": []}
SHARD = {"file": "x", "bytes": 1, "sha256": "", "records": 1, "tokens": 1, "completion_tokens": 1}
NOTE = {"shard": SHARD, "request": REQUEST, "logprob": -1.0, "mass": 0.0}
NOTE |= {"top_k": 0, "spans": 1, "longest_span": 1, "teachers": {"": [1, 2, -3.0]}}
GENERATION = {"id": "a", "completion": "", "answer": "1", "extracted": None, "correct": True}
GENERATION |= {"finished": True, "tokens": 1, "sample": 0, "reason": "", "repeats": False}
GENERATION |= {"difficulty": ""}
COUNTS, METRICS = {"done": 1, "by": {"a": 1}}, {"step": 1, "loss": 0.5}
ABSENT = object()
FIRST = "000000000-000000001.json"
MODEL = from_hf(tiny.raw_config(), source="tiny")
RESULT = {"kind": "tune", "condition": "main", "arm": "sft", "seed": 1, "rate": 1e-3}
RESULT |= {
    "accuracy": {"validation": 0.5, "in": 1.0},
    "curves": {"nll": 1.0},
    "drift": {"excess": 1},
}
RESULT["start"] = {"in": "ff"}
PLAN = {"candidates": ["c1"], "rounds": [], "metric": "eval/nll"}
TUNED = {"name": "c1", "step": 1, "metrics": {"eval/nll": 1.0}}
ATTEMPT = {"from_step": 0, "step": 1, "elapsed": 1.0, "steps_at_save": {"1": 1.0}, "ended": ""}
LONG = "9" * 5000  # digits, which int() refuses
ATTEMPT |= dict.fromkeys(PARTS, 0.0)


def _goodput(path):
    Goodput(path.parent, 1, entered=0.0, enabled=True)


# What follows uses what it read, as its verbs do.


def _run(path):
    checksums.write(path.parents[1], 8)
    record = read_record(path.parents[3])
    lora.with_adapter(MODEL, (record.config.get("student") or {}).get("lora"))
    learned_from.goes_on_with({}, record, path, accept=True, steps=9)
    return sum(record.on_policy.values())


def _notes(path):
    blocks = scores.score_blocks(path.parents[1], {"shards": []}, {}, {})
    assert scores.scored_shards(path.parents[1], blocks, overwrite=False) == {}  # no such file
    [note] = blocks.done().values()
    scores._by_teacher([note])
    return note["logprob"] + note["mass"] + note["spans"]


def _blocks(path):
    path.with_name("a").touch()
    BlockFiles([path.with_name("a")], {"seed": 0}, counts=("done", "by")).finished()


def _counts(path):
    files = BlockFiles([path.parents[1] / "a"], {"seed": 0}, counts=("done", "by"))
    assert blocks._sum(list(files.done().values()) * 2)["done"] == 2
    assert files.pending(2, 1) == (1, [range(1, 2)])


def _study(path):
    results = conditions.Results(path)
    return [round(line["accuracy"]["validation"], 9) for line in results.done.values()]


def _start(path):
    run = conditions.Run("test", "main", "dft", 1, 1e-3)
    conditions.Results(path).check_start(run, RESULT["start"])


def _tune(path):
    results = _Results(path, ("c1",), [], "eval/nll")
    [first, *_] = results.order(["c1"])
    if results.known(first, 1):
        results.text(first)
    with contextlib.redirect_stdout(io.StringIO()):
        results.show({"c1": ()}, first)


@pytest.mark.parametrize(
    ("name", "read", "good"),
    [
        ("checkpoints/8/run/metadata", _run, RUN),
        ("goodput.json", _goodput, {"attempts": [ATTEMPT]}),
        ("a.manifest.json", _blocks, {"request": {"seed": 0}, "files": {}} | COUNTS),
        (f"{BlockFiles([Path('a')], {'seed': 0}).directory}/{FIRST}", _counts, COUNTS),
        (f"{scores.score_blocks(Path(), {'shards': []}, {}, {}).directory}/{FIRST}", _notes, NOTE),
        ("results.jsonl", _study, RESULT),
        ("results.jsonl", _start, RESULT | {"kind": "test"}),
        ("a.jsonl", lambda path: read_generations(path)[0].tokens + 1, GENERATION),
        ("tune.json", _tune, {"plan": PLAN, "results": [TUNED]}),
        ("tune.json", _tune, {"plan": PLAN, "results": [TUNED, TUNED | {"error": "nan"}]}),
        ("metrics.jsonl", lambda path: sum(next(metrics.read_metrics(path)).values()), METRICS),
    ],
)
def test_what_a_run_reads_of_its_own_is_checked_to_the_leaves(tmp_path, name, read, good):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    places = [(good, key) for key in good]
    for inner, key in places:
        if isinstance(parts := inner[key], dict):
            places += [(parts, name) for name in parts]
        elif isinstance(parts, list):
            places += [(parts, place) for place in range(len(parts))]
    for inner, key in places:
        kept = inner[key]
        for junk in ("x", [[None]], {"y": []}, True, None, 10**400, ABSENT):
            inner[key] = junk
            if junk is ABSENT:
                del inner[key]
            path.write_text(json.dumps(good) + "\n")
            with contextlib.suppress(DcodError):
                read(path)
            if junk is ABSENT and isinstance(inner, list):
                inner.insert(key, kept)
        inner[key] = kept
    path.write_text(json.dumps(good) + "\n")
    read(path)


def test_a_step_of_thousands_of_digits_is_named(tmp_path):
    (tmp_path / "goodput.json").write_text(
        json.dumps({"attempts": [ATTEMPT | {"steps_at_save": {LONG: 1.0}}]})
    )
    with pytest.raises(DcodError, match="steps_at_save names no step: '999"):
        _goodput(tmp_path / "goodput.json")


def test_blocks_that_overlap_are_named(tmp_path):
    files = BlockFiles([tmp_path / "a"], {"seed": 0})
    files.write(range(0, 4), ["x"], {})
    (files.directory / "a-b.json").touch()  # nobody's
    assert files.pending(6, 4) == (4, [range(4, 6)])
    files.write(range(2, 6), ["x"], {})
    with pytest.raises(DcodError, match=r"2-0+6\.json: beside the blocks before 4"):
        files.pending(6, 4)


ZIPPED = {
    "of Python 2": (b"(9,), } ", b"(9L,), }"),
    "unclosed": (b"(9,)", b"(9, "),
    "huge": (b"(9,), }           ", b"(9999999999999,), }"),
}


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "array", "pickled", "newer", *ZIPPED])
def test_arrays_that_are_not_whole_are_named(tmp_path, kind):
    whole, one, path = io.BytesIO(), io.BytesIO(), tmp_path / "start.npz"
    np.savez(whole, a=np.arange(9), b=np.array([{}]) if kind == "pickled" else np.arange(9))
    np.save(one, np.arange(9))
    newer = bytearray(whole.getvalue())
    newer[newer.rindex(b"PK\x01\x02") + 6] = 99  # the version of zip that a member needs
    contents = {"empty": b"", "text": b"text", "array": one.getvalue(), "newer": newer}
    if kind in ZIPPED:
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as file:
            file.writestr("a.npy", one.getvalue().replace(*ZIPPED[kind]))
    path.write_bytes(contents.get(kind, whole.getvalue()[: -50 if kind == "cut" else None]))
    with pytest.raises(DcodError, match=r"start\.npz: not whole, .*; remove it"):
        read_arrays(path, mend="remove it")


@pytest.mark.parametrize(
    "files", [{"run/metadata": 5}, ["run/metadata"], {"run/metadata": [1, None]}]
)
def test_checksums_of_no_such_kind_are_damage(tmp_path, files):
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / checksums.NAME).write_text(json.dumps({"step": 8, "files": files}))
    with pytest.raises(checksums.DamagedCheckpointError, match="cannot be read"):
        checksums.verify(tmp_path, 8, ())


def test_only_a_steps_own_name_is_a_checkpoint(tmp_path):
    for name in ("8", "08", "²", "٣", "-1", "1" * 200, "9.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert finished(tmp_path) == [8, int("1" * 200)]


def test_half_a_character_is_no_text_of_a_manifest() -> None:
    with pytest.raises(DcodError, match=r"can only hold JSON values: .*surrogates not allowed"):
        to_json({"version": "\ud83d"})
