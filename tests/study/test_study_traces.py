"""The traces of the study: its domains, and how conditions choose among traces."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from test_study import recipe

from dcod_jax import config as configs
from dcod_jax.configs.study import LIGHTNING
from dcod_jax.errors import DcodError
from dcod_jax.sample.sampler import Sample
from dcod_jax.study import arithmetic, domain, letters
from dcod_jax.study.arithmetic import STYLES, worked_solution
from dcod_jax.study.lab import Lab
from dcod_jax.types import Trace


def test_the_sets_are_apart_and_each_is_what_its_name_says():
    config = recipe(**{"study.problems": "200"})
    sets = domain.held_out(config)
    ids = [p.expression for problems in sets.values() for p in problems]
    assert len(ids) == len(set(ids)) == 4 * 200
    stream = domain.training_problems(config, "traces", config.study.terms)
    trained = list(itertools.islice(stream, 2000))
    assert not set(ids) & {p.expression for p in trained}
    assert {p.numbers[0] for p in trained} == set(range(1, 7))
    assert {p.numbers[0] for p in sets["operands"]} == {7, 8, 9}
    assert {len(p.numbers) for p in sets["operands"]} == {len(p.numbers) for p in trained} == {3, 4}
    assert {len(p.numbers) for p in sets["longer"]} == {5, 6}
    for problem in itertools.chain(*sets.values()):
        assert eval(problem.expression) == problem.answer
        assert min(problem.running_values()) >= 0
        assert (
            problem.numbers[0]
            + sum(
                n for n, op in zip(problem.numbers[1:], problem.operators, strict=True) if op == "+"
            )
            <= arithmetic.LARGEST
        )


@pytest.mark.parametrize("name", list(domain.DOMAINS))
def test_noise_changes_one_symbol_of_the_steps_and_styles_are_told_apart(name):
    draw, config = random.Random(0), recipe(**{"study.domain": name})
    kind = domain.domain_of(config)
    for problem in domain.held_out(config)["in"]:
        for style in kind.STYLES:
            text = worked_solution(problem, style, kind.STYLES)
            assert kind.style_of(text) == style
            noisy = domain.disturb(text, draw, kind.SYMBOLS)
            changed = [(a, b) for a, b in zip(text, noisy, strict=True) if a != b]
            assert len(changed) == 1
            assert all(c in kind.SYMBOLS for c in changed[0])
            assert domain.is_correct(problem, noisy)
            assert not domain.is_correct(problem, text + "1")


def test_letters_are_moved_as_their_digits_say():
    """Each style against moves done by hand; the sets differ in first letter and length."""
    problem = letters.Moves("dab", "1r2")
    assert problem.record() == {"id": "dab 1 r 2", "prompt": "dab 1 r 2=", "answer": "bad"}
    assert letters.solve_steps(problem) == "1 adb\nr bda\n2 bad"
    assert letters.solve_words(problem) == "dab now, jump 1: adb, turn: bda, jump 2: bad"
    assert letters.solve_tracks(problem) == "d 223\na 132\nb 311"
    sets = domain.held_out(recipe(**{"study.domain": "letters"}))
    assert {p.word[0] for p in sets["in"]} <= set("abcdef")
    assert {p.word[0] for p in sets["operands"]} == set("ghi")
    assert {len(p.moves) for p in sets["in"]} == {2, 3}
    assert {len(p.moves) for p in sets["longer"]} == {4, 5}
    for p in itertools.chain(*sets.values()):
        word = list(p.word)
        for move in p.moves:
            if move == "r":
                word.reverse()
            else:
                at = int(move) - 1
                word[at : at + 2] = word[at + 1], word[at]
        assert "".join(word) == p.answer
        assert len(set(p.word)) == 3


def test_a_style_is_kept_in_part():
    """ "equations:0.1" lets a tenth of its traces pass, and all of the styles without a share."""
    config = recipe()
    config.study.styles = ("words", "equations:0.1")
    config.prepare.filter_correct = False
    problem = next(domain.problem_stream(config, "x", (3, 4), (1, 6)))
    answer = Sample([1], [0.0], True)
    kept = dict.fromkeys(STYLES, 0)
    draw = random.Random(0)
    for style, _ in itertools.product(STYLES, range(2000)):
        text = worked_solution(problem, style)
        kept[style] += not domain._why_not(config, problem, answer, text, draw)
    assert (kept["words"], kept["groups"]) == (2000, 0)
    assert 150 < kept["equations"] < 250
    config.study.styles = ("word",)
    with pytest.raises(DcodError, match=r"study\.styles names word; there are"):
        domain._why_not(config, problem, answer, "1 up 2", draw)
    config.study.styles = ("words:x",)
    with pytest.raises(DcodError, match="expected STYLE or STYLE:SHARE"):
        domain.style_shares(config)


def test_the_selected_traces_are_the_best_by_their_rule():
    traces = [Trace(f"{i}", np.arange(4), np.array([0, 0, 1, 1], bool)) for i in range(10)]
    scores = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0]
    assert [t.id for t in domain.select(traces, scores, 0.3)] == ["4", "5", "7"]
    config = recipe()
    for text in ("likely", "likely:0", "short:1.5", "long:0.3", "short:x", "short:nan"):
        config.study.select = text
        with pytest.raises(DcodError, match=r"study\.select="):
            domain.selection(config)
    config.study.select = "short:0.3"
    assert domain.selection(config) == ("short", 0.3)


def test_own_answers_are_the_starts_and_scored_by_both(tmp_path, monkeypatch):
    """study.select=own: in place of the teacher's traces, right or wrong, with both log-probs."""
    other = "study.noise=0.5 study.styles=words"
    config = configs.with_changes(recipe(), f"{LIGHTNING} {other}".split())
    lab, asked = Lab(config, tmp_path, {}), []
    drawn = [Trace(f"{i}", np.arange(2, 6), np.array([0, 0, 1, 1], bool)) for i in range(3)]

    def sampled(config, model):
        how = (config.prepare.filter_correct, config.study.noise, tuple(config.study.styles))
        asked.append((model is lab.teacher, *how))
        return drawn, {"counts": {"sampled": len(asked)}, "styles": {}}

    def scored(config, model, traces):
        known = np.full(2, -1.0 if model is lab.teacher else -2.0, np.float32)
        return [dataclasses.replace(trace, logprobs=known) for trace in traces]

    monkeypatch.setattr(lab, "start", lambda config, seed: {})
    monkeypatch.setattr(domain, "teacher_traces", sampled)
    monkeypatch.setattr(domain, "_scored", scored)
    own = lab._trained_on(config, 1, start=False)
    assert asked == [(True, True, 0.5, ("words",)), (False, False, 0.0, ())]
    assert own.manifest["counts"] == {"sampled": 2}
    for trace in own.read(range(3)):
        assert (list(trace.logprobs), list(trace.start_logprobs)) == ([-1, -1], [-2, -2])
