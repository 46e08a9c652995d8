r"""The unit of an answer: what is a measure, what is a noun, what multiplies the number."""

from __future__ import annotations

import dataclasses
import math
import re

_MEASURES = {  # canonical name: its spellings, without a plural s
    "m": "m meter metre",
    "cm": "cm centimeter centimetre",
    "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "g": "g gram gm",
    "kg": "kg kilogram kilo",
    "mg": "mg milligram",
    "pound": "lb pound gbp £",
    "oz": "oz ounce floz",
    "t": "ton tonne",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "L": "L l liter litre",
    "mL": "ml mL milliliter millilitre",
    "gal": "gal gallon",
    "dollar": "dollar usd buck ￥",
    "cent": "cent",
    "euro": "euro eur €",
    "yen": "yen yuan rmb ¥",
    "rupee": "rupee rs ₹",
    "celsius": "degC celsius",
    "fahrenheit": "degF fahrenheit",
    "K": "K kelvin",
    "N": "N newton",
    "J": "J joule",
    "W": "W watt",
    "V": "V volt",
    "Hz": "hz",
    "B": "B byte",
    "b": "bit",
    "KB": "kb kilobyte",
    "MB": "mb megabyte",
    "GB": "gb gigabyte",
    "a.m.": "am",
    "p.m.": "pm",
}
_CANONICAL = {name: unit for unit, names in _MEASURES.items() for name in names.split()}
_MULTIPLIERS = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words after a number that change it, so that "5 or 6" or "2 and a half" is not 5 or 2.
NOT_UNITS = frozenset(
    "or and to times half over plus minus squared cubed mod base equals where if i pi "
    "sin cos tan cot csc log ln exp sqrt gcd lcm arcsin arccos arctan".split()
)
_CURRENCY = re.compile(r"^([-+]?)\s*([€£¥₹￥])\s*(?=[-+]?[\d.])|\s*([€£¥₹￥])\s*$")
# The value ends with what is no letter; then come words up to the end.
_TAIL = re.compile(
    r"(?P<value>.*[^\sA-Za-z/(.,'-])(?P<gap>[\s,/(]*)"
    r"(?P<words>(?<![\\A-Za-z])[A-Za-z](?:[A-Za-z\s./'()-]|\^\s*\{?\s*-?\d\s*\}?)*)",
    re.DOTALL,
)
_MODULUS = re.compile(
    r"\s*\(?\s*(?:\\text\{\s*\(?\s*)?\\?[pb]?mod(?:ulo)?\s*[{}]?\s*(\w+)\s*\}?\s*\)?\s*\}?\s*$"
)
_POWERS = [
    (re.compile(r"\b(?:square|sq)\b\.?\s*([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s*([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"([A-Za-z]+)\s+squared"), r"\1^2"),
    (re.compile(r"([A-Za-z]+)\s+cubed"), r"\1^3"),
    (re.compile(r"\b([ap])\.?\s?m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\bfl\.?\s*oz\b"), "floz"),
    (re.compile(r"\bmph\b"), "mi/h"),
    (re.compile(r"\b(?:kmph|kph|kmh)\b"), "km/h"),
    (re.compile(r"\bper\b"), "/"),
]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A value in LaTeX, its measure ("" where it has none: "9 apples") and what multiplies it."""

    value: str
    measure: str = ""
    factor: int = 1
    modulus: str = ""


def _unit(word: str) -> str | None:
    """The canonical name of a measure, None for any other word."""
    for name in (word, word.lower() if len(word) > 1 else word):
        for one in (name, name.removesuffix("s") if len(name) > 2 else name):
            if one in _CANONICAL:
                return _CANONICAL[one]
    return None


def _is_unit(word: str, *, marked: bool, apart: bool) -> bool:
    """Whether a word behind a value is a measure or a noun, not a variable or an operator."""
    if word.lower() in NOT_UNITS:
        return False
    if marked or word == "of":
        return True
    if _unit(word) is not None:
        return apart or len(word) > 1
    return len(word) > (2 if apart else 3) and not set(word) <= set("xyz")


def _measure(words: str) -> str:
    found, sign = [], 1
    for mark, word, power in re.findall(r"(/)|([A-Za-z]+)(?:\s*\^\s*\{?(-?\d)\}?)?", words):
        if mark:
            sign = -1
        elif unit := _unit(word):
            found.append(f"{unit}^{sign * int(power or 1)}")
    return " ".join(sorted(found))


def quantity(text: str) -> Quantity:
    r"""What a canonical answer measures: "5 \text{ cm}^2" -> Quantity("5", "cm^2").

    "x" and "2 or 3" have no unit; their value is the whole text.
    """
    modulus = ""
    text = re.sub(r"(?<=[\d})%])\s*[\u4e00-\u9fff]+$", "", text)  # Chinese measure words
    match = _MODULUS.search(text)
    if match and match.start():
        modulus, text = match.group(1), text[: match.start()].rstrip(" (")
    currency = ""
    if match := _CURRENCY.search(text):
        currency = match.group(2) or match.group(3)
        text = (match.group(1) or "") + text[: match.start()] + text[match.end() :]
    marked = set(re.findall(r"[A-Za-z]+", " ".join(re.findall(r"\\text\{([^{}]*)\}", text))))
    match = _TAIL.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip())
    words = match.group("words") if match else ""
    for pattern, new in _POWERS:
        words = pattern.sub(new, words)
    names = re.findall(r"[A-Za-z]+", words)
    if match is None or not all(
        _is_unit(name, marked=name in marked, apart=bool(match.group("gap") or place))
        for place, name in enumerate(names)
    ):
        return Quantity(text, _measure(_CANONICAL.get(currency, "")), 1, modulus)
    factor = math.prod(_MULTIPLIERS.get(name.lower(), 1) for name in names)
    measure = _measure(words) or _measure(_CANONICAL.get(currency, ""))
    return Quantity(match.group("value").strip(), measure, factor, modulus)
