"""Traces sampled from the teacher: what prepare reads, resumed to the same bytes, left alone."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.data import blocks, chat
from dcod_jax.data.forms import read_record
from dcod_jax.data.presets import Fields
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError
from dcod_jax.generate_traces import command as verb
from dcod_jax.models import hf, transformer
from dcod_jax.sample.sampler import Sample

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher and five prompts, one of them a conversation."""
    place = tmp_path_factory.mktemp("generate")
    tiny.write_model(place / "teacher", seed=4)
    records = [
        {"id": r["id"], "prompt": r["prompt"], "answer": r["answer"], "template": "+"}
        for r in tiny.sums(4)
    ]
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    records.append({"id": "talk", "messages": talk, "answer": "4"})
    tiny.write_jsonl(place / "prompts.jsonl", records)
    return place


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_config(place: Path, run_dir: Path, **changes):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(run_dir)
    config.teacher.path, config.teacher.dtype = str(place / "teacher"), "float32"
    config.generate.prompts = str(place / "prompts.jsonl")
    config.generate.samples = 6
    config.generate.temperature = 5.0  # nearly uniform: the stop token is drawn soon enough
    config.prepare.filter_correct = False  # a random model solves nothing
    config.generate.max_new_tokens = 32
    config.generate.batch_size = 2
    config.train.progress = False
    for key, value in changes.items():
        configs.assign(config, key.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def whole(place):
    return verb.generate_traces(make_config(place, place / "run"))


def test_every_trace_is_what_prepare_reads(place, whole):
    tokenizer = load_tokenizer(place / "teacher")
    records, rejected = read_lines(whole), read_lines(whole.with_name(verb.REJECTED))
    traces = list(read_traces(find_sources(str(whole)), Fields()))
    assert len(records) == len(traces) > 4
    assert len({r["id"] for r in records + rejected}) == len(records + rejected) == 30
    for record, trace in zip(records, traces, strict=True):
        assert trace.id == record["id"]
        assert trace.answer == record["answer"]
        assert trace.token_ids == record["token_ids"]
        assert trace.logprobs == record["logprobs"]
        assert (trace.temperature, trace.finish_reason) == (5.0, "stop")
        assert record["token_ids"][-1] == tokenizer.eos_token_id
        text = tokenizer.decode(record["token_ids"], skip_special_tokens=True)
        assert trace.completion_text() == text
    assert records[0]["template"] == "+"
    talk = next(r for r in records + rejected if r["id"].startswith("talk"))
    (trace,) = read_record(talk, Fields(), source="x", requests={})
    assert [m["role"] for m in trace.messages] == ["system", "user", "assistant"]
    for record in rejected:
        empty = not tokenizer.decode(record["token_ids"], skip_special_tokens=True).strip()
        assert record["rejected"] == ("empty" if empty else "truncated")
        assert empty or len(record["token_ids"]) == 32


def scripted(place, tmp_path, answers, **changes):
    """A run whose teacher says what `answers` has: {prompt id: [(text, finished), ...]}."""
    config = make_config(place, tmp_path, prepare__filter_correct="true", **changes)
    tokenizer = load_tokenizer(place / "teacher")
    said = [pair for samples in answers.values() for pair in samples]
    config.generate.samples = len(said) // len(answers)
    questions = [{"id": name, "prompt": name, "answer": "3"} for name in answers]
    config.generate.prompts = str(tiny.write_jsonl(tmp_path / "p.jsonl", questions))

    def draw(prompts, *, indices, on_batch):
        assert len(prompts) == len(indices)
        out = []
        for text, finished in (said[i] for i in indices):
            ids = tokenizer.encode(text, add_special_tokens=False) + [1] * finished
            out.append(Sample(ids, [-0.5] * len(ids), finished))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "_sampler", lambda config, teacher, mesh: draw)
        path = verb.generate_traces(config)
    return read_lines(path), read_lines(path.with_name(verb.REJECTED)), path


def test_wrong_answers_are_kept_apart_with_their_reason(place, tmp_path, caplog):
    caplog.set_level("INFO")
    right, wrong = ("1+2=3\n#### 3", True), ("1+2=4\n#### 4", True)
    answers = {"a": [right, wrong, ("no idea", True)], "b": [("", True), ("3 is", False), right]}
    records, rejected, path = scripted(place, tmp_path, answers, generate__batch_size="1")
    assert [r["id"] for r in records] == ["a-0", "b-2"]
    found = [(r["id"], r["rejected"], r["extracted"]) for r in rejected]
    assert found == [
        ("a-1", "wrong_answer", "4"),
        ("a-2", "no_answer", None),
        ("b-0", "empty", None),
        ("b-1", "truncated", None),
    ]
    assert rejected[0]["completion"] == wrong[0]
    manifest = json.loads(path.with_name("traces.jsonl.manifest.json").read_text())
    counts = {"empty": 1, "no_answer": 1, "truncated": 1, "wrong_answer": 1}
    assert (manifest["sampled"], manifest["traces"], manifest["rejected"]) == (6, 2, counts)
    assert "rejected: 1 empty, 1 no_answer, 1 truncated, 1 wrong_answer" in caplog.text


def test_the_sampling_settings_reach_the_sampler(place, tmp_path, monkeypatch):
    asked = []

    def note(model, prompts, **options):
        asked.append(options)
        return [Sample([5, 1], [-0.5, -0.1], True, "stop", "0") for _ in prompts]

    monkeypatch.setattr(verb, "sample", note)
    settings = {"top_p": "0.9", "top_k": "7", "min_p": "0.1", "stop": "x,y"}
    changes = {f"generate__{name}": value for name, value in settings.items()}
    path = verb.generate_traces(make_config(place, tmp_path, **changes))
    options = asked[0]
    names = ("temperature", "top_p", "top_k", "min_p", "stop_strings", "seed")
    assert [options[n] for n in names] == [5.0, 0.9, 7, 0.1, ("x", "y"), 0]
    assert options["decode"]([5, 6]) == "01"
    assert [r["completion"] for r in read_lines(path)] == ["0"] * 24 + [[TURN]] * 6
    request = json.loads(path.with_name("traces.jsonl.manifest.json").read_text())["request"]
    assert request["sampling"]["stop"] == ["x", "y"]


TURN = {"role": "assistant", "content": "0"}


def test_logprobs_and_tokens_are_the_teachers_own(place, whole):
    """Sampled at another temperature, the log-probs are still those of temperature 1."""
    tokenizer = load_tokenizer(place / "teacher")
    config, params = hf.load_model(place / "teacher", dtype=jnp.float32)
    record = json.loads(whole.read_text().splitlines()[0])
    prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": record["prompt"]}])
    tokens = jnp.array([prompt + record["token_ids"]])
    logits = np.asarray(transformer.logits(config, params, tokens), np.float64)
    logits = logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = table[np.arange(len(record["token_ids"])), record["token_ids"]]
    np.testing.assert_allclose(record["logprobs"], expected, atol=2e-5)


def test_stopped_and_started_again_gives_the_same_bytes(place, whole, tmp_path, caplog):
    caplog.set_level("INFO")
    real, named = blocks.replace_file, []

    def stops_in_the_second_block(path, content):
        named.append(path)
        if len(named) == 6:  # a block whose bytes are there and which is not yet whole
            raise KeyboardInterrupt
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "replace_file", stops_in_the_second_block)
        with pytest.raises(KeyboardInterrupt):
            verb.generate_traces(make_config(place, tmp_path))
    [parts] = tmp_path.glob("traces.jsonl.partial-*")
    lines = [len(read_lines(part)) for part in parts.glob("*.jsonl")]
    assert (sum(lines), len(list(parts.glob("*[0-9].json")))) == (16, 1)
    path = verb.generate_traces(make_config(place, tmp_path))
    assert "going on behind 8 traces" in caplog.text
    for name in ("traces.jsonl", verb.REJECTED):
        assert (tmp_path / name).read_bytes() == (whole.parent / name).read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == [
        ".traces.jsonl.lock",
        "traces.jsonl",
        "traces.jsonl.manifest.json",
        "traces.rejected.jsonl",
    ]


def test_a_finished_file_is_left_alone_without_reading_the_weights(place, whole, caplog):
    caplog.set_level("INFO")
    before = whole.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "_sampler", None)
        verb.generate_traces(make_config(place, place / "run", generate__batch_size="7"))
    assert "nothing to do" in caplog.text
    assert whole.read_bytes() == before


def test_other_settings_do_not_overwrite_it(place, whole):
    before = whole.read_bytes()
    with pytest.raises(DcodError, match=r"with other sampling.*change run_dir"):
        verb.generate_traces(make_config(place, place / "run", generate__temperature="0.5"))
    assert whole.read_bytes() == before


def test_a_file_of_someone_else_is_not_overwritten(place, tmp_path):
    (tmp_path / "traces.jsonl").write_text("{}\n")
    with pytest.raises(DcodError, match="no manifest"):
        verb.generate_traces(make_config(place, tmp_path))
    assert (tmp_path / "traces.jsonl").read_text() == "{}\n"
    (tmp_path / "traces.jsonl").unlink()
    mine = {verb.REJECTED: "{}\n", "traces.jsonl.manifest.json": '{"mine": 1}'}
    for name, content in mine.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DcodError, match="request is missing"):
        verb.generate_traces(make_config(place, tmp_path))
    manifest = {"request": {}, "files": {verb.REJECTED: "0" * 64}}
    manifest |= dict.fromkeys(("sampled", "traces", "tokens", "rejected"), 1)
    (tmp_path / "traces.jsonl.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DcodError, match=r"beside a traces\.rejected\.jsonl of something else"):
        verb.generate_traces(make_config(place, tmp_path))
    assert (tmp_path / verb.REJECTED).read_text() == "{}\n"


def test_the_manifest_counts_what_was_written(whole):
    manifest = json.loads(whole.with_name("traces.jsonl.manifest.json").read_text())
    records, rejected = read_lines(whole), read_lines(whole.with_name(verb.REJECTED))
    assert (manifest["sampled"], manifest["traces"]) == (30, len(records))
    reasons = [r["rejected"] for r in rejected]
    assert manifest["rejected"] == {name: reasons.count(name) for name in sorted(set(reasons))}
    assert manifest["tokens"] == sum(len(r["token_ids"]) for r in records + rejected)
    assert manifest["request"]["teacher"]["name"] == "teacher"


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_sampled(place, tmp_path):
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1?"}, {"prompt": "1" * 256}])
    with pytest.raises(DcodError, match=rf"^{file}:2: the prompt has .* generate\.max_new_tokens"):
        verb.generate_traces(make_config(place, tmp_path, generate__prompts=str(file)))


def test_prompts_must_be_given(place, tmp_path):
    with pytest.raises(DcodError, match=r"generate\.prompts is empty"):
        verb.generate_traces(make_config(place, tmp_path, generate__prompts=""))
