"""The prepare verb: every filter with its count, splits, reuse, refusal and clean restarts."""

import json
import math
from pathlib import Path

import pytest
from prepare_inputs import record, save_tokenizer, write

from dcod_jax.config import dataset_dir
from dcod_jax.data import borders, templates
from dcod_jax.data.conversation import FIELDS, recall
from dcod_jax.data.dataset import TraceDataset, read_manifest, remove_unlisted
from dcod_jax.data.tokenizer import load_tokenizer, template_fingerprint, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.prepare import command as verb
from dcod_jax.prepare import filters
from dcod_jax.prepare.command import is_prepared, prepare, remove_earlier


def dropped(root: Path) -> list[tuple[str, str]]:
    lines = (root / "quarantine.jsonl").read_text().splitlines()
    return [(r["source"].rpartition(":")[2], r["reason"]) for r in map(json.loads, lines)]


def test_each_filter_has_its_reason(config, tmp_path, capsys) -> None:
    overlap = write(tmp_path / "eval.jsonl", [{"question": "What is 7 + 1?"}])
    config.prepare.overlap_files = (str(overlap),)
    config.data.max_length = 200
    config.prepare.on_bad_record = "quarantine"
    records = [
        record(0),
        record(1, answer="3"),
        record(2, completion="I do not know"),
        record(3, finish_reason="length"),
        record(0),
        record(7),
        record(8, completion="so " * 200 + "\n#### 9"),
        record(9, completion=""),
        record(10, completion="It is 11.<|im_end|>"),
        record(10, prompt="Half \ud83d?"),
        record(11, answer=None),
        record(12),
    ]
    write(Path(config.data.traces), records)
    root = prepare(config)
    assert root == tmp_path / "run" / "dataset"
    expected = [
        ("2", "wrong_answer"),
        ("3", "no_answer"),
        ("4", "truncated"),
        ("5", "duplicate"),
        ("6", "overlap"),
        ("7", "too_long"),
        ("8", "bad_record"),
        ("9", "bad_record"),
        ("10", "bad_record"),
    ]
    assert sorted(dropped(root), key=lambda item: int(item[0])) == expected
    manifest = read_manifest(root / "train")
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"], sum(counts["dropped"].values())) == (12, 3, 9)
    assert manifest["sources"][0]["records"] == 12
    assert manifest["config"]["data"]["max_length"] == 200
    quarantined = json.loads((root / "quarantine.jsonl").read_text().splitlines()[-1])
    assert "record" in quarantined
    assert not (root / "eval").exists()
    shown = capsys.readouterr().out
    assert "«It is 1.\n#### 1<|im_end|>»" in shown
    assert "dropped: too_long" in shown


def test_a_path_wider_than_the_table_is_shown_in_one_piece(config, tmp_path, capsys) -> None:
    config.run_dir = str(tmp_path / ("deep " * 20).strip() / "[run]")
    root = prepare(config)
    assert f"\n{root}:\n" in capsys.readouterr().out


def test_the_traces_at_rest(config, tokenizer_dir) -> None:
    dataset = TraceDataset(prepare(config) / "train")
    tokenizer = load_tokenizer(tokenizer_dir)
    (trace,) = dataset.read([3])
    assert trace.id == "r3"
    assert {key: trace.meta[key] for key in trace.meta if key not in FIELDS} == {
        "source": f"{config.data.traces}:4",
        "answer": "4",
    }
    assert recall(tokenizer, trace).messages[-1]["content"] == "It is 4.\n#### 4"
    text = tokenizer.decode(trace.token_ids[trace.completion_mask])
    assert text == "It is 4.\n#### 4<|im_end|>"
    assert dataset.manifest["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert dataset.manifest["template"]["fingerprint"] == template_fingerprint(tokenizer)
    assert not dataset.scored


def test_templates_and_tokens_of_many_traces_are_made_together(config, monkeypatch) -> None:
    exchanges, encoded = [], []
    exchange, ids = templates._Renderer._exchange, borders.encode_plain

    def counted(renderer, template, texts):
        exchanges.append(len(texts))
        return exchange(renderer, template, texts)

    def measured(tokenizer, text):
        encoded.append(len(text))
        return ids(tokenizer, text)

    monkeypatch.setattr(templates._Renderer, "_exchange", counted)
    monkeypatch.setattr(borders, "encode_plain", measured)
    monkeypatch.setattr(filters, "BLOCK", 4)
    long = [record(i, prompt=f"{i}. " * 200, completion=f"{i}: " * 200) for i in range(10)]
    write(Path(config.data.traces), [entry | {"answer": None} for entry in long])
    prepare(config)
    assert [count for count in exchanges if count > 1] == [8, 8, 4]  # a text and a prompt each
    texts = sum(len(entry["prompt"] + entry["completion"]) for entry in long)
    assert sum(encoded) < 1.2 * texts  # once, and what is between special tokens


@pytest.mark.parametrize("place", [".partial", "", ".before"])
def test_a_users_file_in_what_prepare_replaces_is_left(config, place) -> None:
    """What an interrupted run left is no user's, nor what the program itself wrote."""
    if not place:
        prepare(config)
        config.prepare.replace, config.data.max_length = True, config.data.max_length - 1
    work = Path(f"{dataset_dir(config)}{place}")
    manifest = None if place else read_manifest(work / "train")
    shard = work / "train" / "traces-00000.array_record.tmp"
    for name in (".DS_Store", "._a", "Thumbs.db", "train/desktop.ini", "train/.nfs01"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()  # of the system
    for name in ("notes.txt", "train/notes.txt", "train/traces-mine.array_record", "eval/link"):
        file = work / name
        for folder in (file.parent, shard.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shard.touch()
        file.symlink_to("nowhere") if file.name == "link" else file.write_text("mine")
        with pytest.raises(DcodError, match=rf"{file} is not of the dataset {work}, .* left as"):
            prepare(config)
        assert file.is_symlink() or file.read_text() == "mine"
        remove_unlisted(work / "train", manifest)
        assert not shard.exists()
        assert file.is_symlink() or file.read_text() == "mine"
        if place == ".before":
            remove_earlier(Path(dataset_dir(config)))
            assert work.is_dir()
        file.unlink()
    assert prepare(config).is_dir()
    assert place or read_manifest(work / "train") != manifest
    remove_earlier(Path(dataset_dir(config)))
    assert work.exists() == (not place)


def test_without_the_filters_everything_stays(config) -> None:
    write(Path(config.data.traces), [record(1, answer="3"), record(2), record(2)])
    config.prepare.filter_correct = False
    config.prepare.deduplicate = False
    dataset = TraceDataset(prepare(config) / "train")
    assert [t.id for t in dataset.read(range(3))] == ["r1", "r2", "r2#2"]


def test_a_malformed_record_stops_the_run_by_default(config) -> None:
    with open(config.data.traces, "a") as file:
        file.write('{"prompt": "cut')
    with pytest.raises(DcodError, match=r"traces.jsonl:6: truncated JSON"):
        prepare(config)
    assert not is_prepared(config)
    write(Path(config.data.traces), [record(1), record(2, completion="x<|im_end|>", answer=None)])
    with pytest.raises(DcodError, match=r"traces.jsonl:2: the assistant message holds the special"):
        prepare(config)


def test_nothing_left_is_refused_with_the_counts(config) -> None:
    write(Path(config.data.traces), [record(i, answer="99") for i in range(3)])
    with pytest.raises(DcodError, match=r"no trace .*3 read, 0 held out; dropped: wrong_answer 3"):
        prepare(config)
    config.data.max_length = 8
    config.prepare.filter_correct = False
    with pytest.raises(DcodError, match="too_long 3"):
        prepare(config)


# ---------------------------------------------------------------- splits


def prompts(path: Path, tokenizer) -> set[str]:
    dataset = TraceDataset(path)
    traces = dataset.read(range(dataset.manifest["totals"]["records"]))
    return {tokenizer.decode(t.token_ids[~t.completion_mask]) for t in traces}


def test_eval_fraction_holds_out_prompts(config, tokenizer_dir) -> None:
    records = [record(i, id=f"{i}-{k}") for i in range(40) for k in range(2)]
    for k, entry in enumerate(records):
        entry["completion"] = f"Sample {k}.\n" + entry["completion"]
    write(Path(config.data.traces), records)
    config.data.eval_fraction = 0.25
    root = prepare(config)
    tokenizer = load_tokenizer(tokenizer_dir)
    train, held_out = (prompts(root / name, tokenizer) for name in ("train", "eval"))
    assert not train & held_out
    assert len(train | held_out) == 40
    assert 3 <= len(held_out) <= 20
    counts = [read_manifest(root / name)["counts"] for name in ("train", "eval")]
    assert counts[0]["kept"] + counts[1]["kept"] == 80 == counts[0]["read"]
    assert counts[0]["held_out"] == counts[1]["kept"] == 2 * len(held_out)


def test_eval_traces_and_their_prompts(config, tmp_path) -> None:
    again = record(3, completion="It may be 4.\n#### 4")  # of one prompt, both are measured on
    held_out = [record(3, completion="Four: 4\n#### 4"), again, record(20)]
    config.data.eval_traces = str(write(tmp_path / "held.jsonl", held_out))
    root = prepare(config)
    assert dropped(root) == [("4", "held_out_prompt")]
    assert read_manifest(root / "eval")["counts"]["kept"] == 3
    assert read_manifest(root / "train")["counts"]["kept"] == 4


def test_held_out_settings_that_cannot_be(config) -> None:
    config.data.eval_fraction = 1e-9
    with pytest.raises(DcodError, match="held out none of the 5 traces"):
        prepare(config)
    config.data.eval_traces = config.data.traces
    with pytest.raises(DcodError, match="are both set"):
        prepare(config)
    config.data.eval_fraction, config.data.max_length = 0.0, 4
    with pytest.raises(DcodError, match=r"too_long.*; raise data\.max_length"):
        prepare(config)
    config.data.traces = str(write(Path(config.run_dir).parent / "none.jsonl", []))
    config.data.eval_traces = ""
    with pytest.raises(DcodError, match=r"0 read.*; the files hold no record"):
        prepare(config)


def test_a_tokenizer_without_a_template_is_said(config, caplog) -> None:
    caplog.set_level("INFO")
    prepare(config)
    assert "no chat template" not in caplog.text
    bare = Path(config.run_dir).parent / "bare"
    tokenizer = load_tokenizer(config.student.tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    config.student.tokenizer, config.prepare.replace = str(bare), True
    prepare(config)
    assert f"{bare} has no chat template: a prompt and its completion are joined" in caplog.text


# ---------------------------------------------------------------- teachers and weights


def metas(config) -> list[tuple]:
    dataset = TraceDataset(Path(dataset_dir(config)) / "train")
    traces = dataset.read(range(len(dataset)))
    return [(t.meta.get("teacher"), t.meta.get("weight")) for t in traces]


def test_teachers_and_weights_of_traces(config, tmp_path) -> None:
    texts = [record(7, completion=f"Sample {k}.\n#### 8")["completion"] for k in range(2)]
    several = {"prompt": "What is 7 + 1?", "answer": "8", "generations": texts}
    conversation = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    records = [
        record(1, teacher="org/a", w=0.5),
        record(2, teacher=None, w=2),
        several | {"teacher": ["org/a", "c"], "w": [0, 1.5]},
        several | {"teacher": "d", "w": 3, "prompt": "And 7 + 1?"},
        {"messages": conversation, "teacher": "e", "w": 1},
    ]
    write(Path(config.data.traces), records)
    config.prepare.weight_field = "w"
    config.score.teachers = ("f path=models/f files=*/traces.jsonl",)
    manifest = read_manifest(prepare(config) / "train")
    named = [("org/a", 0.5), ("f", 2.0), ("org/a", 0.0), ("c", 1.5), ("d", 3.0), ("d", 3.0)]
    assert metas(config) == [*named, ("e", 1.0)]
    assert manifest["teachers"] == ["c", "d", "e", "f", "org/a"]
    assert manifest["weighted"] is True
    assert manifest["unread_columns"] == {}
    config.prepare.weight_field = config.prepare.teacher_field = ""
    config.score.teachers = ()
    config.run_dir = str(tmp_path / "without")
    manifest = read_manifest(prepare(config) / "train")
    assert set(metas(config)) == {(None, None)}
    assert (manifest["teachers"], manifest["weighted"]) == ([], False)
    assert manifest["unread_columns"] == {"teacher": 6, "w": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "w must be a finite number >= 0, found 'None'; it is the weight that"),
        ({"w": -1}, "w must be a finite number >= 0, found '-1'"),
        ({"w": "two"}, "w must be a finite number >= 0, found 'two'"),
        ({"w": True}, "w must be a finite number"),
        ({"w": math.nan}, "w must be a finite number >= 0, found 'None'"),
        ({"w": [1, 2]}, "w must be a finite number"),
        ({"w": 1, "teacher": 7}, "teacher must be the name of a teacher, found int"),
    ],
)
def test_wrong_weights_and_teachers_are_refused(config, changes, message) -> None:
    write(Path(config.data.traces), [record(1) | changes])
    config.prepare.weight_field = "w"
    with pytest.raises(DcodError, match=f"traces.jsonl:1: {message}"):
        prepare(config)


# ---------------------------------------------------------------- again


def test_the_same_inputs_are_not_prepared_twice(config, caplog, tmp_path) -> None:
    caplog.set_level("INFO")
    assert not is_prepared(config)
    root = prepare(config)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    caplog.clear()
    assert is_prepared(config)
    assert prepare(config) == root
    assert "already prepared" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    moved = tmp_path / "moved.jsonl"
    Path(config.data.traces).rename(moved)
    assert is_prepared(config)  # the raw traces need not be there any more
    config.data.traces = str(moved)
    assert is_prepared(config)
    config.data.traces = ""
    assert is_prepared(config)


def test_other_inputs_are_refused_by_name(config, tmp_path) -> None:
    prepare(config)
    config.data.max_length = 100
    config.prepare.deduplicate = False
    expected = r"different: data.max_length \(it was 2048, now 100\), prepare.deduplicate"
    with pytest.raises(DcodError, match=expected):
        prepare(config)
    config.data.max_length = 2048
    config.prepare.deduplicate = True
    write(Path(config.data.traces), [record(1)])
    with pytest.raises(DcodError, match=r"different: data\.traces\. Remove it"):
        is_prepared(config)
    write(Path(config.data.traces), [record(i) for i in range(5)])
    other = save_tokenizer(tmp_path / "other", merges=[("h", "o")])
    config.student.tokenizer = str(other)
    with pytest.raises(DcodError, match=r"different: tokenizer\."):
        prepare(config)


def test_a_directory_of_something_else_is_left_alone(config, tmp_path) -> None:
    config.data.dataset = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DcodError, match="is not a dataset that prepare wrote"):
        prepare(config)
    (tmp_path / "mine" / "notes.txt").unlink()
    assert prepare(config) == tmp_path / "mine"


def test_an_interrupted_run_leaves_nothing_to_read(config, monkeypatch) -> None:
    clean = config.copy_and_resolve_references()
    clean.run_dir = config.run_dir + "-clean"
    whole = prepare(clean)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    config.prepare.shard_records = clean.prepare.shard_records
    monkeypatch.setattr(verb.Filter, "provenance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert not is_prepared(config)
    monkeypatch.undo()
    root = prepare(config)
    shards = [sorted((r / "train").glob("*.array_record")) for r in (whole, root)]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]
    assert not root.with_name("dataset.partial").exists()


def test_a_config_without_a_tokenizer_is_refused(config) -> None:
    config.student.tokenizer = ""
    with pytest.raises(DcodError, match=r"no tokenizer: set student\.path"):
        prepare(config)


@pytest.mark.shared
@pytest.mark.parametrize(("verdicts", "wrong"), [(True, 72), (False, 63)])
def test_real_qwen_traces(config, shared_data, tmp_path, verdicts, wrong) -> None:
    """800 traces of MATH problems: 728 right by the file's own verdicts, 737 by our grader."""
    source = shared_data / "qwen25_math_traces" / "math_cot_100.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    own = records if verdicts else [{k: v for k, v in x.items() if k != "score"} for x in records]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in own))
    config.data.traces = str(file)
    config.data.max_length = 100_000
    config.prepare.overlap_files = (str(shared_data / "math500" / "test.jsonl"),)
    config.prepare.overlap_ngram = 1000  # whole prompts only
    root = prepare(config)
    counts = read_manifest(root / "train")["counts"]
    assert counts["read"] == 800
    assert counts["dropped"]["wrong_answer"] == wrong
    assert counts["dropped"]["overlap"] > 0
    assert counts["kept"] + sum(counts["dropped"].values()) == 800
