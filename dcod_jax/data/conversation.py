"""The conversation of a trace in its meta, so that another tokenizer and template can encode it.

A message's content is the two ends of its place in the decoded trace, or the text itself where a
template wrote another one: {"messages": [{"role": "user", "content": [23, 87]}, ...]}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dcod_jax.data import chat
from dcod_jax.data.records import RawTrace
from dcod_jax.data.tokenizer import Tokenizer, decode
from dcod_jax.data.turns import reasoning_rule
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

FIELDS = ("messages", "supervised", "tools")  # of a trace's meta


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with role and content, which of them are supervised, and the tools shown."""

    messages: list[dict[str, Any]]
    supervised: list[int]
    tools: list[Any] | None = None

    def encode(self, tokenizer: Tokenizer) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Token ids and mask, as `chat.encode`, with reasoning in the template's own form."""
        others = set(range(len(self.messages))) - set(self.supervised)
        rule = reasoning_rule(tokenizer, "auto")
        messages = [
            m | {"content": rule.fold(m["content"], "")} if m["role"] == "assistant" else m
            for m in self.messages
        ]
        return chat.encode(tokenizer, messages, unsupervised=others, tools=self.tools)


def remember(tokenizer: Tokenizer, raw: RawTrace, token_ids: Sequence[int]) -> dict[str, Any]:
    """Meta fields that `recall` reads."""
    text, place = decode(tokenizer, token_ids), 0
    messages: list[dict[str, Any]] = []
    for message in raw.messages:
        start = text.find(message["content"], place)
        if start < 0:
            messages.append(message)
            continue
        place = start + len(message["content"])
        messages.append(message | {"content": [start, place]})
    fields: dict[str, Any] = {"messages": messages}
    if raw.supervised() != [len(messages) - 1]:
        fields["supervised"] = raw.supervised()
    if raw.tools:
        fields["tools"] = raw.tools
    return fields


def recall(tokenizer: Tokenizer, trace: Trace) -> Conversation:
    """The conversation that prepare remembered; tokenizer: the one of the trace's ids."""
    if "messages" not in trace.meta:
        raise DcodError(
            f"trace {trace.id!r} has no messages in its meta, which a teacher with another "
            "tokenizer needs: prepare the traces again with this version of dcod_jax"
        )
    text, messages = decode(tokenizer, trace.token_ids.tolist()), []
    for message in trace.meta["messages"]:
        content = message["content"]
        whole = content if isinstance(content, str) else text[content[0] : content[1]]
        messages.append(message | {"content": whole})
    supervised = trace.meta.get("supervised", [len(messages) - 1])
    return Conversation(messages, supervised, trace.meta.get("tools"))
