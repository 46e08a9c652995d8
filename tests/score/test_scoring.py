"""Teacher log-probs: exact in any batch and on any mesh; refused when wrong; restartable."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers

from dcod_jax import config as configs
from dcod_jax.data.dataset import DatasetWriter, TraceDataset
from dcod_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.losses.head import VocabHead
from dcod_jax.models import hf, transformer
from dcod_jax.parallel.mesh import make_mesh, tree_shardings
from dcod_jax.score import scoring
from dcod_jax.score import teacher as teachers
from dcod_jax.score.command import score
from dcod_jax.score.scoring import ScoreSettings, batches_by_length, score_traces
from dcod_jax.types import Trace

ROOT = Path(__file__).resolve().parents[2]
V = 49  # real vocabulary of the tiny models, which have 3 rows more
SETTINGS = ScoreSettings(
    top_k=0, batch_tokens=128, head_chunk=48, compute_dtype="float32", valid_vocab=V
)


def make_traces(count=9, seed=0) -> list[Trace]:
    """Random tokens; prompt of 1 to 9, completion of 1 to 30, one trace in two turns."""
    generator = np.random.default_rng(seed)
    traces = []
    for number in range(count):
        prompt, completion = generator.integers(1, 10), generator.integers(1, 31)
        ids = generator.integers(0, V, prompt + completion).astype(np.int32)
        mask = np.arange(len(ids)) >= prompt
        if number == 3:
            mask[prompt + 2 : prompt + 4] = False
        traces.append(Trace(f"t{number}", ids, mask, meta={"answer": str(number)}))
    return traces


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("teacher"), seed=5)


@pytest.fixture(scope="module")
def model(teacher):
    return hf.load_model(teacher, dtype=jnp.float32)


@pytest.fixture(scope="module")
def dense(teacher) -> list[np.ndarray]:
    """Float64 log-softmax over the real vocabulary of transformers' logits, [C, V] a trace."""
    torch.set_num_threads(1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tables = []
    for trace in make_traces():
        with torch.no_grad():
            out = theirs(torch.tensor(trace.token_ids[None].astype(np.int64))).logits[0]
        logits = out.numpy().astype(np.float64)[:, :V]
        logits -= logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        tables.append(table[np.flatnonzero(trace.completion_mask) - 1])
    return tables


def chosen(trace: Trace, table: np.ndarray) -> np.ndarray:
    ids = trace.token_ids[trace.completion_mask]
    return table[np.arange(len(ids)), ids]


def test_logprobs_are_those_of_transformers(model, dense):
    traces = make_traces()
    scored = score_traces(*model, traces, settings=SETTINGS)
    for before, after, table in zip(traces, scored, dense, strict=True):
        assert after.logprobs.dtype == np.float32
        np.testing.assert_allclose(after.logprobs, chosen(before, table), atol=2e-5)
        unscored = dataclasses.asdict(dataclasses.replace(after, logprobs=None))
        np.testing.assert_equal(unscored, dataclasses.asdict(before))


def test_top_k_is_the_head_of_the_distribution_and_its_tail(model, dense):
    settings = dataclasses.replace(SETTINGS, top_k=5)
    for trace, table in zip(
        score_traces(*model, make_traces(), settings=settings), dense, strict=True
    ):
        order = np.argsort(-table, axis=-1)[:, :5]
        best = np.take_along_axis(table, order, axis=-1)
        np.testing.assert_array_equal(trace.topk_ids, order)
        assert trace.topk_logprobs.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(trace.topk_logprobs.astype(np.float32), best, rtol=2**-8)
        np.testing.assert_allclose(trace.tail_logprobs, np.log1p(-np.exp(best).sum(-1)), atol=1e-4)
        np.testing.assert_allclose(trace.logprobs, chosen(trace, table), atol=2e-5)


def test_top_k_of_the_whole_vocabulary_is_dense_and_leaves_no_tail(model, dense):
    settings = dataclasses.replace(SETTINGS, top_k=V)
    for trace, table in zip(
        score_traces(*model, make_traces(), settings=settings), dense, strict=True
    ):
        whole = np.zeros_like(table)
        np.put_along_axis(whole, trace.topk_ids, trace.topk_logprobs.astype(np.float64), axis=-1)
        np.testing.assert_allclose(whole, table, rtol=2**-8)
        assert (trace.tail_logprobs == scoring.TAIL_FLOOR).all()


def test_a_tail_beside_a_sure_token_keeps_its_digits():
    logits = jnp.array([20.0, 0.0, -1.0, -2.0])
    _, values, tail = scoring.top_k_logprobs(logits, VocabHead(1), top_k=1)
    exact = np.asarray(logits, np.float64)
    total = np.log(np.exp(exact).sum())
    np.testing.assert_allclose(values, exact[:1] - total, atol=1e-7)
    np.testing.assert_allclose(tail, np.log(np.exp(exact[1:]).sum()) - total, rtol=1e-6)


def test_plan_holds_every_trace_once_in_few_shapes_of_bounded_size():
    lengths = np.random.default_rng(0).integers(1, 700, 500).tolist()
    plan = batches_by_length(lengths, batch_tokens=4096, shards=2)
    assert sorted(i for batch in plan for i in batch.members) == list(range(500))
    for batch in plan:
        assert batch.rows % 2 == 0
        assert batch.rows * batch.length <= 4096
        assert max(lengths[i] for i in batch.members) <= batch.length
    assert len({(batch.rows, batch.length) for batch in plan}) <= 15
    padded = sum(batch.rows * batch.length for batch in plan)
    assert padded < 1.35 * sum(lengths)
    assert batches_by_length([9000, 3], batch_tokens=4096)[0].rows == 1


def test_eight_devices_score_as_one(model):
    config, params = model
    settings = dataclasses.replace(SETTINGS, top_k=4)
    one = score_traces(config, params, make_traces(), settings=settings)
    mesh = make_mesh(2, 2, tensor=2)
    placed = jax.device_put(params, tree_shardings(mesh, transformer.logical_axes(config)))
    many = score_traces(config, placed, make_traces(), settings=settings, mesh=mesh)
    for left, right in zip(one, many, strict=True):
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
        np.testing.assert_array_equal(left.topk_ids, right.topk_ids)
        np.testing.assert_allclose(left.tail_logprobs, right.tail_logprobs, atol=1e-4)


def test_a_nan_names_the_trace(model):
    config, params = model
    embedding = params["embed_tokens"]["embedding"]
    traces = make_traces()
    only_there = set(range(V)) - {int(i) for t in traces for i in t.token_ids if t.id != "t2"}
    broken = {**params, "embed_tokens": {"embedding": embedding.at[min(only_there)].set(jnp.nan)}}
    traces[2].token_ids[0] = min(only_there)
    with pytest.raises(DcodError, match="log-probability nan"):
        score_traces(config, broken, traces, settings=SETTINGS)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([4], [True], "at least one token before"),
        ([4, 5], [True, True], "at least one token before"),
        ([4, 5], [False, False], "at least one token before"),
        ([4, V], [False, True], "another tokenizer"),
        ([4] * 300, [False] * 299 + [True], "max_position_embeddings is 256"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_id(model, ids, mask, message):
    trace = Trace("odd one", np.array(ids, np.int32), np.array(mask))
    with pytest.raises(DcodError, match=f"'odd one'.*{message}"):
        score_traces(*model, [trace], settings=SETTINGS)


def test_more_top_k_than_vocabulary_is_refused(model):
    settings = dataclasses.replace(SETTINGS, top_k=V + 1)
    with pytest.raises(DcodError, match=f"score.top_k={V + 1}"):
        score_traces(*model, make_traces(), settings=settings)


# ---------------------------------------------------------------- the verb


def write_dataset(root: Path, tokenizer_path: Path) -> Path:
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer_path))
    for split, count in (("train", 20), ("eval", 4)):
        manifest = {"tokenizer": {"fingerprint": fingerprint}}
        with DatasetWriter(root / split, shard_records=4, manifest=manifest) as writer:
            for trace in make_traces(count, seed=count):
                writer.write(trace)
    return root


def make_config(dataset: Path, teacher: Path, **changes):
    config = configs.load_recipe(configs.BASE)
    config.data.dataset, config.teacher.path = str(dataset), str(teacher)
    config.teacher.dtype = "float32"
    config.score.batch_tokens = 256
    config.train.progress = False
    for key, value in changes.items():
        configs.assign(config, key.replace("__", "."), value)
    return config


def hashes(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_stopped_and_started_again_gives_the_same_bytes(tmp_path, teacher, capsys, caplog):
    caplog.set_level("INFO", logger="dcod_jax")
    whole = write_dataset(tmp_path / "whole", teacher)
    manifests = score(make_config(whole, teacher, score__top_k="3"))
    assert manifests["train"]["scored"]
    assert "26 bytes a token, top-3 hold" in capsys.readouterr().out

    cut = write_dataset(tmp_path / "cut", teacher)
    before = hashes(cut)
    calls, real = [], score_traces

    def stops_in_the_third(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcod_jax.score.command.score_traces", stops_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            score(make_config(cut, teacher, score__top_k="3"))
    after = hashes(cut)
    assert {name: after[name] for name in before} == before  # nothing lost
    assert len([name for name in after if "scored" in name]) == 2
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcod_jax.score.command.score_traces", counted)
        score(make_config(cut, teacher, score__top_k="3"))
    assert "going on behind 2 of 5 shards" in caplog.text
    assert len(calls) == 4  # three of five shards of train were left, one of eval
    assert hashes(cut) == hashes(whole)


def test_scored_again_by_the_same_teacher_does_nothing(tmp_path, teacher, caplog):
    caplog.set_level("INFO", logger="dcod_jax")
    root = write_dataset(tmp_path / "data", teacher)
    score(make_config(root, teacher))
    first = hashes(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers.Teacher, "load", None)  # the weights are not even read
        score(make_config(root, teacher))
    assert caplog.text.count("scored these traces before") == 2
    assert hashes(root) == first
    trace = TraceDataset(root / "train").read([0])[0]
    assert trace.logprobs is not None
    assert trace.topk_ids is None


def test_the_starts_log_probs_lie_beside_the_teachers(tmp_path, teacher):
    """Both are those of scoring by one model alone; the start's compute dtype is its own."""
    root, student = write_dataset(tmp_path / "d", teacher), tiny.write_model(tmp_path / "s", seed=8)
    asked = {"score__student": "true", "student__path": str(student)}
    asked["student__compute_dtype"] = "float32"
    manifest = score(make_config(root, teacher, **asked))["train"]
    assert manifest["start"]["weights"] == hf.weights_fingerprint(student)
    found = TraceDataset(root / "train").read(range(5))
    bare = [Trace(t.id, t.token_ids, t.completion_mask) for t in found]
    for path, name in ((teacher, "logprobs"), (student, "start_logprobs")):
        config, params = hf.load_model(path, dtype=jnp.float32, mesh=None)
        alone = score_traces(config, params, bare, settings=SETTINGS)
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_allclose(getattr(one, name), other.logprobs, rtol=1e-5, atol=1e-6)
    assert score(make_config(root, teacher, **asked))["train"] == manifest  # nothing left to do
    again = score(make_config(root, teacher, score__overwrite="true"))["train"]
    assert "start" not in again
    assert TraceDataset(root / "train").read([0])[0].start_logprobs is None
    with pytest.raises(DcodError, match=r"student\.path is empty"):
        score(make_config(root, teacher, score__student="true", score__overwrite="true"))


def test_another_teacher_is_refused_unless_asked_for(tmp_path, teacher):
    root = write_dataset(tmp_path / "data", teacher)
    score(make_config(root, teacher))
    first = hashes(root)
    other = tiny.write_model(tmp_path / "Other2.5-1B", seed=6)
    with pytest.raises(DcodError, match=r"score\.overwrite"):
        score(make_config(root, other))
    assert hashes(root) == first
    manifest = score(make_config(root, other, score__overwrite="true"))["train"]
    assert manifest["teacher"]["name"] == "Other2.5-1B"
    assert manifest["teacher"]["weights"] == hf.weights_fingerprint(other)


def test_another_tokenizer_needs_the_students_and_padding_does_not(tmp_path, teacher):
    root = write_dataset(tmp_path / "data", teacher)
    padded = tiny.write_model(tmp_path / "padded", seed=5, vocab_size=64)
    assert score(make_config(root, padded))["train"]["scored"]
    alien = tiny.write_model(tmp_path / "alien", seed=5)
    tiny.write_tokenizer(alien, alphabet="9876543210" + tiny.ALPHABET[10:])
    with pytest.raises(DcodError, match=r"another tokenizer than the traces; set student\.path"):
        score(make_config(root, alien))
    with pytest.raises(DcodError, match="written with another tokenizer"):
        score(make_config(root, alien, student__tokenizer=str(alien)))


def test_no_dataset_and_no_teacher_are_named(tmp_path, teacher):
    with pytest.raises(DcodError, match="not a directory"):
        score(make_config(tmp_path / "none", teacher))
    root = write_dataset(tmp_path / "data", teacher)
    with pytest.raises(DcodError, match=r"teacher\.path is empty"):
        score(make_config(root, Path(""), teacher__path=""))
