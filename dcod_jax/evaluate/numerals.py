r"""Numbers as people write them: digits, fractions, e-notation, words and Chinese numerals.

Standard library only. `number` is exact; `in_digits` is the spelling that `number` reads.
"""

from __future__ import annotations

import fractions
import re
from collections.abc import Sequence

_DECIMALS = fractions.Fraction(5, 10**7)  # two decimals are equal to six places ...
_DIGITS = fractions.Fraction(5, 10**6)  # ... and to six significant digits
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
    r"(?:[eE]([-+]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?")
_FRACTION = re.compile(
    r"([-+]?)\s*(?:\\frac\{\s*([-+]?\d{1,60})\s*\}\{\s*([-+]?\d{1,60})\s*\}"
    r"|(\d{1,60})\s*[/:]\s*(\d{1,60}))"
)

MULTIPLIERS = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6,
               "billion": 10**9, "trillion": 10**12}  # fmt: skip
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = dict(zip([*_UNITS, *_TENS], [*range(20), *range(20, 100, 10)], strict=True))
_PARTS = {"half": 2, "halve": 2, "quarter": 4, "third": 3} | {
    f"{word}th": place
    for place, word in enumerate(
        "four fif six seven eigh nin ten eleven twelf thirteen fourteen fifteen".split(), 4
    )
}
_ORDINALS = {"first": 1, "second": 2} | {
    word: place for word, place in _PARTS.items() if place > 2 and word != "quarter"
}
_PLACE = re.compile(rf"(?:the )?({'|'.join(_ORDINALS)})(?: place)?", re.IGNORECASE)
_WORD = rf"(?:{'|'.join([*_UNITS[::-1], *_TENS, *MULTIPLIERS])})(?![A-Za-z])"
_PART = rf"(?:{'|'.join(_PARTS)})s?(?![A-Za-z])"
# "minus twelve", "two thirds", "one hundred and five", "2 and a half", "half", "a dozen"
_SPELLED = re.compile(
    rf"(?P<sign>(?:minus|negative) )?(?:(?P<top>an?|{_WORD})[ -](?P<part>{_PART})|(?P<half>half)\b"
    rf"|(?:(?:an? (?={'|'.join(MULTIPLIERS)}))?"
    rf"(?P<whole>\d+|{_WORD}(?:(?:[ -]| and ){_WORD})*(?![ -]{_PART})))"
    rf"(?P<dozen> ?dozen)?"
    rf"(?: and (?P<more>an?|{_WORD})[ -](?P<rest>{_PART}))?)"
    r"(?=$|[ ,.%](?!\d))(?:(?: of)? an?(?= [a-z]))?"
)
# A number in words inside a sentence; "one" alone is mostly a pronoun.
IN_WORDS = re.compile(
    rf"(?<![A-Za-z-])(?:(?:minus|negative) )?(?:half a (?:dozen|million)"
    rf"|(?!one\b(?! hundred| thousand| and)){_WORD}(?:(?:[ -]| and ){_WORD})*(?:[ -]{_PART})?)",
    re.IGNORECASE,
)
_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_CHINESE_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_CHINESE_NUMBER = rf"[{''.join((*_CHINESE, *_CHINESE_POWERS))}]{{1,24}}"
_IN_CHINESE = re.compile(
    rf"(?:(?P<percent>百分之)|(?P<bottom>{_CHINESE_NUMBER})分之)?(?P<number>{_CHINESE_NUMBER})"
    r"(?P<unit>[\u4e00-\u9fff]{0,2})"
)
IN_CHINESE = re.compile(
    rf"(?<=[是为有得剩下共需要了])({_CHINESE_NUMBER})(?=(?:[\u4e00-\u9fff]?|[种个次只本条名]"
    r"[\u4e00-\u9fff]{0,4})[。，！]|$)"
)


def number(text: str) -> fractions.Fraction | None:
    """The exact value of a plain number, fraction or e-notation; None for any other text."""
    if match := _DECIMAL.fullmatch(text):
        sign, digits, *powers = match.groups()
        value = fractions.Fraction(f"{sign}{digits.rstrip('.')}")
        power = int(powers[0] or powers[1] or 0)
        return value * fractions.Fraction(10) ** power if power else value
    if match := _POWER_OF_TEN.fullmatch(text):
        return fractions.Fraction(10) ** int(match.group(1))
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        top, bottom = (int(p) for p in parts if p is not None)
        return fractions.Fraction(-top if sign == "-" else top, bottom) if bottom else None
    return None


def close(
    left: fractions.Fraction | float | complex, right: fractions.Fraction | float | complex
) -> bool:
    """Equal to six decimals and to six significant digits."""
    difference = abs(left - right)
    return difference <= _DECIMALS and difference <= _DIGITS * max(abs(left), abs(right))


def is_rounded(
    texts: tuple[str, str], values: Sequence[fractions.Fraction | float | complex]
) -> bool:
    """Whether an exact value was rounded to a decimal: a reference's 3 digits, an answer's 6."""
    decimals = [re.fullmatch(r"[-+]?(\d*)\.(\d+)", text.strip()) for text in texts]
    for decimal, text, digits in zip(decimals, (texts[1], texts[0]), (6, 3), strict=True):
        if decimal and "." not in text and len("".join(decimal.groups()).lstrip("0")) >= digits:
            unit = fractions.Fraction(1, 10 ** len(decimal.group(2)))
            return abs(values[0] - values[1]) <= unit / 2
    return False


def same_number(left: str, right: str, tolerance: float) -> bool | None:
    """Whether two numbers are equal; None where one is no number."""
    first, second = number(left), number(right)
    if first is None or second is None:
        return None
    rounded = any(re.search(r"[.e^]", text) for text in (left, right))
    return (
        first == second
        or (rounded and close(first, second))
        or abs(first - second) <= fractions.Fraction(tolerance)
        or is_rounded((left, right), (first, second))
    )


def latex(value: fractions.Fraction) -> str:
    """The exact spelling of a number."""
    top, bottom = value.numerator, value.denominator
    return str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"


def _counted(words: str) -> int:
    """ "one hundred and five" -> 105."""
    total = group = 0
    for word in re.findall("[a-z]+|[0-9]+", words):
        if word.isdecimal() or word in _VALUES or word in ("and", "a", "an"):
            group += int(word) if word.isdecimal() else _VALUES.get(word, 0)
        elif word in ("hundred", "dozen"):
            group = max(group, 1) * MULTIPLIERS[word]
        else:
            total, group = total + max(group, 1) * MULTIPLIERS[word], 0
    return total + group


def _fraction(top: str, part: str) -> fractions.Fraction:
    count = 1 if top in ("a", "an") else _counted(top)
    return fractions.Fraction(count, _PARTS[part.removesuffix("s")])


def _from_words(match: re.Match[str]) -> str:
    sign = "-" if match.group("sign") else ""
    if match.group("part"):
        value = _fraction(match.group("top"), match.group("part"))
    elif match.group("half"):
        value = fractions.Fraction(1, 2)
    else:
        value = fractions.Fraction(_counted(match.group("whole")))
        value *= 12 if match.group("dozen") else 1
        if match.group("rest"):
            value += _fraction(match.group("more"), match.group("rest"))
    return sign + latex(value)


def _from_chinese(text: str) -> int:
    total = section = digit = 0
    for sign in text:
        if sign in _CHINESE:
            digit = 10 * digit + _CHINESE[sign] if digit else _CHINESE[sign]
        elif (power := _CHINESE_POWERS[sign]) >= 10**4:
            total, section, digit = (total + section + digit) * power, 0, 0
        else:
            section, digit = section + (digit or 1) * power, 0
    return total + section + digit


def in_digits(text: str) -> str:
    r"""A canonical answer that begins with a number in words: "two dozen eggs" -> "24 eggs".

    Any other text is returned as it is.
    """
    if match := _IN_CHINESE.fullmatch(text):
        value = fractions.Fraction(_from_chinese(match.group("number")))
        if match.group("percent"):
            return f"{value}%"
        if bottom := _from_chinese(match.group("bottom") or "一"):
            return latex(value / bottom) + match.group("unit")
    if match := _PLACE.fullmatch(text):
        return str(_ORDINALS[match.group(1).lower()])
    if not re.match(r"[A-Za-z]{3}|an? |\d+ and ", text):
        return text
    match = _SPELLED.match(text.lower())
    if match and match.group(0) and not match.group(0).isdecimal():
        return _from_words(match) + text[match.end() :]
    return re.sub(r"(?i)^(?:minus|negative)\s+(?=[\d.\\(])", "-", text)
