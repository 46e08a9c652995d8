r"""Whether two final answers are the same: lists, sets, intervals, units and numbers.

`equal` takes an answer apart; the parts that need algebra go to a function that the caller gives,
and without one their equality is None: unknown. Standard library only.
"""

from __future__ import annotations

import dataclasses
import fractions
import re
from collections.abc import Callable, Iterable, Sequence

from dcod_jax.evaluate.spelling import braced, canonical
from dcod_jax.evaluate.units import Quantity, quantity

MAX_ANSWER_CHARS = 500  # a longer answer is compared by its spelling only
MAX_ITEMS = 60  # a longer list is compared by its spelling only

Algebra = Callable[[str, str, float], bool]  # (predicted, reference, tolerance)

_DECIMALS = fractions.Fraction(5, 10**7)  # two decimals are equal to six places ...
_DIGITS = fractions.Fraction(5, 10**6)  # ... and to six significant digits
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
    r"(?:[eE]([-+]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?")
_FRACTION = re.compile(
    r"([-+]?)\s*(?:\\frac\{\s*([-+]?\d{1,60})\s*\}\{\s*(\d{1,60})\s*\}|(\d{1,60})\s*[/:]\s*(\d{1,60}))"
)
_BASED = re.compile(r"([-+]?[\dA-F]*\d[\dA-F]*(?:\.\d+)?)_\{?(\d{1,2})\}?")
_TIME = re.compile(r"\d{1,2}:\d\d")
_WORDS = re.compile(r"[A-Za-z][A-Za-z\s.,'\"&()-]*")
_CHOICE = re.compile(
    r"(?:\\text\{)?\s*(?:\(([A-Za-z])\)[.:]?|([A-J])\s*[.):])\s*\}?\s*(?P<rest>.*)", re.DOTALL
)
_LEAD = re.compile(
    r"(?:\\text\{)?\s*(?:the )?(?:final |correct )?answer(?: is:?|:)\s*\}?\s*", re.IGNORECASE
)
_LABEL = re.compile(
    r"([^=<>+*/^\d,;(-][^=<>+*/^,;(]*(?:\([^()=]*\))?|\([^()=]*\))\s*(?:=|\\equiv|\\approx)(?!=)"
)
_SET_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:\\in\s*(?:\\mathbb\{R\}|R))?\s*(?:\||:)\s*(.*)\\\}", re.DOTALL
)
_MEMBER = re.compile(r"[A-Za-z]\s*\\in\s*(?=[(\[]|\\mathbb|\\\{)")
_RELATION = re.compile(r"\s*(\\le|\\ge|\\ne|<|>)\s*")
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w\}?)?")
_SEPARATOR = re.compile(
    r"[,;]\s*(?:(?:and|or)\b)?|\\text\{\s*,?\s*(?:and|or)\s*\}|(?:and|or)\b|或|和", re.IGNORECASE
)
_EQUATION = re.compile(r"(?<![<>!=])=(?!=)")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_COMMA = re.compile("[,;]")


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """A canonical answer in its parts.

    `ends` is "" for a single answer, "," for a list, the two brackets of a tuple, interval or set,
    "∪" for a union. A relation such as 1 < x is an interval of `variable`.
    """

    text: str
    ends: str = ""
    items: tuple[_Parsed, ...] = ()
    variable: str = ""
    label: str = ""  # what stands before an equals sign


# ---------------------------------------------------------------- taken apart


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        match = separator.match(text, place) if depth == 0 else None
        if match and not (match.group(0)[0].isalpha() and text[place - 1 : place].isalpha()):
            parts.append(text[start:place])
            start = place = match.end()
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        place += 1
    return [part for part in (p.strip() for p in [*parts, text[start:]]) if part]


def _enclosed(text: str) -> tuple[str, str]:
    r"""(brackets, content) where one pair encloses the text, else "": "[1,2)" -> ("[)", "1,2")."""
    escaped = text.startswith("\\{") and text.endswith("\\}")
    if not escaped and not (text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(text) > 1):
        return "", text
    content = text[2:-2] if escaped else text[1:-1]
    depth = 0
    for character in content:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return "", text
    return text[escaped] + text[-1], content.strip()


def _relation(text: str) -> _Parsed | None:
    r"""x<3 or 1\le x<4 as an interval; None where it is no such relation of one variable."""
    parts = _RELATION.split(text)
    terms, signs = parts[::2], parts[1::2]
    if signs == ["\\ne"] and _VARIABLE.fullmatch(terms[0]):
        below, above = (_relation(f"{terms[0]}{sign}{terms[1]}") for sign in "<>")
        return _Parsed(text, "∪", (below, above), terms[0]) if below and above else None
    if "\\ne" in signs:
        return None
    if len(terms) not in (2, 3):
        return None
    if all(sign in (">", "\\ge") for sign in signs):
        terms, signs = terms[::-1], ["\\le" if s == "\\ge" else "<" for s in signs[::-1]]
    if any(sign in (">", "\\ge") for sign in signs):
        return None
    if len(terms) == 2 and _VARIABLE.fullmatch(terms[0]):
        terms, signs = ["-\\infty", *terms], ["<", *signs]
    elif len(terms) == 2:
        terms, signs = [*terms, "\\infty"], [*signs, "<"]
    if not _VARIABLE.fullmatch(terms[1]):
        return None
    ends = "(["[signs[0] == "\\le"] + ")]"[signs[1] == "\\le"]
    return _Parsed(text, ends, (_Parsed(terms[0]), _Parsed(terms[2])), terms[1])


def _parse(text: str) -> _Parsed:
    text = text.strip()
    while braced(text, 0, len(text)) == text[1:-1] and text[:1] == "{":
        text = text[1:-1].strip()
    squeezed = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace(" ", "")
    if squeezed.lower() in ("\\mathbb{r}", "allrealnumbers"):
        return _Parsed(text, "()", (_Parsed("-\\infty"), _Parsed("\\infty")))
    if squeezed.lower() in ("\\{\\}", "\\emptyset", "emptyset", "theemptyset"):
        return _Parsed("\\emptyset")
    if "\\begin" in text:
        return _Parsed(text)
    if match := _SET_BUILDER.fullmatch(text):
        inner = _parse(match.group(2))
        if inner.variable or inner.ends == "∪":
            return inner
    text = _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text
    if len(parts := _split(text, _SEPARATOR)) > 1:
        items = tuple(map(_parse, parts))
        if all(item.variable for item in items) and not re.search(r"\band\b", text):
            return _Parsed(text, "∪", items)
        flat = (i for item in items for i in (item.items if item.ends == "," else (item,)))
        return _Parsed(text, ",", tuple(flat))
    if label := _LABEL.match(text):
        value = _parse(text[label.end() :].rpartition("=")[2])
        return dataclasses.replace(value, text=text, label=label.group(1).strip()) if (
            value.ends
        ) else _Parsed(value.text, label=label.group(1).strip())  # fmt: skip
    if len(parts := _split(text, _UNION)) > 1:
        return _Parsed(text, "∪", tuple(map(_parse, parts)))
    brackets, content = _enclosed(text)
    if brackets:
        items = tuple(map(_parse, _split(content, _COMMA)))
        if len(items) > 1 or brackets == "{}":
            return _Parsed(text, brackets, items)
        if brackets == "()":
            return _parse(content)
    if len(pair := re.split(r"\\pm(?![A-Za-z])", text)) == 2:
        return _Parsed(text, ",", tuple(_parse(sign.join(pair)) for sign in "+-"))
    return _relation(text) or _Parsed(text)


# ---------------------------------------------------------------- numbers


def _number(text: str) -> fractions.Fraction | None:
    """The exact value of a plain number, fraction, mixed number or e-notation."""
    if match := _DECIMAL.fullmatch(text):
        sign, digits, *powers = match.groups()
        power = int(powers[0] or powers[1] or 0)
        return fractions.Fraction(f"{sign}{digits.rstrip('.')}") * fractions.Fraction(10) ** power
    if match := _POWER_OF_TEN.fullmatch(text):
        return fractions.Fraction(10) ** int(match.group(1))
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        top, bottom = (int(p) for p in parts if p is not None)
        return fractions.Fraction(-top if sign == "-" else top, bottom) if bottom else None
    return None


def close(left: fractions.Fraction | complex, right: fractions.Fraction | complex) -> bool:
    """Equal to six decimals and to six significant digits."""
    difference = abs(left - right)
    return difference <= _DECIMALS and difference <= _DIGITS * max(abs(left), abs(right))


def _same_number(left: str, right: str, tolerance: float) -> bool | None:
    first, second = _number(left), _number(right)
    if first is None or second is None:
        return None
    rounded = any(re.search(r"[.e^]", text) for text in (left, right))
    return (
        first == second
        or (rounded and close(first, second))
        or abs(first - second) <= fractions.Fraction(tolerance)
    )


# ---------------------------------------------------------------- compared


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    found: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        found = None if verdict is None else found
    return found


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        found = None if verdict is None else found
    return found


@dataclasses.dataclass(frozen=True)
class _Comparison:
    algebra: Algebra | None
    tolerance: float

    def same(self, left: _Parsed, right: _Parsed) -> bool | None:
        if not left.ends and not right.ends:
            return self._single(left, right)
        if left.label and right.label and left.label != right.label:
            return False
        if max(len(left.items), len(right.items)) > MAX_ITEMS:
            return False
        if "∪" in (left.ends, right.ends):
            return left.ends == right.ends and self._as_sets(left.items, right.items)
        if left.variable and right.variable and left.variable != right.variable:
            return False
        brackets = {left.ends, right.ends} - {"", ","}
        if brackets and brackets != {"{}"}:  # the order counts
            if len(left.items) != len(right.items):
                return False
            if len(brackets) == 2 and len(left.items) == 2 and brackets != {"()", "{}"}:
                return False  # intervals that differ at an end; (1, 2) may be a pair
            return _all(map(self.same, left.items, right.items))
        return self._as_sets(left.items or (left,), right.items or (right,))

    def _as_sets(self, left: Sequence[_Parsed], right: Sequence[_Parsed]) -> bool | None:
        table = [[self.same(one, other) for other in right] for one in left]
        return _all([*map(_any, table), *map(_any, zip(*table, strict=True))])

    def _single(self, left: _Parsed, right: _Parsed) -> bool | None:
        if _squeeze(left.text) == _squeeze(right.text) and left.label == right.label:
            return True
        letters = len(left.label) == len(right.label) == 1
        if letters and left.label != right.label:  # x = 1 is not y = 1
            return False
        texts = [left.text, right.text]
        equations = [bool(_EQUATION.search(text)) for text in texts]
        if equations[0] != equations[1] and (label := left.label or right.label):
            wholes = [text if one else f"{label} = {text}"
                      for text, one in zip(texts, equations, strict=True)]  # fmt: skip
            return self._leaf(*wholes)  # 2x + y = 3 and y = 3 - 2x
        if equations[0] != equations[1]:  # "x + y = 5" for 5
            texts = [text.rpartition("=")[2] if one else text
                     for text, one in zip(texts, equations, strict=True)]  # fmt: skip
        first, second = map(quantity, texts)
        if first.measure and second.measure and first.measure != second.measure:
            return False
        if first.modulus and second.modulus and first.modulus != second.modulus:
            return False
        return self._value(first, second)

    def _value(self, left: Quantity, right: Quantity) -> bool | None:
        if _squeeze(left.value) == _squeeze(right.value):
            return left.factor == right.factor
        clocks = [_clock(one) for one in (left, right)]
        if all(clocks):
            return clocks[0] == clocks[1]
        words = [_words(one.value) for one in (left, right)]
        if all(words):
            return words[0] == words[1]
        if any(words) and any(_number(one.value) is not None for one in (left, right)):
            return False
        first, second = (_BASED.fullmatch(_squeeze(one.value)) for one in (left, right))
        if first or second:
            texts = [m.groups() if m else (_squeeze(one.value), None)
                     for m, one in ((first, left), (second, right))]  # fmt: skip
            bases = {base for _, base in texts if base}
            return len(bases) == 1 and texts[0][0] == texts[1][0]
        percent = [one.value.endswith("%") for one in (left, right)]
        texts = [one.value.removesuffix("%").strip() for one in (left, right)]
        texts = [t if one.factor == 1 else _times(t, one.factor)
                 for t, one in zip(texts, (left, right), strict=True)]  # fmt: skip
        same = self._leaf(*texts)
        if same is not True and percent[0] != percent[1]:
            hundredth = [_times(t, fractions.Fraction(1, 100)) if p else t
                         for t, p in zip(texts, percent, strict=True)]  # fmt: skip
            same = _any([same, self._leaf(*hundredth)])
        return same

    def _leaf(self, left: str, right: str) -> bool | None:
        same = _same_number(left, right, self.tolerance)
        if same is None and any(t.count("(") != t.count(")") for t in (left, right)):
            return False
        if same is None and self.algebra is not None:
            return self.algebra(left, right, self.tolerance)
        return same


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _times(value: str, factor: fractions.Fraction | int) -> str:
    number = _number(value)
    return f"({value}) \\cdot {factor}" if number is None else str(number * factor)


def _clock(one: Quantity) -> tuple[int, int] | None:
    """(hour, minute) of a time of day."""
    half = one.measure.partition("^")[0]
    if _TIME.fullmatch(one.value):
        hours, minutes = map(int, one.value.split(":"))
    elif half in ("a.m.", "p.m.") and one.value.isdecimal():
        hours, minutes = int(one.value), 0
    else:
        return None
    if half == "p.m." and hours < 12:
        hours += 12
    return (0 if half == "a.m." and hours == 12 else hours), minutes


def _words(text: str) -> str:
    """Words without case, articles and marks; "" for what is no word but mathematics."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip().strip(".,\"'")
    if not _WORDS.fullmatch(plain) or set(plain) <= set("xyz "):
        return ""
    if len(plain) == 1:
        return plain
    words = re.findall("[a-z]+", plain.lower())
    return "".join(w.removesuffix("s") for w in words if w not in ("the", "a", "an")) or plain


def _choice(text: str) -> tuple[str, str]:
    r"""("B", "12") of "\text{(B)} 12", ("", text) of what names no choice."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        bare = re.fullmatch(r"(?:\\text\{)?\s*(?:[Oo]ption |[Cc]hoice )?\s*([A-J])\s*\}?", text)
        return (bare.group(1), "") if bare else ("", text)
    return (match.group(1) or match.group(2)).upper(), match.group("rest").strip()


def equal(
    predicted: str, reference: str, *, tolerance: float = 0.0, algebra: Algebra | None = None
) -> bool | None:
    """Whether two final answers are the same; None where that takes the missing `algebra`.

    A unit, label, base or percent sign may be left out on one side. Numbers may differ by
    `tolerance`.
    """
    left, right = (_LEAD.sub("", canonical(text), count=1) for text in (predicted, reference))
    if _squeeze(left) == _squeeze(right):
        return bool(left)
    if max(len(left), len(right)) > MAX_ANSWER_CHARS:
        return False
    letters = [_choice(text) for text in (left, right)]
    if letters[0][0] and letters[1][0]:
        return letters[0][0] == letters[1][0]
    sides = [rest if letter and rest else text
             for (letter, rest), text in zip(letters, (left, right), strict=True)]  # fmt: skip
    return _Comparison(algebra, tolerance).same(*map(_parse, sides))
