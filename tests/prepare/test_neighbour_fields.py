"""Calls of tools, dotted names, verdicts and files of any suffix: neighbours of the cases."""

import json

import pyarrow
import pytest
from pyarrow import feather, parquet
from test_neighbours import ENDED, GEMINI, ITEMS, PLAIN_TURN, USER, WHOLE_TURN, texts
from test_trace_forms import ASKED, SAID, TALK, THOUGHT, WHOLE, reading

from dcod_jax.data.presets import Fields
from dcod_jax.data.reasoning import has_reasoning
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError

ASKS = {"custom_id": "1", "body": {"messages": [USER]}}

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "5"},
        ),
        (
            {"role": "tool_call", "content": '[{"name": "add", "arguments": "{\\"a\\": 2}"}]'},
            {"role": "ipython", "content": "5"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "name": "add", "input": {"a": 2}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "content": "5"}]},
        ),
        (
            {"role": "assistant", "content": [{"toolUse": {"name": "add", "input": {"a": 2}}}]},
            {"role": "user", "content": [{"toolResult": {"content": [{"text": "5"}]}}]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [json.dumps(ADD)]},
            {"role": "tool", "content": "5"},
        ),
        (
            {"role": "model", "parts": [{"functionCall": {"name": "add", "args": {"a": 2}}}]},
            {"role": "user", "parts": [{"functionResponse": {"response": 5}}]},
        ),
    ],
    ids=["sharegpt", "roles", "anthropic", "bedrock", "verifiers", "gemini"],
)
def test_calls_of_tools_in_any_dialect_are_one_form(call, result) -> None:
    [trace] = reading({"messages": [USER, call, result, WHOLE_TURN]})
    called = {"role": "assistant", "content": "", "tool_calls": [ADD]}
    assert trace.messages == [USER, called, {"role": "tool", "content": "5"}, WHOLE_TURN]
    empty = {"role": "tool", "content": ""}
    [trace] = reading({"messages": [USER, call, empty, WHOLE_TURN]})
    assert trace.messages[2] == empty
    assert trace.supervised() == [1, 3]


@pytest.mark.parametrize("name", ["body", "passage", "context"])
def test_what_is_named_or_there_already_is_not_added_to_the_prompt(name) -> None:
    [trace] = reading({"prompt": ASKED, name: SAID}, completion=name)
    assert (trace.prompt_text(), trace.completion_text()) == (ASKED, SAID)
    [trace] = reading({"prompt": ASKED, "completion": SAID, name: "5"}, answer=name)
    assert (trace.prompt_text(), trace.answer) == (ASKED, "5")
    [trace] = reading(
        {"prompt": f"{ASKED}\nOf  two\nsums.", "completion": SAID, name: "Of two sums."}
    )
    assert trace.prompt_text() == f"{ASKED}\nOf  two\nsums."


def test_reasoning_beside_empty_parts_is_read() -> None:
    turn = {"reasoning_content": [{"type": "text", "text": ""}], "reasoning": THOUGHT}
    [trace] = reading({"messages": [USER, PLAIN_TURN | turn]})
    assert trace.completion_text() == WHOLE


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
        *(ENDED | {name: "S"} for name in ("system_message", "sys_prompt", "System Instructions")),
        {"systemInstruction": {"parts": [{"text": "S"}]}, "messages": TALK},
        {"request": asked, "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"input": ASKED, "instructions": "S", "output": ITEMS},
    ):
        [trace] = reading(record)
        assert trace.messages[0] == {"role": "system", "content": "S"}, record


def test_earlier_turns_and_tools_of_any_name_are_in_the_prompt() -> None:
    for name in ("history", "chat_history", "Conversation_History", "previous_messages"):
        [trace] = reading(ENDED | {name: TALK, "available_tools": [ADD]})
        assert trace.messages == [*TALK, USER, PLAIN_TURN]
        assert (trace.supervised(), trace.tools, trace.extras) == ([3], [ADD], frozenset())


def test_a_completion_of_json_is_a_text() -> None:
    for text in ('{"choices": [{"text": "A"}]}', '{"message": "hi"}', '["a"]', "[1] See"):
        assert texts([{"prompt": ASKED, "completion": text}]) == [(ASKED, text)]


def test_a_dotted_name_is_a_field_inside_of_an_object() -> None:
    record = ENDED | {"metadata": {"reasoning": THOUGHT}, "reward_model": {"ground_truth": "5"}}
    names = {"reasoning_field": "metadata.reasoning", "answer": "reward_model.ground_truth"}
    [trace] = reading(record, **names)
    assert (trace.completion_text(), trace.answer) == (WHOLE, "5")
    assert texts([ENDED | {"metadata": None}], reasoning_field="metadata.reasoning")
    turn = PLAIN_TURN | {"info": {"think_content": THOUGHT}}
    assert texts([{"messages": [USER, turn]}], reasoning_field="info.think_content") == [
        (ASKED, WHOLE)
    ]


def test_what_is_unread_inside_of_objects_is_listed() -> None:
    record = {"messages": [USER, WHOLE_TURN | {"info": {"verify_score": 0.5, "source": "x"}}]}
    [trace] = reading(record | {"reward_model": {"ground_truth": "5", "style": "rule"}})
    assert trace.extras == {
        *("messages[].info", "messages[].info.verify_score"),
        *("reward_model", "reward_model.ground_truth"),
    }


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"prompt": ASKED, "content": WHOLE, "tokens_predicted": 9}, {"tokens_predicted"}),
        ({"messages": [USER], "role": "assistant", "content": [{"text": WHOLE}], "a": 1}, {"a"}),
        ({"messages": [USER], "choices": [{"message": WHOLE_TURN | {"a": 1}}]}, {"message.a"}),
    ],
)
def test_an_answers_own_columns_are_listed_once(record, unread) -> None:
    assert reading(record)[0].extras == unread


def test_a_verdict_names_its_columns_and_one_that_is_true_is_enough() -> None:
    [trace] = reading(ENDED | {"correct": False, "metadata": {"math_verify": False}})
    assert trace.verdict_of == "correct, metadata.math_verify"
    assert reading(ENDED | {"correct": False, "correctness_llama": True})[0].verdict


def test_a_batch_of_gemini_is_paired_by_its_key() -> None:
    asked = {"key": "k", "request": {"contents": [{"parts": [{"text": ASKED}]}]}}
    answer = {"candidates": [{"content": {"parts": GEMINI}, "finishReason": "STOP"}]}
    assert texts([asked, {"key": "k", "response": answer}]) == [(ASKED, WHOLE)]


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
    ("t.jsonl", b"prompt,completion\n", "a table's name ends in .csv, .tsv or .parquet"),
    ("t.csv", b"prompt,completion,weight\na,b,x\n", "found 'x'"),
    ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("t.parquet", b'{"prompt": "a"}\n', "is not a readable table"),
    ("t.arrow", b"junk", "is not a readable table"),
    ("t.feather", b"FEA1", "is not a readable table"),
]


@pytest.mark.parametrize("name", ["t.jsonlines", "t.ldjson", "t.feather", "t.ipc", "t.pq"])
def test_a_file_of_another_suffix_is_read(name, tmp_path) -> None:
    path, table = tmp_path / name, pyarrow.table({"prompt": [ASKED], "completion": [SAID]})
    if name.endswith(("feather", "ipc")):
        feather.write_feather(table, path, compression="zstd")
    elif name.endswith("pq"):
        parquet.write_table(table, path)
    else:
        path.write_text(json.dumps(ENDED))
    [trace] = read_traces(find_sources(str(tmp_path)), Fields())
    assert trace.completion_text() == SAID


def test_arguments_of_a_table_are_without_the_names_of_other_calls(tmp_path) -> None:
    said = [{"function": {"name": "add", "arguments": {key: 2}}} for key in "ab"]
    talks = [[USER, {"role": "assistant", "tool_calls": [c]}, WHOLE_TURN] for c in said]
    tools = [[{"name": "add", "parameters": {key: {"type": "integer"}}}] for key in "ab"]
    verdicts = pyarrow.array([[("correct", "false")]] * 2, pyarrow.map_("string", "string"))
    table = pyarrow.table({"messages": talks, "tools": tools, "info": verdicts})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = list(read_traces(find_sources(str(tmp_path)), Fields()))
    calls = [trace.messages[1]["tool_calls"][0]["function"] for trace in found]
    assert calls == [{"name": "add", "arguments": {key: 2}} for key in "ab"]
    assert [trace.tools for trace in found] == tools
    assert [trace.verdict for trace in found] == [False, False]
    turns = [USER, {"role": "assistant", "content": None}, USER]  # under input messages, no call
    parquet.write_table(pyarrow.table({"input": [turns], "output": [SAID]}), tmp_path / "t.parquet")
    with pytest.raises(DcodError, match=r"input\[1\]\.content is null"):
        list(read_traces(find_sources(str(tmp_path)), Fields()))


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_that_would_be_read_wrongly_is_refused(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    fields = Fields(weight="weight" if "weight" in str(content) else "")
    with pytest.raises(DcodError, match=message):
        list(read_traces(find_sources(str(tmp_path / name)), fields))


def test_cells_of_a_table_are_numbers_and_verdicts(tmp_path) -> None:
    rows = ",prompt,completion,w,correct\n0,a,b,0.5,True\n1,a,c,1,False\n"  # pandas numbers them
    (tmp_path / "t.csv").write_text(rows)
    found = read_traces(find_sources(str(tmp_path / "t.csv")), Fields(weight="w"))
    assert [(trace.weight, trace.verdict) for trace in found] == [(0.5, True), (1.0, False)]
