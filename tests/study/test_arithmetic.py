"""The quickstart's domain and what is shipped of it."""

from __future__ import annotations

import functools
import itertools
import json
import re
import runpy
import types
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcod_jax.config import load_recipe
from dcod_jax.data import chat
from dcod_jax.data.tokenizer import load_tokenizer, template_fingerprint, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.answers import extract_answer
from dcod_jax.evaluate.generations import Sampling, answer
from dcod_jax.evaluate.problems import Problem, read_problems
from dcod_jax.models import hf
from dcod_jax.sample.sampler import decoding_params
from dcod_jax.study import arithmetic

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"
MEBIBYTES_8 = 8 << 20
CHAIN = re.compile(r"\d(?:[+-]\d)+")

chains = st.integers(2, 6).flatmap(
    lambda terms: st.tuples(
        st.lists(st.integers(0, 9), min_size=terms, max_size=terms),
        st.text("+-", min_size=terms - 1, max_size=terms - 1),
    )
)


@functools.cache
def tool() -> Any:
    """tools/make_quickstart_assets.py as a module."""
    return types.SimpleNamespace(**runpy.run_path(f"{ROOT}/tools/make_quickstart_assets.py"))


@functools.cache
def pieces() -> dict[str, list[arithmetic.Chain]]:
    return tool().pieces()


def value(chain: str) -> int:
    """An independent reading of "8+5-4": a sum of signed integers."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", chain))


def check_equation(equation: str) -> None:
    """ "-3-9=-12" holds."""
    left, right = equation.split("=")
    first, rest = re.fullmatch(r"(-?\d+)((?:[+-]\d+)+)", left).groups()  # type: ignore[union-attr]
    assert int(first) + value(rest) == int(right), equation


def check_solution(solution: str, expression: str, style: str) -> None:
    """Every step is right, uses the problem's numbers in order, and leads to the answer."""
    *steps, last = solution.split("\n")
    assert last == f"#### {value(expression)}"
    operands = [int(number) for number in re.findall(r"\d", expression)]
    if style == "equations":
        used = [int(steps[0].split("+")[0].split("-")[0])]
        before = str(used[0])
        for step in steps:
            check_equation(step)
            assert step.startswith(before)
            used.append(abs(int(step[len(before) :].split("=")[0])))
            before = step.split("=")[1]
        assert used == operands
        assert int(before) == value(expression)
    elif style == "words":
        start, moves = steps[0].split(" ", 1)
        total, used = int(start), [int(start)]
        for move in moves.split(", "):
            verb, number, result = re.fullmatch(r"(up|down) (\d): (-?\d+)", move).groups()  # type: ignore[union-attr]
            total += int(number) if verb == "up" else -int(number)
            used.append(int(number))
            assert total == int(result)
        assert used == operands
        assert total == value(expression)
    elif style in ("values", "chain", "table"):
        signs = ["+", *re.findall(r"[+-]", expression)]
        values = [value(expression[: place + 1]) for place in range(0, len(expression), 2)]
        moves = [f"{sign}{n}" for sign, n in zip(signs, operands, strict=True)]
        rows = zip(moves, values, strict=True)
        expected = {
            "values": " > ".join(map(str, values)),
            "chain": "=".join(
                [
                    expression[:1] + "".join(moves[1:2]),
                    *(f"{v}{m}" for v, m in zip(values[1:-1], moves[2:], strict=True)),
                    f"{values[-1]}",
                ]
            ),
            "table": "; ".join(f"{move} {total}" for move, total in rows),
        }
        assert steps == [expected[style]]
    else:
        equations = [e for step in steps for e in re.findall(r"-?\d+[+-]\d+=-?\d+", step)]
        for equation in equations:
            check_equation(equation)
        plus = [int(n) for n in re.findall(r"(?:^|\+)(\d)", expression)]
        minus = [int(n) for n in re.findall(r"-(\d)", expression)]
        assert steps[0].startswith("plus ")
        assert int(re.findall(r"\d+", steps[0])[-1]) == sum(plus)
        if minus:
            assert int(re.findall(r"\d+", steps[1])[-1]) == sum(minus)
            assert steps[2] == f"{sum(plus)}-{sum(minus)}={value(expression)}"
        assert len(steps) == (3 if minus else 1)


# ---------------------------------------------------------------- problems and solutions


@pytest.mark.parametrize("style", list(arithmetic.STYLES))
@settings(max_examples=150, deadline=None)
@given(chain=chains)
def test_every_step_of_a_worked_solution_is_right(style: str, chain: tuple[list[int], str]) -> None:
    problem = arithmetic.Chain(tuple(chain[0]), chain[1], "Find {}.")
    solution = arithmetic.worked_solution(problem, style)
    check_solution(solution, problem.expression, style)
    found = extract_answer(solution)
    assert found is not None
    assert found.answer == problem.record()["answer"] == str(value(problem.expression))


def test_the_check_of_solutions_can_fail() -> None:
    with pytest.raises(AssertionError):
        check_solution("8+5=13\n13-4=8\n#### 9", "8+5-4", "equations")
    with pytest.raises(AssertionError):
        check_solution("8 up 5: 13, down 3: 10\n#### 9", "8+5-4", "words")
    with pytest.raises(AssertionError):
        check_solution("plus 8+5=13\nminus 4\n13-4=8\n#### 9", "8+5-4", "groups")


def test_parse_expression_reads_reasoning_gyms_form_and_refuses_others() -> None:
    assert tool().parse_expression("8 + 5 - 4") == ((8, 5, 4), "+-")
    for wrong in ("8 * 5", "8", "", "8 + ", "-8 + 5"):
        with pytest.raises(DcodError, match="expected a chain"):
            tool().parse_expression(wrong)


def test_repeated_expressions_give_one_problem() -> None:
    made = list(tool().make_problems(["1 + 2", "1+2", "2 - 1"], seed=0))
    assert [problem.expression for problem in made] == ["1+2", "2-1"]


def test_traces_are_right_and_mix_the_styles() -> None:
    module = tool()
    of = {"teacher": pieces()["teacher"], "student": pieces()["student"]}
    of["competent"] = competent()["worked"]
    for name, problems in of.items():
        shares = module.COMPETENT_STYLE if name == "competent" else module.EVERY_STYLE
        traces = list(arithmetic.worked_traces(problems, shares, seed=module.SEED))
        for trace in traces[::10]:
            check_solution(trace["completion"], trace["id"], trace["style"])
        counts = Counter(trace["style"] for trace in traces)
        assert counts.keys() == shares.keys()
        assert min(counts.values()) > 0.2 * len(traces)


# ---------------------------------------------------------------- splits


def test_no_problem_is_in_two_pieces() -> None:
    expressions = [problem.expression for made in pieces().values() for problem in made]
    assert len(expressions) == len(set(expressions))


def test_shipped_splits_share_no_problem_and_no_template() -> None:
    found: list[set[str]] = []
    for name in ("prompts", "validation", "eval"):
        prompts = [p.messages[0]["content"] for p in read_problems(ASSETS / f"{name}.jsonl")]
        chains = [CHAIN.search(prompt)[0] for prompt in prompts]  # type: ignore[index]
        pairs = zip(prompts, chains, strict=True)
        phrasings = {prompt.replace(chain, "{}") for prompt, chain in pairs}
        found.append(set(chains) | phrasings | {re.sub(r"\d", "", chain) for chain in chains})
        assert len(set(chains)) == len(chains)
    for one, other in itertools.combinations(found, 2):
        assert not one & other


@pytest.mark.parametrize("name", ["validation", "eval"])
def test_no_operator_sequence_decides_a_held_out_split(name: str) -> None:
    counts = Counter(problem.operators for problem in pieces()[name])
    assert counts.keys() == set(tool().OPERATORS[name])
    assert len(counts) >= 5
    assert {len(operators) for operators in counts} >= {3, 4}
    assert max(counts.values()) < 0.25 * counts.total()


def test_no_template_of_the_held_out_splits_is_in_another_split() -> None:
    def templates(name: str) -> set[str]:
        # From the text alone: the question around the chain, and the signs inside it.
        found: set[str] = set()
        for problem in pieces()[name]:
            prompt = problem.record()["prompt"]
            chain = CHAIN.search(prompt)
            assert chain is not None
            found |= {prompt.replace(chain[0], "{}"), re.sub(r"\d", "", chain[0])}
        return found

    train = templates("teacher") | templates("student") | templates("prompts")
    held_out = templates("validation"), templates("eval")
    assert not train & held_out[0]
    assert not train & held_out[1]
    assert not held_out[0] & held_out[1]


# ---------------------------------------------------------------- tokenizer


@settings(max_examples=100, deadline=None)
@given(text=st.text(tool().ALPHABET, max_size=40))
def test_tokenizer_gives_one_token_a_character_and_the_text_back(text: str) -> None:
    tokenizer = tool().build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if "<|" not in text:
        assert len(ids) == len(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("model", ["teacher", "student", "competent/model"])
def test_shipped_tokenizer_is_the_built_one_and_its_chat_prompt_a_prefix(model: str) -> None:
    tokenizer = load_tokenizer(ASSETS / model)
    built = tool().build_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(built)
    assert template_fingerprint(tokenizer) == template_fingerprint(built)
    question = [{"role": "user", "content": "Find 8+5-4."}]
    answer = "8+5=13\n13-4=9\n#### 9"
    ids, mask = chat.encode(tokenizer, [*question, {"role": "assistant", "content": answer}])
    prompt = chat.encode_prompt(tokenizer, question)
    assert list(ids[: len(prompt)]) == list(prompt)
    assert not np.any(mask[: len(prompt)])
    assert np.all(mask[len(prompt) :])
    assert tokenizer.decode(ids[mask]) == answer + "<|end|>"
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


# ---------------------------------------------------------------- what is shipped


@functools.cache
def competent() -> dict[str, list[arithmetic.Chain]]:
    return tool().competent_problems()


def test_shipped_problems_regenerate() -> None:
    made = tool().shipped_problems(pieces(), competent())
    assert len(made) == 7
    for name, content in made.items():
        assert (ASSETS / name).read_text() == content, name


def test_no_problem_of_the_quickstart_is_in_two_sets() -> None:
    found = {name: {p.expression for p in problems} for name, problems in competent().items()}
    held_out = ("validation", "eval", "longer")
    assert [len(found[name]) for name in (*held_out, "prompts")] == [500, 500, 500, 3000]
    for name in held_out:
        for other in found.keys() - {name}:
            assert not found[name] & found[other], (name, other)
    most = max(len(p.numbers) for p in competent()["prompts"])
    assert min(len(p.numbers) for p in competent()["longer"]) > most


@pytest.mark.parametrize(
    "name", ["prompts", "validation", "eval", "competent/prompts", "competent/longer"]
)
def test_shipped_problems_are_read_and_their_answers_right(name: str) -> None:
    read = read_problems(ASSETS / f"{name}.jsonl")
    assert len(read) >= 300
    for problem in read:
        chain = CHAIN.search(problem.messages[0]["content"])
        assert chain is not None
        assert int(problem.answer) == value(chain[0])


@pytest.mark.parametrize("model", ["teacher", "student", "competent/model"])
def test_shipped_models_are_small_and_what_the_recipe_makes(model: str) -> None:
    directory = ASSETS / model
    assert sum(file.stat().st_size for file in directory.iterdir()) <= MEBIBYTES_8
    config, raw = hf.load_config(directory)
    shape = tool().SHAPES[model.split("/")[0]]
    wanted = tool().hf_config(shape)
    assert {key: raw.get(key) for key in shape} == shape
    assert raw["model_type"] == wanted["model_type"]
    assert config.vocab_size == len(tool().build_tokenizer())
    params = hf.load_params(directory, config)
    assert all(np.isfinite(leaf).all() for leaf in _leaves(params))


def _leaves(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for child in tree.values() for leaf in _leaves(child)]
    return [np.asarray(tree)]


def test_recipes_name_files_that_exist_wherever_they_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart_lacking"):
        config = load_recipe(ROOT / "dcod_jax" / "configs" / f"{name}.py")
        sets = [entry.split("=")[1] for entry in config.evaluate.sets]
        for path in (
            config.student.path,
            config.teacher.path,
            config.generate.prompts,
            config.evaluate.problems,
            *sets,
        ):
            assert Path(path).exists(), path


def test_longest_worked_solution_fits_the_recipe() -> None:
    config = load_recipe(ROOT / "dcod_jax" / "configs" / "quickstart_lacking.py")
    longest = max(
        len(arithmetic.worked_solution(problem, style)) + 1  # the end of the turn
        for piece in pieces().values()
        for problem in piece
        for style in arithmetic.STYLES
    )
    assert longest <= config.generate.max_new_tokens == config.evaluate.max_new_tokens
    assert json.loads((ASSETS / "student" / "config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("split", ["eval"])
def test_shipped_models_can_what_the_recipe_says(split: str) -> None:
    recipe = load_recipe(ROOT / "dcod_jax" / "configs" / "quickstart.py")
    problems = read_problems(ASSETS / f"{split}.jsonl", limit=120)

    def accuracy(model: str, problems: list[Problem]) -> float:
        config, params = hf.load_model(ASSETS / model, dtype=jnp.float32)
        tokenizer = load_tokenizer(ASSETS / model)
        decoded = decoding_params(
            config, params, valid_vocab=len(tokenizer), compute_dtype="float32"
        )
        graded = answer(
            decoded,
            tokenizer,
            [(problem, 0) for problem in problems],
            [chat.encode_prompt(tokenizer, problem.messages) for problem in problems],
            indices=range(len(problems)),
            sampling=Sampling(),
            max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=len(problems),
        )
        return sum(g.correct for g in graded) / len(graded)

    assert accuracy("teacher", problems) >= 0.8
    assert 0.3 <= accuracy("student", problems) <= 0.7
    own = read_problems(ASSETS / "competent" / f"{split}.jsonl", limit=120)
    assert accuracy("competent/model", own) >= 0.8
