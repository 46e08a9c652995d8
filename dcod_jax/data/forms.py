"""Raw records, in any of the forms users have, to traces.

A form is one entry of FORMS; a record is read by the first form that matches it. A new form is a
function that reads it and an entry here; where the columns of a data set have names of their own,
an entry in presets.PRESETS is enough. Several samples of one prompt are several traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dcod_jax.data import answers, presets, raw, schema
from dcod_jax.data.answers import finish, is_cut_off, sampled
from dcod_jax.data.columns import Row, completion_columns, ends_with_answer, missing
from dcod_jax.data.raw import BadRecordError, Fields, RawTrace, Record, Turns, truth
from dcod_jax.data.reasoning import may_be_reasoning, unfinished
from dcod_jax.data.unpack import unpacked

# (prompt, completions of it, the mapping that holds id, answer, model and temperature); the prompt
# is empty where a completion is a whole conversation.
Parsed: TypeAlias = tuple[Turns, list[RawTrace], Record]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of raw record: a JSON example, how it is recognised, and how it is read."""

    example: str
    matches: Callable[[Record, Fields], bool]
    read: Callable[[Row], Parsed]  # raises BadRecordError


def _read_completion(row: Row) -> Parsed:
    completions = []
    names = completion_columns(row.record, row.fields)
    for name in names:
        value, reasoning = row.get(name), row.reasoning()
        texts = value if isinstance(value, list) and not _is_one(value) else [value]
        if not texts:
            raise BadRecordError(f"{name} must be a non-empty list, found an empty one")
        alone = len(texts) == 1 and len(names) == 1
        for index, text in enumerate(texts):
            place = name if texts is not value else f"{name}[{index}]"
            thought = reasoning[index : index + 1]
            if not alone and (text is None or text == ""):
                completions.append(RawTrace([], failed=f"{place} is empty"))
                continue
            turns, beside = _said(row, text, place, thought)
            more = _trace(row, turns) if alone and not beside else sampled(beside, turns)
            completions.append(_judged(row, more, str(text), index, len(texts)))
        if len(reasoning) not in (0, len(texts)):
            raise BadRecordError(
                f"{len(reasoning)} texts of reasoning for {len(texts)} completions in {name}"
            )
    return Turns(row.prompt()), completions, row.record


_TEXTS = ("text", "content", "completion", "response", "output", "generated_text")


def _is_one(value: list[Any]) -> bool:
    """Whether a list is one completion: messages, or parts with a type."""
    first = value[0] if value else None
    return isinstance(first, dict) and any(key in first for key in ("role", "from", "type"))


def _said(row: Row, item: Any, name: str, thought: list[str]) -> tuple[Turns, Record]:
    """One completion of any kind, and the mapping with its finish reason and log-probs."""
    if isinstance(item, list) and item and isinstance(item[0], dict):
        return row.with_reasoning(_messages(row, item, name), thought), {}
    if not isinstance(item, dict):
        return raw.assistant(item, name, row.fields, "".join(thought)), {}
    key = next((key for key in _TEXTS if item.get(key) is not None), None)
    if key is None:
        raise BadRecordError(f"{name} must be a text, found an object of {', '.join(item)}")
    schema.check(item, schema.SAMPLE, name)
    return raw.assistant(item[key], f"{name}.{key}", row.fields, "".join(thought)), item


def _messages(row: Row, value: list[Any], name: str) -> Turns:
    """A completion of messages: the assistant's, or parts of one message."""
    if "role" not in value[0] and "from" not in value[0]:
        return raw.assistant(value, name, row.fields)
    turns = raw.read_messages(value, name, row.fields)
    other = next((m["role"] for m in turns.messages if m["role"] not in ("assistant", "tool")), "")
    if other:
        raise BadRecordError(
            f"{name} is read as the completion and holds a message by {other!r}; name a whole "
            f"conversation with prepare.completion_field={name}, or leave its prompt out"
        )
    return turns


def _read_conversation(row: Row) -> Parsed:
    [name] = completion_columns(row.record, row.fields)
    turns = raw.read_messages(row.get(name), name, row.fields)
    turns = row.with_reasoning(turns, row.reasoning())
    messages = turns.messages
    if messages[-1]["role"] != "assistant":
        raise BadRecordError(
            f"the last of {name} is by {messages[-1]['role']!r}, and there is no completion"
        )
    first = next((m["role"] for m in messages if m["role"] != "system"), "")
    if first == "assistant":
        raise BadRecordError(f"{name} has no prompt before its first assistant message")
    trace = _trace(row, turns)
    if not trace.supervised():
        raise BadRecordError(f"no turn of {name} is supervised: each has weight 0 or train false")
    last = row.record[name][-1]  # may tell how it ended
    reason = finish(last.get("finish_reason") or last.get("stop_reason"))
    if is_cut_off(reason):
        trace = dataclasses.replace(trace, finish_reason=reason)
    return Turns([]), [_judged(row, trace, trace.completion_text(), 0, 1)], row.record


def _read_outputs(row: Row) -> Parsed:
    completions = []
    for index, output in enumerate(row.get("outputs")):
        name = f"outputs[{index}]"
        if "text" not in output:
            raise BadRecordError(f"{name} must have a text")
        if not (output["text"] or "").strip():
            completions.append(RawTrace([], failed=f"{name} is empty"))
            continue
        ids, logprobs = raw.read_list(output, "token_ids"), raw.read_list(output, "logprobs")
        if logprobs is not None and ids is not None and len(ids) == len(logprobs):
            logprobs = [_position_logprob(e, t) for e, t in zip(logprobs, ids, strict=True)]
        turns = raw.assistant(output["text"], f"{name}.text", row.fields)
        completions.append(sampled(output, turns, logprobs=logprobs))
    row.used |= {"prompt_token_ids", "request_id", "finished", "metrics", "prompt_logprobs"}
    return Turns(row.prompt(first="messages")), _all_judged(row, completions), row.record


def _position_logprob(entry: Any, token: object) -> object:
    """The number in one position of a vLLM log-prob list: a number, or {token id: Logprob}."""
    entry = entry.get(str(token), entry) if isinstance(entry, dict) else entry
    return entry.get("logprob") if isinstance(entry, dict) else entry


def _read_sglang(row: Row) -> Parsed:
    """SGLang's /generate: text, output_ids, and log-probs as [log-prob, id, text] a token."""
    info, text = row.get("meta_info"), row.get("text")
    entries = info.get("output_token_logprobs")
    if entries and not all(len(entry or []) >= 2 for entry in entries):
        raise BadRecordError("meta_info.output_token_logprobs must hold [log-prob, token id, text]")
    ids = row.get("output_ids") or ([entry[1] for entry in entries] if entries else None)
    logprobs = [entry[0] for entry in entries] if entries else None
    row.used.add("index")
    if not isinstance(text, str) or not text.strip():
        return Turns(row.prompt()), [RawTrace([], failed="text is empty")], row.record
    turns = raw.assistant(text, "text", row.fields)
    beside = {"finish_reason": info.get("finish_reason")}
    completion = sampled(beside, turns, token_ids=ids, logprobs=logprobs)
    judged = _all_judged(row, [completion])
    return Turns(row.prompt()), judged, {"id": info.get("id"), **row.record}


# ---------------------------------------------------------------- one completion


def _read_answer(row: Row) -> Parsed:
    prompt, completions, known = answers.read(row)
    return Turns(prompt), _all_judged(row, completions), known


def _trace(row: Row, turns: Turns) -> RawTrace:
    row.used |= {"token_ids", "logprobs", "finish_reason"}
    return sampled(row.record, turns)


def _told_finish(value: Any, name: str) -> str | None:
    """A finish reason; stop_reason may be the text or id that ended it (vLLM), status anything."""
    reason = finish(value) if isinstance(value, str | dict) else ""
    loose = name in ("stop_reason", "status")
    return None if not reason or (loose and is_cut_off(reason) is None) else reason


def _told_verdict(value: Any, name: str) -> bool | None:
    """A verdict; `label` is one only where it is a boolean (KTO)."""
    boolean = str(value).strip().lower() in ("true", "false")
    return truth(value) if name != "label" or boolean else None


def _judged(row: Row, trace: RawTrace, text: str, index: int, count: int) -> RawTrace:
    """With what the record tells of this completion: that it was cut off, that it is wrong."""
    at = row.place_of(text, index, count)
    reason = row.beside(presets.FINISHES, at, _told_finish) or ""
    reason = trace.finish_reason if is_cut_off(trace.finish_reason) else reason
    told = [(name, True) for name in presets.CUT] + [(name, False) for name in presets.COMPLETE]
    signs = [
        f"{name} is {str(cut).lower()}"
        for name, cut in told
        if row.beside((name,), at, lambda value, _: truth(value)) is cut
    ]
    verdicts = [row.beside((name,), at, _told_verdict) for name in presets.VERDICTS]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return dataclasses.replace(
        trace,
        finish_reason=reason or trace.finish_reason,
        unfinished="".join(signs[:1]),
        verdict=any(verdicts) if verdicts else None,
    )


def _all_judged(row: Row, completions: list[RawTrace]) -> list[RawTrace]:
    count = len(completions)
    return [
        trace if trace.failed else _judged(row, trace, trace.completion_text(), index, count)
        for index, trace in enumerate(completions)
    ]


def _finished(trace: RawTrace) -> RawTrace:
    """With `unfinished` from all signs of it."""
    text = trace.completion_text()
    calls = "tool_calls" in trace.messages[trace.supervised()[-1]]
    why = trace.unfinished or ("" if calls else unfinished(text))  # a call is an answer
    cut = is_cut_off(trace.finish_reason) if trace.finish_reason else False
    if cut is None:
        raise BadRecordError(
            f"finish_reason is {trace.finish_reason[:60]!r}, and whether the completion ended by "
            "itself is not known; write stop where it did, length where it was cut off"
        )
    if cut:
        why = f"finish_reason is {trace.finish_reason}"
    return dataclasses.replace(trace, unfinished=why)


FORMS: dict[str, Form] = {
    "answer of an API, OpenAI or vLLM batch output": Form(
        example='{"custom_id": "1", "request": {"body": {"prompt": "2+2?"}}, '
        '"response": {"body": {"choices": [{"text": "4"}]}}}',
        matches=lambda record, fields: answers.answer_of(record) is not None,
        read=_read_answer,
    ),
    "SGLang generate": Form(
        example='{"prompt": "2+2?", "text": "4", "output_ids": [19, 2], '
        '"meta_info": {"finish_reason": {"type": "stop"}}}',
        matches=lambda record, fields: isinstance(record.get("meta_info"), dict),
        read=_read_sglang,
    ),
    "vLLM generate": Form(
        example='{"prompt": "2+2?", "outputs": [{"text": "4", "token_ids": [19, 2]}]}',
        matches=lambda record, fields: (
            isinstance(record.get("outputs"), list)
            and bool(record["outputs"])
            and isinstance(record["outputs"][0], dict)
        ),
        read=_read_outputs,
    ),
    "prompt and completion (plain, TRL, Alpaca)": Form(
        example='{"prompt": "2+2?", "completion": "4", "answer": "4"}',
        matches=lambda record, fields: any(
            not ends_with_answer(record, name, fields)
            for name in completion_columns(record, fields)
        ),
        read=_read_completion,
    ),
    "conversation (TRL, ShareGPT)": Form(
        example='{"conversations": [{"from": "human", "value": "2+2?"}, '
        '{"from": "gpt", "value": "4"}]}',
        matches=lambda record, fields: bool(completion_columns(record, fields)),
        read=_read_conversation,
    ),
}


def read_record(
    record: object, fields: Fields, *, source: str, requests: Mapping[str, Record]
) -> list[RawTrace]:
    """The traces of one record; `requests` holds the prompts of batch outputs by custom_id.

    Raises BadRecordError (the caller adds `source`).
    """
    if not isinstance(record, dict):
        raise BadRecordError(f"expected a JSON object, found {raw.kind_of(record)}")
    schema.check(record, schema.RECORD)
    whole = unpacked({n: value for n, value in record.items() if value is not None}, fields)
    if shown := [name for name in presets.UNREADABLE if whole.get(name)]:
        raise BadRecordError(
            f"the record has {shown[0]}, and only text can be read; take the column out where the "
            "text is enough"
        )
    form = next((form for form in FORMS.values() if form.matches(whole, fields)), None)
    if form is None:
        raise missing(record, fields, "completion")
    asked = None if whole.get("request") else requests.get(str(whole.get("custom_id")))
    nulls = [str(name) for name in record if name not in whole]
    row = Row(whole | ({"request": asked} if asked else {}), fields, nulls=nulls)
    prompt, completions, known = form.read(row)
    if not completions:
        raise BadRecordError("the record has no completion: its list of samples is empty")
    name = known.get("id") if known.get("custom_id") is None else known["custom_id"]
    base = source if name is None else str(name)
    answer, temperature = row.answer(known), known.get("temperature")
    about = {
        "source": source,
        "record": record,
        "answer": answer,
        "model": known["model"] if isinstance(known.get("model"), str) else "",
        "temperature": float(temperature) if isinstance(temperature, int | float) else None,
        "tools": row.tools or raw.read_tools(row.get("tools")),
    }
    traces = []
    for index, completion in enumerate(completions):
        about["teacher"] = row.teacher(known, index, len(completions))
        about["weight"] = row.weight(known, index, len(completions))
        about["id"] = base if len(completions) == 1 else f"{base}/{index}"
        if completion.failed:
            traces.append(dataclasses.replace(completion, **about))
            continue
        lead = row.system(prompt.messages or completion.messages)
        earlier = [*lead, *prompt.messages]
        turns = Turns(completion.messages, completion.unsupervised).after(earlier)
        trace = dataclasses.replace(
            completion,
            messages=turns.messages,
            unsupervised=turns.unsupervised,
            first_completion=len(earlier) if prompt.messages else 0,
            extras=completion.extras,
            **about,
        )
        traces.append(_finished(trace))
    extras = row.unread() | prompt.extras
    for name in sorted(row.unread()):
        if may_be_reasoning(name, whole.get(name)):
            for trace in traces:
                if not trace.failed:
                    raw.check_reasoned(name, trace.completion_text(), fields)
    return [dataclasses.replace(t, extras=t.extras | extras) for t in traces]
