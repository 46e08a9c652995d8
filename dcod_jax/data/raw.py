"""The checked reading of a record's messages: their roles, texts and reasoning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dcod_jax.data.calls import calls_of_parts, read_calls, results
from dcod_jax.data.presets import TELLING, Fields, leaves, listed
from dcod_jax.data.reasoning import Reasoning, has_reasoning, is_switch, may_be_reasoning
from dcod_jax.data.records import BadRecordError, Message, Record, Turns, kind_of, truth
from dcod_jax.errors import DcodError

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# ShareGPT's, Llama's and Gemini's names, understood in every conversation.
_OTHERS = {"human": "user", "prompter": "user"}
_OTHERS |= dict.fromkeys("gpt model ai chatgpt chatbot bot bing bard claude".split(), "assistant")
_OTHERS |= dict.fromkeys(
    "observation function_response function tool_response tool_result ipython".split(), "tool"
)
KNOWN = ROLES | _OTHERS
ANSWERING = {name for name, role in KNOWN.items() if role == "assistant"}
# Turns that are a part of an assistant's: its calls, as text; its reasoning, before its answer.
_CALLING = ("function_call", "tool_call", "tool_calls")
_REASONING_TURNS = ("thinking", "reasoning", "thought", "analysis")
ANSWERING |= set(_CALLING)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Where a part of type thinking has its text, in the words of the APIs.
_THINKING = ("thinking", "reasoning", "text", "content", "summary")
_THINKING = (*_THINKING, "reasoningContent", "reasoningText")  # Bedrock
_REASONING_PARTS = ("reasoning_details", "thinking_blocks", "thought", "thoughts")
# Whether a turn is trained on, in the words of trainers; and keys that may be another's.
_TRAINED = ("weight", "train", "training", "loss", "trainable", "train_on_turn")
_TRAINED = (*_TRAINED, "loss_weight", "loss_mask", "output_with_loss")
_MAYBE_TRAINED = re.compile("mask|(?<!cons)train|loss|learn|supervis", re.IGNORECASE)
_MAYBE_NOT = ("ignore", "ignored", "skip", "skipped", "exclude", "excluded", "prefix", "partial")
# A message's other keys that carry nothing to train on.
_TEXTS = ("content", "value", "text", "parts", "message")
_PLAIN_KEYS = {"role", "from", *_TEXTS, *REASONING_KEYS}
_PLAIN_KEYS |= {*_REASONING_PARTS, *_TRAINED, "masked", "finish_reason", "stop_reason"}
_PLAIN_KEYS |= {"refusal", "annotations", "audio", "tool_calls", "function_call", "channel"}


def read_text(value: object, name: str) -> str:
    """A non-empty string; parts [{"type": "text", "text": ...}] are joined."""
    text, reasoning = parts(value, name, drop=True)
    if reasoning:
        raise BadRecordError(f"{name} has a part of type 'thinking', and is no answer; write text")
    if not text.strip():
        raise BadRecordError(f"{name} is empty")
    return text


_ENCRYPTED = ("reasoning.encrypted", "redacted_thinking", "redactedContent")


def _is_encrypted(part: Record) -> bool:
    """Whether a part of reasoning tells nothing of it: its text is encrypted, or left out."""
    kind = part.get("type") or next(iter(part), "")
    hidden = part.get("encrypted_content") or (kind == "thinking" and part.get("signature"))
    return kind in _ENCRYPTED or bool(hidden and not any(part.get(key) for key in _THINKING))


def parts(value: object, name: str, *, drop: bool = False) -> tuple[str, str]:
    """(text, reasoning) of a string or of typed parts; drop: reasoning will be left out."""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list) or not value or not all(isinstance(p, dict) for p in value):
        found = "an empty list" if value == [] else kind_of(value)
        parts_are = '; parts are {"type": "text", "text": ...}' if value and found == "list" else ""
        raise BadRecordError(f"{name} must be a string, found {found}{parts_are}")
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    late = False
    for part in value:
        kind = str(part.get("type") or ("text" if "text" in part else ", ".join(part)))
        place = "thinking" if kind.startswith("reasoning") or kind == "summary_text" else kind
        place = "text" if kind in ("output_text", "input_text") else place
        if _is_encrypted(part):
            if drop:
                continue
            raise BadRecordError(
                f"{name} has a part of type {kind!r}: reasoning that is encrypted cannot be "
                "trained on; prepare.reasoning=drop trains on the answers alone"
            )
        if place not in texts:
            told = "only text is supported: write what it says as text, or take it out"
            raise BadRecordError(f"{name} has a part of type {kind!r}; {told}")
        keys = _THINKING if place == "thinking" else ("text",)
        if not any(key in part for key in keys):
            raise BadRecordError(f"{name} has a part of type {kind!r} without {' or '.join(keys)}")
        inner = next((part[key] for key in keys if part.get(key)), "")
        inner = [inner] if isinstance(inner, dict) else inner
        if isinstance(inner, list):
            inner = "".join(parts(inner, f"{name}.{place}", drop=drop))
        place = "thinking" if part.get("thought") is True else place  # Gemini
        if not isinstance(inner, str):
            raise BadRecordError(f"{name}.{place} must be a string, found {kind_of(inner)}")
        late |= place == "thinking" and any(map(str.strip, texts["text"]))
        texts[place].append(inner)
    if late and not drop:
        raise BadRecordError(
            f"{name} has reasoning behind a part of its text, and would be trained in another "
            "order; write the turn as one text, or set prepare.reasoning=drop"
        )
    return "".join(texts["text"]), "\n".join(texts["thinking"])


def thoughts(value: object, name: str) -> list[str]:
    """The texts of a field of reasoning: one, one for each completion, or [] where it has none."""
    if isinstance(value, dict):
        value = next((value[key] for key in _THINKING if value.get(key)), None)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        readable = [part for part in value if not isinstance(part, dict) or not _is_encrypted(part)]
        text = "".join(parts(readable or value, name))
        return [text] if text.strip() else []
    texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BadRecordError(f"{name} must be a string or strings, found {kind_of(value)}")
    return [text or "" for text in texts] if any((text or "").strip() for text in texts) else []


def read_messages(value: object, name: str, fields: Fields) -> Turns:
    """The messages of a conversation; system messages without text are left out."""
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else kind_of(value)
        raise BadRecordError(f"{name} must be a non-empty list of messages, found {found}")
    messages, skipped, extras, told = [], set(), set(), []
    for place, item in _whole_turns(value, name):
        message = read_message(item, place, fields)
        extras |= {f"{name}[].{key}" for key in unread(item, message, place, fields)}
        if not message["content"].strip() and message["role"] in ROLES.keys() - {
            "assistant",
            "tool",
        }:
            continue
        if message["role"] == "assistant":
            if _is_supervised(item, place):
                told.append({k: v for k, v in item.items() if k not in _TEXTS})
            else:
                skipped.add(len(messages))
        messages.append(message)
    if not messages:
        raise BadRecordError(f"{name} holds no message with text")
    return Turns(messages, frozenset(skipped), frozenset(extras), tuple(told))


def _whole_turns(value: list[Any], name: str) -> Iterator[tuple[str, Any]]:
    """(place, message), with a turn of reasoning in the answer that follows it.

    Results of tools among the parts of a user's message are messages of their own.
    """
    thought: list[str] = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        role = str(item.get("role", item.get("from", ""))).lower() if isinstance(item, dict) else ""
        channel = item.get("channel") if role in ANSWERING else None
        if role in _REASONING_TURNS or channel == "analysis":
            text = next((item[key] for key in _TEXTS if item.get(key)), "")
            thought.append("".join(parts(text, place)))
            continue
        if thought and role not in ANSWERING:
            raise BadRecordError(f"{place} must be the answer that the reasoning before it is of")
        if channel == "commentary" and not item.get("tool_calls"):
            raise BadRecordError(
                f"{place} is of the channel {channel!r}, which is no answer; join it to the "
                "message of the channel 'final', or take it out"
            )
        if thought:
            item, thought = {**item, "reasoning_content": "\n".join(thought)}, []
        yield from [(place, found) for found in results(item) or [item]]
    if thought:
        raise BadRecordError(f"the last of {name} is reasoning, and no answer follows it")


def _is_supervised(message: Record, name: str) -> bool:
    given = {key: message[key] for key in (*_TRAINED, "masked") if message.get(key) is not None}
    for key, value in given.items():
        if truth(value) is None:
            raise BadRecordError(f"{name}.{key} is {value!r}; expected 0 or 1")
    return all(truth(value) == (key != "masked") for key, value in given.items())


def unread(item: Record, message: Message, name: str, fields: Fields) -> list[str]:
    """Keys of a message that nothing reads.

    Refuses those of an assistant's that may say what its turn lacks.
    """
    found = {k: v for k, v in item.items() if k not in _PLAIN_KEYS}
    found = {
        k: v
        for k, v in leaves(found)
        if v not in (None, "", [], {}) and k != fields.reasoning_field
    }
    for key, value in found.items() if message["role"] == "assistant" else ():
        not_whole = key.lower() in _MAYBE_NOT and truth(value) is not False
        flag = "." not in key and not (isinstance(value, str) and " " in value)
        if not_whole or (flag and _MAYBE_TRAINED.search(key)):
            raise BadRecordError(
                f"{name}.{key} may say whether the turn is trained on; known are "
                f"{', '.join(_TRAINED)} (0 or false: not) and masked; rename it, or take it out"
            )
        if may_be_reasoning(key, value):
            check_reasoned(key, message["content"], fields)
    return [key for key in found if "." not in key or TELLING.search(key)]


def check_reasoned(name: str, text: str, fields: Fields) -> None:
    """Refuse a completion without reasoning beside an unread field that may hold it."""
    rule: Reasoning = fields.reasoning
    if rule.policy != "drop" and not has_reasoning(text):
        raise BadRecordError(
            f"{name} may be the reasoning of the completion, which has none: set "
            f"prepare.reasoning_field={name}, or prepare.reasoning=drop to leave reasoning out"
        )


def read_message(value: object, name: str, fields: Fields) -> Message:
    """A message of any dialect: role or from, content, value or parts; reasoning is folded in."""
    if isinstance(value, dict) and "parts" in value and value.keys().isdisjoint(("role", "from")):
        value = {"role": "user", **value}  # Gemini's, which may leave it out
    by = "from" if isinstance(value, dict) and "from" in value and "role" not in value else "role"
    texts = ("value", "content") if by == "from" else ("content", "value", "parts")
    texts = (*texts, "text", "message")  # the last is Cohere's
    text = next((t for t in texts if isinstance(value, dict) and value.get(t) is not None), "")
    if not isinstance(value, dict) or by not in value:
        found = ", ".join(value) if isinstance(value, dict) else kind_of(value)
        raise BadRecordError(f"{name} must have {by} and {texts[0]}, found {found}")
    given = value[by].strip().lower() if isinstance(value[by], str) else value[by]
    if given in _CALLING:
        calls = listed(value.get(text))
        calls = calls if isinstance(calls, list) else [calls]
        given, text, value = "assistant", "", {**value, "tool_calls": calls}
    content = value.get(text)
    if isinstance(content, list) and (split := calls_of_parts(content)):
        value = {**value, text: split[1] or "", "tool_calls": split[0]}
    role = KNOWN.get(given) if isinstance(given, str) else None
    if role is None:
        told = "is from" if by == "from" else "has the role"
        expected = ", ".join([*KNOWN, *_CALLING])
        raise BadRecordError(f"{name} {told} {value[by]!r}; expected {expected}")
    calls = read_calls(value, name)
    if calls and role != "assistant":
        raise BadRecordError(f"{name} has tool calls, and the role {role!r}")
    reasoning = _reasoning_of(value, name, fields) if role == "assistant" else ""
    if not text and not reasoning and not calls:
        null = next((f"{name}.{key} is null" for key in texts if key in value), "")
        raise BadRecordError(
            (null or f"{name} must have {by} and {texts[0]}, found {', '.join(value)}")
            + (f"; refusal: {str(value['refusal'])[:80]}" if value.get("refusal") else "")
        )
    drop = role != "assistant" or fields.reasoning.policy == "drop"
    content, thought = ("", "")
    if text and value[text] != "":
        content, thought = parts(value[text], f"{name}.{text}", drop=drop)
    if role in ("system", "tool") and not content.strip():
        return {"role": role, "content": ""}
    if role != "assistant":
        return {"role": role, "content": read_text(value[text], f"{name}.{text}")}
    reasoning = reasoning or thought
    if calls and not content.strip() and not reasoning.strip():
        return {"role": role, "content": "", **calls}
    return {"role": role, "content": fold(content, reasoning, f"{name}.{text}", fields), **calls}


def _reasoning_of(message: Record, name: str, fields: Fields) -> str:
    """The reasoning of a message that has it in a key of its own."""
    chosen = fields.reasoning_field
    own = dict(leaves(message)) if "." in chosen else message
    given = {key: value for key, value in own.items() if value and not is_switch(value)}
    keys = (chosen,) if chosen in own else REASONING_KEYS
    if keys is REASONING_KEYS and given.keys().isdisjoint(keys):
        keys = _REASONING_PARTS
    found = {key: given[key] for key in keys if key in given}
    texts = {key: thoughts(value, f"{name}.{key}") for key, value in found.items()}
    for key, text in texts.items():
        readable = isinstance(value := found[key], str | list) or (
            isinstance(value, dict) and not value.keys().isdisjoint(_THINKING)
        )
        if not text and not readable:
            raise BadRecordError(f"{name}.{key} must be a string, found {kind_of(value)}")
    return "\n".join(only({f"{name}.{key}": text for key, text in texts.items() if text}, fields))


def only(found: dict[str, list[str]], fields: Fields) -> list[str]:
    """The reasoning that each of these fields has; refused where they differ and it is kept."""
    differ = len({" ".join(" ".join(texts).split()) for texts in found.values()}) > 1
    if differ and fields.reasoning.policy != "drop":
        raise BadRecordError(
            f"the reasoning in {' and '.join(found)} differs; prepare.reasoning_field names the "
            "one that is meant"
        )
    return next(iter(found.values()), [])


def with_own_reasoning(message: Message, beside: Record) -> Message:
    """A message with the reasoning that is beside it in its choice or object."""
    if any(message.get(key) for key in REASONING_KEYS):
        return message
    return message | {key: beside[key] for key in REASONING_KEYS if beside.get(key)}


def fold(text: str, reasoning: str, name: str, fields: Fields) -> str:
    """A completion with its reasoning, as `Reasoning.fold`; refused where both are empty."""
    if not text.strip() and not reasoning.strip():
        raise BadRecordError(f"{name} is empty")
    rule: Reasoning = fields.reasoning
    try:
        whole = rule.fold(text, reasoning)
    except DcodError as error:
        raise BadRecordError(f"{name}: {error}") from error
    return whole if whole.strip() else f"{rule.opening}{rule.closing}"  # no answer: unfinished


def assistant(value: object, name: str, fields: Fields, reasoning: str = "") -> Turns:
    """One assistant message of a text (or of parts)."""
    text, thought = parts(value, name)
    content = fold(text, reasoning or thought, name, fields)
    return Turns([{"role": "assistant", "content": content}])
