"""Answers of APIs, alone or in a batch file: as OpenAI's choices, whatever the dialect.

Known are OpenAI's chat, completions and Responses, Anthropic's Messages, Gemini and Ollama.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from dcod_jax.data import raw, schema
from dcod_jax.data.columns import Row
from dcod_jax.data.raw import BadRecordError, Fields, Message, RawTrace, Record, Turns

# What ends a completion before it is whole, and what ends a whole one, in the words of the APIs.
_CUT_OFF = re.compile(
    "length|max|limit|exceed|filter|safety|recitation|blocklist|prohibited|spii|guardrail|abort|"
    "cancel|error|fail|time|incomplete|truncat|insufficient|malformed|refusal|pause|toxic|language"
)
_WHOLE = re.compile("stop|eos|end|complete|finish|tool|function|done|succe")
_KNOWN = ("choices", "candidates", "output", "content", "message")  # where an answer is


def finish(value: Any) -> str:
    """A finish reason in lower case: {"type": "stop"} and FinishReason.STOP are stop."""
    value = value.get("type") if isinstance(value, dict) else value
    text = str(value or "").lower().rpartition(".")[2]
    return "" if text in ("none", "null", "unknown", "finish_reason_unspecified") else text


def is_cut_off(reason: str) -> bool | None:
    """Whether a completion with this finish reason is not whole; None where it is not known."""
    if _CUT_OFF.search(reason):
        return True
    return False if _WHOLE.search(reason) else None


def sampled(beside: Record, turns: Turns, **more: Any) -> RawTrace:
    """A completion with the token ids, log-probs and finish reason that the record has for it."""
    more |= {n: raw.read_list(beside, n) for n in ("token_ids", "logprobs") if n not in more}
    given = beside.get("finish_reason")
    more["finish_reason"] = "" if isinstance(given, list) else finish(given)
    return RawTrace(turns.messages, unsupervised=turns.unsupervised, extras=turns.extras, **more)


def is_request(record: Record) -> bool:
    """Whether a line belongs to the request file of a batch: it holds prompts for the outputs."""
    body = record.get("body") or record.get("params")
    return (
        "custom_id" in record
        and isinstance(body, dict)
        and record.get("response") is None
        and "choices" not in body
    )


def answer_of(record: Record) -> Record | None:
    """The part of a record that is an API's answer, or its failure; None where none is."""
    response, result = record.get("response"), record.get("result")
    if isinstance(response, dict):
        return response.get("body") or {} if "body" in response else response
    if "custom_id" in record and isinstance(result, dict):  # Anthropic's batches
        return result.get("message") or {"error": result.get("error") or result.get("type")}
    if "custom_id" in record and record.get("error"):
        return {"error": record["error"]}
    choices, message, output = (record.get(key) for key in ("choices", "message", "output"))
    first = output[0] if isinstance(output, list) and output else None
    item = first.get("type") if isinstance(first, dict) else None
    talk = isinstance(message, dict) and message.get("role") == "assistant"
    spoken = record.get("role") == "assistant" and isinstance(record.get("content"), list)
    if choices and isinstance(choices, list) and isinstance(choices[0], dict):
        return record
    if talk or spoken or item in ("message", "reasoning", "function_call"):
        return record
    candidates = record.get("candidates")
    return record if isinstance(candidates, list) and candidates else None


def read(row: Row) -> tuple[list[Message], list[RawTrace], Record]:
    """(prompt, completions, the mapping that holds id, answer, model and temperature)."""
    record = row.record
    row.used |= set(record) & {
        *("response", "request", "body", "error", "object", "created", "usage", "result"),
        *("method", "url", "system_fingerprint", "service_tier", "prompt_logprobs", "params"),
        *(*_KNOWN, "role", "type", "stop_reason", "stop_sequence", "incomplete_details", "status"),
    }
    body, envelope = answer_of(record) or {}, record.get("response")
    schema.check(body, schema.ANSWER, "response")
    status = envelope.get("status_code") if isinstance(envelope, dict) else None
    request = record.get("request") or record
    asked = request.get("body") or request.get("params") or request
    problem = record.get("error") or body.get("error")
    choices = [] if problem or status not in (None, 200) else _choices(body)
    if not choices:
        problem = str(problem or "the body has no choices")[:200]
        failure = f"the request failed (status {status or 200}): {problem}"
        return [], [RawTrace([], failed=failure)], record
    completions = [_choice(c or {}, f"choices[{i}]", row.fields) for i, c in enumerate(choices)]
    known = {**asked, **{k: v for k, v in request.items() if k != "body"}, **record}
    known.setdefault("model", body.get("model"))
    row.tools = raw.read_tools(asked.get("tools"))
    return _prompt(row, asked), completions, known


def _prompt(row: Row, asked: Record) -> list[Message]:
    """The messages of what was asked, system text included."""
    own = row
    if asked is not row.record:
        own = Row(asked, dataclasses.replace(row.fields, prompt="", system_prompt=""))
    elif isinstance(asked.get("output"), list) and not asked.get("messages"):
        own = Row({k: v for k, v in asked.items() if k != "output"}, row.fields)  # Responses
    try:
        prompt = own.prompt(first="messages")
    except BadRecordError as error:
        if "expected the field" not in str(error):
            raise
        of = f" for custom_id {row.record['custom_id']!r}" if row.record.get("custom_id") else ""
        raise BadRecordError(
            f"no prompt{of}: a batch output has none of its own; name the request file before it "
            "(data.traces=requests.jsonl,outputs.jsonl), or write messages beside the answer"
        ) from error
    text = asked.get("instructions")  # of Responses
    lead = own.system(prompt)
    if isinstance(text, str) and text.strip() and not lead and prompt[0]["role"] != "system":
        lead = [{"role": "system", "content": text}]
    row.used |= own.used if own.record is not asked or own is row else set()
    return [*lead, *prompt]


def _choices(body: Record) -> list[Any]:
    """An answer as OpenAI's choices; [] where it is empty."""
    output = body.get("output")
    if isinstance(output, list):
        return [_responses(body, output)] if output else []
    if body.get("candidates"):  # Gemini
        return [
            {"message": {"content": (c.get("content") or {}).get("parts")}}
            | {"finish_reason": c.get("finishReason")}
            for c in body["candidates"]
        ]
    if isinstance(body.get("message"), dict):  # Ollama
        reason = "length" if body.get("done") is False else body.get("done_reason")
        return [{"message": body["message"], "finish_reason": reason}]
    if body.get("content") is not None and "choices" not in body:  # Anthropic
        return [{"message": body, "finish_reason": body.get("stop_reason")}]
    if "choices" in body or not body:
        return body.get("choices") or []
    raise BadRecordError(
        f"the answer holds {', '.join(map(str, body))}; expected one of {', '.join(_KNOWN)}"
    )


def _responses(body: Record, output: list[Any]) -> Record:
    """The choice of a Responses answer: its messages, reasoning and calls in one message."""
    content: list[Any] = []
    calls = []
    for index, item in enumerate(output):
        kind = item.get("type", "message") if isinstance(item, dict) else raw.kind_of(item)
        if kind == "message":
            text = item.get("content") or []
            content += [{"type": "text", "text": text}] if isinstance(text, str) else text
        elif kind == "reasoning":
            content += [item] if item.get("content") or item.get("summary") else []
        elif kind == "function_call":
            calls.append({"id": item.get("call_id"), "function": item})
        else:
            raise BadRecordError(f"output[{index}] is of type {kind!r}; only messages can be read")
    why = (body.get("incomplete_details") or {}).get("reason") or body.get("status")
    message = {"content": content or None} | ({"tool_calls": calls} if calls else {})
    return {"message": message, "finish_reason": why}


def _choice(choice: Record, name: str, fields: Fields) -> RawTrace:
    message, text = choice.get("message"), choice.get("text")
    if "delta" in choice:
        raise BadRecordError(f"{name} is a piece of a streamed answer; join the pieces to messages")
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
    return sampled(choice, Turns([message]), logprobs=logprobs, token_bytes=texts)


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
