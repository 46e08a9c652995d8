"""Messages to token ids and a completion mask; no other file knows chat templates.

A conversation is rendered to text once. The supervised part of each assistant turn is found in
that text, and token borders are put exactly on its two ends:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n«Hello<|im_end|>»\\n

A supervised turn starts where the generation prompt ends, so that training sees what sampling
sees, and ends with the end-of-turn token; what a template writes after that (a newline) is not
supervised. Where a template has `{% generation %}` markers they decide, and are checked; elsewhere
the text of the prompt with its generation prompt must be a prefix of the whole. A template that
strips reasoning, or opens it in the generation prompt, gives generation prompt + completion + end
for a supervised last turn. A tokenizer without a template gives prompt + completion + eos, prompt
and completion being plain strings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dcod_jax.data.reasoning import closing, is_mark, opened
from dcod_jax.data.templates import READY
from dcod_jax.data.tokenizer import Tokenizer, chat_template, decode, library_errors
from dcod_jax.data.turns import (
    Message,
    Text,
    calls_end,
    check_calls,
    check_shown,
    render_chat,
    render_turns_ahead,
    shared_prefix,
    special_names,
    special_tokens,
    turn_ending,
    turn_tokens,
)
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY_THINKING = "<think></think>"  # some templates write it before a turn without reasoning
# Other models' end-of-turn tokens, which are plain text to a tokenizer that does not have them.
_FOREIGN_ENDS = (
    "</s> <|im_end|> <|endoftext|> <|eot_id|> <|end_of_text|> <|end|> <|return|> <eos> "
    "<end_of_turn> <｜end▁of▁sentence｜> <|endofturn|> <|eom_id|>"
).split()
_FOREIGN_TURNS = re.compile(
    r"^\s*(?:<\|start_header_id\|>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<bos>|<\|im_start\|>|"
    r"<start_of_turn>|<\|start_of_role\|>)|^analysis[\s\S]*?assistant(?:commentary|final)|"
    r"<\|im_end\|>\s*<\|im_start\|>|<\|eot_id\|>\s*<\|start_header_id\|>|"
    r"<end_of_turn>\s*<start_of_turn>|<\|end\|>\s*<\|(?:start|user|assistant|system)\|>|"
    r"<\|channel\|>\w+<\|message\|>|<｜User｜>[^<]*<｜Assistant｜>|\[INST\][^\[]*\[/INST\]"
)


class _StrippedError(DcodError):
    """A template that writes another text than the completion, as those that drop reasoning."""


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _turn_end(
    tokenizer: Tokenizer, text: str, start: int, *, content: str, template: str, calls: bool
) -> int:
    """The end of the turn at `start`: behind the first special token after its content.

    Refuses a template that alters a completion, puts supervised text before it, or ends it
    otherwise than a conversation's last one. `calls`: tool calls follow the content.
    """
    tokens, ending = turn_tokens(tokenizer, template), "".join(turn_ending(tokenizer, template))
    place = text.find(content.strip(), start)
    content_end = start if place < 0 else place + len(content.strip())
    found = tokens.search(text, content_end)
    if found is not None and found.group(0) in text[start : max(place, start)]:
        found = tokens.search(text, start)  # the content is a later turn's
    turn = text[start : found.end() if found else None]
    written, said = _squeeze(turn), _squeeze(content)
    begins = written.startswith(EMPTY_THINKING) and not said.startswith(EMPTY_THINKING)
    place = written.find(said, len(EMPTY_THINKING) if begins else 0)
    lead = written[:place]
    if place < 0:
        raise _StrippedError(
            f"the chat template changes the completion: {content[:60]!r} became {turn[:60]!r} "
            "(templates of reasoning models drop the reasoning of earlier turns); give a template "
            f"that keeps it (student.chat_template: a file, or {' or '.join(READY)}), or leave "
            "the earlier turns unsupervised (weight 0)"
        )
    if lead not in ("", EMPTY_THINKING):
        raise DcodError(
            f"the chat template writes {lead!r} before the completion, but not in its generation "
            "prompt; move it under `if add_generation_prompt` or mark the completion with "
            "{% generation %} (student.chat_template)"
        )
    behind = written[place + len(said) :]
    if found is None or (not calls and behind != _squeeze(ending)):
        raise DcodError(
            f"the chat template writes {behind[:60]!r} behind a completion, and {ending!r} behind "
            "the last one; end every assistant turn with the same special token in a template of "
            "your own (student.chat_template)"
        )
    return found.end()


def _template_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    supervised: Sequence[int],
    tools: Sequence[Any] | None,
) -> Text:
    """The conversation's text, and the spans of its supervised turns."""
    last = len(messages) - 1
    try:
        return _whole_spans(tokenizer, messages, template, supervised, tools)
    except _StrippedError:
        if list(supervised) != [last] or "tool_calls" in messages[last]:
            raise
    prompt, _ = render_chat(tokenizer, messages[:last], template=template, prompt=True, tools=tools)
    content = _behind(prompt, messages[last]["content"])
    text = prompt + content + turn_ending(tokenizer, template)[1]
    return text, [(len(prompt), len(text))]


def _whole_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    supervised: Sequence[int],
    tools: Sequence[Any] | None,
) -> Text:
    """The same, all in the text that the template gives the whole conversation."""
    marked = bool(_MARKERS.search(template))
    render_turns_ahead(tokenizer, [(messages, supervised, tools)])
    text, marks = render_chat(tokenizer, messages, template=template, tools=tools)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if marked and len(marks) != len(turns):
        raise DcodError(
            f"the chat template marks {len(marks)} spans with {{% generation %}} for "
            f"{len(turns)} assistant turns; every turn needs one"
        )
    spans = []
    for index in supervised:
        before = messages[:index]
        prompt, _ = render_chat(tokenizer, before, template=template, prompt=True, tools=tools)
        content = _behind(prompt, messages[index]["content"])
        start, last = len(prompt), len(text)
        if not text.startswith(prompt):
            raise _unstable(text, prompt, index)
        if marked:
            begins, last = marks[turns.index(index)]
            if begins > start:
                raise DcodError(
                    f"the chat template writes {text[start:begins]!r} before a completion, outside "
                    "{% generation %} and not in its generation prompt; move it into one of them"
                )
        calls = "tool_calls" in messages[index]
        end = _turn_end(tokenizer, text, start, content=content, template=template, calls=calls)
        if calls:
            until, _ = render_chat(tokenizer, messages[: index + 1], template=template, tools=tools)
            end = calls_end(turn_tokens(tokenizer, template), text, until, (start, end))
        if end > last:
            raise DcodError(
                f"the chat template's {{% generation %}} block leaves out the end-of-turn token "
                f"after {text[max(start, last - 30) : last]!r}; move {{% endgeneration %}} behind "
                "it"
            )
        spans.append((start, end))
    return text, spans


def _unstable(text: str, prompt: str, index: int) -> DcodError:
    """The error of a generation prompt that is no prefix of the whole conversation."""
    same = shared_prefix(text, prompt)
    kind = _StrippedError if opened(prompt) else DcodError
    return kind(
        f"the chat template is not prefix-stable: before assistant turn {index} the generation "
        f"prompt goes on {prompt[same:][:60]!r}, the whole conversation {text[same:][:60]!r}; "
        "training would see another prompt than sampling. Give a template that keeps earlier text "
        f"(student.chat_template: a file, or {' or '.join(READY)})"
    )


def _behind(prompt: str, content: str) -> str:
    """A completion as it goes on behind its generation prompt, which may have opened reasoning."""
    mark = opened(prompt)
    if not mark:
        return content
    if closing(mark) not in content:
        raise DcodError(
            f"the chat template opens {mark} in its generation prompt, and the completion has no "
            f"{closing(mark)}: it would be trained as reasoning without an end. Traces without "
            "reasoning need a template that opens none (student.chat_template, or a variable such "
            "as student.template_kwargs=enable_thinking=false)"
        )
    if not content.lstrip().startswith(mark):
        return content
    rest = content.lstrip().removeprefix(mark)
    return rest.removeprefix("\n") if prompt.endswith("\n") else rest


def _plain_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> Text:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise DcodError(
            f"the tokenizer has no chat template, and without one only a plain prompt and "
            f"completion can be told apart (the roles here: {roles}); set student.chat_template"
        )
    if not tokenizer.eos_token:
        raise DcodError("the tokenizer has neither a chat template nor an eos token to end with")
    start = _bos(tokenizer) + messages[0]["content"]
    text = start + messages[1]["content"] + tokenizer.eos_token
    return text, [(len(start), len(text))]


def _bos(tokenizer: Tokenizer) -> str:
    """The bos token's text where the tokenizer itself puts one before a text, else ''."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else ""


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        with library_errors():
            return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except ValueError as error:
        raise DcodError(f"the tokenizer cannot encode {text[:60]!r}: {error}") from error


def _cut(tokenizer: Tokenizer, text: str, border: int, whole: list[int]) -> int | None:
    """How many tokens of `whole` come before the character `border`; None inside a token."""
    # Nothing merges with a special token: the text behind the last one tells.
    before = list(special_tokens(tokenizer).finditer(text, 0, border))
    names = special_names(tokenizer)
    places = [place for place, token in enumerate(whole) if token in names][: len(before)]
    if before and [names[whole[place]] for place in places] == [found[0] for found in before]:
        rest, start = _ids(tokenizer, text[before[-1].end() : border]), places[-1] + 1
        if whole[start : start + len(rest)] == rest:
            return start + len(rest)
    prefix = _ids(tokenizer, text[:border])
    return len(prefix) if whole[: len(prefix)] == prefix else None


def _encode_at(
    tokenizer: Tokenizer, text: str, borders: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of `text` with token borders at the given characters; and the token index of each.

    The whole text is encoded, and each prefix must be a prefix in tokens too. Where a token
    would cross a border (a completion that starts with a newline) the pieces are encoded alone,
    as sampling does; that must decode to the same text.
    """
    whole = _ids(tokenizer, text)
    found = [_cut(tokenizer, text, border, whole) for border in borders]
    if len(cuts := [cut for cut in found if cut is not None]) == len(borders):
        return whole, cuts
    ids, cuts, last = [], [], 0
    for border in [*borders, len(text)]:
        ids += _ids(tokenizer, text[last:border])
        cuts.append(len(ids))
        last = border
    decoded = decode(tokenizer, ids)
    if decoded != text:
        place = shared_prefix(decoded, text)
        raise DcodError(
            "a token of this tokenizer crosses the border between prompt and completion, near "
            f"{text[max(0, place - 20) : place + 20]!r}; end the generation prompt of the "
            "template with a special token or a newline (student.chat_template)"
        )
    return ids, cuts[:-1]


def _check_content(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None) -> None:
    for message in messages:
        said = message["role"] == "assistant"  # which marks of reasoning belong to
        tokens = turn_tokens(tokenizer, template).finditer(message["content"])
        if found := next((t for t in tokens if not (said and is_mark(t[0]))), None):
            raise DcodError(
                f"the {message['role']} message holds the special token {found.group(0)!r} as "
                "text, which would be read as the token; remove it (vLLM: skip_special_tokens)"
            )
        if found := _FOREIGN_TURNS.search(message["content"]):
            raise DcodError(
                f"the {message['role']} message holds {found.group(0)[:60]!r}, turns of another "
                "model's chat template as text; give the conversation as messages"
            )
        text = message["content"].rstrip()
        end = next((end for end in _FOREIGN_ENDS if text.endswith(end)), "")
        if end and message["role"] == "assistant" and not (end == "</s>" and "<s>" in text):
            raise DcodError(
                f"the assistant message ends with {end!r}, another model's end-of-turn token, "
                "which would be trained as text; remove it: the student's template writes its own"
            )


def tokens_above(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> int:
    """A number of tokens above `limit` that the texts surely have; 0 where that is not sure.

    Long texts are counted in pieces, since tokenising takes some 400 bytes a character.
    """
    piece = 1 << 16
    if sum(map(len, texts)) <= piece + 16 * limit:
        return 0
    count = 0
    for text in texts:
        for start in range(0, len(text), piece):
            # A cut adds the few tokens of one word; far more are taken off.
            count += max(0, len(_ids(tokenizer, text[start : start + piece])) - 64)
            if count > limit:
                return count
    return 0


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    first_completion: int = 0,
    unsupervised: Collection[int] = (),
    tools: Sequence[Any] | None = None,
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Token ids of a conversation and the mask of its supervised tokens.

    Every assistant message from index `first_completion` on that is not `unsupervised` is
    supervised, up to and with its end-of-turn token. Raises DcodError where the mask would be
    empty, full or inexact, or the template does not show the `tools`.
    """
    template = chat_template(tokenizer)
    _check_content(tokenizer, messages, template)
    check_calls(tokenizer, messages, template, tools)
    supervised = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index >= first_completion
        if index not in unsupervised
    ]
    if tools and (template is None or not _shows_tools(tokenizer, messages, template, tools)):
        raise DcodError(
            "the record has tools, and the chat template does not show them; give a template that "
            "does (student.chat_template), or take the column out"
        )
    if template is None:
        text, spans = _plain_spans(tokenizer, messages)
    else:
        text, spans = _template_spans(tokenizer, messages, template, supervised, tools)
        check_shown(tokenizer, messages, template=template, tools=tools)
    ids, cuts = _encode_at(tokenizer, text, [border for span in spans for border in span])
    mask = np.zeros(len(ids), bool)
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        mask[start:end] = True
    if not mask.any():
        raise DcodError("no token of the conversation is supervised: it has no assistant turn")
    if mask.all():
        raise DcodError("every token of the conversation is supervised: it has no prompt")
    return np.asarray(ids, np.int32), mask


def _shows_tools(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str, tools: Sequence[Any]
) -> bool:
    texts = (render_chat(tokenizer, messages, template=template, tools=t)[0] for t in (tools, None))
    return len(set(texts)) > 1


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a prompt up to where the completion starts: what `encode` masks out before it."""
    template = chat_template(tokenizer)
    _check_content(tokenizer, messages, template)
    if template is not None:
        text, _ = render_chat(tokenizer, messages, template=template, prompt=True)
        check_shown(tokenizer, messages, template=template, prompt=True)
    elif [message["role"] for message in messages] == ["user"]:
        text = _bos(tokenizer) + messages[0]["content"]
    else:
        raise DcodError(
            "the tokenizer has no chat template, so a prompt must be one plain text; "
            "set student.chat_template"
        )
    return _ids(tokenizer, text)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of plain text, behind the bos token where the tokenizer puts one: no chat template."""
    _check_content(tokenizer, [{"role": "user", "content": text}], None)
    return _ids(tokenizer, _bos(tokenizer) + text)


def render_sample(tokenizer: Tokenizer, trace: Trace) -> str:
    """The decoded trace with its supervised tokens between « and »."""
    parts, start = [], 0
    flips = np.flatnonzero(np.diff(trace.completion_mask)) + 1
    for end in [*flips.tolist(), len(trace.token_ids)]:
        text = decode(tokenizer, trace.token_ids[start:end].tolist())
        parts.append(f"«{text}»" if trace.completion_mask[start] else text)
        start = end
    return "".join(parts)
