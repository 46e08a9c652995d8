"""Traces sampled from the teacher: what prepare reads, resumed to the same bytes, left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax import generate_traces as verb
from dcod_jax.data import chat
from dcod_jax.data.formats import Fields
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.models import hf, transformer
from dcod_jax.types import DcodError

ROOT = Path(__file__).resolve().parents[1]


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


def make_config(place: Path, run_dir: Path, **changes):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(run_dir)
    config.teacher.path, config.teacher.dtype = str(place / "teacher"), "float32"
    config.generate.prompts = str(place / "prompts.jsonl")
    config.generate.samples = 3
    config.generate.max_new_tokens = 16
    config.generate.batch_size = 2
    config.train.progress = False
    for key, value in changes.items():
        configs.assign(config, key.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def whole(place):
    return verb.generate_traces(make_config(place, place / "run"))


def test_every_trace_is_what_prepare_reads(place, whole):
    tokenizer = chat.load_tokenizer(place / "teacher")
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    traces = list(read_traces(find_sources(str(whole)), Fields()))
    assert len(records) == len(traces) == 14  # one was empty
    assert len({trace.id for trace in traces}) == 14
    for record, trace in zip(records, traces, strict=True):
        assert trace.id == record["id"]
        assert trace.answer == record["answer"]
        assert trace.token_ids == record["token_ids"]
        assert trace.logprobs == record["logprobs"]
        assert trace.temperature == 1.0
        ended = record["token_ids"][-1] == tokenizer.eos_token_id
        assert trace.finish_reason == ("stop" if ended else "length")
        text = tokenizer.decode(record["token_ids"], skip_special_tokens=True)
        assert trace.completion_text() == text
    assert records[0]["template"] == "+"
    assert [m["role"] for m in traces[-1].messages] == ["system", "user", "assistant"]


def test_logprobs_and_tokens_are_the_teachers_own(place, whole):
    """Sampled at another temperature, the log-probs are still those of temperature 1."""
    tokenizer = chat.load_tokenizer(place / "teacher")
    config, params = hf.load_model(place / "teacher", dtype=jnp.float32)
    record = json.loads(whole.read_text().splitlines()[0])
    prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": record["prompt"]}])
    tokens = jnp.array([prompt + record["token_ids"]])
    logits = np.asarray(transformer.logits(config, params, tokens), np.float64)
    logits = logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = table[np.arange(len(record["token_ids"])), record["token_ids"]]
    np.testing.assert_allclose(record["logprobs"], expected, atol=2e-5)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_generate_traces as test
from dcod_jax import generate_traces as verb
real, named = verb.replace_file, []
def dies_in_the_second_block(path, content):
    named.append(path)
    if len(named) == 4:  # a block whose bytes are there and which is not yet whole
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)
verb.replace_file = dies_in_the_second_block
verb.generate_traces(test.make_config(Path({place!r}), Path({run!r})))
"""


def test_killed_and_started_again_gives_the_same_bytes(place, whole, tmp_path, capsys):
    program = KILLED.format(tests=str(ROOT / "tests"), place=str(place), run=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL
    [blocks] = tmp_path.glob("traces.jsonl.partial-*")
    lines = [p.read_bytes().count(b"\n") for p in sorted(blocks.glob("*.jsonl"))]
    assert (sum(lines), len(list(blocks.glob("*.json")))) == (14, 1)
    path = verb.generate_traces(make_config(place, tmp_path))
    assert "going on behind 8 traces" in capsys.readouterr().out
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "traces.jsonl",
        "traces.jsonl.manifest.json",
    ]


def test_a_finished_file_is_left_alone_without_reading_the_weights(place, whole, capsys):
    before = whole.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "_sampler", None)
        verb.generate_traces(make_config(place, place / "run", generate__batch_size="7"))
    assert "nothing to do" in capsys.readouterr().out
    assert whole.read_bytes() == before


def test_other_settings_do_not_overwrite_it(place, whole):
    before = whole.read_bytes()
    with pytest.raises(DcodError, match=r"with other temperature.*change run_dir"):
        verb.generate_traces(make_config(place, place / "run", generate__temperature="0.5"))
    assert whole.read_bytes() == before


def test_a_file_of_someone_else_is_not_overwritten(place, tmp_path):
    (tmp_path / "traces.jsonl").write_text("{}\n")
    with pytest.raises(DcodError, match="no manifest"):
        verb.generate_traces(make_config(place, tmp_path))
    assert (tmp_path / "traces.jsonl").read_text() == "{}\n"


def test_the_manifest_counts_what_was_written(whole):
    manifest = json.loads(whole.with_name("traces.jsonl.manifest.json").read_text())
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert (manifest["sampled"], manifest["traces"], manifest["empty"]) == (15, len(records), 1)
    assert manifest["tokens"] == 1 + sum(len(r["token_ids"]) for r in records)
    assert manifest["truncated"] == sum(r["finish_reason"] == "length" for r in records)
    assert manifest["request"]["teacher"]["name"] == "teacher"


def test_prompts_must_be_given(place, tmp_path):
    with pytest.raises(DcodError, match=r"generate\.prompts is empty"):
        verb.generate_traces(make_config(place, tmp_path, generate__prompts=""))
