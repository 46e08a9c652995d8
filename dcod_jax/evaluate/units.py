r"""The unit of an answer: what is a measure, what is a noun, what multiplies the number."""

from __future__ import annotations

import dataclasses
import fractions
import math
import re

from dcod_jax.evaluate.numerals import MULTIPLIERS, latex, number

# What measures the same stands in one line: how many of the first one, the canonical name, and its
# other spellings, all without a plural s.
_TABLE = """
1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 week wk
1 month, 12 year yr
1 nm nanometer nanometre, 1e3 um micron micrometer micrometre, 1e6 mm millimeter millimetre,\
 1e7 cm centimeter centimetre, 1e9 m meter metre, 1e12 km kilometer kilometre
1 in inch inche, 12 ft foot feet, 36 yd yard, 63360 mi mile
1 mg milligram, 1e3 g gram gm, 1e6 kg kilogram kilo, 1e9 ton tonne
1 oz ounce floz, 16 pound lb gbp £
1 mL ml milliliter millilitre, 1000 L l liter litre
1 pint pt, 2 quart qt, 8 gal gallon
1 cent ¢, 100 dollar usd buck ￥
1 pence penny pennie, 100 pound
""" + "\n".join(  # and "1 mW, 1e3 W watt, 1e6 kW, 1e9 MW, 1e12 GW"
    f"1 m{unit}, 1e3 {unit} {name}, 1e6 k{unit}, 1e9 M{unit}, 1e12 G{unit}"
    for unit, name in zip("J W V N Pa Hz eV A".split(), "joule watt volt newton pascal hertz eV amp"
                          .split(), strict=True))  # fmt: skip
_OTHERS = """
ruble rouble ₽, won ₩, euro eur €, yen yuan rmb ¥, rupee rs ₹, degC celsius, degF fahrenheit,
K kelvin, dB decibel, ohm Ω, B byte, bit,
kb kilobyte, mb megabyte, gb gigabyte, am, pm
"""
_LINES = [[part.split() for part in line.split(",")] for line in _TABLE.split("\n") if line]
_CANONICAL = {name: part[1] for line in _LINES for part in line for name in part[1:]} | {
    name: part.split()[0] for part in _OTHERS.split(",") for name in part.split()
}
_SCALES = [{part[1]: fractions.Fraction(part[0]) for part in line} for line in _LINES]
# Words after a number that change it, so that "5 or 6" or "2 and a half" is not 5 or 2.
NOT_UNITS = frozenset(
    "or and to times half over plus minus squared cubed mod base equals where if i pi "
    "sin cos tan cot csc log ln exp sqrt gcd lcm arcsin arccos arctan".split()
)
_CURRENCY = re.compile(r"^([-+]?)\s*([€£¥₹￥₽₩])\s*(?=[-+]?(?:[\d.]|\\frac))|\s*([€£¥₹￥₽₩¢Ω])\s*$")
# The value ends with what is no letter; then come words up to the end.
_TAIL = re.compile(
    r"(?P<value>.*?(?:\d[a-z](?=\s)|[^\sA-Za-z/(.,'-]|\\pi(?=\s)))(?P<gap>[\s,/(]*)"
    r"(?P<words>(?<![\\A-Za-z])[A-Za-z](?:[A-Za-z\s./'()-]|\^\s*\{?\s*-?\d\s*\}?)*)",
    re.DOTALL,
)
# One part of "2 hours and 30 minutes" or "£3 50p", with what joins the next one.
_PART = re.compile(
    r"(?:(?P<sign>￥|£)\s*)?(?P<number>\d+(?:\.\d+)?(?:/\d+)?)(?![\d.])"
    r"(?:\s*(?P<unit>(?!and\b)[A-Za-z]+)\.?)?(?:\s*,?\s*(?:and )?\s*(?=[￥£\d])|\s*$)"
)
_BEHIND = re.compile(
    r"(?:\s|(?=[a-z]{2}))(?!in [a-z])(?:(?:square|cubic|sq\.?|cu\.?) )?([A-Za-z]+)"
    r"(?: ?\^\s?\{?\d\}?|[²³])?(?: ?(?:/|per|an?\b) ?([A-Za-z]+)(?:\^\{?\d\}?|²)?)?(?![A-Za-z^])"
)
_FEET = re.compile(r"(\d+)\s*(?:'|\^\{?\\prime\}?)\s*(\d+(?:\.\d+)?)\s*(?:\"|'')")
_MODULUS = re.compile(r"\s*\(?\s*\\?[pb]?mod(?:ulo)?\s*[{}]?\s*(\w+)\s*\}?\s*\)?\s*\}?\s*$")
_POWERS = [
    (re.compile(r"^times$|(?<=left )over$"), ""),
    (re.compile(r"\bms\s*\^\s*\{?\s*-(\d)\s*\}?"), r"m/s^\1"),
    (re.compile(r"\bof (?:an?|the)\b"), "of"),
    (re.compile(r"\b(?:square|sq)\b\.?\s*([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s*([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"([A-Za-z]+)\s+squared"), r"\1^2"),
    (re.compile(r"([A-Za-z]+)\s+cubed"), r"\1^3"),
    (re.compile(r"\b([ap])\.?\s?m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\bfl\.?\s*oz\b"), "floz"),
    (re.compile(r"\bmph\b"), "mi/h"),
    (re.compile(r"\b(?:kmph|kph|kmh)\b"), "km/h"),
    (re.compile(r"\b(?:per|an?(?= (?:second|minute|hour|day|week|month|year)\b))\b"), "/"),
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


def _is_unit(word: str, *, apart: bool) -> bool:
    """Whether a word behind a value is a measure or a noun, not a variable or an operator."""
    if word.lower() in NOT_UNITS:
        return False
    if word == "of":
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
    r"""What a canonical answer measures: "5 cm^2" -> Quantity("5", "cm^2").

    "x" and "2 or 3" have no unit; their value is the whole text.
    """
    modulus = ""
    text = re.sub(r"(?<=[\d})%])(?:\s*(?=[\u0400-\uffff])[^\W\d_])+$", "", text)  # 12 个, 12 книг
    match = _MODULUS.search(text)
    if match and match.start():
        modulus, text = match.group(1), text[: match.start()].rstrip(" (")
    currency = ""
    if match := _CURRENCY.search(text):
        currency = match.group(2) or match.group(3)
        text = (match.group(1) or "") + text[: match.start()] + text[match.end() :]
    match = _TAIL.fullmatch(text.strip())
    words = match.group("words") if match else ""
    for pattern, new in _POWERS:
        words = pattern.sub(new, words)
    names = re.findall(r"[A-Za-z]+", words)
    if match is None or not all(
        _is_unit(name, apart=bool(match.group("gap") or place or "/" in words))
        for place, name in enumerate(names)
    ):
        return Quantity(text, _measure(_CANONICAL.get(currency, "")), 1, modulus)
    factor = math.prod(MULTIPLIERS.get(name.lower(), 1) for name in names)
    measure = _measure(words) or _measure(_CANONICAL.get(currency, ""))
    return Quantity(match.group("value").strip(), measure, factor, modulus)


def measured(text: str) -> str:
    """The measure that a text behind a number begins with: " km/h, so" -> " km/h"; else ""."""
    match = _BEHIND.match(text)
    if match is None or _unit(match.group(1)) is None:
        return ""
    return match.group(0) if _unit(match.group(2) or "s") else text[: match.end(1)]


# ---------------------------------------------------------------- one measure in another


def ratio_of_units(left: str, right: str) -> fractions.Fraction | None:
    """How many of the right measure one of the left is: ("h^1", "min^1") -> 60; None: not known."""
    ratio = fractions.Fraction(1)
    one, other = (
        {unit: int(power) for unit, _, power in (part.partition("^") for part in measure.split())}
        for measure in (left, right)
    )
    for unit, power in one.items():
        scale = next((s for s in _SCALES if unit in s and any(u in s for u in other)), {unit: 1})
        same = next((u for u in other if u in scale and other[u] == power), None)
        if same is None:
            return None
        ratio *= fractions.Fraction(scale[unit], scale[same]) ** power
        del other[same]
    return None if other else ratio


def compound(text: str) -> list[str]:
    """ "2 hours and 30 minutes" in each of its units, largest first: 5/2 h, 150 min; else []."""
    if not re.match(r"[￥£]?\d", text):
        return []
    plain = _FEET.sub(r"\1 ft \2 in", text)
    counts: list[tuple[str, fractions.Fraction]] = []
    place, plain = 0, plain.strip()
    while match := _PART.match(plain, place):
        sign, unit, place = match.group("sign"), match.group("unit"), match.end()
        name = _CANONICAL[sign] if sign else unit and _unit(unit)
        value = number(match.group("number"))
        if not name or value is None or (sign and unit):
            return []
        counts.append((name, value))
    if len(counts) < 2 or place < len(plain):
        return []
    units = [unit for unit, _ in counts]
    if units[0] == "h" or units[-1] == "s":  # 2h 30m
        units = ["min" if unit == "m" else unit for unit in units]
    scale = next((s for s in _SCALES if set(units) <= set(s)), None)
    if scale is None or len(set(units)) < len(units):
        return []
    total = sum(count * scale[unit] for unit, (_, count) in zip(units, counts, strict=True))
    order = sorted(units, key=lambda unit: -scale[unit])
    return [f"{latex(fractions.Fraction(total) / scale[unit])} {unit}" for unit in order]
