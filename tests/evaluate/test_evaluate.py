"""The evaluate verb: what is there is graded on the same problems, everything kept."""

import json
from pathlib import Path

import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import command, generations
from dcod_jax.evaluate.command import evaluate
from dcod_jax.evaluate.generations import Generation, read_generations
from dcod_jax.export.command import MARKER
from dcod_jax.sample.sampler import Sample
from dcod_jax.seeds import key_seed


@pytest.fixture
def config(tmp_path):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(tmp_path / "run")
    config.student.compute_dtype = "float32"
    config.evaluate.problems = str(tiny.write_jsonl(tmp_path / "p.jsonl", tiny.sums(6)))
    config.evaluate.max_new_tokens = 4
    config.evaluate.limit = 5
    config.evaluate.batch_size = 8
    config.train.progress = False
    return config


def test_start_and_export_are_compared_on_the_same_problems(config, tmp_path, capsys):
    config.student.path = str(tiny.write_model(tmp_path / "start", seed=1))
    export = tiny.write_model(tmp_path / "run" / "export", seed=2)
    (export / MARKER).write_text("{}")
    evaluate(config)
    folder = tmp_path / "run" / "evaluation"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["models"]) == {"start", "student"}
    assert results["models"]["student"]["problems"] == 5
    assert results["models"]["student"]["difference"] == 0.0
    first, second = (read_generations(folder / f"{name}.jsonl") for name in ("start", "student"))
    assert [g.id for g in first] == [g.id for g in second]
    assert [g.completion for g in first] != [g.completion for g in second]
    assert "95 % interval" in capsys.readouterr().out


def test_the_start_is_asked_with_the_tokenizer_it_is_trained_with(config, tmp_path, monkeypatch):
    config.student.path = str(tiny.write_model(tmp_path / "start", seed=1))
    config.teacher.path = str(tiny.write_model(tmp_path / "teacher", seed=2))
    other = tiny.TEMPLATE.replace("<{{", "{# mine #}<{{")
    config.student.tokenizer = str(tiny.write_tokenizer(tmp_path / "mine", template=other))
    used = []

    def note(model, tokenizer, asked, prompts, **options):
        used.append(tokenizer.chat_template)
        return [Generation(p.id, "1", p.answer, "1", True, True, 1, k, "correct") for p, k in asked]

    monkeypatch.setattr(command, "answer", note)
    evaluate(config)
    assert used == [tiny.TEMPLATE, other]


def test_nothing_to_evaluate_is_said(config):
    with pytest.raises(DcodError, match="nothing to evaluate"):
        evaluate(config)
    config.evaluate.problems = ""
    with pytest.raises(DcodError, match=r"evaluate\.problems is empty"):
        evaluate(config)


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_asked(config, tmp_path):
    config.student.path = str(tiny.write_model(tmp_path / "start", seed=1))
    rows = [*tiny.sums(1), {"prompt": "1" * 250, "answer": "1"}]
    file = tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(DcodError, match=rf"^{file}:2: the prompt has 253 .* evaluate\.max_new_tok"):
        evaluate(config)


# ---------------------------------------------------------------- sets, samples, resuming

SAID = ("#### 3", "it is 03", "#### 4", "who knows")  # right, right, wrong, no answer


@pytest.fixture
def scripted(config, tmp_path, monkeypatch):
    """Two problems, four answers each, by a script: the n-th answer follows from its index."""
    rows = [
        {"problem": f"{place}+1?", "answer": "3", "level": place + 1, "unique_id": f"t/{place}"}
        for place in range(2)
    ]
    file = tiny.write_jsonl(tmp_path / "m.jsonl", rows)
    config.evaluate.problems = ""
    config.evaluate.sets = (f"math500={file}",)
    config.evaluate.instruction = "think"
    config.evaluate.samples, config.evaluate.temperature = 4, 0.7
    config.evaluate.top_p, config.evaluate.top_k, config.evaluate.min_p = 0.9, 5, 0.1
    config.evaluate.stop = ("z",)
    config.evaluate.batch_size = 1  # blocks of four
    config.student.path = str(tiny.write_model(tmp_path / "start", seed=1))
    tokenizer = load_tokenizer(config.student.path)
    calls = []

    def sample(model, prompts, **options):
        calls.append((list(options["indices"]), options, tokenizer.decode(prompts[0])))
        out = []
        for index in options["indices"]:
            text = SAID[(index * 3) % 4] if index < 4 else SAID[2]
            ids = [*tokenizer.encode(text, add_special_tokens=False), 1]
            out.append(Sample(ids, [-0.1] * len(ids), text != SAID[3]))
        return out

    monkeypatch.setattr(generations, "sample", sample)
    return config, calls


def test_samples_of_a_set_are_counted_in_every_way(scripted, capsys):
    config, calls = scripted
    evaluate(config)
    folder = Path(config.run_dir) / "evaluation"
    row = json.loads((folder / "math500" / "results.json").read_text())["models"]["start"]
    assert (row["problems"], row["samples"], row["correct"], row["accuracy"]) == (2, 4, 2, 0.25)
    shown = row["details"]
    assert [shown["pass_at_k"][k][0] for k in ("1", "2", "4")] == [
        0.25,
        pytest.approx((1 - 1 / 6) / 2),
        0.5,
    ]
    # "3", "03", "4" and no vote: the pairs that lose are (4, none), those that tie hold 4 and a 3.
    majority = [shown["maj_at_k"][k][0] for k in ("1", "2", "4")]
    assert majority == [0.25, pytest.approx((3 + 2 * 0.5) / 6 / 2), 0.5]
    groups = [(g["difficulty"], g["problems"], g["accuracy"]) for g in shown["by_difficulty"]]
    assert groups == [("1", 1, 0.5), ("2", 1, 0.0)]
    assert sum(part["answers"] for part in shown["by_length"]) == 8
    rates = {"no_answer": 1 / 8, "truncated": 1 / 8, "loops": 0.0}
    assert shown["degenerate"] == rates
    assert shown["reasons"] == {"correct": 2, "no_answer": 1, "wrong": 5}
    kept = read_generations(folder / "math500" / "start.jsonl")
    assert [(g.id, g.sample) for g in kept] == [(f"t/{p}", k) for p in range(2) for k in range(4)]
    assert [g.reason for g in kept[:4]] == ["correct", "no_answer", "wrong", "correct"]
    names = ("temperature", "top_p", "top_k", "min_p", "stop_strings", "seed")
    assert [calls[0][1][n] for n in names] == [0.7, 0.9, 5, 0.1, ("z",), key_seed(0, "evaluate")]
    assert calls[0][2] == "<user>0+1?\nthink<end><assistant>"
    printed = capsys.readouterr().out
    for text in ("math500: Temperature 0.7 pass@1 of 4 answers", "maj@k", "by difficulty", "loop"):
        assert text in printed


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_is_not_repeated(
    scripted, monkeypatch, caplog
):
    caplog.set_level("INFO")
    config, calls = scripted
    path = Path(config.run_dir) / "evaluation" / "math500" / "start.jsonl"
    real = command.answer

    def stops(*args, indices, **options):
        if indices.start:
            raise KeyboardInterrupt
        return real(*args, indices=indices, **options)

    with monkeypatch.context() as patch:
        patch.setattr(command, "answer", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    [blocks] = path.parent.glob("start.jsonl.partial-*")
    (blocks / "000000004-000000008.0.jsonl").write_text('{"id": "t/1", "comp')  # no counts
    evaluate(config)
    assert "going on after 4 answers" in caplog.text
    assert [indices for indices, *_ in calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [(g.id, g.sample) for g in read_generations(path)][4] == ("t/1", 0)
    content = path.read_bytes()
    evaluate(config)
    assert len(calls) == 2
    assert path.read_bytes() == content
    kept = path.with_name("start.previous.jsonl")
    kept.write_text("of an earlier change")
    config.evaluate.top_k = 6
    evaluate(config)
    assert len(calls) == 4
    assert kept.read_text() == "of an earlier change"
    assert path.with_name("start.previous2.jsonl").read_bytes() == content
    assert "with other sampling: kept as start.previous2.jsonl" in caplog.text


def test_few_shot_plain_prompts_stop_at_the_next_question(scripted, tmp_path):
    config, calls = scripted
    alphabet = tiny.ALPHABET + "QA:"
    config.student.tokenizer = str(tiny.write_tokenizer(tmp_path / "more", alphabet=alphabet))
    pairs = [{"prompt": "5+1?", "completion": "#### 6"}, {"prompt": "2?", "completion": "#### 2"}]
    config.evaluate.exemplars = str(tiny.write_jsonl(tmp_path / "e.jsonl", pairs))
    config.evaluate.form, config.evaluate.shots = "plain", 1
    evaluate(config)
    assert calls[0][1]["stop_strings"] == ("z", "\nQuestion:")
    config.evaluate.exemplars = str(
        tiny.write_jsonl(tmp_path / "e.jsonl", [{"prompt": "1+1?", "completion": "#### 2"}])
    )
    with pytest.raises(DcodError, match="is the problem at"):
        evaluate(config)
