"""Raw records, in any of the forms users have, to traces.

A form is one entry of FORMS; a record is read by the first form that matches it. A new form is a
function that reads it and an entry here; where the columns of a data set have names of their own,
an entry in presets.PRESETS is enough. Several samples of one prompt are several traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dcod_jax.data import presets, raw, schema
from dcod_jax.data.columns import Row, completion_columns, ends_with_answer, missing
from dcod_jax.data.raw import BadRecordError, Fields, RawTrace, Record, Turns
from dcod_jax.data.reasoning import unfinished

# What ends a completion before it is whole, in the words of the APIs.
CUT_OFF = (
    "length max_tokens max_length model_length max_output_tokens content_filter safety abort error "
    "incomplete"
).split()
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
        texts = value if isinstance(value, list) else [value]
        if not texts:
            raise BadRecordError(f"{name} must be a non-empty list, found an empty one")
        if isinstance(value, list) and isinstance(texts[0], dict):  # messages, or parts of one
            completions.append(_trace(row, _messages(row, value, name)))
            continue
        alone = len(texts) == 1
        for index, text in enumerate(texts):
            place = name if not isinstance(value, list) else f"{name}[{index}]"
            thought = reasoning[index] if index < len(reasoning) else ""
            turns = raw.assistant(text, place, row.fields, thought)
            more = _trace(row, turns) if alone and len(names) == 1 else RawTrace(turns.messages)
            completions.append(_judged(row, more, str(text), index, len(texts)))
        if len(reasoning) not in (0, len(texts)):
            raise BadRecordError(
                f"{len(reasoning)} texts of reasoning for {len(texts)} completions in {name}"
            )
    return Turns(row.prompt()), completions, row.record


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
    turns = row.with_reasoning(turns)
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
        completions.append(_sampled(output, turns, logprobs=logprobs))
    row.used |= {"prompt_token_ids", "request_id", "finished", "metrics", "prompt_logprobs"}
    return Turns(row.prompt(first="messages")), completions, row.record


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
    completion = _sampled(beside, turns, token_ids=ids, logprobs=logprobs)
    return Turns(row.prompt()), [completion], {"id": info.get("id"), **row.record}


def is_request(record: Record) -> bool:
    """Whether a line belongs to the request file of a batch: it holds prompts for the outputs."""
    return (
        "custom_id" in record
        and isinstance(record.get("body"), dict)
        and record.get("response") is None
        and "choices" not in record["body"]
    )


def _read_batch(row: Row) -> Parsed:
    record = row.record
    row.used |= set(record) & {
        *("response", "request", "choices", "body", "error", "object", "created", "usage"),
        *("method", "url", "system_fingerprint", "service_tier", "prompt_logprobs"),
    }
    response = record.get("response", {"body": record})
    body, status = response.get("body") or {}, response.get("status_code") or 200
    known: dict[str, Any] = {}
    request = record.get("request") or record
    asked = request.get("body") or request
    if status != 200 or record.get("error") or not body.get("choices"):
        problem = record.get("error") or body.get("error") or "the body has no choices"
        failure = f"the request failed (status {status}): {str(problem)[:200]}"
        return Turns([]), [RawTrace([], failed=failure)], record
    if asked.get("messages"):
        prompt = raw.read_messages(asked["messages"], "messages", row.fields).messages
        row.used.add("messages")
    elif asked.get("prompt"):
        prompt = [{"role": "user", "content": raw.read_text(asked["prompt"], "prompt")}]
        row.used.add("prompt")
    else:
        raise BadRecordError(
            f"no prompt for custom_id {record.get('custom_id')!r}: a batch output has none of its "
            "own; name the request file before it (data.traces=requests.jsonl,outputs.jsonl)"
        )
    completions = [
        _choice(choice or {}, f"choices[{i}]", row.fields)
        for i, choice in enumerate(body["choices"])
    ]
    known = {**asked, **{k: v for k, v in request.items() if k != "body"}, **record}
    known.setdefault("model", body.get("model"))
    row.tools = raw.read_tools(asked.get("tools"))
    return Turns(prompt), completions, known


def _choice(choice: Record, name: str, fields: Fields) -> RawTrace:
    message, text = choice.get("message"), choice.get("text")
    if message is None and text is None:
        raise BadRecordError(f"{name} must have a message or a text")
    given = {"role": "assistant", **(message or {"content": text})}
    spoken = [given.get(key) for key in ("content", *raw.REASONING_KEYS, "tool_calls")]
    if not any(spoken) or all(isinstance(s, str) and not s.strip() for s in spoken if s):
        why = given.get("refusal") or choice.get("finish_reason") or "no text"
        return RawTrace([], failed=f"{name} is empty ({str(why)[:200]})")
    place = f"{name}.message" if message else f"{name}.text"
    message = raw.read_message(given, place, fields)
    texts, logprobs = _choice_logprobs(choice.get("logprobs"))
    return _sampled(choice, Turns([message]), logprobs=logprobs, token_bytes=texts)


def _choice_logprobs(value: Any) -> tuple[list[bytes] | None, list[Any] | None]:
    """(token bytes, log-probs) of a choice's `logprobs`, chat or completions form."""
    if not value:
        return None, None
    if (entries := value.get("content")) is not None:
        texts = [
            bytes(e["bytes"]) if e.get("bytes") is not None else str(e.get("token", "")).encode()
            for e in (entry or {} for entry in entries)
        ]
        return texts, [(entry or {}).get("logprob") for entry in entries]
    if (logprobs := value.get("token_logprobs")) is not None:
        return [str(token).encode() for token in value.get("tokens") or []], logprobs
    raise BadRecordError("choice.logprobs has neither content nor token_logprobs")


# ---------------------------------------------------------------- one completion


def _finish(value: Any) -> str:
    value = value.get("type") if isinstance(value, dict) else value
    return str(value or "").lower()


def _sampled(beside: Record, turns: Turns, **more: Any) -> RawTrace:
    """A completion with the token ids, log-probs and finish reason that the record has for it."""
    more |= {n: raw.read_list(beside, n) for n in ("token_ids", "logprobs") if n not in more}
    given = beside.get("finish_reason")
    more["finish_reason"] = "" if isinstance(given, list) else _finish(given)
    return RawTrace(turns.messages, unsupervised=turns.unsupervised, extras=turns.extras, **more)


def _trace(row: Row, turns: Turns) -> RawTrace:
    row.used |= {"token_ids", "logprobs", "finish_reason"}
    return _sampled(row.record, turns)


def _judged(row: Row, trace: RawTrace, text: str, index: int, count: int) -> RawTrace:
    """With what the record tells of this completion: that it was cut off, that it is wrong."""
    at = row.place_of(text, index, count)
    finish = _finish(row.beside(presets.FINISHES, at, str | dict)) or trace.finish_reason
    whole = [row.beside((name,), at, bool) for name in presets.COMPLETE]
    verdicts = [row.beside((name,), at, bool) for name in presets.VERDICTS]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return dataclasses.replace(
        trace,
        finish_reason=finish,
        unfinished=f"{presets.COMPLETE[whole.index(False)]} is false" if False in whole else "",
        verdict=any(verdicts) if verdicts else None,
    )


def _finished(trace: RawTrace) -> RawTrace:
    """With `unfinished` from all signs of it."""
    text = trace.completion_text()
    calls = "tool_calls" in trace.messages[trace.supervised()[-1]]
    why = trace.unfinished or ("" if calls else unfinished(text))  # a call is an answer
    if trace.finish_reason in CUT_OFF:
        why = f"finish_reason is {trace.finish_reason}"
    return dataclasses.replace(trace, unfinished=why)


FORMS: dict[str, Form] = {
    "OpenAI or vLLM batch output": Form(
        example='{"custom_id": "1", "request": {"body": {"prompt": "2+2?"}}, '
        '"response": {"body": {"choices": [{"text": "4"}]}}}',
        matches=lambda record, fields: (
            isinstance(record.get("response"), dict)
            or (bool(record.get("choices")) and isinstance(record["choices"][0], dict))
        ),
        read=_read_batch,
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
    whole = {name: value for name, value in record.items() if value is not None}
    form = next((form for form in FORMS.values() if form.matches(whole, fields)), None)
    if form is None:
        raise missing(record, fields, "completion")
    asked = None if whole.get("request") else requests.get(str(whole.get("custom_id")))
    row = Row(whole | ({"request": asked} if asked else {}), fields)
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
    return [dataclasses.replace(t, extras=t.extras | extras) for t in traces]
