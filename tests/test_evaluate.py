"""The evaluate verb: what is there is graded on the same problems, everything kept."""

import json

import pytest
import tiny

from dcod_jax import comparison
from dcod_jax import config as configs
from dcod_jax.evals import Generation, read_generations
from dcod_jax.evaluate import evaluate
from dcod_jax.export import MARKER
from dcod_jax.types import DcodError


@pytest.fixture
def config(tmp_path):
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(tmp_path / "run")
    config.student.compute_dtype = "float32"
    config.evaluate.problems = str(tiny.write_jsonl(tmp_path / "p.jsonl", tiny.sums(6)))
    config.evaluate.max_new_tokens = 4
    config.evaluate.limit = 5
    config.evaluate.batch_size = 8
    config.prepare.workers = 1
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

    def note(model_config, params, tokenizer, asked, prompts, **options):
        used.append(tokenizer.chat_template)
        return [Generation(p.id, "1", p.answer, "1", True, True, 1, k, "correct") for p, k in asked]

    monkeypatch.setattr(comparison, "answer", note)
    evaluate(config)
    assert used == [tiny.TEMPLATE, other]


def test_nothing_to_evaluate_is_said(config):
    with pytest.raises(DcodError, match="nothing to evaluate"):
        evaluate(config)
    config.evaluate.problems = ""
    with pytest.raises(DcodError, match=r"evaluate\.problems is empty"):
        evaluate(config)
