"""Reasoning and answer: the marks between them, and how a template writes them.

Reasoning comes inside a completion, between marks, or in a field of its own; `Reasoning.fold`
makes the first of the second, in the form of the student's template.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from dcod_jax.errors import DcodError

# Names of the marks around reasoning, and around an answer, in the words of teachers.
_THOUGHT = (
    r"[\w:-]{0,30}(?:think|thought|reason|scratch_?pad|reflect|monologue|working_out|rationale)"
    r"[\w:-]{0,30}|cot|analysis|inner_(?:pre|suf)fix"
)
_ANSWER = r"(?:(?:begin|end)_of_|start_|end_)?(?:final_?)?(?:answer|solution|output|response)"
_SIDE = re.compile(r"^(?:begin|start|end)_(?:of_)?|_(?:start|end|prefix|suffix)$")
_ENDING = re.compile(r"^end_|_(?:end|suffix)$")
# How the two ends of a part differ: <think> and </think>, <|begin_of_thought|> and <|end_of_...|>.
_PAIRS = (("begin_of", "end_of"), ("BEGIN_OF", "END_OF"), ("start", "end"), ("START", "END"))
_PAIRS = (*_PAIRS, ("prefix", "suffix"))
# Marks that no rule spells: of Mistral, Kimi, MedGemma, Gemma 4, and gpt-oss's channels (harmony).
_CHANNEL = "<|channel|>analysis<|message|>"
_FINAL = "<|channel|>final<|message|>"
_ODD = {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "<unused94>": "<unused95>"}
_ODD["<|channel>thought"] = "<channel|>"
_ODD[_CHANNEL] = f"<|end|><|start|>assistant{_FINAL}"
_BEGINNING = {end: begin for begin, end in _ODD.items()}
_VISIBLE = re.compile(r"\S")
_FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1", re.DOTALL | re.MULTILINE)


def _marks(names: str, *odd: str) -> re.Pattern[str]:
    """Marks of these names at either end: <name>, </NAME>, <|name|>, <name kind="x">."""
    plain = rf"(?P<bar>\|?)(?P<slash>/?)(?P<name>(?i:{names}))(?: [^<>/\n]*)?(?P=bar)"
    plain = rf"(?:(?<=<) ?|(?<=&)lt;){plain}(?:>|&gt;)"  # the latter as HTML spells it
    rest = "|".join([plain, *(f"(?<={re.escape(o[0])}){re.escape(o[1:])}" for o in odd)])
    # A set of first characters makes the search four times as fast.
    first = "".join(re.escape(c) for c in sorted({"<", "&", *(o[0] for o in odd)}))
    return re.compile(f"[{first}](?:{rest})")


_MARK = _marks(_THOUGHT, *_ODD, *_ODD.values())
_ANSWER_MARK = _marks(_ANSWER)
_LATE = re.compile("answer|solution", re.IGNORECASE)  # what is no other element of a text


def _side(mark: re.Match[str]) -> tuple[str, bool]:
    """(what both ends of a part have in common, whether this one is its end)."""
    if mark["name"] is None:
        return _BEGINNING.get(mark[0], mark[0]), mark[0] in _BEGINNING
    name = mark["name"].lower()
    return mark["bar"] + _SIDE.sub("", name), bool(mark["slash"] or _ENDING.search(name))


def _end_of(begin: re.Match[str], text: str) -> re.Match[str] | None:
    """The mark that ends what `begin` begins."""
    wanted = _side(begin)[0], True
    return next((m for m in begin.re.finditer(text, begin.end()) if _side(m) == wanted), None)


def closing(mark: str) -> str:
    """The end for a mark that begins a part: <think> gives </think>."""
    if mark in _ODD:
        return _ODD[mark]
    for begin, end in _PAIRS:
        if begin in mark:
            return mark.replace(begin, end, 1)
    place = 4 if mark.startswith("&lt;") else 2 if mark.startswith("<|") else 1
    name, space, _ = mark[place:].partition(" ")
    return f"{mark[:place]}/{name}{'>' if space else ''}"


def opening(text: str) -> str:
    """The mark of reasoning that a text begins with, or ""."""
    mark = _MARK.match(text, len(text) - len(text.lstrip()))
    return mark[0] if mark and not _side(mark)[1] else ""


def opened(prompt: str, *, ends: bool = False) -> str:
    """The mark that begins (or `ends`) reasoning at the end of a generation prompt, or ""."""
    tail = prompt.rstrip()[-80:]
    marks = (m for m in _MARK.finditer(tail) if m.end() == len(tail) and _side(m)[1] == ends)
    return next((mark[0] for mark in marks), "")


def closed(prompt: str) -> str:
    """The mark of the end of reasoning there, as in modes without it."""
    return opened(prompt, ends=True)


def without_marks(text: str) -> str:
    """A text without the marks of reasoning."""
    return _MARK.sub("", text)


_CHANNELS = re.compile(r"\s*(?:<\|start\|>)?(?:assistant)?(?: to=\S+)?<\|channel\|>")
_MESSAGE = re.compile(
    _CHANNELS.pattern + r"((?:(?!<\|(?:channel|message)\|>).)*)<\|message\|>"
    r"(.*?)(?:<\|(?:end|return|call)\|>|$)",
    re.DOTALL,
)


def of_channels(text: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a completion in harmony's channels, as gpt-oss writes it.

    The answer is "" where it was cut off before; None for any other text. Raises DcodError where a
    message is neither reasoning nor the answer behind it.
    """
    if not _CHANNELS.match(text):
        return None
    found: dict[str, list[str]] = {"analysis": [], "final": []}
    place = 0
    while message := _MESSAGE.match(text, place):
        place, channel = message.end(), message[1].strip()
        if channel not in found or found["final"]:
            raise DcodError(
                f"the completion has a message of the channel {channel[:60]!r} that is neither "
                "reasoning nor the answer behind it; write calls as tool_calls, or take it out"
            )
        found[channel].append(message[2])
    if rest := text[place:].strip():
        raise DcodError(f"the completion has {rest[:60]!r} outside of the messages of its channels")
    return "\n".join(found["analysis"]), "".join(found["final"])


def _begun(text: str, marks: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """The marks that begin a part at the beginning of a line."""
    place, fresh = 0, True  # fresh: no mark is before this one on its line
    for mark in marks.finditer(text):
        line = text.rfind("\n", place, mark.start()) + 1
        bare = (fresh or line) and not text[line or place : mark.start()].strip(" \t")
        if bare and not _side(mark)[1]:
            yield mark
        place, fresh = mark.end(), False


def _blocks(text: str) -> list[tuple[int, int, str]]:
    """(start, end, inside) of each part of reasoning that begins a line."""
    ends: dict[str, collections.deque[int]] = {}  # where marks begin, by what they end
    for mark in _MARK.finditer(text):
        if _side(mark)[1]:
            ends.setdefault(_side(mark)[0], collections.deque()).append(mark.start())
    found, place = [], 0
    for begin in _begun(text, _MARK):
        if begin.start() < place:
            continue
        after = ends.get(_side(begin)[0], collections.deque())
        while after and after[0] < begin.end():
            after.popleft()
        end = _MARK.match(text, after[0]) if after else None
        if end is None:
            continue
        place = end.end()
        start = text.rfind("\n", 0, begin.start()) + 1
        found.append((start, place, text[begin.end() : end.start()]))
    return found


# Names of fields that hold reasoning, whatever else they are called.
_THOUGHTS = re.compile(
    r"reasoning|think|thought|rationale|cot$|^analysis$|trajector|scratchpad|monolog", re.IGNORECASE
)
# Names that tell about reasoning: reasoning_type, thinking_level.
_DIFFER = (
    "the completion holds reasoning, and so does a field beside it, and they differ; set "
    "prepare.reasoning_field to the one that is meant, or take one out"
)
_ABOUT = re.compile(
    r"(type|mode|model|style|level|category|tokens|length|language|source|format|quality|score|"
    r"domain|skill|topic|tag|dataset|effort|budget|required|name|url|version|_id)s?$",
    re.IGNORECASE,
)
# Columns with the data set's own solution: gt_cot, reference_rationale.
GIVEN = re.compile(r"(gt|gold|ground_?truth|reference|human|expert|official)_", re.IGNORECASE)
_SWITCHES = (
    "on off true false yes no none low medium high auto enabled disabled minimal max xhigh default "
    "think no_think thinking nan null n/a"
).split()


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """What becomes of reasoning, and how the template writes it.

    `policy`: auto (kept), keep (kept, and a trace without it refused), drop (left out).
    """

    policy: str = "auto"
    opening: str = "<think>\n"
    closing: str = "\n</think>\n\n"

    def fold(self, text: str, reasoning: str) -> str:
        """A completion and its reasoning as one text.

        ("so", "4") -> "<think>\\nso\\n</think>\\n\\n4". Raises DcodError where the completion has
        other reasoning of its own.
        """
        if channels := of_channels(text):
            within, text = channels
            if not text.strip():
                return f"{self.opening}{within}"
            if within.strip() and reasoning.strip() and within.split() != reasoning.split():
                raise DcodError(_DIFFER)
            reasoning = reasoning or within
        text, reasoning = self.complete(text), self._bare(reasoning, text)
        own, answer = split(text)
        if self.policy == "drop":
            blocks = _blocks(text)
            starts = [*(start for start, _, _ in blocks), len(text)]
            bare = text[: starts[0]] + "".join(
                text[end:start].lstrip()
                for (_, end, _), start in zip(blocks, starts[1:], strict=True)
            )
            return bare.lstrip("\n") if blocks or reasoning.strip() else text
        if reasoning.strip() and own.strip() and own.split() != reasoning.split():
            raise DcodError(_DIFFER)
        if own.strip() and self.opening == _CHANNEL:  # whose final channel holds answers alone
            reasoning = own
        elif own.strip() or not reasoning.strip():
            return text
        return f"{self.opening}{reasoning.strip()}{self.closing}{answer.lstrip()}"

    def _bare(self, reasoning: str, text: str) -> str:
        """The reasoning of a field without its marks: "<think>so</think>" -> "so"."""
        inside, answer = split(self.complete(reasoning))
        if inside and answer.strip() and answer.split() != split(text)[1].split():
            raise DcodError(
                "the field of reasoning holds reasoning and another answer than the completion; "
                "set prepare.completion_field to the one that is meant"
            )
        return inside or reasoning.lstrip().removeprefix(opening(reasoning))

    def complete(self, text: str) -> str:
        """With the opening mark where a completion begins after it: "so</think>4" and its kind."""
        begun = set()
        for mark in _MARK.finditer(text):
            key, ends = _side(mark)
            if ends and key not in begun:
                if text[max(0, mark.start() - 1) : mark.end() + 1] == f"`{mark[0]}`":  # told of
                    continue
                lead = _BEGINNING.get(mark[0], mark[0].replace("/", "", 1))
                for begin, end in _PAIRS if lead == mark[0] else ():
                    lead = lead.replace(end, begin, 1) if lead == mark[0] else lead
                lead = self.opening if self.opening.strip() == lead else f"{lead}\n"
                return lead + text.lstrip("\n")
            begun.add(key)
        return text


def split(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a completion: "<think>so</think>4" -> ("so", "4")."""
    begin = _MARK.match(text, len(text) - len(text.lstrip()))
    if begin is None or _side(begin)[1] or (end := _end_of(begin, text)) is None:
        return "", text
    return text[begin.end() : end.start()], text[end.end() :].lstrip()


def has_reasoning(text: str) -> bool:
    """Whether a completion holds reasoning that is begun and ended, and not empty."""
    return any(inside.strip() for _, _, inside in _blocks(Reasoning().complete(text)))


def may_be_reasoning(name: str, value: object) -> bool:
    """Whether a field that nothing read is named like a teacher's reasoning and holds sentences."""
    name = name.rpartition(".")[2]
    named = _THOUGHTS.search(name) and not GIVEN.match(name) and not _ABOUT.search(name)
    return bool(named) and _has_words(value)


def _has_words(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_words, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and " " in value.strip()


def _behind_space(text: str, place: int) -> int:
    found = _VISIBLE.search(text, place)
    return found.start() if found else len(text)


def unfinished(text: str) -> str:
    """Why a completion is not whole, or "": a part that is begun and not ended, or no answer."""
    place = 0
    while True:
        start = _behind_space(text, place)
        begin = _MARK.match(text, start) or _ANSWER_MARK.match(text, start)
        if begin is None or _side(begin)[1]:
            break
        if (end := _end_of(begin, text)) is None:
            return f"{begin[0]} is not ended by {closing(begin[0])}"
        place = end.end()
        if begin.re is _MARK and _behind_space(text, place) == len(text):
            return f"nothing follows {end[0]}"
    bare = _FENCE.sub("", text)
    for marks in (_MARK, _ANSWER_MARK):  # one that is begun on a later line
        begun = (m for m in _begun(bare, marks) if marks is _MARK or _LATE.search(m[0]))
        for last in collections.deque(begun, maxlen=1):
            if _end_of(last, bare) is None:
                return f"{last[0]} is not ended by {closing(last[0])}"
    return ""


def is_switch(value: object) -> bool:
    """Whether a field named like reasoning only turns it on: {"reasoning": "on"}."""
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in _SWITCHES
    )
