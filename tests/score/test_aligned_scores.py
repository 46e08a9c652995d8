"""The verb score with a teacher of another tokenizer: log-probs of spans, read by the loss."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from other_tokenizers import CHATML, byte_level, chain
from test_alignment import asked, trace_of
from transformers import AutoModelForCausalLM

from dcod_jax import config as configs
from dcod_jax.data import chat, pipeline
from dcod_jax.data.conversation import recall
from dcod_jax.data.dataset import DatasetWriter, TraceDataset
from dcod_jax.data.teachers import teacher_entries
from dcod_jax.data.templates import DATE
from dcod_jax.data.tokenizer import decode, load_tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.losses.distill import DistillLoss
from dcod_jax.losses.head import VocabHead
from dcod_jax.models import hf
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score
from dcod_jax.score.scoring import ScoreSettings, score_traces
from dcod_jax.score.teacher import own_tokenizer
from dcod_jax.train import loop as train
from dcod_jax.train.settings import loss_config
from dcod_jax.types import Batch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student's tokenizer of letters, a teacher of longer tokens, and traces of sums."""
    root = tmp_path_factory.mktemp("pair")
    student = load_tokenizer(tiny.write_tokenizer(root / "student"))
    merges = [*chain("12"), *chain("34"), *chain("\n####"), *chain(" 1")]
    theirs = byte_level(list(dict.fromkeys(merges)))
    tiny.write_model(root / "teacher", vocab_size=len(theirs) + 5)
    theirs.save_pretrained(root / "teacher")
    manifest = {"tokenizer": {"fingerprint": tokenizer_fingerprint(student)}}
    with DatasetWriter(root / "data", shard_records=3, manifest=manifest) as writer:
        for record in tiny.sums(5):
            trace = trace_of(student, asked(record["completion"], record["prompt"]))
            writer.write(dataclasses.replace(trace, id=record["id"]))
    return root


def config_of(place, **changes):
    config = configs.load_recipe(configs.BASE)
    config.data.dataset, config.teacher.path = str(place / "data"), str(place / "teacher")
    config.student.tokenizer, config.teacher.dtype = str(place / "student"), "float32"
    config.train.progress = False
    for key, value in changes.items():
        configs.assign(config, key.replace("__", "."), value)
    return config


def by_torch(place, trace):
    """log p of each span by transformers, in equal shares; the spans by a walk over characters."""
    torch.set_num_threads(1)
    student, teacher = (load_tokenizer(place / name) for name in ("student", "teacher"))
    conversation = recall(student, trace)
    ids, mask = chat.encode(teacher, conversation.messages)
    model = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0].double()
    table = torch.log_softmax(logits[:, : len(teacher)], -1).numpy()
    at = np.flatnonzero(mask)
    left, right = (
        [*student.convert_ids_to_tokens(trace.token_ids[trace.completion_mask])],
        [(decode(teacher, [int(ids[i])]), table[i - 1, ids[i]]) for i in at],
    )
    assert (left.pop(), right[-1][0]) == ("<end>", "<|im_end|>")
    shares, starts = [], []
    for text, value in right[:-1]:  # each of the teacher's tokens is some of the student's letters
        assert "".join(left[: len(text)]) == text
        left = left[len(text) :]
        shares += [value / len(text)] * len(text)
        starts += [True] + [False] * (len(text) - 1)
    assert not left
    return np.asarray([*shares, right[-1][1]]), [*starts, True]


def test_the_verb_stores_the_log_probs_of_spans_and_the_loss_reads_them(place, capsys, caplog):
    assert score(config_of(place))["data"]["alignment"]["longest_span"] == 5  # \n####
    assert "in 65 spans of 1.34 tokens, the longest of 5" in capsys.readouterr().out
    dataset = TraceDataset(place / "data")
    traces = dataset.read(range(5))
    for trace in traces:
        shares, starts = by_torch(place, trace)
        np.testing.assert_allclose(trace.logprobs, shares, atol=2e-5)
        assert trace.span_starts.tolist() == starts
    score(config_of(place))
    assert "scored these traces before" in caplog.text

    [(rows, index)] = pipeline.eval_batches(dataset, seq_len=96, batch_size=2)
    batch = Batch(**{name: jnp.asarray(value) for name, value in rows.items()})
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 96, 8)), jnp.float32)
    head = jnp.asarray(generator.normal(size=(52, 8)), jnp.float32)
    loss = DistillLoss(loss_config(config_of(place)), VocabHead(64))
    _, stats = jax.jit(functools.partial(loss, step=0))(hidden, head, batch)
    found = np.zeros((2, 96), np.float32)
    log_q = found.copy()
    for row, places in enumerate(rows["head_positions"]):
        used = places < 96
        found[row, places[used]] = np.asarray(stats.weights)[row, used]
        log_q[row, places[used]] = np.asarray(stats.student_logprobs)[row, used]
    for number, trace in enumerate(traces):
        at = (index == number) & rows["loss_mask"]
        spans = np.cumsum(trace.span_starts)
        r = log_q[at].astype(np.float64) - trace.logprobs
        mean = np.asarray([r[spans == span].mean() for span in spans])
        np.testing.assert_allclose(found[at], 1 / (1 + np.exp(-mean)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score__top_k": "4"}, "only the log-prob of the trace's text can be compared"),
        ({"student__tokenizer": ""}, r"set student\.path or student\.tokenizer"),
    ],
)
def test_what_another_tokenizer_cannot_give_is_refused(place, changes, message):
    with pytest.raises(DcodError, match=message):
        score(config_of(place, score__overwrite="true", **changes))


def test_the_students_choice_of_a_template_is_not_the_teachers(place):
    def template(**changes):
        [entry] = teacher_entries(config_of(place, **changes))
        return own_tokenizer(entry, date=DATE).chat_template

    assert template(student__chat_template="deepseek_r1") == CHATML
    named = {"teacher__chat_template": "deepseek_r1", "teacher__template_kwargs": '("a=7",)'}
    assert "<｜Assistant｜>" in template(**named)
    assert "7" in template(**named)


@pytest.mark.long
def test_prepare_score_and_train_with_a_teacher_of_another_tokenizer(place, tmp_path, capsys):
    student = tiny.write_model(tmp_path / "student", seed=3)
    config = config_of(place, student__path=str(student), student__tokenizer="")
    config.run_dir, config.data.dataset = str(tmp_path / "run"), ""
    config.data.traces = str(tiny.write_jsonl(tmp_path / "sums.jsonl", tiny.sums(24)))
    config.data.max_length, config.data.seq_len, config.data.batch_size = 96, 96, 8
    config.train.steps, config.train.save_every, config.train.eval_every = 2, 0, 0
    config.student.compute_dtype, config.train.log_every = "float32", 1
    prepare(config)
    score(config)
    assert "tokens, the longest of 5" in capsys.readouterr().out
    train.fit(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    ratios = [line["weights/log_ratio"] for line in found if "weights/log_ratio" in line]
    dataset = TraceDataset(tmp_path / "run" / "dataset" / "train")
    traces = dataset.read(range(len(dataset)))
    own = hf.load_model(student, dtype=jnp.float32)
    settings = ScoreSettings(0, 256, 64, "float32", len(load_tokenizer(student)))
    log_q = np.concatenate([t.logprobs for t in score_traces(*own, traces, settings=settings)])
    log_p = np.concatenate([t.logprobs for t in traces])
    assert dataset.spans
    # The first batch holds all traces, and the parameters are those that scored.
    np.testing.assert_allclose(ratios[0], (log_q - log_p).mean(), atol=1e-3)
