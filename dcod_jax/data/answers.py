"""Answers of APIs, alone or in a batch file: as OpenAI's choices, whatever the dialect.

Known are OpenAI's chat, completions and Responses, Anthropic's Messages, Bedrock's Converse,
Cohere, Gemini and Ollama.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dcod_jax.data import calls, raw, records, schema
from dcod_jax.data.columns import Row
from dcod_jax.data.presets import Fields
from dcod_jax.data.records import BadRecordError, Message, RawTrace, Record, Turns
from dcod_jax.data.told import finish

_ENVELOPE = ("id", "type", "model", "usage", "container", "stop_reason", "stop_sequence")
_SAID = ("message", "text", "content", "logprobs", "tool_calls")
TEXTS = ("text", "content", "completion", "response", "output", "generated_text", "generation")
_KNOWN = ("choices", "candidates", "output", "content", "message")  # where an answer is


def sampled(beside: Record, turns: Turns, **more: Any) -> RawTrace:
    """A completion with the token ids, log-probs and finish reason that the record has for it."""
    found = _of_tokens(beside.get("logprobs"))
    if "logprobs" not in more and found is not None:
        more["token_bytes"], more["logprobs"] = _choice_logprobs(found)
    more |= {n: records.read_list(beside, n) for n in ("token_ids", "logprobs") if n not in more}
    given = beside.get("finish_reason")
    more["finish_reason"] = "" if isinstance(given, list) else finish(given)
    more |= {"unsupervised": turns.unsupervised, "extras": turns.extras, "told": turns.told}
    return RawTrace(turns.messages, **more)


def _of_tokens(value: Any) -> Record | None:
    """A choice's `logprobs`, where a record has them without their choice."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "token" in value[0]:
        return {"content": value}
    return value if isinstance(value, dict) else None


def batch_name(record: Record) -> str | None:
    """The name that a request of a batch and its output share; Gemini's files call it key."""
    paired = isinstance(record.get("request") or record.get("response"), dict) or "error" in record
    name = record.get("custom_id")
    name = record.get("key") if name is None and paired else name
    return None if name is None else str(name)


def is_request(record: Record) -> bool:
    """Whether a line belongs to the request file of a batch: it holds prompts for the outputs."""
    body = record.get("body") or record.get("params")
    if "custom_id" not in record and "key" in record and "error" not in record:
        body = record.get("request")
    return (
        batch_name(record) is not None
        and isinstance(body, dict)
        and record.get("response") is None
        and record.get("result") is None
        and "choices" not in body
    )


def answer_of(record: Record) -> Record | None:
    """The part of a record that is an API's answer, or its failure; None where none is."""
    response, result = record.get("response"), record.get("result")
    if isinstance(response, dict):
        schema.check(response, schema.RESPONSE, "response")
        return response.get("body") or {} if "body" in response else response
    if "custom_id" in record and isinstance(result, dict):  # Anthropic's batches
        schema.check(result, {"message": dict}, "result")
        return result.get("message") or {"error": result.get("error") or result.get("type")}
    if batch_name(record) is not None and record.get("error"):
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
    if isinstance(record.get("content"), str) and "tokens_predicted" in record:  # llama.cpp
        return record
    candidates = record.get("candidates")
    several = candidates if isinstance(candidates, list) else []
    keys = {key for one in several if isinstance(one, dict) for key in one}  # Gemini's
    return record if keys & {"content", "finishReason", "finish_reason"} else None


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
    request = record.get("request")
    request = request if request and isinstance(request, dict) else record
    bodies = (part for key in ("body", "params") if isinstance(part := request.get(key), dict))
    asked = next(filter(None, bodies), request)
    asked = asked["request"] if isinstance(asked.get("request"), dict) else asked  # Gemini's files
    problem = record.get("error") or body.get("error") or body.get("promptFeedback")
    choices = [] if problem or status not in (None, 200) else _choices(body)
    if not choices:
        problem = str(problem or "the body has no choices")[:200]
        failure = f"the request failed{f' (status {status})' if status else ''}: {problem}"
        return [], [RawTrace([], failed=failure)], record
    records.check_parts(len(choices), len(row.leaves))
    completions = [_choice(c or {}, f"choices[{i}]", row.fields) for i, c in enumerate(choices)]
    own = {f"message.{key}" for key in record} if body is record else set()  # named as columns
    completions = [dataclasses.replace(c, extras=c.extras - own) for c in completions]
    known = {**asked, **{k: v for k, v in request.items() if k != "body"}, **record}
    known.setdefault("model", body.get("model"))
    row.tools = calls.read_tools(asked.get("tools"))
    row.used |= {"tools", "key"}
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
        name = batch_name(row.record)
        of = f" for custom_id {name!r}" if name else ""
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
            | {"finish_reason": c.get("finishReason", c.get("finish_reason"))}
            for c in (candidate or {} for candidate in body["candidates"])
        ]
    message = (output if isinstance(output, dict) else body).get("message")  # Converse has both
    if isinstance(message, dict):  # Ollama, Cohere
        names = ("done_reason", "finish_reason", "stop_reason", "stopReason")
        reason = next((body[name] for name in names if body.get(name)), None)
        reason = "length" if body.get("done") is False else reason
        return [{"message": message, "finish_reason": reason}]
    if body.get("content") is not None and "choices" not in body:  # Anthropic
        message = {key: value for key, value in body.items() if key not in _ENVELOPE}
        return [{"message": message, "finish_reason": body.get("stop_reason")}]
    if "choices" in body or not body:
        return body.get("choices") or []
    if isinstance(output, dict) and "choices" in output:  # DashScope
        return output["choices"] or []
    if text := next((name for name in TEXTS if isinstance(body.get(name), str)), None):
        return [{**body, "message": {"content": body[text]}, "text": None}]  # Ollama's generate
    raise BadRecordError(
        f"the answer holds {', '.join(map(str, body))}; expected one of {', '.join(_KNOWN)}"
    )


def _responses(body: Record, output: list[Any]) -> Record:
    """The choice of a Responses answer: its messages, reasoning and calls in one message."""
    content: list[Any] = []
    calls = []
    for index, item in enumerate(output):
        kind = item.get("type", "message") if isinstance(item, dict) else records.kind_of(item)
        if kind == "message":
            text = item.get("content") or []
            content += [{"type": "text", "text": text}] if isinstance(text, str) else text
        elif kind == "reasoning":
            told = ("content", "summary", "encrypted_content")
            content += [item] if any(item.get(key) for key in told) else []
        elif kind == "function_call":
            calls.append({"id": item.get("call_id"), "function": item})
        else:
            raise BadRecordError(f"output[{index}] is of type {kind!r}; only messages can be read")
    why = (body.get("incomplete_details") or {}).get("reason") or body.get("status")
    refusal = next(
        (p["refusal"] for p in content if isinstance(p, dict) and p.get("refusal")), None
    )
    message = {"content": content or None} | ({"tool_calls": calls} if calls else {})
    message |= {"content": None, "refusal": refusal} if refusal else {}
    return {"message": message, "finish_reason": why}


def _choice(choice: Record, name: str, fields: Fields) -> RawTrace:
    message, text = choice.get("message"), choice.get("text")
    if message is None and text is None:
        if "delta" in choice:
            raise BadRecordError(f"{name} is a piece of a streamed answer; join them to messages")
        raise BadRecordError(f"{name} must have a message or a text")
    given = raw.with_own_reasoning({"role": "assistant", **(message or {"content": text})}, choice)
    spoken = [given.get(key) for key in ("content", *raw.REASONING_KEYS, "tool_calls")]
    if choice.get("error"):  # OpenRouter: the provider failed on the way
        return RawTrace([], failed=f"{name} failed: {str(choice['error'])[:200]}")
    if not any(spoken) or all(isinstance(s, str) and not s.strip() for s in spoken if s):
        why = given.get("refusal") or choice.get("finish_reason") or "no text"
        return RawTrace([], failed=f"{name} is empty ({str(why)[:200]})")
    place = f"{name}.message" if message else f"{name}.text"
    message = raw.read_message(given, place, fields)
    texts, logprobs = _choice_logprobs(choice.get("logprobs"))
    extras = raw.unread(given, message, place, fields)
    told = {k: v for of in (given, choice) for k, v in of.items() if k not in _SAID}
    turns = Turns([message], extras=frozenset(f"message.{key}" for key in extras), told=(told,))
    return sampled(choice, turns, logprobs=logprobs, token_bytes=texts)


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
    if value.keys().isdisjoint(("content", "token_logprobs")):
        raise BadRecordError("choice.logprobs has neither content nor token_logprobs")
    return None, None
