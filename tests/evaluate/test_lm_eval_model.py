"""lm-evaluation-harness on our sampler: log-likelihoods equal transformers', tasks run."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval", exc_type=ImportError)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dcod_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dcod_jax.errors import DcodError  # noqa: E402
from dcod_jax.evaluate.lm_eval_model import DcodLM  # noqa: E402

LENGTH = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), seed=3, initializer_range=0.5)


@pytest.fixture(scope="module")
def lm(home):
    return DcodLM(str(home), max_length=LENGTH, batch_tokens=1024, batch_size=8)


@pytest.fixture(scope="module")
def reference(home):
    """log p [T, V] after each of the given ids, by transformers, over the tokenizer's ids."""
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float64)
    size = len(load_tokenizer(home))

    def table(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, :, :size], -1).numpy()

    return table


def instances(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def expected(reference, context, continuation):
    ids = (context + continuation)[-(LENGTH + 1) :]
    table = reference(ids[:-1])[-len(continuation) :]
    value = table[np.arange(len(continuation)), continuation].sum()
    return value, bool((table.argmax(-1) == continuation).all())


def test_loglikelihoods_are_those_of_transformers(lm, reference):
    encode = lm.tok_encode
    best = reference(encode("1+2"))[-1].argmax()
    greedy = lm.tokenizer.decode([best])
    pairs = [
        ("1+2", "=3"),
        ("1+2", greedy),
        ("how many? ", "5"),  # the space belongs to the continuation
        ("", "12"),
        ("x" * 30, "12 or 13"),  # cut on the left
        ("q", "a long answer of 24 char"),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    encoded = [
        (encode("1+2"), encode("=3")),
        (encode("1+2"), [int(best)]),
        (encode("how many?"), encode(" 5")),
        ([lm.eot_token_id], encode("12")),
        (encode("x" * 30), encode("12 or 13")),
        (encode("q"), encode("a long answer of 24 char")),
    ]
    wanted = [expected(reference, *pair) for pair in encoded]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in wanted], rtol=2e-5)
    assert [g for _, g in found] == [g for _, g in wanted]
    assert found[1][1]
    assert not all(g for _, g in found)


def test_rolling_loglikelihood_scores_each_token_once_with_the_longest_context(lm, reference):
    text = "one and two is three; two and two is four; that is all we know."
    ids, total = [lm.prefix_token_id, *lm.tok_encode(text)], 0.0
    count = len(ids) - 1
    for first in range(0, count, LENGTH):
        last = min(first + LENGTH, count)  # tokens first+1 .. last of ids are predicted
        window = ids[max(0, last - LENGTH) : last]
        table = reference(window)[-(last - first) :]
        total += table[np.arange(last - first), ids[first + 1 : last + 1]].sum()
    short = "4+4"
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), (short,)))
    first, _ = expected(reference, [lm.prefix_token_id], lm.tok_encode(short))
    np.testing.assert_allclose(found, [total, first], rtol=2e-5)


def test_generation_is_greedy_up_to_the_stop_string(lm, reference):
    def continued(ids, count):
        for _ in range(count):
            ids = [*ids, int(reference(ids)[-1].argmax())]
        return ids[-count:]

    whole = lm.tokenizer.decode(continued(lm.tok_encode("1+2"), 12), skip_special_tokens=True)
    until = whole[5:7]
    settings = {"until": [until], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    long = "y" * 20  # 12 of its tokens are left
    after = lm.tokenizer.decode(continued(lm.tok_encode("y" * 12), 12), skip_special_tokens=True)
    asked = instances(
        "generate_until",
        ("1+2", settings),
        (long, {"max_new_tokens": 12}),
        ("1+2", {"until": until, "max_gen_toks": 12}),
    )
    found = lm.generate_until(asked)
    assert found == [whole[: whole.index(until)], after, whole[: whole.index(until)]]
    assert found[0]
    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    first, second = lm.generate_until(
        instances("generate_until", ("1+2", drawn), ("1+2", drawn | {"top_k": 1}))
    )
    assert second == whole != first


def test_what_the_sampler_cannot_do_is_refused(lm, home):
    with pytest.raises(DcodError, match="num_beams, which the sampler does not have"):
        lm.generate_until(instances("generate_until", ("1", {"num_beams": 4})))
    with pytest.raises(DcodError, match="leaves no room"):
        lm.generate_until(instances("generate_until", ("1", {"max_gen_toks": LENGTH})))
    with pytest.raises(DcodError, match=r"continuation of at most 24"):
        lm.loglikelihood(instances("loglikelihood", ("1", "2" * 25)), disable_tqdm=True)
    with pytest.raises(DcodError, match="max_length=999"):
        DcodLM(str(home), max_length=999)
    with pytest.raises(DcodError, match="batch_size='many'"):
        DcodLM(str(home), batch_size="many")


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}="
doc_to_choice: "{{{{[right, wrong]}}}}"
target_delimiter: ""
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{right}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def test_tasks_of_the_harness_run_with_the_chat_template(lm, reference, tmp_path, monkeypatch):
    """A task of log-likelihoods and one of generation, through simple_evaluate."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{a}+1", "right": str(a + 1), "wrong": str(a + 2)} for a in range(6)]
    encode, decode = lm.tok_encode, lm.tokenizer.decode
    for row in rows[:3]:  # what the model itself says after the chat prompt
        ids = encode(f"<user>{row['question']}<end><assistant>")
        for _ in range(4):
            ids.append(int(reference(ids)[-1].argmax()))
        row["right"] = decode(ids[-4:], skip_special_tokens=True)
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "choice.yaml").write_text(CHOICE.format(file=file))
    (tmp_path / "answer.yaml").write_text(ANSWER.format(file=file))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=["tiny_choice", "tiny_answer"],
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    results = found["results"]
    won = 0
    for row in rows:
        context = encode(f"<user>{row['question']}=<end><assistant>")
        values = [expected(reference, context, encode(row[k]))[0] for k in ("right", "wrong")]
        won += values[0] > values[1]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(won / 6)
    assert 0 < won < 6
    matched = results["tiny_answer"]["exact_match,none"]
    given = [s["filtered_resps"][0] for s in found["samples"]["tiny_answer"]]
    assert given[:3] == [row["right"] for row in rows[:3]]
    assert matched == pytest.approx(
        np.mean([g == r["right"] for g, r in zip(given, rows, strict=True)])
    )
    assert json.loads(json.dumps(found["config"]["model"], default=str))
