"""Raw records, in any of the forms users have, to traces.

A form is one entry of FORMS; a record is read by the first form that matches it. A new form is a
function that reads it and an entry there; where the columns of a data set have names of their own,
an entry in presets.PRESETS is enough. Several samples of one prompt are several traces.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from dcod_jax.data import answers, calls, raw, records, schema
from dcod_jax.data.answers import TEXTS, sampled
from dcod_jax.data.columns import (
    Row,
    completion_columns,
    ends_with_answer,
    find,
    hint,
    missing,
    unreadable,
)
from dcod_jax.data.kept import Kept
from dcod_jax.data.presets import COMPLETIONS, CONVERSATIONS, HUMAN, TOOLS, Fields, listed, plain
from dcod_jax.data.reasoning import may_be_reasoning, opened
from dcod_jax.data.records import BadRecordError, Message, RawTrace, Record, Turns
from dcod_jax.data.told import finish, finished, judged, numbered
from dcod_jax.data.unpack import nulls, unpacked

# (prompt, completions of it, the mapping that holds id, answer, model and temperature); the prompt
# is empty where a completion is a whole conversation.
Parsed: TypeAlias = tuple[Turns, list[RawTrace], Record]


def _read_completion(row: Row) -> Parsed:
    completions = []
    names = completion_columns(row.record, row.fields)
    steps = row.record.get("labels")
    _check_teachers(row, names)
    for name in names:
        value = row.get(name)
        texts = value if isinstance(value, list) and not _is_one(value) else [value]
        if not texts:
            raise BadRecordError(f"{name} must be a non-empty list, found an empty one")
        records.check_parts(len(completions) + len(texts), len(row.leaves))
        if isinstance(steps, list) and len(steps) == len(texts) > 1:
            raise BadRecordError(
                f"{name} and labels may be the steps of one solution (TRL's stepwise form); join "
                "the steps to one completion, or rename labels to correct where each is a whole one"
            )
        alone = len(texts) == 1 and len(names) == 1
        for index, (text, thought) in enumerate(
            zip(texts, _thoughts(row, len(texts)), strict=True)
        ):
            place = name if texts is not value else f"{name}[{index}]"
            if (not alone or isinstance(text, dict)) and not thought and _is_blank(text):
                completions.append(RawTrace([], failed=f"{place} is empty"))
                continue
            turns, beside = _said(row, text, place, thought)
            trace = sampled(beside, turns)
            trace = _of_record(row, trace) if alone and not beside else trace
            if len(names) > 1:
                told = (*trace.told, numbered(row, name))
                trace = dataclasses.replace(trace, told=told)
            completions.append(judged(row, trace, str(text), index, len(texts)))
    if "outputs" in names:  # vLLM's
        row.used |= {"prompt_token_ids", "request_id", "finished", "metrics", "prompt_logprobs"}
    first = "messages" if names == ["outputs"] else ""
    return Turns(row.prompt(first=first)), completions, row.record


def _check_teachers(row: Row, names: Sequence[str]) -> None:
    """Refuse a person's solution where the teacher's column is there and null in this record."""
    if row.fields.completion or not row.nulls or plain(names[0]) not in HUMAN:
        return
    known = {plain(name) for name in (*COMPLETIONS, *CONVERSATIONS)}
    if null := next((name for name in row.nulls if plain(name) in known), None):
        raise BadRecordError(
            f"{null} is null, and {names[0]} may be a person's text; take the record out, or set "
            "prepare.completion_field to the one that is meant"
        )


def _thoughts(row: Row, count: int) -> list[str]:
    """The reasoning of each of `count` completions, from a column; "" where it has none."""
    found = row.reasoning()
    if len(found) not in (0, count):
        raise BadRecordError(f"{len(found)} texts of reasoning for {count} completions")
    return found or [""] * count


def _of_record(row: Row, trace: RawTrace) -> RawTrace:
    """The only completion of a record, which has its token ids, log-probs and finish reason."""
    beside = {"token_ids", "logprobs", "finish_reason"}
    row.used |= beside
    if beside.isdisjoint(row.record):
        return trace
    turns = Turns(trace.messages, trace.unsupervised, trace.extras)
    return dataclasses.replace(sampled(row.record, turns), told=trace.told)


def _is_one(value: list[Any]) -> bool:
    """Whether a list is one completion: messages, or parts with a type."""
    first = value[0] if value else None
    return isinstance(first, dict) and any(key in first for key in ("role", "from", "type"))


# Keys of such an object that are no message's.
_OWN = ("role", "from", "message", "index", "token_ids", "logprobs", "cumulative_logprob")


def _is_blank(item: Any) -> bool:
    """Whether one of several completions, or an object, holds neither text nor reasoning."""
    if not isinstance(item, dict):
        return item is None or (isinstance(item, str) and not item.strip())
    keys = [key for key in (*TEXTS, *raw.REASONING_KEYS) if key in item]
    return bool(keys) and all(_is_blank(item[key]) for key in keys)


def _said(row: Row, item: Any, name: str, thought: str) -> tuple[Turns, Record]:
    """One completion of any kind, and the mapping with its finish reason and log-probs."""
    if isinstance(item, list) and item and isinstance(item[0], dict):
        return row.with_reasoning(_messages(row, item, name), thought), {}
    if not isinstance(item, dict):
        return raw.assistant(item, name, row.fields, thought), {}
    inner = item["message"] if isinstance(item.get("message"), dict) else item
    key = next((key for key in TEXTS if inner.get(key) is not None), None)
    if key is None:
        raise BadRecordError(
            f"{name} must be a text, found an object of {', '.join(item)}; of a single text the "
            f"field can be named: prepare.completion_field={name}.{next(iter(item), 'name')}"
        )
    schema.check(item, schema.SAMPLE, name)
    ids, logprobs = item.get("token_ids"), item.get("logprobs")
    if ids and logprobs and len(ids) == len(logprobs):
        logprobs = [_position_logprob(e, t) for e, t in zip(logprobs, ids, strict=True)]
        item = item | {"logprobs": logprobs}
    given = raw.with_own_reasoning(inner, item)
    given = {k: v for k, v in given.items() if k not in (*TEXTS, *_OWN)}
    said = given | {"role": "assistant", "content": inner[key]}
    message = raw.read_message(said, name, row.fields)
    turns = row.with_reasoning(Turns([message]), thought)
    extras = raw.unread(given, turns.messages[0], name, row.fields)
    column = name.partition("[")[0]
    told = {k: v for k, v in item.items() if k not in TEXTS}
    names = frozenset(f"{column}[].{key}" for key in extras)
    return dataclasses.replace(turns, extras=names, told=(told,)), item


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
    messages = turns.messages
    if messages[-1]["role"] != "assistant":
        raise BadRecordError(
            f"the last of {name} is by {messages[-1]['role']!r}, and there is no completion"
            f"{hint(row.record, row.fields, 'completion', HUMAN)}"
        )
    turns = row.with_reasoning(turns, _thoughts(row, 1)[0])
    first = next((m["role"] for m in messages if m["role"] != "system"), "")
    if first == "assistant":
        raise BadRecordError(f"{name} has no prompt before its first assistant message")
    trace = _of_record(row, sampled({}, turns))
    if not trace.supervised():
        raise BadRecordError(f"no turn of {name} is supervised: each has weight 0 or train false")
    return Turns([]), [judged(row, trace, trace.completion_text(), 0, 1)], row.record


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
    return Turns(row.prompt()), _all_judged(row, [completion]), {"id": info.get("id"), **row.record}


# ---------------------------------------------------------------- one completion


def _read_answer(row: Row) -> Parsed:
    prompt, completions, known = answers.read(row)
    return Turns(prompt), _all_judged(row, completions), known


def _all_judged(row: Row, completions: list[RawTrace]) -> list[RawTrace]:
    """With the reasoning of a column beside them, and what the record tells of each."""
    count, found = len(completions), []
    thoughts = _thoughts(row, count)
    for index, trace in enumerate(completions):
        if not trace.failed:
            turns = row.with_reasoning(Turns(trace.messages), thoughts[index])
            trace = dataclasses.replace(trace, messages=turns.messages)
            trace = judged(row, trace, trace.completion_text(), index, count)
        found.append(trace)
    return found


def _is_completion(record: Record, fields: Fields) -> bool:
    names = completion_columns(record, fields)
    return any(not ends_with_answer(record, name, fields) for name in names)


# What a record is recognised by, and the reader of it, which raises BadRecordError.
FORMS: dict[str, tuple[Callable[[Record, Fields], bool], Callable[[Row], Parsed]]] = {
    "answer": (lambda record, _: answers.answer_of(record) is not None, _read_answer),
    "sglang": (lambda record, _: isinstance(record.get("meta_info"), dict), _read_sglang),
    "completion": (_is_completion, _read_completion),
    "conversation": (lambda record, f: bool(completion_columns(record, f)), _read_conversation),
}


def _check_template_kwargs(record: Record) -> None:
    """Refuse what a record alone would have its template write into the prompt (TRL)."""
    given = listed(record.get("chat_template_kwargs"))
    for name, value in given.items() if isinstance(given, dict) else ():
        if value and isinstance(value, str | list | dict):
            raise BadRecordError(
                f"chat_template_kwargs.{name} changes the prompt of this record alone, and one "
                "template serves all; write it into system or tools, or take it out"
            )


def _check_border(record: Record, prompt: list[Message], completion: RawTrace) -> None:
    """Refuse a prompt that is in its continuation, too (HF pipelines, echo=true), or begins it."""
    rows = [record, *(v[0] for v in record.values() if isinstance(v, list) and v)]
    choices = (answers.answer_of(record) or {}).get("choices")
    continued = any(isinstance(row, dict) and "generated_text" in row for row in rows)
    continued |= isinstance(choices, list) and bool((choices[0] or {}).get("text"))
    asked, said = prompt[-1]["content"].strip(), completion.messages[0]["content"].lstrip()
    if (mark := opened(asked)) and asked.split("\n")[-1].strip() == mark:
        raise BadRecordError(
            f"the prompt ends with {mark}, which the student's template writes where it does; take "
            "it out, and begin the completion with it"
        )
    if continued and said.startswith(asked) and len(said) > len(asked) >= 8:
        raise BadRecordError(
            "the completion begins with its whole prompt, which would be trained as an answer; cut "
            "it off (HF pipelines: return_full_text=False; completions of an API: no echo)"
        )


def _asked(prompt: list[Message], completion: RawTrace) -> list[Message]:
    """The prompt, without the completion where it is there again as the last message."""
    if not prompt or prompt[-1]["role"] != "assistant" or "tool_calls" in prompt[-1]:
        return prompt
    said, again = (turn["content"].split() for turn in (completion.messages[0], prompt[-1]))
    if len(prompt) > 1 and said == again:
        return prompt[:-1]
    raise BadRecordError(
        "the prompt ends with an assistant message, and the completion would be a second answer "
        "to it; join them to one message, or take one out"
    )


def _turns(row: Row, prompt: list[Message], completion: RawTrace) -> dict[str, Any]:
    """The fields of the trace that hold its conversation: the prompt before the completion."""
    if prompt:
        _check_border(row.record, prompt, completion)
    lead = row.system(prompt or completion.messages)
    earlier = [*lead, *_asked(prompt, completion)]
    turns = Turns(completion.messages, completion.unsupervised).after(earlier)
    return {
        "messages": turns.messages,
        "unsupervised": turns.unsupervised,
        "first_completion": len(earlier) if prompt else 0,
    }


def read_record(
    record: object, fields: Fields, *, source: str, requests: Mapping[str, str] | Kept
) -> list[RawTrace]:
    """The traces of one record; `requests` holds those of batch outputs as JSON, by custom_id.

    Raises BadRecordError (the caller adds `source`).
    """
    if not isinstance(record, dict):
        raise BadRecordError(f"expected a JSON object, found {records.kind_of(record)}")
    # NaN is null, as pandas writes it.
    there = {n: value for n, value in record.items() if value is not None and value == value}
    there |= {n: listed(there[n]) for n in ("token_ids", "logprobs") if n in there}
    schema.check(there, schema.RECORD)
    whole = unpacked(there, fields)
    if shown := [name for name, value in whole.items() if unreadable(name) and value]:
        raise BadRecordError(
            f"the record has {shown[0]}, and only text can be read; take the column out where the "
            "text is enough"
        )
    error = whole.get("error")
    if isinstance(error, dict) or (finish(error) and isinstance(error, str)):
        whole = {"custom_id": source, **whole}  # a failed request, whatever stands beside it
    read = next((read for matches, read in FORMS.values() if matches(whole, fields)), None)
    if read is None:
        raise missing(record, fields, "completion")
    own = isinstance(whole.get("request"), dict) and whole["request"]
    asked = None if own else requests.get(answers.batch_name(whole) or "")
    asked = json.loads(asked) if asked else None
    _check_template_kwargs(whole)
    row = Row(whole | ({"request": asked} if asked else {}), fields, nulls=nulls(record, fields))
    prompt, completions, known = read(row)
    if not completions:
        raise BadRecordError("the record has no completion: its list of samples is empty")
    records.check_parts(len(completions), len(row.leaves), len(prompt.messages))
    name = answers.batch_name(known)
    if name is None:
        name = source if known.get("id") in (None, "") else str(known["id"])
    model = known["model"] if isinstance(known.get("model"), str) else ""
    records.check_name(name, "id")
    records.check_name(model, "model")
    answer, temperature = row.answer(known), known.get("temperature")
    tools = find(row.record, TOOLS) or "tools"
    about = {
        "source": source,
        "record": record,
        "answer": answer,
        "model": model,
        "temperature": float(temperature) if isinstance(temperature, int | float) else None,
        "tools": row.tools or calls.read_tools(row.get(tools), row.get("functions")),
    }
    traces = []
    for index, completion in enumerate(completions):
        about["teacher"] = row.teacher(known, index, len(completions))
        about["weight"] = row.weight(known, index, len(completions))
        about["id"] = name if len(completions) == 1 else f"{name}/{index}"
        told = {} if completion.failed else _turns(row, prompt.messages, completion)
        trace = dataclasses.replace(completion, **told, **about)
        traces.append(trace if completion.failed else finished(trace))
    extras = _extras(row, traces) | prompt.extras
    return [dataclasses.replace(t, extras=t.extras | extras) for t in traces] if extras else traces


def _extras(row: Row, traces: list[RawTrace]) -> frozenset[str]:
    """Columns that nothing read; one with reasoning that the completions lack is refused."""
    unread = row.unread()
    for name in sorted(unread):
        if may_be_reasoning(name, unread[name]):
            for trace in traces:
                if not trace.failed:
                    raw.check_reasoned(name, trace.completion_text(), row.fields)
    return frozenset(unread)
