"""Raw traces are read in every form users have, and every bad record is named with its line."""

import json
import struct
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dcod_jax.data.forms import FORMS, read_record
from dcod_jax.data.presets import Fields
from dcod_jax.data.records import RawTrace
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "It is 4."}
HUMAN = {"from": "human", "value": "2 + 2?"}
GPT = {"from": "gpt", "value": "It is 4."}


def write(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


PLAIN = Fields()


def read(path, fields: Fields = PLAIN, **kwargs) -> list[RawTrace]:
    return list(read_traces(find_sources(str(path)), fields, **kwargs))


def read_one(tmp_path, record, **kwargs) -> RawTrace:
    (trace,) = read(write(tmp_path / "t.jsonl", record), **kwargs)
    return trace


EXAMPLES = {
    "answer": {"custom_id": "1", "request": {"body": {"prompt": "2+2?"}}}
    | {"response": {"body": {"choices": [{"text": "4", "logprobs": {"content": None}}]}}},
    "sglang": {"prompt": "2+2?", "text": "4", "output_ids": [19, 2]}
    | {"meta_info": {"finish_reason": {"type": "stop"}}},
    "completion": {"prompt": "2+2?", "completion": "4", "answer": "4"},
    "conversation": {
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_the_example_of_a_form_is_read_by_that_form_alone(name) -> None:
    record = EXAMPLES[name]
    assert next(other for other, (matches, _) in FORMS.items() if matches(record, PLAIN)) == name
    [trace] = read_record(record, PLAIN, source="f:1", requests={})
    assert (trace.prompt_text(), trace.completion_text()) == ("2+2?", "4")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "completion": "It is 4."},
        {"question": "2 + 2?", "response": "It is 4."},
        {"problem": "2 + 2?", "solution": "It is 4."},
        {"instruction": "2 + 2?", "input": "", "output": "It is 4."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "It is 4."},
        {"messages": [USER], "completion": "It is 4."},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [HUMAN, GPT], "system": ""},
        {"conversations": [HUMAN], "completion": "It is 4."},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]}
        | {"completion": "It is 4."},
        {"prompt": "2 + 2?", "outputs": [{"text": "It is 4.", "token_ids": [1], "logprobs": None}]},
        {"custom_id": "a", "request": {"body": {"messages": [USER]}}}
        | {"response": {"status_code": 200, "body": {"choices": [{"message": ASSISTANT}]}}},
        {"prompt": "2 + 2?", "choices": [{"text": "It is 4."}]},
    ],
)
def test_forms(tmp_path, record) -> None:
    trace = read_one(tmp_path, record)
    assert trace.messages == [USER, ASSISTANT]
    assert trace.prompt_text() == "2 + 2?"
    assert trace.completion_text() == "It is 4."
    assert trace.source == f"{tmp_path / 't.jsonl'}:1"
    assert trace.messages[trace.first_completion :][-1] == ASSISTANT


@pytest.mark.parametrize(("given", "found"), [(0, "0"), (7, "7"), ("", "t.jsonl:1")])
def test_an_id_may_be_zero(tmp_path, given, found) -> None:
    trace = read_one(tmp_path, {"id": given, "prompt": "p", "completion": "c"})
    assert trace.id.rpartition("/")[2] == found


def test_the_fields_beside_the_text(tmp_path) -> None:
    record = {"id": 7, "prompt": "p", "completion": "c", "answer": 4}
    record |= {"token_ids": [1, 2], "logprobs": [-0.5, -1], "finish_reason": "stop"}
    trace = read_one(tmp_path, record | {"temperature": 1, "model": "big"})
    assert (trace.id, trace.answer, trace.finish_reason) == ("7", "4", "stop")
    assert (trace.token_ids, trace.logprobs) == ([1, 2], [-0.5, -1])
    assert (trace.model, trace.temperature) == ("big", 1.0)


def test_named_fields_and_system_prompt(tmp_path) -> None:
    fields = Fields(prompt="q", completion="a", answer="gold", system_prompt="Think.")
    record = {"q": "2 + 2?", "a": "It is 4.", "gold": "4", "prompt": "no", "completion": "no"}
    trace = read_one(tmp_path, record, fields=fields)
    assert trace.messages == [{"role": "system", "content": "Think."}, USER, ASSISTANT]
    assert (trace.first_completion, trace.answer) == (2, "4")
    assert trace.prompt_text() == "2 + 2?"


def test_context_turns_are_not_the_completion(tmp_path) -> None:
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert read_one(tmp_path, record).first_completion == 3
    record = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    assert read_one(tmp_path, record).first_completion == 0


@pytest.mark.parametrize("inside", [True, False])
def test_a_system_message_in_or_beside_a_conversation(tmp_path, inside) -> None:
    system = {"from": "system", "value": "Be brief."}
    record = {"conversations": [HUMAN, GPT], "system": "Be brief."}
    trace = read_one(tmp_path, {"conversations": [system, HUMAN, GPT]} if inside else record)
    assert trace.messages == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]


def test_a_conversation_keeps_its_turns(tmp_path) -> None:
    turns = [HUMAN, GPT, {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
    trace = read_one(tmp_path, {"conversations": turns})
    assert [m["role"] for m in trace.messages] == ["user", "assistant"] * 2
    assert trace.first_completion == 0  # every assistant turn is the teacher's
    assert trace.completion_text() == "yes"


def test_alpaca_input_is_kept(tmp_path) -> None:
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert read_one(tmp_path, record).prompt_text() == "Add.\n\n2 and 2"


def test_samples_become_traces(tmp_path) -> None:
    record = {"id": "x", "question": "2 + 2?", "response": ["It is 4.", "5"], "answer": "4"}
    traces = read(write(tmp_path / "t.jsonl", record))
    assert [(t.id, t.completion_text()) for t in traces] == [("x/0", "It is 4."), ("x/1", "5")]


def test_batch_output_with_its_request_file(tmp_path) -> None:
    requests = write(
        tmp_path / "requests.jsonl",
        {"custom_id": "a", "method": "POST", "answer": "4"}
        | {"body": {"model": "big", "temperature": 0.7, "messages": [USER]}},
    )
    content = [
        {"token": "It", "logprob": -0.1, "bytes": [73, 116], "top_logprobs": []},
        {"token": " is", "logprob": -0.2, "bytes": None},
    ]
    choices = [
        {"message": ASSISTANT, "logprobs": {"content": content}, "finish_reason": "stop"},
        {"message": ASSISTANT, "finish_reason": "length"},
    ]
    outputs = write(
        tmp_path / "outputs.jsonl",
        {"id": "batch_1", "custom_id": "a", "error": None}
        | {"response": {"status_code": 200, "body": {"model": "big-1", "choices": choices}}},
    )
    first, second = read(f"{requests},{outputs}")
    assert first.messages == [USER, ASSISTANT]
    assert (first.id, first.answer, first.model, first.temperature) == ("a/0", "4", "big", 0.7)
    assert first.token_bytes == [b"It", b" is"]
    assert first.logprobs == [-0.1, -0.2]
    assert second.finish_reason == "length"
    with pytest.raises(DcodError, match=r"outputs.jsonl:1: no prompt for custom_id 'a'.*requests"):
        read(outputs)


def test_vllm_generate_dump(tmp_path) -> None:
    logprobs = [
        {"5": {"logprob": -0.5, "rank": 1}, "6": {"logprob": -0.1, "rank": 2}},
        {"9": {"logprob": -0.25, "rank": 1}},
    ]
    output = {"text": "It is 4.", "token_ids": [5, 9], "logprobs": logprobs}
    trace = read_one(tmp_path, {"prompt": "2 + 2?", "prompt_token_ids": [1], "outputs": [output]})
    assert trace.logprobs == [-0.5, -0.25]


def test_completions_endpoint_logprobs(tmp_path) -> None:
    choice = {"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1, -2]}}
    body = {"choices": [choice]}
    trace = read_one(
        tmp_path, {"body": {"prompt": "p"}, "custom_id": 1, "response": {"body": body}}
    )
    assert (trace.token_bytes, trace.logprobs) == ([b"a", b"b"], [-1, -2])


PAIR: dict[str, object] = {"prompt": "p", "completion": "c"}


def called(arguments: str) -> bytes:
    """A record whose answer calls a tool with arguments as JSON text."""
    call = {"function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return json.dumps({"messages": [{"role": "user", "content": "x"}, answer]}).encode()


GOOD = b'{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "completion": "c', r"t.jsonl:2: truncated JSON .*Unterminated string"),
        (b'{"prompt": "p", "completion"', r"t.jsonl:2: truncated JSON"),
        (b'{"prompt": "p" "completion": "c"}', r"t.jsonl:2: invalid JSON: .* at column 16"),
        (b'{"prompt": "\xff", "completion": "c"}', r"t.jsonl:2: invalid UTF-8 at byte 12"),
        (b"[1]", r"t.jsonl:2: expected a JSON object, found list"),
        (b"[" * 100000, r"t.jsonl:2: invalid JSON"),
        (
            b'{"prompt": "p", "completon": "c"}',
            r"t.jsonl:2: no completion: .*found prompt, completon; if it is completon: "
            r"prepare.completion_field=completon",
        ),
        (b'{"completion": "c"}', r"t.jsonl:2: no prompt: .* prepare.prompt_field"),
        (b'{"prompt": "p", "completion": " "}', r"t.jsonl:2: completion is empty"),
        (b'{"prompt": "", "completion": "c"}', r"t.jsonl:2: prompt is empty"),
        (
            b'{"prompt": "p", "completion": "x\\ud83d"}',
            r"completion holds '\\ud83d' at character 1",
        ),
        (b'{"prompt": 5, "completion": "c"}', r"t.jsonl:2: prompt must be a string, found int"),
        (b'{"prompt": "p", "completion": null}', r"no completion: .*, completion \(null\); prep"),
        (b'{"prompt": "p", "completion": []}', r"completion must be a non-empty list"),
        (
            b'{"prompt": "p", "completion": "c", "answer": [1, 2]}',
            r"answer must be a string or a num",
        ),
        (b'{"prompt": "p", "completion": "c", "logprobs": 3}', r"logprobs must be a list"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', r"the last of messages is by 'user'"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', r"no prompt before"),
        (b'{"messages": [{"content": "x"}]}', r"messages\[0\] must have role and content"),
        (
            b'{"conversations": [{"from": "human"}]}',
            r"conversations\[0\] must have from and value, found from",
        ),
        (
            b'{"conversations": [{"from": "users", "value": "x"}]}',
            r"conversations\[0\] is from 'users'; expected system, .*, human, .*gpt",
        ),
        (
            b'{"conversations": [{"from": ["gpt"], "value": "x"}]}',
            r"conversations\[0\] is from \['gpt'\]",
        ),
        (
            b'{"conversations": [{"from": "human", "value": 3}]}',
            r"conversations\[0\].value must be a string, found int",
        ),
        (
            b'{"conversations": [{"from": "human", "value": "x"}]}',
            r"the last of conversations is by 'user', and there is no completion",
        ),
        (
            b'{"conversations": [{"from": "gpt", "value": "x"}]}',
            r"conversations has no prompt before its first assistant message",
        ),
        (
            b'{"system": "s", "conversations": [{"from": "system", "value": "t"}, '
            b'{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}',
            r"one inside conversations, one in the field system",
        ),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', r"has the role 'robot'; expected"),
        (
            b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "c"}',
            r"part of type 'image'",
        ),
        (
            b'{"prompt": "p", "choices": [{"message": {"content": "c", "tool_calls": [1]}}]}',
            r"choices\[0\].message: tool call 0 must have a name and arguments.*found 1",
        ),
        (
            b'{"custom_id": "a", "response": {"status_code": 500, "body": {"error": "busy"}}}',
            r"the request failed \(status 500\): busy",
        ),
        # JSON inside of a text is checked as the record is.
        (called(r'{"a": "\ud83d"}'), r"tool call 0 must have a name and arguments"),
        (called('{"a": ' + "[" * 900 + "]" * 900 + "}"), r"tool call 0 must have a name and arg"),
        (called('{"a": 1, "a": 2}'), r"tool call 0 must have a name and arguments"),
        (
            json.dumps(PAIR | {"tools": r'["\udc00"]'}).encode(),
            r"tools is no JSON list of definitions: \[0\] holds '\\udc00'",
        ),
        # Names are kept over records, and completions are read with all columns and messages.
        (json.dumps(PAIR | {"n" * 5000: True}).encode(), r"a name of more than 4096 characters"),
        (
            b'{"prompt": "p", "completion": "c"'
            + b"".join(b', "%d": 1' % n for n in range(9_999))
            + b', "7": 1}',
            r"an object has the name '7' twice",
        ),
        (
            json.dumps(PAIR | {f"m{n}": {"is_correct": True} for n in range(101)}).encode(),
            r"more than 100 columns tell of a completion: m0.is_correct, m1.is_correct",
        ),
    ],
)
def test_a_bad_record_is_named_and_can_be_set_aside(tmp_path, line: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(DcodError, match=message) as error:
        read(path)
    assert "t.jsonl:2: " in str(error.value)
    assert "prepare.on_bad_record=quarantine" in str(error.value)
    bad = []
    assert len(read(path, on_bad=lambda trace, reason: bad.append(trace))) == 2
    assert [b.source for b in bad] == [f"{path}:2"]
    assert (
        bad[0].record.encode("utf-8", "ignore")[:20]
        in line.decode("utf-8", "backslashreplace").encode()
    )


def test_a_record_is_not_read_once_for_each_of_thousands(tmp_path, monkeypatch) -> None:
    record = {"prompt": [USER] * 8, "completions": ["c"] * 10}
    assert len(read(write(tmp_path / "t.jsonl", record))) == 10
    monkeypatch.setattr("dcod_jax.data.records.MOST_PARTS", 99)
    with pytest.raises(DcodError, match="10 completions beside 2 columns and 8 messages are 100 p"):
        read(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.StringArray.from_buffers(
            1, pyarrow.py_buffer(struct.pack("<2i", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")
        ),
        pyarrow.array([2**31 - 1], pyarrow.date32()),
        pyarrow.array([2**60], pyarrow.duration("s")),
        pyarrow.array([1], pyarrow.timestamp("s", "No/Zone")),
    ],
    ids=["no UTF-8", "date", "duration", "zone"],
)
def test_a_table_of_what_python_cannot_hold_is_named(tmp_path, column) -> None:
    table = pyarrow.table({"prompt": ["p"], "completion": ["c"], "column": column})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DcodError, match=r"t.parquet is not a readable table"):
        read(tmp_path / "t.parquet")


def test_a_number_of_any_length_orders_columns(tmp_path) -> None:
    names = [f"answer_{n}" for n in (10, 2, "9" * 4500)]
    fields = Fields(completion="answer_*")
    path = write(tmp_path / "t.jsonl", {"prompt": "p"} | dict.fromkeys(names, "c"))
    with pytest.raises(DcodError, match="a name of more than 4096 characters"):
        read(path, fields)
    path = write(tmp_path / "t.jsonl", {"prompt": "p"} | {n[:4000]: n[:9] for n in names})
    found = [trace.completion_text() for trace in read(path, fields)]
    assert found == ["answer_2", "answer_10", "answer_99"]
    many = {f"answer_{n}": "c" for n in range(1001)}
    with pytest.raises(DcodError, match=r"1001 columns are answer_\*, more than 1000"):
        read(write(tmp_path / "t.jsonl", {"prompt": "p"} | many), fields)
