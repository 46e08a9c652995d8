"""Several teachers, each of its own traces; scores kept by a second prepare; settings compared."""

import dataclasses
import shutil
from pathlib import Path

import fake_servers
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_servers import serve

from dcod_jax import config as configs
from dcod_jax.config import dataset_dir
from dcod_jax.data.dataset import TraceDataset, read_manifest
from dcod_jax.data.teachers import config_errors, teacher_entries, teacher_of_file, teacher_paths
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.export import card
from dcod_jax.inspect import command as inspect
from dcod_jax.models import hf
from dcod_jax.prepare.command import is_prepared, prepare
from dcod_jax.report.traces import Seen, shown
from dcod_jax.score.command import _report, score
from dcod_jax.score.scoring import ScoreSettings, score_traces
from dcod_jax.score.teacher import joint_provenance
from dcod_jax.train.command import missing_verbs
from dcod_jax.train.setup import expected_teacher

MODEL = fake_servers.table(49)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), seed=5)


def make_config(tmp_path: Path, model: Path, records: list[dict]):
    config = configs.load_recipe(configs.BASE)
    config.run_dir, config.student.path = str(tmp_path / "run"), str(model)
    config.data.traces = str(tiny.write_jsonl(tmp_path / "a.jsonl", records))
    config.teacher.dtype = "float32"
    config.prepare.shard_records = 4
    config.score.batch_tokens, config.score.concurrency, config.score.retries = 256, 2, 0
    config.train.progress = False
    return config


def traces_of(config) -> dict:
    dataset = TraceDataset(Path(dataset_dir(config)) / "train")
    return {trace.id: trace for trace in dataset.read(range(len(dataset)))}


def served(trace) -> np.ndarray:
    places = np.flatnonzero(trace.completion_mask)
    return MODEL[trace.token_ids[places - 1], trace.token_ids[places]].astype(np.float32)


def test_each_teacher_scores_its_own_traces(tmp_path, model, capsys, caplog):
    caplog.set_level("INFO", logger="dcod_jax")
    records = tiny.sums(10)
    other = tiny.write_jsonl(tmp_path / "b.jsonl", records[6:])
    for number, entry in enumerate(records[:6]):
        entry["teacher"] = "org/b" if number % 3 == 0 else "a"
    config = make_config(tmp_path, model, records[:6])
    config.data.traces += f",{other}"
    with serve("vllm", MODEL, load_tokenizer(model)) as fake:
        config.score.teachers = (
            f"a path={model} dtype=float32",
            f"org/b server={fake.url}/v1 model=big files=*/b.jsonl",
        )
        prepare(config)
        assert read_manifest(Path(dataset_dir(config)) / "train")["teachers"] == ["a", "org/b"]
        assert missing_verbs(config)[-1] == "score"
        fake.faults = [None, None, None, 400]  # in the second shard; the first one is kept
        with pytest.raises(DcodError, match="the server refuses: 400"):
            score(config)
        asked = len(fake.bodies)
        manifest = score(config)["train"]
        assert "going on behind 1 of 3 shards" in caplog.text
        assert len(fake.bodies) - asked == 4
    weights = {"a": hf.weights_fingerprint(model), "org/b": "served: big"}
    assert manifest["teacher"]["name"] == "a, org/b"
    told = manifest["teacher"]["teachers"]
    assert {name: about["weights"] for name, about in told.items()} == weights
    assert told["org/b"]["server"]["max_model_len"] == 512
    for told in (None, manifest["teacher"]):
        assert expected_teacher(config, told) == manifest["teacher"]["weights"]  # the server is off
    assert missing_verbs(config) == ["prepare"]
    told = manifest["teacher"]["teachers"]
    assert joint_provenance(dict(reversed(told.items()))) == manifest["teacher"]
    _report(tmp_path, manifest | {"by_teacher": {"a": manifest["by_teacher"]["a"]}})
    assert "  org/b: no trace is its own" in capsys.readouterr().out
    found = traces_of(config)
    of_b = {name: t for name, t in found.items() if t.meta["teacher"] == "org/b"}
    assert set(of_b) == {e["id"] for e in [records[0], records[3], *records[6:]]}
    for trace in of_b.values():
        np.testing.assert_array_equal(trace.logprobs, served(trace))
    of_a = [t for name, t in found.items() if name not in of_b]
    bare = [dataclasses.replace(trace, logprobs=None) for trace in of_a]
    settings = ScoreSettings(0, 256, config.loss.head_chunk, "float32", 49)
    own = score_traces(*hf.load_model(model, dtype=jnp.float32), bare, settings=settings)
    for left, right in zip(of_a, own, strict=True):
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
    dataset = TraceDataset(Path(dataset_dir(config)) / "train")
    rows = dict(inspect._manifest_rows(dataset))
    assert "weights served: big" in rows["teacher org/b"]
    assert "completion_tokens" in rows["of a"]
    lines = [line for line in card._data_lines(manifest) if line.startswith("- teacher")]
    starts = ["- teacher a: traces `4`, ", "- teacher org/b: traces `6`, "]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 2
    assert [name in line for name, line in zip(weights.values(), lines, strict=True)] == [True] * 2
    trace, tokenizer = of_b[records[0]["id"]], load_tokenizer(model)
    seen = Seen("x", "train", [trace], tokenizer, [np.asarray(trace.logprobs)], None, "")
    assert shown(seen, count=1)[0]["id"] == f"{trace.id} of org/b"  # on the report's page
    by_teacher = manifest["by_teacher"]
    assert {name: own["traces"] for name, own in by_teacher.items()} == {"a": 4, "org/b": 6}
    values = np.concatenate([t.logprobs for t in of_b.values()])
    assert by_teacher["org/b"]["mean_logprob"] == pytest.approx(values.mean(), rel=1e-6)
    assert by_teacher["org/b"]["completion_tokens"] == len(values)


def test_a_server_with_our_log_probs_gives_the_dataset_that_our_scoring_gives(tmp_path, model):
    """Training reads the teacher from the scored traces alone, so it has the same bits, too."""
    config = make_config(tmp_path, model, tiny.sums(5))
    prepare(config)
    root = Path(dataset_dir(config))
    bare = shutil.copytree(root, tmp_path / "bare")
    config.teacher.path = str(model)
    score(config)
    own = {tuple(trace.token_ids.tolist()): trace for trace in traces_of(config).values()}
    with serve("vllm", MODEL, load_tokenizer(model)) as fake:

        def ours(answer):
            ids = fake.bodies[-1][1]["prompt"]
            entries, trace = answer["choices"][0]["prompt_logprobs"], own[tuple(ids)]
            for place, value in zip(
                np.flatnonzero(trace.completion_mask), trace.logprobs, strict=True
            ):
                entries[place][str(ids[place])]["logprob"] = float(value)
            return answer

        fake.change = ours
        config.data.dataset, config.teacher.path, config.teacher.name = str(bare), "", "big"
        config.score.server, config.score.dialect = fake.url, "vllm"
        config.score.concurrency = 1
        score(config)
    found = traces_of(config)
    assert found.keys() == {trace.id for trace in own.values()}
    for trace in own.values():
        for name in ("token_ids", "completion_mask", "logprobs"):
            np.testing.assert_array_equal(getattr(found[trace.id], name), getattr(trace, name))


def test_a_trace_of_no_teacher_is_refused(tmp_path, model):
    records = [record | {"teacher": "A"} for record in tiny.sums(2)]
    config = make_config(tmp_path, model, records)
    config.score.teachers = (f"a path={model} dtype=float32", f"c path={model} dtype=float32")
    prepare(config)
    with pytest.raises(
        DcodError,
        match=rf"trace '{records[0]['id']}' names the teacher 'A', and "
        r"score.teachers has a, c.*files=PATTERN",
    ):
        score(config)
    with serve("vllm", MODEL, load_tokenizer(model)) as fake:
        config.score.teachers = ()
        config.score.server, config.teacher.name = fake.url, "big"
        assert score(config)["train"]["teacher"]["weights"] == "served: big"  # one for all
        fake.longest = 1024
        with pytest.raises(
            DcodError,
            match=r"different: server.max_model_len \(it was 512, now 1024\); set score.overwr",
        ):
            score(config)


def test_scores_of_unchanged_traces_are_kept_by_a_second_prepare(tmp_path, model):
    records = tiny.sums(9)
    config = make_config(tmp_path, model, records[:6])
    with serve("vllm", MODEL, load_tokenizer(model)) as fake:
        config.score.server, config.teacher.name = fake.url, "big"
        prepare(config)
        score(config)
        changed = records[0] | {"completion": records[0]["completion"] + " "}
        tiny.write_jsonl(tmp_path / "a.jsonl", [records[7], changed, *records[2:6], records[8]])
        with pytest.raises(DcodError, match=r"different: data.traces.*prepare.replace=True"):
            prepare(config)
        config.prepare.replace = True
        assert not is_prepared(config)
        prepare(config)
        assert not TraceDataset(Path(dataset_dir(config)) / "train").scored
        fake.model, fake.bodies = MODEL[::-1], []
        manifest = score(config)["train"]
        assert len(fake.bodies) == 3
        kept = {record["id"] for record in records[2:6]}
        for trace in traces_of(config).values():
            assert (trace.id in kept) == bool((trace.logprobs == served(trace)).all())
        assert manifest["scored"]
        assert [p.name for p in tmp_path.glob("run/dataset*")] == ["dataset"]
        # Another top-k, and nothing is taken over.
        tiny.write_jsonl(tmp_path / "a.jsonl", records[:6])
        prepare(config)
        config.score.top_k, fake.bodies = 2, []
        score(config)
        assert len(fake.bodies) == 6


def test_settings_of_recipe_and_dataset_are_compared(tmp_path, model):
    config = make_config(tmp_path, model, tiny.sums(3))
    config.teacher.path = str(model)
    prepare(config)
    config.data.max_length = 100
    with pytest.raises(DcodError, match=r"data.max_length \(it was 2048, now 100\)"):
        score(config)
    config.score.teachers = (f"a path={model} files=*.jsonl",)
    with pytest.raises(DcodError, match=r"files of score.teachers \(it was None, now \{'a'"):
        score(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.teachers": ("path=models/A",)}, "has no name"),
        ({"score.teachers": ("a",)}, "must have either path= or server="),
        ({"score.teachers": ("a path=x server=http://y",)}, "must have either path= or server="),
        ({"score.teachers": ("a pth=x",)}, "has pth=x.*did you mean 'path'"),
        ({"score.teachers": ("a path=x files=",)}, "files=; behind the name.*it is empty"),
        ({"score.teachers": ("a server=http://y dialect=vlm",)}, "did you mean 'vllm'"),
        ({"score.teachers": ("a path=x dtype=int8",)}, "dtype must be"),
        ({"score.teachers": ("a path=x", "a path=y")}, "a is named more than once"),
        ({"score.teachers": ("a path=x",), "teacher.path": "y"}, "are both set"),
        ({"score.server": "http://y", "teacher.path": "y"}, "are both set"),
        ({"score.server": "http://y"}, "needs teacher.name"),
        ({"score.server": "localhost:8000", "teacher.name": "m"}, "'localhost:8000' is no URL"),
        ({"score.server": "file:///etc/hosts", "teacher.name": "m"}, "is no URL of a server"),
        ({"score.teachers": ("a server=http://y:port",)}, "'http://y:port' is no URL"),
        ({"score.teachers": ("a path=x path=y",)}, "has a key twice"),
        *(
            ({"score.server": url, "teacher.name": "m"}, "is no URL of a server")
            for url in (
                *("http://a..b:80", f"http://{'a' * 99}:80", "http://h/\u00fc", "http://h/a b"),
                *("http://user:word@h", "http://h/v1?key=x", "http://h\n:80", "http://[::1"),
            )
        ),
        (
            {"score.teachers": ("a server=http://y dialect=llama_cpp",), "score.top_k": 3},
            "score.top_k=3: the dialect llama_cpp",
        ),
        ({"loss.teacher_weights": ("a",)}, "'a' must be a teacher's name and a finite weight"),
        ({"loss.teacher_weights": ("a=-1",)}, "must be a teacher's name"),
        ({"loss.teacher_weights": ("a=nan",)}, "must be a teacher's name"),
        ({"loss.teacher_weights": ("a=1", "a=2")}, "a is named more than once"),
        ({"score.dialect": "tgi"}, "score.dialect='tgi' must be one of vllm, sglang, llama_cpp"),
        ({"score.concurrency": 0}, "score.concurrency=0 must be greater than 0"),
        ({"score.retries": -1}, "score.retries=-1 must not be negative"),
    ],
)
def test_wrong_teachers_are_refused(changes, message):
    config = configs.load_recipe(configs.BASE)
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    with pytest.raises(DcodError, match=message):
        configs.check(config)


def test_right_teachers_are_not_refused():
    config = configs.load_recipe(configs.BASE)
    config.score.teachers = ("a path=x y", "org/b server=http://z:1 dialect=sglang files=b*.jsonl")
    config.loss.teacher_weights = ("a=0", "org/b=0.5")
    config.score.top_k = 3
    assert config_errors(configs.keys(config)) == []
    entries = teacher_entries(config)
    assert [(e.path, e.model, e.dialect) for e in entries] == [
        ("x y", "", "vllm"),
        ("", "org/b", "sglang"),
    ]
    assert teacher_paths(config) == {"teacher-a": "x y"}  # what evaluate grades
    assert teacher_of_file(entries, "b-1.jsonl:17") == "org/b"
    assert teacher_of_file(entries, "c.jsonl:17") == ""
    twice = [entry._replace(files="*.jsonl") for entry in entries]
    with pytest.raises(DcodError, match="of the files of a and org/b"):
        teacher_of_file(twice, "b.jsonl:1")
