"""One raw record, in any of the forms users have, to one or more traces.

    {"prompt" | "messages", "completion", "answer"?, "logprobs"?, "token_ids"?, ...}   TRL, plain
    {"messages": [..., {"role": "assistant", ...}]}                                    TRL
    {"conversations": [{"from": "human" | "gpt" | "system", "value"}], "system"?}      ShareGPT
    {"custom_id", "response": {"body": {"choices": [...]}}}      OpenAI / vLLM batch output
    {"prompt", "outputs": [{"text", "token_ids", "logprobs"}]}   vLLM generate

Several samples of one prompt (a list of completions, n choices) are several traces.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from dcod_jax.errors import DcodError

PROMPT_FIELDS = ("prompt", "question", "problem", "instruction")
COMPLETION_FIELDS = ("completion", "response", "output", "solution")
CONVERSATION_FIELDS = ("messages", "conversations")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

Message = dict[str, str]


class BadRecordError(DcodError):
    """A record that cannot be read; the message has no file and line yet."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where the parts of a record are; an empty name stands for the synonyms above."""

    prompt: str = ""
    completion: str = ""
    answer: str = "answer"
    system_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class RawTrace:
    """One trace as delivered; nothing is tokenised yet."""

    id: str
    messages: list[Message]
    first_completion: int  # assistant messages from this index on are the teacher's
    source: str  # "file:line"
    record: Any  # the whole record, for the quarantine
    answer: str | None = None
    token_ids: list[Any] | None = None  # of the completion, as delivered
    token_bytes: list[bytes] | None = None  # where an API gives token texts in place of ids
    logprobs: list[Any] | None = None  # one number a token, as delivered
    finish_reason: str = ""
    model: str = ""  # the teacher's name and sampling temperature where the record tells
    temperature: float | None = None

    def prompt_text(self) -> str:
        """The conversation before the completion, without system messages."""
        last = max(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        end = self.first_completion if self.first_completion else last
        shown = [m["content"] for m in self.messages[:end] if m["role"] != "system"]
        return "\n".join(shown)

    def completion_text(self) -> str:
        """The last assistant message: where the final answer is."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"][-1]


@dataclasses.dataclass(frozen=True)
class _Completion:
    """One sampled completion and what came with it."""

    messages: list[Message]
    token_ids: list[Any] | None = None
    token_bytes: list[bytes] | None = None
    logprobs: list[Any] | None = None
    finish_reason: str = ""


# ---------------------------------------------------------------- small readers


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _get_list(record: Mapping[str, Any], name: str) -> list[Any] | None:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise BadRecordError(f"{name} must be a list, found {_kind(value)}")
    return value


def _text(value: Any, name: str) -> str:
    """A non-empty string; parts [{"type": "text", "text": ...}] are joined."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise BadRecordError(f"{name} has a part of type {other[0]!r}; only text is supported")
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadRecordError(f"{name} must be a string, found {_kind(value)}")
    if not value.strip():
        raise BadRecordError(f"{name} is empty")
    return _unicode(value, name)


def _unicode(text: str, name: str) -> str:
    r"""Refuse half of a surrogate pair, which JSON can spell (\ud83d) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name} holds {text[error.start]!a} at character {error.start}, half a surrogate pair"
        ) from error
    return text


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{name} must be a non-empty list of messages, found {_kind(value)}")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if isinstance(value, dict) and "from" in value and "role" not in value:
        return _sharegpt_message(value, name)
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        found = ", ".join(value) if isinstance(value, dict) else _kind(value)
        raise BadRecordError(f"{name} must have role and content, found {found}")
    if value["role"] not in ROLES:
        raise BadRecordError(f"{name} has the role {value['role']!r}; expected {', '.join(ROLES)}")
    for extra in ("tool_calls", "reasoning_content", "reasoning"):
        if value.get(extra):
            raise BadRecordError(
                f"{name} carries {extra} beside its content, which would be lost; write it into "
                "content in the form that the student is to produce"
            )
    return {"role": value["role"], "content": _text(value["content"], f"{name}.content")}


def _sharegpt_message(value: Mapping[str, Any], name: str) -> Message:
    role = SHAREGPT_ROLES.get(value["from"]) if isinstance(value["from"], str) else None
    if role is None:
        raise BadRecordError(
            f"{name} is from {value['from']!r}; expected {', '.join(SHAREGPT_ROLES)}"
        )
    if "value" not in value:
        raise BadRecordError(f"{name} must have from and value, found {', '.join(value)}")
    return {"role": role, "content": _text(value["value"], f"{name}.value")}


def _conversation(record: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of a field; ShareGPT's system message may stand beside them."""
    messages = _messages(record[name], name)
    system = record.get("system") if name == "conversations" else None
    if system is None or system == "":
        return messages
    if messages[0]["role"] == "system":
        raise BadRecordError("a system message stands in conversations and beside them in system")
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _find(record: Mapping[str, Any], *, chosen: str, synonyms: Sequence[str]) -> str | None:
    """Name of the field that holds the prompt or the completion; None when there is none."""
    if chosen:
        return chosen if chosen in record else None
    return next((name for name in synonyms if name in record), None)


def _missing(record: Mapping[str, Any], *, what: str, chosen: str, names: Sequence[str]) -> Any:
    names = [chosen] if chosen else list(names)
    close = [m for n in names for m in difflib.get_close_matches(n, list(record), n=1, cutoff=0.7)]
    hint = f" (the nearest is {close[0]!r})" if close else ""
    return BadRecordError(
        f"no {what}: expected the field {' or '.join(names)}, found "
        f"{', '.join(record) or 'nothing'}{hint}; prepare.{what}_field names another one"
    )


def _answer(record: Mapping[str, Any], fields: Fields) -> str | None:
    value = record.get(fields.answer) if fields.answer else None
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecordError(
            f"{fields.answer} must be a string or a number, found {_kind(value)}; "
            "prepare.answer_field names another field"
        )
    return _unicode(str(value), fields.answer)


# ---------------------------------------------------------------- completions


def _position_logprob(entry: Any, token: Any) -> Any:
    """The number in one position of a vLLM log-prob list: a number, or {token id: Logprob}."""
    if isinstance(entry, dict):
        entry = entry.get(str(token), entry)
        if isinstance(entry, dict):
            entry = entry.get("logprob")
    return entry


def _openai_logprobs(value: Any) -> tuple[list[bytes] | None, list[Any] | None]:
    """(token bytes, log-probs) of a choice's `logprobs`, chat or completions form."""
    if not value:
        return None, None
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        entries = value["content"]
        texts = [
            bytes(e["bytes"]) if e.get("bytes") is not None else str(e.get("token", "")).encode()
            for e in entries
        ]
        return texts, [entry.get("logprob") for entry in entries]
    if isinstance(value, dict) and isinstance(value.get("token_logprobs"), list):
        tokens = value.get("tokens") or []
        return [str(token).encode() for token in tokens], value["token_logprobs"]
    raise BadRecordError("choice.logprobs has neither content nor token_logprobs")


def _choice(choice: Any, index: int) -> _Completion:
    name = f"choices[{index}]"
    if not isinstance(choice, dict) or not ("message" in choice or "text" in choice):
        raise BadRecordError(f"{name} must have a message or a text")
    if "message" in choice:
        messages = [_message({"role": "assistant", **choice["message"]}, f"{name}.message")]
    else:
        messages = [{"role": "assistant", "content": _text(choice["text"], f"{name}.text")}]
    texts, logprobs = _openai_logprobs(choice.get("logprobs"))
    return _Completion(
        messages,
        token_ids=_get_list(choice, "token_ids"),
        token_bytes=texts,
        logprobs=logprobs,
        finish_reason=str(choice.get("finish_reason") or ""),
    )


def _vllm_output(output: Any, index: int) -> _Completion:
    name = f"outputs[{index}]"
    if not isinstance(output, dict) or "text" not in output:
        raise BadRecordError(f"{name} must have a text")
    ids, logprobs = _get_list(output, "token_ids"), _get_list(output, "logprobs")
    if logprobs is not None and ids is not None and len(ids) == len(logprobs):
        logprobs = [_position_logprob(e, t) for e, t in zip(logprobs, ids, strict=True)]
    return _Completion(
        [{"role": "assistant", "content": _text(output["text"], f"{name}.text")}],
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=str(output.get("finish_reason") or ""),
    )


def _field_completions(record: Mapping[str, Any], name: str) -> list[_Completion]:
    value = record[name]
    if isinstance(value, list) and value and isinstance(value[0], str):
        samples = [_text(text, f"{name}[{index}]") for index, text in enumerate(value)]
        return [_Completion([{"role": "assistant", "content": text}]) for text in samples]
    if isinstance(value, list):
        messages = _messages(value, name)
    else:
        messages = [{"role": "assistant", "content": _text(value, name)}]
    ids, logprobs = _get_list(record, "token_ids"), _get_list(record, "logprobs")
    reason = str(record.get("finish_reason") or "")
    return [_Completion(messages, token_ids=ids, logprobs=logprobs, finish_reason=reason)]


# ---------------------------------------------------------------- records


def _prompt(record: Mapping[str, Any], name: str) -> list[Message]:
    value = record[name]
    if isinstance(value, list):
        return _conversation(record, name)
    text = _text(value, name)
    if name == "instruction" and isinstance(record.get("input"), str) and record["input"].strip():
        text = f"{text}\n\n{record['input']}"  # Alpaca
    return [{"role": "user", "content": text}]


def _split(record: Mapping[str, Any], fields: Fields) -> tuple[list[Message], list[_Completion]]:
    """(prompt, completions) of any form but the batch output's."""
    prompt_name = _find(record, chosen=fields.prompt, synonyms=PROMPT_FIELDS)
    conversation = next((name for name in CONVERSATION_FIELDS if name in record), None)
    prompt_name = prompt_name or conversation
    if isinstance(record.get("outputs"), list):
        completions = [_vllm_output(o, i) for i, o in enumerate(record["outputs"])]
        prompt_name = "messages" if "messages" in record else prompt_name
    else:
        name = _find(record, chosen=fields.completion, synonyms=COMPLETION_FIELDS)
        if name is None and conversation and not fields.completion:
            return [], [_whole_conversation(record, conversation)]
        if name is None:
            raise _missing(
                record, what="completion", chosen=fields.completion, names=COMPLETION_FIELDS
            )
        completions = _field_completions(record, name)
    if prompt_name is None:
        raise _missing(record, what="prompt", chosen=fields.prompt, names=PROMPT_FIELDS)
    return _prompt(record, prompt_name), completions


def _whole_conversation(record: Mapping[str, Any], name: str) -> _Completion:
    messages = _conversation(record, name)
    if messages[-1]["role"] != "assistant":
        raise BadRecordError(
            f"the last of {name} is by {messages[-1]['role']!r}, and there is no completion"
        )
    if messages[0]["role"] == "assistant" or len(messages) < 2:
        raise BadRecordError(f"{name} has no prompt before its first assistant message")
    ids, logprobs = _get_list(record, "token_ids"), _get_list(record, "logprobs")
    reason = str(record.get("finish_reason") or "")
    return _Completion(messages, token_ids=ids, logprobs=logprobs, finish_reason=reason)


def is_request(record: Mapping[str, Any]) -> bool:
    """Whether a line belongs to the request file of a batch: it holds prompts for the outputs."""
    return "custom_id" in record and "body" in record and "response" not in record


def _batch(
    record: Mapping[str, Any], fields: Fields, requests: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Message], list[_Completion], dict[str, Any]]:
    """(prompt, completions, everything else known) of an OpenAI or vLLM batch output line."""
    response = record.get("response", {"body": record})
    body, status = response.get("body") or {}, response.get("status_code", 200)
    if status != 200 or record.get("error") or "choices" not in body:
        problem = record.get("error") or body.get("error") or "the body has no choices"
        raise BadRecordError(f"the request failed (status {status}): {problem}")
    request = record.get("request") or requests.get(str(record.get("custom_id"))) or record
    asked = request.get("body") or request
    if asked.get("messages"):
        prompt = _messages(asked["messages"], "messages")
    elif asked.get("prompt"):
        prompt = [{"role": "user", "content": _text(asked["prompt"], "prompt")}]
    else:
        raise BadRecordError(
            f"no prompt for custom_id {record.get('custom_id')!r}: a batch output has none of its "
            "own; name the request file before it (data.traces=requests.jsonl,outputs.jsonl)"
        )
    completions = [_choice(choice, index) for index, choice in enumerate(body["choices"])]
    known = {**asked, **{k: v for k, v in request.items() if k != "body"}, **record}
    known.setdefault("model", body.get("model"))
    return prompt, completions, known


def read_record(
    record: Any, fields: Fields, *, source: str, requests: Mapping[str, Mapping[str, Any]]
) -> list[RawTrace]:
    """The traces of one record. Raises BadRecordError (the caller adds `source`)."""
    if not isinstance(record, dict):
        raise BadRecordError(f"expected a JSON object, found {_kind(record)}")
    known: Mapping[str, Any] = record
    if isinstance(record.get("response"), dict) or isinstance(record.get("choices"), list):
        prompt, completions, known = _batch(record, fields, requests)
    else:
        prompt, completions = _split(record, fields)
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
        traces.append(
            RawTrace(
                id=base if len(completions) == 1 else f"{base}/{index}",
                messages=messages,
                first_completion=len(prompt) + system if prompt else 0,
                source=source,
                record=record,
                answer=_answer(known, fields),
                token_ids=completion.token_ids,
                token_bytes=completion.token_bytes,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                model=str(known.get("model") or ""),
                temperature=float(temperature) if isinstance(temperature, int | float) else None,
            )
        )
    return traces
