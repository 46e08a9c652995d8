"""Records of public data sets and APIs: what of each is trained on, dropped or refused."""

import contextlib
import io
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcod_jax import config as configs
from dcod_jax.configs.base import get_config
from dcod_jax.data import answers, json_text, raw, schema
from dcod_jax.data.forms import read_record
from dcod_jax.data.presets import PRESETS, Fields, fields_of
from dcod_jax.data.reasoning import Reasoning
from dcod_jax.data.records import BadRecordError
from dcod_jax.data.templates import READY
from dcod_jax.data.tokenizer import decode
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.data.turns import reasoning_rule
from dcod_jax.errors import DcodError
from dcod_jax.prepare.filters import Filter

CASES = Path(__file__).parents[1] / "data" / "cases" / "trace_forms.jsonl"


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in GPT-2's order of bytes with Qwen's NFC, and the ids that the cases name."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in order] + [chr(256 + i) for i in range(256 - len(order))]
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = {("Ġ", "s"): 262, ("Ġ", "i"): 307, ("Ġi", "s"): 308, ("T", "h"): 310}
    merges |= {("Th", "e"): 309, ("u", "m"): 332}
    vocab |= {left + right: place for (left, right), place in merges.items()}
    unused = set(range(900)) - set(vocab.values())
    vocab |= {f"<unused{place}>": place for place in unused}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # 900, 901, 902
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = READY["chatml"]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def outcome(path: Path, tokenizer, keys) -> dict:
    """{"kept": [[prompt, supervised], ...], "dropped": {reason: n}, "unread": [...]}."""
    config = get_config()
    for key, value in keys.items():
        configs.assign(config, key, value)
    quarantine = io.StringIO()
    run = Filter(config, tokenizer, quarantine, advance=lambda n: None)
    kept = []
    for _, trace in run.run(find_sources(str(path))):
        ids, mask = trace.token_ids, trace.completion_mask
        cut = int(mask.argmax())
        parts = [decode(tokenizer, ids[:cut].tolist()), decode(tokenizer, ids[mask].tolist())]
        kept.append(parts if trace.logprobs is None else [*parts, len(trace.logprobs)])
    assert [json.loads(line)["reason"] for line in quarantine.getvalue().splitlines()] == list(
        run.counts.dropped.elements()
    ) or run.counts.dropped
    return {"kept": kept, "dropped": dict(run.counts.dropped), "unread": sorted(run.unread)}


def write(case: dict, directory: Path) -> Path:
    path = directory / case.get("file", "traces.jsonl")
    if "raw_hex" in case:
        path.write_bytes(bytes.fromhex(case["raw_hex"]))
    else:
        records = [*case.get("requests", []), *case["records"]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


ALL = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case["id"])
def test_a_form_gives_what_it_should(case, tmp_path, tokenizer) -> None:
    path, right = write(case, tmp_path), case["right"]
    if "refused" in right:
        with pytest.raises(DcodError, match=right["refused"]):
            outcome(path, tokenizer, case["keys"])
        return
    assert outcome(path, tokenizer, case["keys"]) == right


# ---------------------------------------------------------------- presets

ASKED, THOUGHT, SAID = "Add two and three.", "Two and three are five.", "It is \\boxed{5}."
WHOLE = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": WHOLE}]
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": WHOLE}]
ROWS = {
    "openr1": {"problem": ASKED, "generations": [WHOLE], "solution": "By hand.", "messages": TALK},
    "openthoughts": {"system": "S", "conversations": SHARED},
    "openthoughts_metadata": {"problem": ASKED, "deepseek_reasoning": THOUGHT}
    | {"deepseek_solution": SAID, "ground_truth_solution": "By hand."},
    "bespoke_stratos": {"system": "S", "conversations": SHARED},
    "s1k": {"question": ASKED, "thinking_trajectories": [THOUGHT], "attempt": SAID},
    "s1k_1_1": {"question": ASKED, "deepseek_thinking_trajectory": THOUGHT, "solution": "By hand."}
    | {"deepseek_attempt": SAID, "gemini_attempt": "No.", "gemini_thinking_trajectory": "So."}
    | {"deepseek_grade": "Yes"},
    "limo": {"question": ASKED, "solution": WHOLE, "answer": "5"},
    "deepmath": {"question": ASKED, "final_answer": "5", "r1_solution_1": f"{THOUGHT}\n</think>"}
    | {"r1_solution_2": WHOLE},
    "numinamath": {"problem": ASKED, "solution": "By hand.", "messages": TALK},
    "openmathinstruct2": {"problem": ASKED, "generated_solution": WHOLE, "expected_answer": "5"},
    "openmathreasoning": {"problem": ASKED, "generated_solution": WHOLE, "expected_answer": "5"},
    "nemotron": {"input": TALK[:1], "output": WHOLE, "reasoning": "on", "system_prompt": "S"},
    "metamathqa": {"query": ASKED, "original_question": "Sum?", "response": WHOLE},
    "mathinstruct": {"instruction": ASKED, "output": WHOLE},
    "am_r1": {"messages": [{**turn, "info": {"think_content": "x"}} for turn in TALK]},
    "mixture_of_thoughts": {"messages": TALK, "num_tokens": 9},
    "codeforces_cots": {"prompt": ASKED, "generation": WHOLE, "messages": TALK},
    "dolphin_r1": {"messages": TALK[:1], "reasoning": THOUGHT, "answer": SAID},
    "medical_o1": {"Question": ASKED, "Complex_CoT": THOUGHT, "Response": SAID},
    "openorca": {"system_prompt": "S", "question": ASKED, "response": WHOLE},
    "slimorca": {"conversations": [{**turn, "weight": n} for n, turn in enumerate(SHARED)]},
    "ultrachat": {"prompt": ASKED, "messages": TALK},
    "orca_math": {"question": ASKED, "answer": WHOLE},
    "alpaca": {"instruction": ASKED, "input": "", "output": WHOLE},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_finds_the_teachers_text(name, tokenizer) -> None:
    config = get_config()
    config.prepare.form = name
    fields = fields_of(config.prepare, reasoning_rule(tokenizer, "auto"))
    traces = read_record(ROWS[name], fields, source="x:1", requests={})
    whole = [trace for trace in traces if not trace.unfinished]
    assert [trace.completion_text() for trace in whole] == [WHOLE]
    assert len(traces) - len(whole) == (name == "deepmath")
    assert whole[0].prompt_text() == ASKED
    system = [m["content"] for m in whole[0].messages if m["role"] == "system"]
    assert system == (["S"] if "system" in str(ROWS[name]) else [])
    assert whole[0].answer == ("5" if "5" in list(ROWS[name].values()) else None)


def test_a_key_is_stronger_than_a_preset(tokenizer) -> None:
    config = get_config()
    config.prepare.form = "openr1"
    config.prepare.completion_field = "solution"
    fields = fields_of(config.prepare, reasoning_rule(tokenizer, "auto"))
    [trace] = read_record(ROWS["openr1"], fields, source="x:1", requests={})
    assert trace.completion_text() == "By hand."


def test_another_persons_text_is_not_taken_for_the_teachers() -> None:
    for name in ("s1k_1_1", "deepmath", "openr1"):
        row = ROWS[name] | {"solution": "By hand."}
        row |= {"generations": [WHOLE, SAID]} if name == "openr1" else {}
        with pytest.raises(DcodError, match=rf"prepare\.form={name}"):
            read_record(row, Fields(), source="x:1", requests={})
    row = {"question": ASKED, "my_attempt": "a b", "solution": "By hand."}
    with pytest.raises(DcodError, match=r"solution may be .* my_attempt the teacher's") as error:
        read_record(row, Fields(), source="x:1", requests={})
    assert "limo" not in str(error.value)
    row = {"prompt": ASKED, "response_1": "a b", "response_2": "c d"}
    with pytest.raises(DcodError, match=r"prepare\.completion_field=response_\*"):
        read_record(row, Fields(), source="x:1", requests={})


# ---------------------------------------------------------------- reasoning


def reading(record: dict, **changes):
    return read_record(record, Fields(**changes), source="x:1", requests={})


MESSAGE = {"role": "assistant", "content": SAID}


@pytest.mark.parametrize(
    "record",
    [
        *({"messages": [TALK[0], MESSAGE | {key: THOUGHT}]} for key in raw.REASONING_KEYS),
        {"messages": [TALK[0], MESSAGE | {"reasoning": THOUGHT, "reasoning_content": THOUGHT}]},
        {"messages": [TALK[0], MESSAGE | {"content": WHOLE, "reasoning": THOUGHT}]},
        {"prompt": ASKED, "completion": SAID, "reasoning": THOUGHT},
        {"prompt": ASKED, "completion": [SAID], "thinking": [THOUGHT]},
        {"messages": [TALK[0], MESSAGE], "reasoning_content": THOUGHT},
        {
            "prompt": ASKED,
            "choices": [{"message": {"content": f"\n\n{SAID}", "reasoning": THOUGHT}}],
        },
        {"prompt": ASKED, "completion": f"{THOUGHT}\n</think>\n\n{SAID}"},
        {
            "prompt": ASKED,
            "completion": [
                {"type": "thinking", "thinking": THOUGHT, "signature": "x"},
                {"type": "text", "text": SAID},
            ],
        },
        {
            "prompt": ASKED,
            "choices": [
                {
                    "message": {
                        "content": [
                            {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                            {"type": "text", "text": SAID},
                        ]
                    }
                }
            ],
        },
    ],
)
def test_reasoning_in_a_field_of_its_own_is_folded_in_or_left_out(record) -> None:
    [kept] = reading(record)
    assert kept.completion_text() == WHOLE
    [plain] = reading(record, reasoning=Reasoning("drop"))
    assert plain.completion_text() == SAID


def test_different_reasoning_in_two_places_is_refused() -> None:
    for message in (
        {"reasoning": "a", "reasoning_content": "b"},
        {"content": WHOLE, "reasoning": "a"},
    ):
        with pytest.raises(DcodError, match=r"prepare\.reasoning_field"):
            reading({"messages": [TALK[0], MESSAGE | message]})
    both = {"messages": [TALK[0], MESSAGE | {"reasoning": "a", "mine": THOUGHT}]}
    assert reading(both, reasoning_field="mine")[0].completion_text() == WHOLE


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "completion": "<think>so"},
        {"prompt": ASKED, "completion": "\n<|begin_of_thought|>so"},
        {"prompt": ASKED, "completion": "<think>so</think><answer>5"},
        {"prompt": ASKED, "completion": "<think>so</think>\n"},
        {"messages": [TALK[0], {"role": "assistant", "content": None, "reasoning": "so"}]},
        {"prompt": ASKED, "completion": SAID, "finish_reason": "max_tokens"},
        {"prompt": ASKED, "completion": SAID, "finish_reasons": ["length"]},
        {"prompt": ASKED, "completion": SAID, "is_reasoning_complete": False},
        {"prompt": ASKED, "text": SAID, "meta_info": {"finish_reason": {"type": "length"}}},
        {"prompt": ASKED, "outputs": [{"text": SAID, "finish_reason": "length"}]},
    ],
)
def test_what_is_not_whole_is_seen(record) -> None:
    [trace] = reading(record)
    assert trace.unfinished
    [trace] = reading(record, reasoning=Reasoning("drop"))
    assert trace.unfinished


def test_keep_drops_traces_without_reasoning(tmp_path, tokenizer) -> None:
    rows = [{"prompt": "a", "completion": WHOLE}, {"prompt": "b", "completion": SAID}]
    path = write({"records": rows}, tmp_path)
    found = outcome(path, tokenizer, {"prepare.reasoning": "keep"})
    assert (len(found["kept"]), found["dropped"]) == (1, {"no_reasoning": 1})


# ---------------------------------------------------------------- what is dropped


def test_traces_that_differ_in_the_system_prompt_are_not_duplicates(tmp_path, tokenizer) -> None:
    rows = [{"prompt": "a", "completion": "b", "system": text} for text in ("S", "T", "S")]
    path = write({"records": rows}, tmp_path)
    found = outcome(path, tokenizer, {})
    assert (len(found["kept"]), found["dropped"]) == (2, {"duplicate": 1})


HOSTILE = [
    '{"choices": [{"message": null}]}',
    '{"choices": null}',
    *('{"response": {"body": "x"}}', '{"completion": {"message": {}, "body": 1}}'),
    *('{"response": {"body": []}}', '{"custom_id": "a", "result": {"message": 5}}'),
    '{"custom_id": "a", "response": {"body": {"choices": [1]}}}',
    '{"custom_id": "a", "body": {"messages": 5}}',
    '{"body": "p", "response": {"choices": [{"text": "t"}]}}',
    '{"custom_id": "a", "body": {"messages": ["x"], "temperature": Infinity}}',
    '{"prompt": "p", "choices": [{"text": "t", "logprobs": {"content": [1]}}]}',
    '{"prompt": "p", "choices": [{"text": "t", "logprobs": {"content": [{"bytes": [300]}]}}]}',
    '{"prompt": "p", "choices": [{"text": "t", '
    '"logprobs": {"content": [{"bytes": 1000000000000}]}}]}',
    '{"prompt": "p", "completion": "c", "temperature": 1' + "0" * 400 + "}",
    '{"prompt": "p", "completion": "c", "temperature": Infinity}',
    '{"prompt": "p", "completion": "c", "id": "\\ud800"}',
    '{"prompt": "p", "completion": "c", "model": "\\udfff"}',
    '{"prompt": "p", "completion": "c", "answer": Infinity}',
    '{"prompt": "p", "completion": "c", "token_ids": [1' + "0" * 400 + "]}",
    '{"prompt": "p", "completion": "c", "history": [1]}',
    '{"prompt": "p", "completion": "c", "tools": "x"}',
    '{"prompt": "p", "completion": "c", "reasoning": [{"type": "text", "text": "t"}, [1]]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": {}}]}',
    '{"messages": [{"role": [], "content": "a"}]}',
    '{"prompt": "p", "outputs": [{"text": 5}]}',
    '{"prompt": "p", "text": "t", "meta_info": {"output_token_logprobs": [1]}}',
    '{"a":' * 100_000,
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_malformed_record_is_set_aside(line, tmp_path, tokenizer) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line + '\n{"prompt": "p", "completion": "c"}\n')
    keys = {"prepare.on_bad_record": "quarantine"}
    found = outcome(path, tokenizer, keys)
    assert (len(found["kept"]), found["dropped"]) == (1, {"bad_record": 1})
    with pytest.raises(DcodError, match=r"t\.jsonl:1: "):
        outcome(path, tokenizer, {})
    here = Path("/proc/self/fd")  # a refused file is closed at once, not when memory is swept
    assert str(path) not in {os.readlink(fd) for fd in here.iterdir() if fd.is_symlink()}


def test_a_number_that_is_not_finite_is_named_as_one() -> None:
    with pytest.raises(BadRecordError, match="temperature must be a finite number, found 'inf'"):
        schema.check({"temperature": math.inf}, schema.RECORD)


def test_a_long_line_is_too_long_before_it_is_parsed(tmp_path, tokenizer) -> None:
    path = tmp_path / "t.jsonl"
    long = json.dumps({"prompt": "p", "completion": "a" * 30_000_000})
    middle = json.dumps({"prompt": "p", "completion": "a b " * 100_000})
    path.write_text(f'{long}\n{middle}\n{{"prompt": "p", "completion": "c"}}\n')
    found = outcome(path, tokenizer, {})
    assert (len(found["kept"]), found["dropped"]) == (1, {"too_long": 2})


# ---------------------------------------------------------------- any record at all

NAMES = st.sampled_from(
    [
        *("prompt", "completion", "messages", "conversations", "system", "history", "tools"),
        *("choices", "response", "body", "request", "custom_id", "outputs", "text", "meta_info"),
        *("role", "content", "from", "value", "reasoning", "thinking", "weight", "logprobs"),
        *("bytes", "token", "logprob", "token_ids", "finish_reason", "answer", "solution"),
        *("generations", "finish_reasons", "correct", "type", "message", "temperature", "id"),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["user", "assistant", "human", "gpt", "text", "thinking", "<think>", "</think>"]
    ),
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=4), max_leaves=12
)
RECORDS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=5)


def _never_breaks(record: dict) -> None:
    line = json.dumps(record).encode()
    with contextlib.suppress(DcodError):
        parsed = json_text.parse(line)
        if answers.is_request(parsed):
            schema.check(parsed, {"body": schema.ASKED})
        else:
            for trace in read_record(parsed, Fields(), source="x:1", requests={}):
                assert trace.failed or trace.completion_text().strip()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RECORDS)
def test_no_record_ends_the_reader(record) -> None:
    _never_breaks(record)


@pytest.mark.long
@settings(max_examples=100_000, deadline=None)
@given(RECORDS)
def test_no_record_of_many_ends_the_reader(record) -> None:
    _never_breaks(record)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | RECORDS.map(lambda r: json.dumps([r, r]).encode()[:-2]))
def test_no_bytes_end_the_reader(content) -> None:
    with contextlib.suppress(DcodError):
        json_text.parse(content)
    with tempfile.TemporaryDirectory() as directory:
        for name in ("t.jsonl", "t.csv"):
            path = Path(directory) / name
            path.write_bytes(content)
            with contextlib.suppress(DcodError):
                list(read_traces(find_sources(str(path)), Fields(), longest=64))
