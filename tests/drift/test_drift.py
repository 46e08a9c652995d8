"""Drift: KLs against torch, sequences of parts and devices, the verb."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_drift_curves import mean_alive
from transformers import AutoModelForCausalLM

from dcod_jax import config as configs
from dcod_jax.drift import command as verb
from dcod_jax.drift import scores as drift_scores
from dcod_jax.drift.curves import Sequences, drift_curves, excess_difference, position_means
from dcod_jax.drift.scores import (
    DriftModel,
    DriftSettings,
    draw_samples,
    measure,
)
from dcod_jax.errors import DcodError
from dcod_jax.export.command import MARKER
from dcod_jax.files import to_json
from dcod_jax.models import hf, transformer
from dcod_jax.parallel.mesh import make_mesh, tree_shardings
from dcod_jax.score.scoring import TraceBatch

V, STOP, NEW = 49, 1, 10
PROMPTS = ([5, 9, 12, 7], [8, 6], [20, 21, 22, 23, 24, 25, 26], [11, 30, 4], [40, 41])


def one_device():
    return make_mesh(1, devices=jax.devices()[:1])


def settings(**changes):
    options = {"mesh": one_device(), "max_new_tokens": NEW, "seed": 3, "eos_ids": (STOP,)}
    options |= {"valid_vocab": V, "samples": 3, "batch_size": 8}
    options |= {"batch_tokens": 256, "head_chunk": 512}
    return DriftSettings(**(options | changes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(teacher, student, their directories): two sizes, padded differently, stopping early."""
    place = tmp_path_factory.mktemp("drift")
    sizes = {"vocab_size": 56, "hidden_size": 48, "num_attention_heads": 6}
    tiny.write_model(place / "teacher", seed=1, initializer_range=0.35, **sizes)
    tiny.write_model(place / "student", seed=2, initializer_range=0.35)
    models = [
        DriftModel(*hf.load_model(place / name, dtype=jnp.float32, mesh=one_device()), "float32")
        for name in ("teacher", "student")
    ]
    return *models, place


@pytest.fixture(scope="module")
def measured(pair):
    return measure(*pair[:2], PROMPTS, settings())


# ---------------------------------------------------------------- against torch


@pytest.fixture(scope="module")
def torch_models(pair):
    torch.set_num_threads(1)
    return {
        name: AutoModelForCausalLM.from_pretrained(pair[2] / name, dtype=torch.float64).eval()
        for name in ("teacher", "student")
    }


def torch_logprobs(models, ids, **inputs):
    """{model: log-probs [..., V]} over the tokenizer's entries."""
    with torch.no_grad():
        return {
            name: torch.log_softmax(model(torch.tensor(ids), **inputs).logits[..., :V], dim=-1)
            for name, model in models.items()
        }


def test_kl_and_logprobs_equal_torch_token_by_token(measured, torch_models):
    """The first token's prediction is the last prompt position's; nothing is averaged."""
    for scored in (measured.student, measured.teacher):
        assert scored.prompt.tolist() == [i for i in range(5) for _ in range(3)]
        for row, prompt in enumerate(scored.prompt):
            n, ids = scored.length[row], list(PROMPTS[prompt])
            tokens = scored.tokens[row, :n].tolist()
            assert scored.finished[row] == (tokens[-1] == STOP)
            found = torch_logprobs(torch_models, [ids + tokens])
            p, q = (found[name][0, len(ids) - 1 :] for name in ("teacher", "student"))
            kl = (p.exp() * (p - q)).sum(-1).numpy()
            np.testing.assert_allclose(scored.kl[row, : n + 1], kl, atol=3e-5)
            for values, mine in ((q, scored.student_logprobs), (p, scored.teacher_logprobs)):
                wanted = values[np.arange(n), tokens].numpy()
                np.testing.assert_allclose(mine[row, :n], wanted, atol=3e-5)
            assert not scored.kl[row, n + 1 :].any()
            assert not scored.tokens[row, n:].any()
    lengths = np.concatenate([measured.student.length, measured.teacher.length])
    ended = np.concatenate([measured.student.finished, measured.teacher.finished])
    assert 0 < ended.mean() < 1  # both kinds of end are tested
    assert lengths.min() < NEW


# ---------------------------------------------------------------- measuring


def test_log_ratio_by_position(measured):
    sides = {"student": measured.student, "teacher": measured.teacher}
    found = {n: position_means(one.log_ratios(), resamples=20) for n, one in sides.items()}
    scored = measured.teacher
    ratio = scored.student_logprobs.astype(np.float64) - scored.teacher_logprobs
    for t in range(4):
        wanted = mean_alive(ratio, scored.mask(), t)
        assert found["teacher"].value[t] == pytest.approx(wanted, rel=1e-6)
    # Student's own tokens are likelier under it than under the teacher, the teacher's less.
    assert np.nanmean(found["student"].value) > 0 > np.nanmean(found["teacher"].value)
    one = position_means(Sequences(ratio, scored.mask(), np.arange(len(ratio))), resamples=20)
    np.testing.assert_allclose(one.value, found["teacher"].value, rtol=1e-6)


def test_both_sets_are_the_samplers_own(pair, measured):
    teacher, student, _ = pair
    for model, scored in ((teacher, measured.teacher), (student, measured.student)):
        drawn = draw_samples(model, PROMPTS, settings())
        rows = [scored.tokens[i, :n].tolist() for i, n in enumerate(scored.length)]
        assert [s.token_ids for s in drawn] == rows


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.long)])
def test_parts_and_devices_change_nothing(pair, measured, devices):
    """A part of the prompts, on one device or eight, gives the rows of the whole on one."""
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    models = [
        DriftModel(
            m.config,
            jax.device_put(m.params, tree_shardings(mesh, transformer.logical_axes(m.config))),
            m.compute_dtype,
        )
        for m in pair[:2]
    ]
    counted = []
    options = {"first_prompt": 3, "on_batch": counted.append}
    part = measure(*models, PROMPTS[3:], settings(mesh=mesh), **options)
    assert sum(counted) == 4 * 6
    for name in ("student", "teacher"):
        whole, found = getattr(measured, name), getattr(part, name)
        np.testing.assert_array_equal(found.prompt, whole.prompt[9:])
        np.testing.assert_array_equal(found.tokens, whole.tokens[9:])
        np.testing.assert_allclose(found.kl, whole.kl[9:], atol=2e-5)


def test_no_logits_of_a_whole_batch_exist(pair, measured):
    """The traced program has logits of head_chunk tokens and no larger ones."""
    teacher, student, _ = pair
    prompts = [PROMPTS[i] for i in measured.student.prompt[:8]]
    planned = TraceBatch(tuple(range(8)), rows=8, length=32)
    batch = drift_scores._batch(prompts, drift_scores.to_samples(measured.student), planned)

    def widths(head_chunk):
        forward = drift_scores._forward(teacher, student, settings(head_chunk=head_chunk))
        text = drift_scores._score.lower(forward, student.params, teacher.params, batch).as_text()
        return {int(n) for n in re.findall(r"x8x(\d+)x52xf32", text)}

    assert widths(16) == {2}  # 8 rows of 2 tokens, of both models
    assert widths(256) == {32}


def test_a_students_difference_to_itself_is_nothing(measured):
    found = excess_difference(measured.kls(), measured.kls(), resamples=20)
    assert np.nanmax(np.abs(found.value)) == 0


# ---------------------------------------------------------------- the verb


@pytest.fixture
def config(pair, tmp_path):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(tmp_path / "run")
    config.teacher.path = str(pair[2] / "teacher")
    config.teacher.dtype = "float32"
    config.student.path = str(pair[2] / "student")
    config.student.compute_dtype = "float32"
    problems = [{"prompt": f"{a}+{a}?"} for a in range(9)]
    config.evaluate.problems = str(tiny.write_jsonl(tmp_path / "p.jsonl", problems))
    config.drift.limit = 4
    config.drift.samples = 8
    config.drift.max_new_tokens = NEW
    config.drift.batch_size = 8
    config.score.batch_tokens = 256
    config.drift.resamples = 50
    config.mesh.data = 8
    config.train.progress = False
    return config


def damaged(file):
    """Each array absent, of another type or shape, or with a value that cannot be; the faults."""
    arrays = dict(np.load(file))
    request, prompts = json.loads(str(arrays.pop("request"))), arrays["teacher.prompt"]
    text = np.array(to_json(request).decode())
    odd = {"prompt": 1, "length": 999, "kl": np.float32("nan")}
    for name, array in arrays.items():
        others = [None, array.astype(np.complex64), array[..., None], array[:1], array[:0]]
        if (field := name.partition(".")[2]) in odd:
            others.append(array + odd[field])
        for other in others:
            kept = {key: value for key, value in arrays.items() if key != name}
            np.savez(file, request=text, **kept, **({} if other is None else {name: other}))
            with pytest.raises(
                DcodError, match=rf"start\.npz: not what drift wrote.*{name} "
            ) as told:
                verb._read(file, request, prompts)
            yield str(told.value)


def test_the_verb_resumes_and_ends_with_the_same_numbers(
    config, pair, tmp_path, monkeypatch, capsys, caplog
):
    """Blocks are kept, a second student uses the teacher's sequences again, the table is told."""
    caplog.set_level("INFO")
    monkeypatch.setattr(verb, "make_mesh", lambda *_, **__: one_device())
    monkeypatch.setattr(verb, "LEAST", 2)
    monkeypatch.setattr(verb, "BLOCK_BATCHES", 1)  # one prompt a block
    export = tiny.write_model(tmp_path / "run" / "export", seed=5, initializer_range=0.35)
    (export / MARKER).write_text("{}")
    whole = verb.drift(config)
    folder = tmp_path / "run" / "drift"
    assert {p.name for p in folder.iterdir()} == {"start.npz", "student.npz", ".lock"}
    start, student = (np.load(folder / f"{name}.npz") for name in ("start", "student"))
    np.testing.assert_array_equal(start["teacher.tokens"], student["teacher.tokens"])
    assert start["teacher.prompt"].tolist() == [i for i in range(4) for _ in range(8)]
    assert (student["student.tokens"] != start["student.tokens"]).any()
    shown = capsys.readouterr().out
    for row in ("start", "student", "ExAccErr", "minus student"):
        assert row in shown
    # Interrupted in the third block, then started again.
    for file in folder.iterdir():
        file.unlink()
    measured, calls, sampled = verb.measure, [], []

    def interrupted(*args, **options):
        calls.append(options["first_prompt"])
        sampled.append(options["teacher_samples"] is None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(verb, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verb.drift(config)
    assert len(list(folder.glob("*.npz"))) == 2
    assert verb.drift(config) == whole
    assert calls == [0, 1, 2, 2, 3, 0, 1, 2, 3]
    assert sampled == [True] * 5 + [False] * 4  # the second student's blocks know the teacher's
    assert "start: going on after 2 of 4 blocks" in caplog.text
    left = ("start.part-000003.npz", "student.part-000000.npz.tmp")  # by kills
    for name in (*left, "start.part-mine.npz"):
        (folder / name).touch()
    assert verb.drift(config) == whole
    assert calls[9:] == []  # everything was there
    names = {"start.npz", "student.npz", ".lock", "start.part-mine.npz"}
    assert {p.name for p in folder.iterdir()} == names
    assert json.loads((tmp_path / "run" / "drift.json").read_text()) == whole
    kept = (folder / "start.npz").read_bytes()
    assert len(set(damaged(folder / "start.npz"))) == 2 * (7 + 3)
    with pytest.raises(DcodError, match="not what drift wrote"):
        verb.drift(config)
    (folder / "start.npz").write_bytes(kept)
    config.seed = 1
    assert verb.drift(config)["models"] != whole["models"]
    assert "measured anew" in caplog.text


def test_what_drift_json_holds(measured):
    config = configs.load_recipe(configs.BASE)
    config.drift.resamples = 30
    found = verb.summary(config, {"sft": measured}, prompts=5, teacher="t")["models"]["sft"]
    curves = drift_curves(*measured.kls(), resamples=30)
    assert found["excess"]["value"] == pytest.approx(curves.excess.value.tolist())
    assert found["reach"] == curves.reach(10)
    assert "difference" not in found


def test_what_cannot_be_measured_is_said(config, tmp_path):
    config.student.tokenizer = str(
        tiny.write_tokenizer(tmp_path / "other", alphabet="0123456789+?")
    )
    with pytest.raises(DcodError, match="another tokenizer"):
        verb.drift(config)
    config.student.tokenizer = ""
    config.drift.prompts = str(tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1" * 256}]))
    with pytest.raises(DcodError, match=r"p\.jsonl:1: the prompt has .* drift\.max_new_tokens"):
        verb.drift(config)
    config.drift.prompts = ""
    config.evaluate.problems = ""
    with pytest.raises(DcodError, match=r"drift\.prompts and evaluate\.problems are empty"):
        verb.drift(config)
