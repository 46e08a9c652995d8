"""Messages to token ids and a completion mask; no other file knows chat templates.

A conversation is rendered to text once. The supervised part of each assistant turn is found in
that text, and token borders are put exactly on its two ends:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n«Hello<|im_end|>»\\n

A supervised turn starts where the generation prompt ends, so that training sees what sampling
sees, and ends with the end-of-turn token; what a template writes after that (a newline) is not
supervised. Where a template has `{% generation %}` markers they decide, and are checked; elsewhere
the text of the prompt with its generation prompt must be a prefix of the whole. A template that
strips reasoning, or writes another prompt before a completion (with reasoning opened, or, as
Mistral's, with the system message in its last turn), gives generation prompt + completion + end for
a supervised last turn. A tokenizer without a template gives prompt + completion + eos, prompt
and completion being plain strings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dcod_jax.data.borders import encode_at, encode_plain
from dcod_jax.data.reasoning import closed, closing, has_reasoning, opened, split, without_marks
from dcod_jax.data.templates import READY
from dcod_jax.data.tokenizer import Tokenizer, chat_template, decode
from dcod_jax.data.turns import (
    Message,
    Text,
    calls_end,
    check_calls,
    check_content,
    check_shown,
    probes,
    render_chat,
    render_turns_ahead,
    shared_prefix,
    special_tokens,
    turn_ending,
    turn_tokens,
)
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

MOST_RENDERED = 1 << 28  # characters of all prompts of one conversation
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_KEEPING = (
    f"give a template that keeps earlier text (student.chat_template: a file, or "
    f"{' or '.join(READY)}), or leave the earlier turns unsupervised (weight 0)"
)
_ANSWER = "7q3x"  # is in no template
EMPTY_THINKING = "<think></think>"  # some templates write it before a turn without reasoning


class _StrippedError(DcodError):
    """A template that writes another completion, as without its reasoning, or another prompt."""


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _is_channel(tokens: re.Pattern[str], lead: str) -> bool:
    """Whether a text before a completion begins and ends with special tokens.

    Sampling writes it then, behind the generation prompt: <|channel|>final<|message|>.
    """
    found = list(tokens.finditer(lead))
    return len(found) > 1 and found[0].start() == 0 and found[-1].end() == len(lead)


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
        bare = without_marks(content) == content and not opened(text[:start])
        bare |= content_end > start  # it is there, behind other text
        raise (DcodError if bare else _StrippedError)(  # reasoning alone may be left out
            f"the chat template changes the completion: {content[:60]!r} became {turn[:60]!r} "
            f"(templates of reasoning models drop the reasoning of earlier turns); {_KEEPING}"
        )
    twice = lead == EMPTY_THINKING and has_reasoning(content)
    if twice or (lead not in ("", EMPTY_THINKING) and not _is_channel(tokens, lead)):
        # A template may take a mark that the completion tells of for one of its own.
        kind = DcodError if without_marks(lead) else _StrippedError
        raise kind(
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
    last, options = len(messages) - 1, {"template": template, "tools": tools}
    try:
        laid = _whole_spans(tokenizer, messages, template, supervised, tools)
    except _StrippedError:
        if list(supervised) != [last] or "tool_calls" in messages[last]:
            raise
    else:
        check_shown(tokenizer, messages, **options)
        return laid
    prompt, _ = render_chat(tokenizer, messages[:last], prompt=True, **options)
    check_shown(tokenizer, messages[:last], prompt=True, **options)
    content = _behind(prompt, messages[last]["content"])
    content = content if opened(prompt) else _blanks(tokenizer, template) + content
    text = prompt + content + turn_ending(tokenizer, template)[1]
    return text, [(len(prompt), len(text))]


@functools.lru_cache(maxsize=8)
def _blanks(tokenizer: Tokenizer, template: str) -> str:
    """What a template writes between generation prompt and answer, if blank, as Mistral's does."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    bare, _ = render_chat(tokenizer, asked[:1], template=template, prompt=True)
    whole, _ = render_chat(tokenizer, asked, template=template)
    _, header, lead = whole.partition(_ANSWER)[0].rpartition(bare[-8:])
    return lead if header and not lead.strip() else ""


def _whole_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    supervised: Sequence[int],
    tools: Sequence[Any] | None,
) -> Text:
    """The same, all in the text that the template gives the whole conversation."""
    marked = bool(_MARKERS.search(template))
    if len(supervised) > 1:
        render_turns_ahead(tokenizer, [(messages, supervised, tools)])
    text, marks = render_chat(tokenizer, messages, template=template, tools=tools)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if marked and len(marks) != len(turns):
        raise DcodError(
            f"the chat template marks {len(marks)} spans with {{% generation %}} for "
            f"{len(turns)} assistant turns; every turn needs one"
        )
    spans, order = [], {index: place for place, index in enumerate(turns)}
    starts = _starts(tokenizer, messages, template, supervised, tools, text)
    for index in supervised:
        before, start = messages[:index], starts.get(index)
        if start is None:
            prompt, _ = render_chat(tokenizer, before, template=template, prompt=True, tools=tools)
            if not text.startswith(prompt):
                same = shared_prefix(text, prompt)
                raise _StrippedError(
                    f"the chat template is not prefix-stable: before assistant turn {index} the "
                    f"generation prompt goes on {prompt[same:][:60]!r}, the whole conversation "
                    f"{text[same:][:60]!r}; training would see another prompt than sampling; "
                    f"{_KEEPING}"
                )
            start = len(prompt)
        lead, said, last = text[max(0, start - 99) : start], messages[index]["content"], len(text)
        if (content := _behind(lead, said)) != said and closed(lead):
            raise _StrippedError(
                f"the template ends reasoning before {said[:60]!r}, which does, too"
            )
        if marked:
            begins, last = marks[order[index]]
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


def _starts(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    supervised: Sequence[int],
    tools: Sequence[Any] | None,
    text: str,
) -> dict[int, int]:
    """Where turns of a conversation of many begin in its text, without rendering each prompt.

    The template writes one text with a special token before each assistant turn, and its places are
    the turns'; the prompts of `probes` are rendered and must agree. {} for few turns, or where that
    does not hold. Raises DcodError where so many prompts cannot be rendered.
    """
    chosen, options = probes(supervised), {"template": template, "tools": tools}
    if len(chosen) == len(supervised):
        return {}
    bare, _ = render_chat(tokenizer, messages[: chosen[0]], **options)
    prompts = [render_chat(tokenizer, messages[:i], prompt=True, **options)[0] for i in chosen]
    lead = prompts[0].removeprefix(bare)
    ends = [found.end() for found in re.finditer(re.escape(lead), text)]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if special_tokens(tokenizer).search(lead) and len(ends) == len(turns):
        starts = dict(zip(turns, ends, strict=True))
        if all(p == text[: starts[i]] for i, p in zip(chosen, prompts, strict=True)):
            return starts
    if len(supervised) * len(text) > MOST_RENDERED:
        raise DcodError(
            f"the conversation has {len(supervised)} supervised turns, and the chat template "
            "writes earlier turns otherwise when others follow, so each is rendered alone; split "
            "it, or leave earlier turns unsupervised (weight 0)"
        )
    return {}


def _behind(prompt: str, content: str) -> str:
    """A completion as it goes on behind its generation prompt, which may have opened reasoning."""
    mark = opened(prompt)
    if closed(prompt):
        if has_reasoning(content):
            raise DcodError(
                f"the generation prompt ends reasoning ({prompt.rstrip()[-20:]!r}), and the "
                "completion has reasoning; set student.template_kwargs=enable_thinking=true (or "
                "the template's own name for it), or prepare.reasoning=drop"
            )
        inside, answer = split(content)  # of an empty block, which the prompt has already
        return answer if not inside.strip() else content
    if not mark:
        return content
    if closing(mark) not in content.replace(f"`{closing(mark)}`", ""):  # which tells of it
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


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], **about: Any
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Token ids of a conversation and the mask of its supervised tokens, as `lay_out` finds them.

    about: what `lay_out` takes.
    """
    return encode_laid(tokenizer, lay_out(tokenizer, messages, **about))


def lay_out(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    first_completion: int = 0,
    unsupervised: Collection[int] = (),
    tools: Sequence[Any] | None = None,
) -> Text:
    """The text of a conversation and its supervised spans.

    Every assistant message from index `first_completion` on that is not `unsupervised` is
    supervised, up to and with its end-of-turn token. Raises DcodError where the spans would be
    inexact, or the template does not show the `tools`.
    """
    template = chat_template(tokenizer)
    check_content(tokenizer, messages, template)
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
        return _plain_spans(tokenizer, messages)
    return _template_spans(tokenizer, messages, template, supervised, tools)


def encode_laid(
    tokenizer: Tokenizer, laid: Text
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """As `encode`; raises DcodError where the mask would be empty, full or inexact."""
    text, spans = laid
    ids, cuts = encode_at(tokenizer, text, [border for span in spans for border in span])
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
    check_content(tokenizer, messages, template)
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
    return encode_plain(tokenizer, text)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of plain text, behind the bos token where the tokenizer puts one: no chat template."""
    check_content(tokenizer, [{"role": "user", "content": text}], None)
    return encode_plain(tokenizer, _bos(tokenizer) + text)


def render_sample(tokenizer: Tokenizer, trace: Trace) -> str:
    """The decoded trace with its supervised tokens between « and »."""
    parts, start = [], 0
    flips = np.flatnonzero(np.diff(trace.completion_mask)) + 1
    for end in [*flips.tolist(), len(trace.token_ids)]:
        text = decode(tokenizer, trace.token_ids[start:end].tolist())
        parts.append(f"«{text}»" if trace.completion_mask[start] else text)
        start = end
    return "".join(parts)
