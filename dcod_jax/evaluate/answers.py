r"""Final answers: found in a completion by stated rules, compared where that needs no algebra.

Standard library only, and every search is linear in the text: what a model wrote is read here.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
from collections.abc import Callable

MAX_ANSWER_CHARS = 500  # a longer answer is compared by its spelling only

_BOXES_TRIED = 20  # from the end; bounds the search in a text of nothing but \\boxed{
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_HASH = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_]{0,8}(?:(?i:final answer|the answer|answer)|A)[*_ \t]{0,4}:[*_ \t]{0,4}(\S[^\n]*)$",
    re.MULTILINE,
)
_ANSWER_IS = re.compile(r"(?i:answer(?: to [^\n.:]{1,80})? is)[ \t]{0,4}:?\s{0,4}(\S[^\n]{0,200})")
_LAST_NUMBER = re.compile(rf"(?<![\w.^])(?:{_NUMBER})(?![\w]|\.\d)")
_WITH_UNIT = re.compile(rf"[*$]{{0,3}}({_NUMBER})[*$]{{0,3}}((?: [A-Za-z]{{1,20}}){{1,4}})\**")
# Words after a number that change it, so that "2 dozen" or "5 or 6" is not 2 or 5.
_NOT_UNITS = frozenset(
    "or and to times of half dozen hundred thousand million billion trillion percent over by "
    "plus minus squared cubed".split()
)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The final answer of a text and the rule that found it."""

    answer: str
    rule: str


def _braced(text: str, start: int) -> str | None:
    """The content of the balanced {...} that opens at `start`, else None."""
    depth = 0
    for index in range(start, min(len(text), start + 4 * MAX_ANSWER_CHARS)):
        if text[index] == "\\" and text[index + 1 : index + 2] in ("{", "}"):
            continue
        if text[index] == "{" and text[index - 1] != "\\":
            depth += 1
        elif text[index] == "}" and text[index - 1] != "\\":
            depth -= 1
            if depth == 0:
                return text[start + 1 : index]
    return None


def _last_boxed(text: str) -> str | None:
    for match in reversed(list(_BOXED.finditer(text))[-_BOXES_TRIED:]):
        if text[match.end() : match.end() + 1] == "{":
            content = _braced(text, match.end())
        else:  # \boxed 5
            bare = re.match(r"[^\s$\\]+", text[match.end() : match.end() + 50])
            content = bare.group(0).rstrip(".,") if bare else None
        if content is not None and content.strip():
            return content.strip()
    return None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):  # not a list: a text may have very many
        found = match
    return None if found is None else found.group(found.lastindex or 0).strip()


def _sentence(text: str) -> str:
    r"""The first sentence of what follows "the answer is": "$18$ dollars. So" -> "$18$ dollars"."""
    end = re.search(r"[.!?](?=\s|$)|[.!?]\*", text)
    return (text[: end.start()] if end else text).strip()


def _without_unit(answer: str | None) -> str | None:
    """A plain number in words of its unit: "**18** eggs" -> "18"."""
    match = _WITH_UNIT.fullmatch(answer) if answer else None
    if match is None or _NOT_UNITS & set(match.group(2).lower().split()):
        return answer
    return match.group(1)


# Where a completion is searched, in this order; the first rule that finds an answer gives it.
EXTRACTION_RULES: dict[str, Callable[[str], str | None]] = {
    "boxed": _last_boxed,  # the last non-empty \boxed{...}
    "hash": lambda text: _without_unit(_last_match(_HASH, text)),  # the last line `#### X`
    # The last line `A: X`, `Answer: X` or `Final answer: X`.
    "answer_line": lambda text: _without_unit(_last_match(_ANSWER_LINE, text)),
    # What follows the last "answer is", to the end of its sentence.
    "answer_is": lambda text: _without_unit(_sentence(_last_match(_ANSWER_IS, text) or "")),
    "last_number": lambda text: _last_match(_LAST_NUMBER, text),
}


def extract_answer(text: str) -> Extraction | None:
    r"""The final answer of a completion by the first of EXTRACTION_RULES that finds one.

    >>> extract_answer("so 4 eggs.\n#### 4")
    Extraction(answer='4', rule='hash')
    """
    for rule, find in EXTRACTION_RULES.items():
        if found := find(text):
            return Extraction(found, rule)
    return None


def reference_answer(answer: str) -> str:
    r"""The answer in a reference: a worked solution ending `#### N`, `A: N` or \boxed{N} is read.

    A reference without such a mark is the answer itself ("The answer is" is not looked for).
    """
    marked = _last_boxed(answer) or _last_match(_HASH, answer) or _last_match(_ANSWER_LINE, answer)
    return marked or answer.strip()


# ---------------------------------------------------------------- normalisation, comparison

_PLAIN = re.compile(r"[-+]?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})")
_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[!,;:> ]|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\\$|\$|\{,\}|~")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise_answer(answer: str) -> str:
    r"""One spelling for what typesetting spells in many ways: `$10{,}000.$` -> `10000`."""
    text = answer.strip().strip("*_").strip()
    text = text.replace("\\(", "").replace("\\)", "").replace("\\[", "").replace("\\]", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-")
    text = _NOISE.sub(lambda m: "," if m.group(0) == "{,}" else "", text)
    text = text.replace("^\\circ", "").replace("^{\\circ}", "").strip().rstrip(".").strip()
    text = _STYLE.sub(r"\1", text)
    if not any(mark in text for mark in "()[]{}"):  # in a tuple the comma separates
        text = _THOUSANDS.sub("", text)
    letter = re.fullmatch(r"\(([A-Za-z])\)", text)
    text = letter.group(1) if letter else text
    return re.sub(r"\s+", "", text)


def compare_plain(predicted: str, reference: str) -> bool | None:
    """Equality that needs no algebra: same spelling, or two plain numbers; None when unsure."""
    left, right = normalise_answer(predicted), normalise_answer(reference)
    if left and left == right:
        return True
    if _PLAIN.fullmatch(left) and _PLAIN.fullmatch(right):
        if decimal.Decimal(left) == decimal.Decimal(right):
            return True
        if "." not in left + right:  # fractions of different precision are for math-verify
            return False
    return None
