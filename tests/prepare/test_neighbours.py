"""Neighbours of the cases in test_trace_forms.py: other names, nestings and dialects."""

import json
import re

import pytest
from test_trace_forms import ASKED, SAID, SHARED, TALK, THOUGHT, WHOLE, reading

from dcod_jax.data import traces as reader
from dcod_jax.data.presets import Fields
from dcod_jax.data.reasoning import Reasoning, has_reasoning
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError

USER, PLAIN_TURN, WHOLE_TURN = TALK[0], {"role": "assistant", "content": SAID}, TALK[1]
DRAFT = {"role": "assistant", "content": "No."}
BLOCK = {"type": "thinking", "thinking": THOUGHT}
ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAID}]},
]


def texts(records: list, **changes) -> list:
    """Prompt and completion of each trace, or why there is none."""
    found, fields, requests, answered = [], Fields(**changes), {}, set()
    for record in records:
        line = json.dumps(record).encode()
        for trace in reader._traces_of(line, fields, "x:1", requests, answered, longest=1 << 20):
            why = trace.failed or trace.unfinished or ("wrong" if trace.verdict is False else "")
            found.append(why or (trace.prompt_text(), trace.completion_text()))
    return found


GEMINI = [{"text": THOUGHT, "thought": True}, {"text": SAID}]
RIGHT = {
    "columns that belong to the prompt": [
        {"instruction": "Add", "context": "two and three.", "response": WHOLE},
        {"Instruction": "Add", "Input": "two and three.", "Output": WHOLE},
    ],
    "packed messages": [
        {"messages": json.dumps(TALK)},
        {"conversations": json.dumps(SHARED)},
        {"messages": {"role": ["user", "assistant"], "content": [ASKED, WHOLE]}},
        {"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:])},
        {"prompt": TALK[0], "completion": TALK[1]},
        {"prompt": ASKED, "completions": json.dumps([WHOLE])},
        {"contents": [{"parts": [{"text": ASKED}], "role": "user"},
                      {"parts": GEMINI, "role": "model"}]},
    ],
    "several completions as objects or messages": [
        {"prompt": ASKED, "completions": [{"text": WHOLE}, {"text": WHOLE}]},
        {"prompt": ASKED, "responses": [{"content": WHOLE, "model": "m"}]},
        {"prompt": ASKED, "completions": [TALK[1:], TALK[1:]]},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "reasoning": THOUGHT},
    ],
    "reasoning in parts": [
        {"messages": [USER, PLAIN_TURN | {"reasoning_details": [
            {"type": "reasoning.text", "text": THOUGHT}]}]},
        {"messages": [USER, PLAIN_TURN | {"thinking_blocks": [BLOCK]}]},
        {"messages": [USER, PLAIN_TURN | {"thought": THOUGHT, "thinking": True}]},
        {"messages": [USER, {"role": "model", "parts": GEMINI}]},
        {"prompt": ASKED, "completion": SAID, "reasoning": {"content": THOUGHT}},
    ],
    "answers of APIs": [
        {"request": {"messages": [USER]}, "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"messages": [USER], "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"input": ASKED, "output": ITEMS, "status": "completed"},
        {"custom_id": "1", "request": {"body": {"input": ASKED}},
         "response": {"status_code": 200, "body": {"output": ITEMS}}},
        {"request": {"contents": [{"role": "user", "parts": [{"text": ASKED}]}]},
         "response": {"candidates": [{"content": {"parts": GEMINI}, "finishReason": "STOP"}]}},
        {"request": {"messages": [USER]}, "response": {"role": "assistant", "content": [
            BLOCK, {"type": "text", "text": SAID}], "stop_reason": "end_turn"}},
        {"custom_id": "1", "request": {"params": {"messages": [USER]}},
         "result": {"type": "succeeded", "message": PLAIN_TURN | {"reasoning": THOUGHT}}},
        {"messages": [USER], "message": PLAIN_TURN | {"thinking": THOUGHT}, "done": True},
        {"prompt": ASKED, "response": WHOLE, "done": True, "done_reason": "stop"},
    ],
    "roles": [
        {"messages": [{"role": "USER ", "content": ASKED}, {"role": "ai", "content": WHOLE}]},
        {"conversations": [SHARED[0], {"from": "chatgpt", "value": WHOLE}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_neighbours_of_the_cases_give_the_same_text(kind) -> None:
    for record in RIGHT[kind]:
        found = texts([record])
        assert {" ".join(prompt.split()) for prompt, _ in found} == {ASKED}, record
        assert {completion for _, completion in found} == {WHOLE}, record


@pytest.mark.parametrize(
    "turn",
    [
        *({key: value} for key in ("weight", "train", "loss") for value in (0, False, "false")),
        *({key: 0} for key in ("trainable", "train_on_turn", "loss_weight", "loss_mask")),
        {"masked": True},
    ],
)
def test_a_turn_that_is_marked_is_not_supervised(turn) -> None:
    [trace] = reading({"messages": [USER, DRAFT | turn, USER, WHOLE_TURN]})
    assert trace.supervised() == [3]


ENDED = {"prompt": ASKED, "completion": SAID}
CUT = ["FinishReason.MAX_TOKENS", "max_new_tokens", "model_context_window_exceeded", "RECITATION"]
CUT += ["timeout", "USER_CANCEL", "refusal", "insufficient_system_resource", "pause_turn"]
DROPPED = {
    "finish_reason is": [
        *(ENDED | {"finish_reason": reason} for reason in CUT),
        ENDED | {"finishReason": "length"},
        ENDED | {"done_reason": "length"},
        ENDED | {"status": "incomplete"},
        {"prompt": ASKED, "completions": [{"text": SAID, "finish_reason": "length"}]},
        {"messages": [USER, PLAIN_TURN | {"finish_reason": "length"}]},
        {"input": ASKED, "output": ITEMS, "status": "incomplete"},
        {"messages": [USER], "message": PLAIN_TURN, "done": False},
    ],
    "is (true|false)": [
        ENDED | {"truncated": True},
        ENDED | {"is_complete": "False"},
        ENDED | {"is_finished": 0},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "completed": False},
        {"prompt": ASKED, "choices": [{"message": PLAIN_TURN}], "finished": False},
    ],
    "wrong": [
        *(ENDED | {"correct": value} for value in (0, 0.0, "false", "False")),
        ENDED | {"label": False},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "label": False},
        {"prompt": ASKED, "outputs": [{"text": SAID}], "is_correct": [False]},
    ],
    "is not ended by": [
        {"prompt": ASKED, "completion": f"Sure.\n<think>\n{THOUGHT}"},
        {"prompt": ASKED, "completion": f"{WHOLE}\n<think>again"},
        {"prompt": ASKED, "completion": f"◁think▷{THOUGHT}"},
    ],
    "the request failed|is empty": [
        {"custom_id": "1", "response": None, "error": {"message": "rate"}},
        {"custom_id": "1", "result": {"type": "errored", "error": {"type": "overloaded"}}},
        {"prompt": ASKED, "completions": [None, ""]},
    ],
}


@pytest.mark.parametrize("why", DROPPED)
def test_neighbours_of_the_cases_are_dropped(why) -> None:
    for record in DROPPED[why]:
        found = texts([record])
        assert found, record
        assert all(re.search(why, trace) for trace in found if isinstance(trace, str)), record
        assert all(isinstance(trace, str) for trace in found), record
    whole = [
        ENDED | {"finish_reason": reason} for reason in ("FinishReason.STOP", "eos", "unknown")
    ]
    whole += [ENDED | {"stop_reason": "###"}, ENDED | {"label": 0}, ENDED | {"correct": 1}]
    assert texts(whole) == [(ASKED, SAID)] * len(whole)


ASKS = {"custom_id": "1", "body": {"messages": [USER]}}
REFUSED = [
    (ENDED | {"cot": THOUGHT}, {}, r"prepare\.reasoning_field=cot"),
    (ENDED | {"deepseek_reasoning": [THOUGHT]}, {}, "may be the reasoning"),
    ({"messages": [USER, PLAIN_TURN | {"thinking_text": THOUGHT}]}, {}, "may be the reasoning"),
    (ENDED | {"cot": THOUGHT}, {"reasoning_field": "cott"}, "the nearest is 'cot'"),
    (ENDED | {"result": "5"}, {"answer": "results"}, "the nearest is 'result'"),
    (ENDED | {"answer": float("nan")}, {}, "found nan"),
    (ENDED | {"images": ["a.png"]}, {}, "has images, and only text can be read"),
    (ENDED | {"finish_reason": "weird"}, {}, "write stop where it did"),
    ({"prompt": ASKED, "completions": [SAID, "a"], "correct": [True]}, {}, "1 entries for 2"),
    ({"messages": [USER, DRAFT | {"mask": 1}, USER, WHOLE_TURN]}, {}, "whether the turn is trai"),
    ({"messages": [USER, DRAFT | {"train": "x"}, USER, WHOLE_TURN]}, {}, "expected 0 or 1"),
    ({"messages": [USER, {"role": "model", "parts": [{"functionCall": {}}]}]}, {}, "functionCall"),
    ({"messages": str(TALK)}, {}, "no JSON; write it as a JSON list"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}}, {}, "different lengths"),
    ({"dialog": TALK}, {}, r"prepare\.completion_field=dialog"),
    (TALK[0], {}, r'write \{"messages": \[\.\.\.\]\}'),
    ({"prompt": ASKED, "choices": [{"delta": {"content": "a"}}]}, {}, "a streamed answer"),
    ({"messages": [USER], "response": {"words": "a"}}, {}, "the answer holds words"),
    ({"input": ASKED, "output": [*ITEMS, {"type": "web_search_call"}]}, {}, "web_search_call"),
]


@pytest.mark.parametrize(("record", "changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_neighbours_of_the_cases_are_refused(record, changes, message) -> None:
    with pytest.raises(DcodError, match=message):
        texts([record], **changes)


def test_what_may_be_reasoning_is_left_out_where_reasoning_is() -> None:
    dropped = {"reasoning": Reasoning("drop")}
    assert texts([ENDED | {"cot": THOUGHT}], **dropped) == [(ASKED, SAID)]
    twice = {
        "prompt": ASKED,
        "completion": f"{WHOLE[: -len(SAID)]}<think>\nagain\n</think>\n{SAID}",
    }
    assert texts([twice], **dropped) == [(ASKED, SAID)]
    assert texts([ENDED | {"cot": None}], reasoning_field="cot") == [(ASKED, SAID)]
    for name in ("gt_cot", "reference_rationale", "ground_truth_reasoning"):  # not the teacher's
        assert texts([ENDED | {name: THOUGHT}]) == [(ASKED, SAID)]


def test_one_id_of_two_requests_is_refused_before_an_output() -> None:
    answer = {"custom_id": "1", "response": {"body": {"choices": [{"message": WHOLE_TURN}]}}}
    other = {"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Else?"}]}}
    found = texts([ASKS, ASKS, answer, other, answer])
    assert found == [(ASKED, WHOLE), ("Else?", WHOLE)]
    with pytest.raises(DcodError, match="custom_id '1' has another request before"):
        texts([ASKS, other, answer])


def test_system_text_of_any_name_is_in_the_prompt() -> None:
    asked = {"system": "S", "messages": [USER]}
    for record in (
        ENDED | {"system_message": "S"},
        {"systemInstruction": {"parts": [{"text": "S"}]}, "messages": TALK},
        {"request": asked, "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"input": ASKED, "instructions": "S", "output": ITEMS},
    ):
        [trace] = reading(record)
        assert trace.messages[0] == {"role": "system", "content": "S"}, record


def test_empty_reasoning_is_none() -> None:
    assert has_reasoning(WHOLE)
    assert not has_reasoning(f"<think>\n\n</think>\n\n{SAID}")


FILES = [
    ("t.csv", b"prompt,completion,completion\na,b,c\n", "'completion'.* twice"),
    ("t.csv", b"prompt;completion\na;b\n", "parted by ','"),
    ("t.jsonl", b'{"prompt": "a", "completion": "b", "completion": "c"}\n', "'completion' twice"),
    ("t.json", b'[{"prompt": "a", "completion": "b"}\n', "no ] at its end"),
    ("t.jsonl", b"\x1f\x8b\x08", "must end in .gz"),
    ("t.jsonl", b"\xff\xfe\0\0{\0\0\0", "UTF-32"),
    ("t.jsonl", b"data: {}\n", "a record is one line"),
    ("t.jsonl", b"{'prompt': 'a'}\n", "the line begins"),
    ("t.csv", b"prompt,completion,weight\na,b,x\n", "found 'x'"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_that_would_be_read_wrongly_is_refused(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    fields = Fields(weight="weight" if "weight" in str(content) else "")
    with pytest.raises(DcodError, match=message):
        list(read_traces(find_sources(str(tmp_path / name)), fields))


def test_cells_of_a_table_are_numbers_and_verdicts(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("prompt,completion,w,correct\na,b,0.5,True\na,c,1,False\n")
    found = read_traces(find_sources(str(tmp_path / "t.csv")), Fields(weight="w"))
    assert [(trace.weight, trace.verdict) for trace in found] == [(0.5, True), (1.0, False)]
