"""What inspect prints and exports is what the dataset and the models hold."""

import json
import re

import forks
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_traces import make_traces
from pyarrow import parquet

from dcod_jax import cli
from dcod_jax.data import chat
from dcod_jax.data.dataset import DatasetWriter
from dcod_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from dcod_jax.losses.adaptive import initial
from dcod_jax.models import hf, transformer
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.types import Trace, TrainState


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("student") / "model", seed=1)


def encode_sum(tokenizer, record, *, scored):
    messages = [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    ids, mask = chat.encode(tokenizer, messages)
    count = int(mask.sum())
    logprobs = -np.arange(1, count + 1, dtype=np.float32) / 16 if scored else None
    starts = np.arange(count) % 2 == 0 if scored else None  # as of a teacher with other tokens
    meta = {"source": "sums.jsonl:1", "messages": messages}
    return Trace(record["id"], ids, mask, logprobs, span_starts=starts, meta=meta)


def write_split(directory, student, *, count, seed=0, scored=True):
    tokenizer = load_tokenizer(student)
    manifest = {
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "source": str(student),
        },
        "template": {"fingerprint": "abc"},
        "counts": {"read": 9, "kept": count, "dropped": {"wrong_answer": 3, "too_long": 1}},
    }
    traces = [encode_sum(tokenizer, r, scored=scored) for r in tiny.sums(count, seed=seed)]
    with DatasetWriter(directory, shard_records=4, manifest=manifest) as writer:
        for trace in traces:
            writer.write(trace)
    return traces


@pytest.fixture(scope="module")
def root(tmp_path_factory, student):
    root = tmp_path_factory.mktemp("root")
    return root, {
        "train": write_split(root / "train", student, count=6),
        "eval": write_split(root / "eval", student, count=2, seed=5, scored=False),
    }


@pytest.fixture(scope="module")
def expected(root, student):
    """Student log-probs of each trace's completion, from whole logits of one padded batch."""
    traces = [trace for split in root[1].values() for trace in split]
    config, params = hf.load_model(student, dtype=jnp.float32)
    tokens = np.zeros((len(traces), max(len(trace.token_ids) for trace in traces)), np.int32)
    for row, trace in zip(tokens, traces, strict=True):
        row[: len(trace.token_ids)] = trace.token_ids
    logits = np.asarray(transformer.logits(config, params, jnp.asarray(tokens)), np.float64)
    logits = logits[:, :, : len(load_tokenizer(student))]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for row, trace in zip(logprobs, traces, strict=True):
        places = np.flatnonzero(trace.completion_mask)
        found[trace.id] = row[places - 1, trace.token_ids[places]]
    return found


def run(capsys, *argv):
    code = 0
    try:
        cli.run("inspect", [str(argument) for argument in argv])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table_rows(text):
    """Cells of the lines of a token table."""
    lines = [line for line in text.splitlines() if re.match(r"\s*│\s*\d+ │", line)]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_the_manifest_and_a_trace_with_both_models(root, student, expected, capsys, wide):
    directory, splits = root
    trace = splits["train"][2]
    code, out, _ = run(
        capsys, directory / "train", "--start", 2, "--tokens", 0, "--student", student
    )
    assert code == 0
    assert re.search(r"traces\s+│ 6 ", out)
    assert re.search(r"dropped: wrong_answer\s+│ 3 ", out)
    assert tokenizer_fingerprint(load_tokenizer(student)) in out
    assert f"trace {trace.id}" in out
    assert f"«{trace.id[4:].replace('-', '+')}=" in out  # the supervised part begins here
    rows = table_rows(out[out.index(f"trace {trace.id}") :])
    assert len(rows) == len(trace.token_ids)
    entry = 0
    for place, (row, supervised) in enumerate(zip(rows, trace.completion_mask, strict=True)):
        assert int(row[0]) == place
        assert row[2] == ("yes" if supervised else "")
        if not supervised:
            assert row[3:] == ["", "", ""]
        else:
            p, q = trace.logprobs[entry], expected[trace.id][entry]
            assert float(row[3]) == pytest.approx(p, abs=1e-4)
            assert float(row[4]) == pytest.approx(q, abs=2e-4)
            assert float(row[5]) == pytest.approx(q - p, abs=3e-4)
            entry += 1
    assert entry == len(expected[trace.id])


def test_unscored_is_said_and_both_splits_are_shown(root, capsys, wide):
    directory, splits = root
    code, out, _ = run(capsys, directory, "--examples", 1)
    assert code == 0
    assert all(f"trace {traces[0].id}" in out for traces in splits.values())
    held_out = out[out.index(str(directory / "eval")) :]
    assert re.search(r"teacher log-probs\s+│ not scored", held_out)
    rows = table_rows(held_out)
    assert all(row[3] == ("not scored" if row[2] else "") for row in rows)
    assert all(len(row) == 4 for row in rows)  # without a student none of its columns
    assert "0.0000" not in held_out


def test_long_traces_are_cut_and_say_so(root, capsys, wide):
    directory, splits = root
    _, out, _ = run(capsys, directory / "train", "--tokens", 5)
    assert len(table_rows(out)) == 5
    assert f"{len(splits['train'][0].token_ids) - 5} more tokens" in out
    _, out, _ = run(capsys, directory / "train", "--examples", 0)
    assert not table_rows(out)
    _, out, _ = run(capsys, directory / "train", "--start", 6)
    assert "no trace 6" in out


def test_json_is_the_manifest(root, capsys):
    directory, _ = root
    _, out, _ = run(capsys, directory / "train", "--json")
    assert json.loads(out) == json.loads((directory / "train" / "manifest.json").read_text())
    _, out, _ = run(capsys, directory, "--json")
    assert set(json.loads(out)) == {"train", "eval"}


@pytest.mark.parametrize("name", ["out/all.jsonl", "all.parquet"])
def test_export_holds_every_trace(root, student, expected, capsys, tmp_path, name):
    directory, splits = root
    path = tmp_path / name
    code, _, _ = run(capsys, directory, "--examples", 0, "--export", path, "--student", student)
    assert code == 0
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        found = parquet.read_table(path).to_pylist()
        for record in found:
            record["meta"] = json.loads(record["meta"])
    given = [(split, trace) for split, traces in splits.items() for trace in traces]
    for record, (split, trace) in zip(found, given, strict=True):
        assert (record["split"], record["id"]) == (split, trace.id)
        assert record["token_ids"] == trace.token_ids.tolist()
        assert record["completion_mask"] == trace.completion_mask.tolist()
        if trace.logprobs is None:
            assert record["logprobs"] is None
        else:
            np.testing.assert_array_equal(np.float32(record["logprobs"]), trace.logprobs)
            assert record["span_starts"] == trace.span_starts.tolist()
        np.testing.assert_allclose(record["student_logprobs"], expected[trace.id], atol=1e-4)
        assert record["text"].startswith("<user>")
        assert record["topk_ids"] is None
        assert record["meta"] == trace.meta
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]


def test_a_checkpoint_scores_like_the_weights_it_holds(root, student, expected, capsys, tmp_path):
    directory, splits = root
    _, params = hf.load_model(student, dtype=jnp.float32)
    checkpointer = Checkpointer(tmp_path / "run")
    named = {"path": str(student), "config": "", "tokenizer": "", "compute_dtype": "float32"}
    state = TrainState(
        step=jnp.int32(3), params=params, opt_state={"count": jnp.int32(3)}, loss_state=initial()
    )
    checkpointer.save(Snapshot(state=state, step=3, config={"student": named}))
    checkpointer.close()
    path = tmp_path / "all.jsonl"
    code, _, error = run(
        capsys,
        *(directory / "train", "--examples", 0, "--export", path, "--checkpoint", tmp_path / "run"),
    )
    assert code == 0, error
    for line, trace in zip(path.read_text().splitlines(), splits["train"], strict=True):
        found = json.loads(line)["student_logprobs"]
        np.testing.assert_allclose(found, expected[trace.id], atol=1e-4)


def test_export_holds_the_top_k(tmp_path, capsys):
    traces = make_traces(5, top_k=3)
    with DatasetWriter(tmp_path / "d", shard_records=9, manifest={}) as writer:
        for trace in traces:
            writer.write(trace)
    code, out, _ = run(capsys, tmp_path / "d", "--export", tmp_path / "x.parquet")
    assert code == 0
    assert "tokens are shown as ids" in " ".join(out.split())
    assert "top-3 and tail, 26 bytes" in out
    for record, trace in zip(
        parquet.read_table(tmp_path / "x.parquet").to_pylist(), traces, strict=True
    ):
        np.testing.assert_array_equal(record["topk_ids"], trace.topk_ids)
        np.testing.assert_array_equal(
            np.float32(record["topk_logprobs"]), trace.topk_logprobs.astype(np.float32)
        )
        assert record["student_logprobs"] is None


def test_mistakes_are_reported_without_a_traceback(root, student, tmp_path, capsys):
    directory, _ = root
    code, _, err = run(capsys, tmp_path / "nothing")
    assert code == 1
    assert "is not a directory" in err
    other = tiny.write_tokenizer(tmp_path / "tok", alphabet="0123456789+=#\n ")
    code, _, err = run(capsys, directory, "--tokenizer", other)
    assert code == 1
    assert "written with another tokenizer" in err
    code, _, err = run(capsys, directory, "--checkpoint", tmp_path)
    assert code == 1
    assert "expected a run directory" in err
    for wrong in ("--export x.csv", "--examples -1", "--student a --checkpoint b"):
        with pytest.raises(SystemExit) as exit_info:
            cli.run("inspect", [str(directory), *wrong.split()])
        assert exit_info.value.code == 2


def test_the_command_runs(root):
    directory, _ = root
    done = forks.run(["-m", "dcod_jax.inspect", str(directory / "eval")])
    assert done.returncode == 0, done.stderr
    assert "not scored" in done.stdout
