"""What a chat template writes around a completion: its end, and the form of reasoning.

Both are read off a rendered probe, so that sampling stops at the token that training ends with.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dcod_jax.data.reasoning import Reasoning, of_channels, opened, unfinished, without_marks
from dcod_jax.data.templates import TemplateError, render, render_ahead
from dcod_jax.data.tokenizer import Tokenizer, added_tokens, chat_template
from dcod_jax.errors import DcodError
from dcod_jax.models.config import ModelConfig

Message = dict[str, Any]  # {"role": ..., "content": ...}
Text = tuple[str, list[tuple[int, int]]]  # and spans of it: characters [start, end)


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Any special token, as text."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@functools.lru_cache(maxsize=4)
def special_names(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens among the added ones."""
    names, special = added_tokens(tokenizer), special_tokens(tokenizer)
    return {token: name for token, name in names.items() if special.fullmatch(name)}


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str,
    prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> Text:
    """Rendered text, and the spans of the template's generation markers."""
    try:
        return render(template, _by_channel(messages), _names(tokenizer, tools, prompt=prompt))
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        about = f"messages of the roles ({roles}) {'with' if tools else 'without'} tools"
        raise DcodError(f"{about}: {error}") from error


def _by_channel(messages: Sequence[Message]) -> list[Message]:
    """Messages with the reasoning of harmony's channels in a key, where its template reads it."""
    shown: list[Message] = []
    for message in messages:
        said = message["content"] if message["role"] == "assistant" else ""
        found = of_channels(said) if isinstance(said, str) else None
        split = {"thinking": found[0], "content": found[1]} if found and found[1] else {}
        shown.append(message | split)
    return shown


def _names(tokenizer: Tokenizer, tools: Sequence[Any] | None, *, prompt: bool) -> dict[str, Any]:
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    return names | {"add_generation_prompt": prompt, "tools": list(tools) if tools else None}


def render_turns_ahead(
    tokenizer: Tokenizer,
    conversations: Iterable[tuple[Sequence[Message], Sequence[int], Sequence[Any] | None]],
) -> None:
    """Render conversations and the prompts of their supervised turns in one exchange.

    conversations: of each the messages, the places of its supervised ones, and its tools.
    """
    if (template := chat_template(tokenizer)) is None:
        return
    texts = []
    for messages, supervised, tools in conversations:
        whole, prompt = (_names(tokenizer, tools, prompt=flag) for flag in (False, True))
        turns = _by_channel(messages)
        texts += [(turns, whole), *((turns[:index], prompt) for index in probes(supervised))]
    render_ahead(template, texts)


def probes(supervised: Sequence[int]) -> list[int]:
    """The supervised turns whose prompts are rendered: all of few; the first, last and some."""
    last = len(supervised) - 1
    if last < 32:
        return list(supervised)
    places = {*range(8), *range(last - 7, last + 1), *(1 << power for power in range(40))}
    return [supervised[place] for place in sorted(places) if place <= last]


def shared_prefix(left: str | bytes, right: str | bytes) -> int:
    """How many characters (or bytes) both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differ, min(len(left), len(right)))


_PROBE = "7q3x"  # a text that no template writes


@functools.lru_cache(maxsize=8)
def turn_ending(tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """(what stands between a completion and its end-of-turn token, that token).

    It is the first special token, or an added one without that mark right behind the completion.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    text, _ = render_chat(tokenizer, probe, template=template)
    rest = text[text.rfind(_PROBE) + len(_PROBE) :]
    special = special_tokens(tokenizer).search(rest)
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    follows = [name for name in added if name.strip() and rest.lstrip().startswith(name)]
    plain = max(follows, key=len, default="")
    if plain and (special is None or rest.index(plain) < special.start()):
        return rest[: rest.index(plain)], plain
    if special is None:
        raise DcodError(
            "the chat template does not end an assistant turn with a special token, so a student "
            "could not learn to stop; end the turn with {{ eos_token }} in a template of your "
            "own (student.chat_template)"
        )
    return rest[: special.start()], special.group(0)


@functools.lru_cache(maxsize=8)
def turn_tokens(tokenizer: Tokenizer, template: str | None) -> re.Pattern[str]:
    """Any special token, and the one that ends the template's turns."""
    special = special_tokens(tokenizer)
    try:
        end = turn_ending(tokenizer, template)[1] if template is not None else ""
    except DcodError:  # named where a completion is encoded
        end = ""
    if not end or special.fullmatch(end):
        return special
    return re.compile(f"{re.escape(end)}|{special.pattern}")


@functools.lru_cache(maxsize=256)
def _left_out(tokenizer: Tokenizer, template: str, kinds: str, tools: str, prompt: bool) -> str:
    """The role of the first message whose text the template does not write, or ""."""
    messages = json.loads(kinds)
    for place, message in enumerate(messages):
        message["content"] = f"7q{place}x3" if message["content"] else ""
    shown = {"template": template, "prompt": prompt, "tools": json.loads(tools)}
    try:
        text, _ = render_chat(tokenizer, messages, **shown)
    except DcodError:  # it looks into texts; the messages themselves are rendered already
        return ""
    return next((m["role"] for m in messages if m["content"] not in text), "")


def check_shown(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str,
    tools: Sequence[Any] | None = None,
    prompt: bool = False,
) -> None:
    """Refuse a template that leaves out messages, as those that know few roles do."""
    kinds = [message | {"content": bool(message["content"].strip())} for message in messages]
    texts = (json.dumps(value) for value in (kinds, list(tools) if tools else None))
    if role := _left_out(tokenizer, template, *texts, prompt):
        raise DcodError(
            f"the chat template does not write the text of a message by {role!r}, and the model "
            "would not see it; give a template that does (student.chat_template), or another role"
        )


# Other models' end-of-turn tokens, which are plain text to a tokenizer that does not have them.
_FOREIGN_ENDS = (
    "</s> <|im_end|> <|endoftext|> <|eot_id|> <|end_of_text|> <|end|> <|return|> <eos> "
    "<end_of_turn> <｜end▁of▁sentence｜> <|endofturn|> <|eom_id|>"
).split()
_FOREIGN_START = re.compile(
    r"\s*(?:<\|start_header_id\|>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<bos>|<\|im_start\|>|"
    r"<start_of_turn>|<\|start_of_role\|>)|analysis[\s\S]*?assistant(?:commentary|final)"
)
_FOREIGN_TURNS = re.compile(
    r"<\|im_end\|>\s*<\|im_start\|>|<\|eot_id\|>\s*<\|start_header_id\|>|"
    r"<end_of_turn>\s*<start_of_turn>|<\|end\|>\s*<\|(?:start|user|assistant|system)\|>|"
    r"<\|channel\|>\w+<\|message\|>|<｜User｜>[^<]*<｜Assistant｜>|\[INST\][^\[]*\[/INST\]"
)


def check_content(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None) -> None:
    """Refuse texts that hold the tokens or turns of a template, this one's or another's."""
    for message in messages:
        text, tokens = message["content"], turn_tokens(tokenizer, template)
        if message["role"] == "assistant" and tokens.search(text):  # marks belong to it
            text = without_marks(text)
        if found := tokens.search(text):
            raise DcodError(
                f"the {message['role']} message holds the special token {found.group(0)!r} as "
                "text, which would be read as the token; remove it (vLLM: skip_special_tokens)"
            )
        if found := _FOREIGN_START.match(text) or _FOREIGN_TURNS.search(text):
            raise DcodError(
                f"the {message['role']} message holds {found.group(0)[:60]!r}, turns of another "
                "model's chat template as text; give the conversation as messages"
            )
        text = text.rstrip()
        end = next((end for end in _FOREIGN_ENDS if text.endswith(end)), "")
        if end and message["role"] == "assistant" and not (end == "</s>" and "<s>" in text):
            raise DcodError(
                f"the assistant message ends with {end!r}, another model's end-of-turn token, "
                "which would be trained as text; remove it: the student's template writes its own"
            )


def _eos(tokenizer: Tokenizer) -> int | None:
    eos: Any = tokenizer.eos_token_id
    return None if eos is None else int(eos)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a supervised turn; None where the template tells of none."""
    template = chat_template(tokenizer)
    if template is None:
        return _eos(tokenizer)
    try:
        _, text = turn_ending(tokenizer, template)
    except DcodError:  # such a template cannot be trained with; its prompts can be answered
        return None
    return tokenizer.backend_tokenizer.token_to_id(text)


def stop_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a completion: the model's, the tokenizer's eos, the template's end of turn."""
    found = set(config.eos_token_ids)
    found |= {end for end in (_eos(tokenizer), end_of_turn(tokenizer)) if end is not None}
    if not found:
        raise DcodError(
            "neither the model's config.json (eos_token_id) nor its tokenizer (eos_token, chat "
            "template) names a stop token; add one, or every completion would run to the length "
            "limit"
        )
    return tuple(sorted(found))


def reasoning_rule(tokenizer: Tokenizer, policy: str) -> Reasoning:
    """How the tokenizer's template writes the reasoning of a message; <think> where it does not."""
    return _rule(tokenizer, chat_template(tokenizer), policy)


@functools.lru_cache(maxsize=8)
def _rule(tokenizer: Tokenizer, template: str | None, policy: str) -> Reasoning:
    rule = Reasoning(policy)
    if template is None:
        return rule
    asked = [{"role": "user", "content": "a"}]
    thought = _PROBE[::-1]
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": _PROBE}]
    keys = ("reasoning_content", "reasoning")  # the latter: Gemma 4
    for said in (*({"content": _PROBE, key: thought} for key in keys), {"content": parts}):
        answer = {"role": "assistant", **said}
        try:
            prompt, _ = render_chat(tokenizer, asked, template=template, prompt=True)
            text, _ = render_chat(tokenizer, [*asked, answer], template=template)
        except DcodError:  # named where the first trace is encoded
            continue
        before, written, rest = text.partition(thought)
        closing, answered, _ = rest.partition(_PROBE)
        opening = before[shared_prefix(before, prompt) :]
        if mark := opened(prompt):
            opening = prompt[prompt.rindex(mark) :]
        known = said["content"] is not parts or opened(opening)  # and no list as text
        whole = not unfinished(f"{opening}{thought}{closing}{_PROBE}")  # no mark of an answer
        if known and whole and written and answered and opening.strip() and closing.strip():
            return Reasoning(policy, opening, closing)
    return rule


# ---------------------------------------------------------------- tool calls


def check_calls(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None,
    tools: Sequence[Any] | None,
) -> None:
    """Refuse a template that does not write each turn's tool calls, or writes one as a token."""
    for index, message in enumerate(messages):
        if "tool_calls" not in message:
            continue
        spelled = json.dumps(message["tool_calls"], ensure_ascii=False)
        if found := special_tokens(tokenizer).search(spelled):
            raise DcodError(f"a tool call holds the special token {found.group(0)!r} as text")
        bare = [*messages[:index], {"role": "assistant", "content": message["content"]}]
        texts = {
            render_chat(tokenizer, turns, template=template, tools=tools)[0]
            for turns in (messages[: index + 1], bare)
            if template is not None
        }
        if len(texts) < 2:
            raise DcodError(
                "the record has tool calls, and the chat template does not write them; give a "
                "template that does (student.chat_template), or write them into the content in "
                "the form that the student is to produce"
            )


def calls_end(tokens: re.Pattern[str], text: str, until: str, turn: tuple[int, int]) -> int:
    """The end of a turn with tool calls, which may hold special tokens: its last special token.

    until: the conversation up to and with the turn; turn: where it begins, and its first such token
    ends.
    """
    start, end = turn
    within = [found.end() for found in tokens.finditer(until, start)]
    if text.startswith(until):
        return max([end, *within])
    if len(within) == 1:  # the turn's end: its calls hold none
        return end
    raise DcodError(
        "the chat template writes a turn with tool calls otherwise when other turns follow; "
        "give a template that keeps it (student.chat_template)"
    )
