"""Tools: their definitions, an assistant's calls of them, and what they gave, in any dialect."""

from __future__ import annotations

import json
from typing import Any

from dcod_jax.data.json_text import parse
from dcod_jax.data.presets import listed
from dcod_jax.data.records import BadRecordError, Message, Record, kind_of


def results(message: Any) -> list[Message]:
    """Messages by tool for the results of calls (Anthropic, Bedrock, Gemini), and the rest."""
    content = message.get("content", message.get("parts")) if isinstance(message, dict) else None
    found, rest = [], []
    for part in content if isinstance(content, list) else ():
        result = part if isinstance(part, dict) else {}
        if result.get("type") != "tool_result":
            result = result.get("toolResult") or result.get("functionResponse")
        if isinstance(result, dict):
            given = result.get("content", result.get("response"))
            text = given if isinstance(given, str | list) else json.dumps(given, ensure_ascii=False)
            found.append({"role": "tool", "content": text})
        else:
            rest.append(part)
    return [*found, *([{"role": "user", "content": rest}] if rest else [])] if found else []


def calls_of_parts(content: list[Any]) -> tuple[list[Any], list[Any]] | None:
    """(calls, other parts) of a content with tool calls among its parts; None without any.

    They are Anthropic's tool_use, Bedrock's toolUse and Gemini's functionCall.
    """
    calls, rest = [], []
    for part in content:
        call = part if isinstance(part, dict) else {}
        if call.get("type") != "tool_use":
            call = call.get("toolUse") or call.get("functionCall")
        if isinstance(call, dict):
            arguments = call.get("input", call.get("args", {}))
            own = call.get("id", call.get("toolUseId"))
            calls.append({"id": own, "name": call.get("name"), "arguments": arguments})
        elif calls:
            raise BadRecordError(
                "a message has text behind a tool call, and would be trained in another order; "
                "write the text before its calls"
            )
        else:
            rest.append(part)
    return (calls, rest) if calls else None


def read_calls(message: Record, name: str) -> dict[str, Any]:
    """{"tool_calls": [...]} with arguments as objects, the form that templates read, or {}."""
    given, legacy = message.get("tool_calls"), message.get("function_call")
    calls, found = given or ([legacy] if legacy else []), []
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        call = listed(call)  # verifiers keep each as JSON text
        inner = call.get("function", call) if isinstance(call, dict) else {}
        inner = inner if isinstance(inner, dict) else {}
        arguments = inner.get("arguments", inner.get("args"))
        if isinstance(arguments, str):
            arguments = listed(arguments) if arguments.strip() else {}
        if not isinstance(inner.get("name"), str) or not isinstance(arguments, dict):
            raise BadRecordError(
                f"{name}: tool call {index} must have a name and arguments, an object or its JSON "
                f"text, found {str(call)[:80]}"
            )
        function = {"name": inner["name"], "arguments": arguments}
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", "function": function, **own})
    return {"tool_calls": found} if found else {}


def read_tools(value: object, functions: object = None) -> list[Any] | None:
    """Tool definitions: a list, or its JSON text; None where there are none.

    functions: OpenAI's older form of them.
    """
    if isinstance(older := listed(functions), list) and not value:
        value = [{"type": "function", "function": one} for one in older]
    if isinstance(value, str) and value.strip():
        try:
            value = parse(value)
        except BadRecordError as error:
            raise BadRecordError(f"tools is no JSON list of definitions: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict | str) for tool in value):
        raise BadRecordError(f"tools must be a list of definitions, found {kind_of(value)}")
    return value
