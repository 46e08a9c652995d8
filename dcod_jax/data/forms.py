"""Raw records, in any of the forms users have, to traces.

A form is one entry of FORMS; a record is read by the first form that matches it. A new form is a
function that reads it and an entry here. Several samples of one prompt (a list of completions,
n choices) are several traces.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from dcod_jax.data import raw
from dcod_jax.data.raw import BadRecordError, Fields, Message, RawTrace, Record

PROMPT_FIELDS = ("prompt", "question", "problem", "instruction")
SYNONYMS = {
    "prompt": PROMPT_FIELDS,
    "completion": ("completion", "response", "output", "solution"),
}
CONVERSATION_FIELDS = ("messages", "conversations")

# (prompt, completions of it, the mapping that holds id, answer, model and temperature); the prompt
# is empty where a completion is a whole conversation.
Parsed: TypeAlias = tuple[list[Message], list[RawTrace], Record]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of raw record: a JSON example, how it is recognised, and how it is read."""

    example: str
    matches: Callable[[Record, Fields], bool]
    read: Callable[[Record, Fields], Parsed]  # raises BadRecordError


def _conversation(record: Record, name: str) -> list[Message]:
    """The messages of a field; ShareGPT may have its system message in a field of its own."""
    messages = raw.read_messages(record[name], name)
    system = record.get("system") if name == "conversations" else None
    if system in (None, ""):
        return messages
    if messages[0]["role"] == "system":
        raise BadRecordError(
            "two system messages: one inside conversations, one in the field system"
        )
    return [{"role": "system", "content": raw.read_text(system, "system")}, *messages]


def _names(fields: Fields, part: str) -> Sequence[str]:
    """Where the prompt or the completion may be: the chosen field, else the synonyms."""
    chosen: str = getattr(fields, part)
    return [chosen] if chosen else SYNONYMS[part]


def _find(record: Record, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)


def _missing(record: Record, fields: Fields, part: str) -> BadRecordError:
    names = _names(fields, part)
    close = [m for n in names for m in difflib.get_close_matches(n, list(record), n=1, cutoff=0.7)]
    hint = f" (the nearest is {close[0]!r})" if close else ""
    return BadRecordError(
        f"no {part}: expected the field {' or '.join(names)}, found "
        f"{', '.join(record) or 'nothing'}{hint}; prepare.{part}_field names another one"
    )


def _prompt(record: Record, fields: Fields, *, first: str = "") -> list[Message]:
    """The prompt of a record; the field `first` is preferred where the record has it."""
    name = first if first in record else None
    name = name or _find(record, _names(fields, "prompt"))
    name = name or _find(record, CONVERSATION_FIELDS)
    if name is None:
        raise _missing(record, fields, "prompt")
    if isinstance(record[name], list):
        return _conversation(record, name)
    text, more = raw.read_text(record[name], name), record.get("input")
    if name == "instruction" and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"  # Alpaca
    return [{"role": "user", "content": text}]


def _answer(record: Record, fields: Fields) -> str | None:
    value = record.get(fields.answer) if fields.answer else None
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecordError(
            f"{fields.answer} must be a string or a number, found {raw.kind_of(value)}; "
            "prepare.answer_field names another field"
        )
    return raw.check_unicode(str(value), fields.answer)


def _read_completion(record: Record, fields: Fields) -> Parsed:
    name = _find(record, _names(fields, "completion")) or ""
    value = record[name]
    if isinstance(value, list) and value and isinstance(value[0], str):
        texts = [raw.assistant(text, f"{name}[{index}]") for index, text in enumerate(value)]
        return _prompt(record, fields), [RawTrace(text) for text in texts], record
    read = raw.read_messages if isinstance(value, list) else raw.assistant
    return _prompt(record, fields), [raw.sampled(record, read(value, name))], record


def _read_conversation(record: Record, fields: Fields) -> Parsed:
    name = _find(record, CONVERSATION_FIELDS) or ""
    messages = _conversation(record, name)
    if messages[-1]["role"] != "assistant":
        raise BadRecordError(
            f"the last of {name} is by {messages[-1]['role']!r}, and there is no completion"
        )
    if messages[0]["role"] == "assistant":
        raise BadRecordError(f"{name} has no prompt before its first assistant message")
    return [], [raw.sampled(record, messages)], record


def _read_outputs(record: Record, fields: Fields) -> Parsed:
    completions = [_output(output, f"outputs[{i}]") for i, output in enumerate(record["outputs"])]
    return _prompt(record, fields, first="messages"), completions, record


def _output(output: object, name: str) -> RawTrace:
    if not isinstance(output, dict) or "text" not in output:
        raise BadRecordError(f"{name} must have a text")
    ids, logprobs = raw.read_list(output, "token_ids"), raw.read_list(output, "logprobs")
    if logprobs is not None and ids is not None and len(ids) == len(logprobs):
        logprobs = [_position_logprob(e, t) for e, t in zip(logprobs, ids, strict=True)]
    return raw.sampled(output, raw.assistant(output["text"], f"{name}.text"), logprobs=logprobs)


def _position_logprob(entry: Any, token: object) -> object:
    """The number in one position of a vLLM log-prob list: a number, or {token id: Logprob}."""
    entry = entry.get(str(token), entry) if isinstance(entry, dict) else entry
    return entry.get("logprob") if isinstance(entry, dict) else entry


def is_request(record: Record) -> bool:
    """Whether a line belongs to the request file of a batch: it holds prompts for the outputs."""
    return "custom_id" in record and "body" in record and "response" not in record


def _read_batch(record: Record, fields: Fields) -> Parsed:
    response = record.get("response", {"body": record})
    body, status = response.get("body") or {}, response.get("status_code", 200)
    if status != 200 or record.get("error") or "choices" not in body:
        problem = record.get("error") or body.get("error") or "the body has no choices"
        raise BadRecordError(f"the request failed (status {status}): {problem}")
    request = record.get("request") or record
    asked = request.get("body") or request
    if asked.get("messages"):
        prompt = raw.read_messages(asked["messages"], "messages")
    elif asked.get("prompt"):
        prompt = [{"role": "user", "content": raw.read_text(asked["prompt"], "prompt")}]
    else:
        raise BadRecordError(
            f"no prompt for custom_id {record.get('custom_id')!r}: a batch output has none of its "
            "own; name the request file before it (data.traces=requests.jsonl,outputs.jsonl)"
        )
    completions = [_choice(choice, f"choices[{i}]") for i, choice in enumerate(body["choices"])]
    known = {**asked, **{k: v for k, v in request.items() if k != "body"}, **record}
    known.setdefault("model", body.get("model"))
    return prompt, completions, known


def _choice(choice: object, name: str) -> RawTrace:
    if not isinstance(choice, dict) or not ("message" in choice or "text" in choice):
        raise BadRecordError(f"{name} must have a message or a text")
    if "message" in choice:
        messages = [raw.read_message({"role": "assistant", **choice["message"]}, f"{name}.message")]
    else:
        messages = raw.assistant(choice["text"], f"{name}.text")
    texts, logprobs = _choice_logprobs(choice.get("logprobs"))
    return raw.sampled(choice, messages, logprobs=logprobs, token_bytes=texts)


def _choice_logprobs(value: object) -> tuple[list[bytes] | None, list[Any] | None]:
    """(token bytes, log-probs) of a choice's `logprobs`, chat or completions form."""
    if not value:
        return None, None
    found = value if isinstance(value, dict) else {}
    if isinstance(entries := found.get("content"), list):
        texts = [
            bytes(e["bytes"]) if e.get("bytes") is not None else str(e.get("token", "")).encode()
            for e in entries
        ]
        return texts, [entry.get("logprob") for entry in entries]
    if isinstance(logprobs := found.get("token_logprobs"), list):
        return [str(token).encode() for token in found.get("tokens") or []], logprobs
    raise BadRecordError("choice.logprobs has neither content nor token_logprobs")


FORMS: dict[str, Form] = {
    "OpenAI or vLLM batch output": Form(
        example='{"custom_id": "1", "request": {"body": {"prompt": "2+2?"}}, '
        '"response": {"body": {"choices": [{"text": "4"}]}}}',
        matches=lambda record, fields: (
            isinstance(record.get("response"), dict) or isinstance(record.get("choices"), list)
        ),
        read=_read_batch,
    ),
    "vLLM generate": Form(
        example='{"prompt": "2+2?", "outputs": [{"text": "4", "token_ids": [19, 2]}]}',
        matches=lambda record, fields: isinstance(record.get("outputs"), list),
        read=_read_outputs,
    ),
    "prompt and completion (plain, TRL, Alpaca)": Form(
        example='{"prompt": "2+2?", "completion": "4", "answer": "4"}',
        matches=lambda record, fields: bool(_find(record, _names(fields, "completion"))),
        read=_read_completion,
    ),
    "conversation (TRL, ShareGPT)": Form(
        example='{"conversations": [{"from": "human", "value": "2+2?"}, '
        '{"from": "gpt", "value": "4"}]}',
        matches=lambda record, fields: (
            not fields.completion and bool(_find(record, CONVERSATION_FIELDS))
        ),
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
    form = next((form for form in FORMS.values() if form.matches(record, fields)), None)
    if form is None:
        raise _missing(record, fields, "completion")
    asked = None if record.get("request") else requests.get(str(record.get("custom_id")))
    whole = {**record, "request": asked} if asked else record
    prompt, completions, known = form.read(whole, fields)
    if not completions:
        raise BadRecordError("the record has no completion: its list of samples is empty")
    name = known.get("id") if known.get("custom_id") is None else known.get("custom_id")
    base = source if name is None else str(name)
    temperature = known.get("temperature")
    traces = []
    for index, completion in enumerate(completions):
        messages = [*prompt, *completion.messages]
        system = bool(fields.system_prompt) and messages[0]["role"] != "system"
        if system:
            messages = [{"role": "system", "content": fields.system_prompt}, *messages]
        trace = dataclasses.replace(
            completion,
            id=base if len(completions) == 1 else f"{base}/{index}",
            messages=messages,
            first_completion=len(prompt) + system if prompt else 0,
            source=source,
            record=record,
            answer=_answer(known, fields),
            model=str(known.get("model") or ""),
            temperature=float(temperature) if isinstance(temperature, int | float) else None,
        )
        traces.append(trace)
    return traces
