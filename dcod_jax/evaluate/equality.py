r"""Whether two final answers are the same: lists, sets, intervals, units and numbers.

`equal` takes an answer apart and compares the parts. Standard library only.
"""

from __future__ import annotations

import dataclasses
import fractions
import re
from collections.abc import Sequence

from dcod_jax.evaluate.algebra import Work, read, same_expression
from dcod_jax.evaluate.numerals import number, same_number
from dcod_jax.evaluate.parts import SPANS, Parsed, is_region, parse, region
from dcod_jax.evaluate.spelling import EQUALS, canonical, split
from dcod_jax.evaluate.units import Quantity, compound, quantity, ratio_of_units

MAX_ANSWER_CHARS = 500  # a longer answer is compared by its spelling only
_MAX_READ = 4 * MAX_ANSWER_CHARS  # a longer one is not brought to one spelling before
MAX_ITEMS = 60  # a longer list is compared by its spelling only

_BASED = re.compile(r"([-+]?[\dA-F]*\d[\dA-F]*(?:\.\d+)?)_\{?(\d{1,2})\}?")
_TIME = re.compile(r"\d{1,2}:\d\d")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?){2,}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z\s.,'\"&()-]*")
_OPENING = re.compile(r"(?i)^(?:it is|it's|there (?:is|are)|it(?= does)|on(?= \w+day))\s+")
_CHOICE = re.compile(
    r"(?:\(([A-Za-z])\)[.:]?|([A-J]|[a-j](?=\)))"
    r"(?:\s*[.):](?![A-Z]\.)| - (?=[A-Za-z]{3}|\d+ [a-z]{2})|(?P<comma>, (?=[\d.]+$))))\s*"
    r"(?P<rest>(?!.*\([b-e]\)).*)",
    re.DOTALL,
)
_LISTED = re.compile(r",| and ")
_LETTERS = re.compile(r"[A-J](?:(?:\s*,\s*|\s*,?\s+and\s+)[A-J])+|[A-J]{2,10}")
_LEAD = re.compile(r"(?:the )?(?:final |correct )?answer(?: is:?|\s*:)\s*", re.I)
# "12 (option B)", "C (12)" and "12 (C)"
_CHOICE_BESIDE = re.compile(
    r"(?P<before>[^()]*?)\s*,?\s*\(?(?:[Oo]ption|[Cc]hoice) \(?(?P<named>[A-J])\)*"
    r"|(?P<first>[A-J])\s*\((?P<value>[^(),]+)\)"
    r"|(?P<number>[^()A-Za-z]*\d[^()]*?|[A-Za-z][a-z]{2,}[a-z ]*?)\s*\((?P<last>[A-J])\)",
    re.DOTALL,
)
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])")
_NOUN = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}(?![A-Za-z])")
_AXIS = re.compile(r"(?<![A-Za-z\\])[jk](?![A-Za-z])")
_OF_A_VARIABLE = re.compile(r"\||\\(?:frac|sqrt|sin|cos|tan|log|ln)(?![A-Za-z])")
_ONE_LETTER = re.compile(r"[A-Za-z]|\\(?!angle|triangle)[a-z]+")
_NAMED = re.compile(r"([A-Z]|\\?[A-Za-z]+?)([A-Za-z]|-?\d+)('*)")  # f(2), P(A), a_3, AB
_DERIVED = re.compile(r"[A-Za-z]'+(?![A-Za-z])|\\frac\{d.*\}\{d")
_CALCULATED = re.compile(r"\([^()]*\w\s*[-+*/^]|^[xyz]{2,}$")
_AND_PART = re.compile(r"(-?\d+)\s*and\s*(\\frac\{\d+\}\{\d+\}|\d+/\d+)")
_PLAIN = re.compile(r"-?\d{1,60}(?:\.\d{1,60})?")
# Words of one meaning, as _words spells them: without articles, spaces and a plural s.
_SYNONYMS = {other: name for name, others in {
    "doenotexist": "dne limitdne limitdoenotexist doesntexist", "undefined": "notdefined",
    "infinitelymany": "infinite", "none": "noneofabove noneofthese", "yes": "true", "no": "false",
    "nosolution": "norealsolution nosolutionexist", "impossible": "notpossible",
    "cannotbedetermined": "notenoughinformation cannotdetermine", "monday": "mon",
    "tuesday": "tue tues", "wednesday": "wed", "thursday": "thu thur thurs", "friday": "fri",
    "saturday": "sat", "sunday": "sun",
}.items() for other in others.split()}  # fmt: skip


# ---------------------------------------------------------------- compared


@dataclasses.dataclass(frozen=True)
class _Comparison:
    tolerance: float
    work: Work

    def same(self, left: Parsed, right: Parsed) -> bool:
        if not left.ends and not right.ends:
            return self._single(left, right)
        names = [(left.label, right.label), (left.variable, right.variable)]
        if max(len(left.items), len(right.items)) > MAX_ITEMS or any(
            all(pair) and pair[0] != pair[1] for pair in names
        ):
            return False
        if is_region(left) or is_region(right):
            first, second = region(left), region(right)
            if first is not None and second is not None:
                return first.same(second)
        if "<" in (left.ends, right.ends):
            return _squeeze(left.text) == _squeeze(right.text)
        if {left.ends, right.ends} & {"∪", "∩", "∖"}:
            if left.ends != right.ends or left.ends != "∖":
                return left.ends == right.ends and self._as_sets(left.items, right.items)
            return all(map(self.same, left.items, right.items))
        brackets = {left.ends, right.ends} - {"", ","}
        if brackets & {"(]", "[)"} and left.ends != right.ends:
            return False
        if brackets == {"()"} and left.ends != right.ends:  # y = 5, x = 3 is (3, 5)
            left, right = map(_in_order, (left, right))
        if brackets and brackets != {"{}"}:  # the order counts
            if len(left.items) != len(right.items):
                return False
            intervals = len(left.items) == 2 and brackets <= {*SPANS}
            if len(brackets) == 2 and (
                intervals or "{}" in brackets or brackets == {"row", "column"}
            ):
                return False  # intervals that differ at an end, a set and a pair
            return all(map(self.same, left.items, right.items))
        return self._as_sets(left.items or (left,), right.items or (right,))

    def _as_sets(self, left: Sequence[Parsed], right: Sequence[Parsed]) -> bool:
        nouns = [[" ".join(_NOUN.findall(one.text)) for one in side] for side in (left, right)]
        if len(left) > 1 and all(nouns[0]) and sorted(nouns[0]) == sorted(set(nouns[1])):
            pairs = zip(left, (right[nouns[1].index(noun)] for noun in nouns[0]), strict=True)
            return all(self.same(*pair) for pair in pairs)  # 3 red and 5 blue
        table = [[self.same(one, other) for other in right] for one in left]
        return all([*map(any, table), *map(any, zip(*table, strict=True))])

    def _single(self, left: Parsed, right: Parsed) -> bool:
        if _squeeze(left.text) == _squeeze(right.text) and left.label == right.label:
            return True
        if all(labels := (left.label, right.label)) and _of_others(*labels):
            return False
        texts = [left.text, right.text]
        equations = [len(split(text, EQUALS)) > 1 for text in texts]
        if equations[0] != equations[1] and (label := left.label or right.label):
            wholes = [text if one else f"{label} = {text}"
                      for text, one in zip(texts, equations, strict=True)]  # fmt: skip
            return self._leaf(*wholes)  # 2x + y = 3 and y = 3 - 2x
        if equations[0] != equations[1]:  # "x + y = 5" for 5
            if equations[1] and len(set(_VARIABLE.findall(right.text.partition("=")[0]))) > 1:
                return False
            texts = [text.rpartition("=")[2] if one else text
                     for text, one in zip(texts, equations, strict=True)]  # fmt: skip
        first, second = map(quantity, texts)
        if first.measure and second.measure and first.measure != second.measure:
            ratio = ratio_of_units(first.measure, second.measure)
            if ratio is None:
                return False
            first = dataclasses.replace(
                first, value=_times(first.value, ratio * first.factor), factor=1
            )
        if first.measure + second.measure and "%" in first.value[-1:] + second.value[-1:]:
            return False
        if first.modulus and second.modulus and first.modulus != second.modulus:
            return False
        return self._value(first, second) or _congruent(first, second)

    def _value(self, left: Quantity, right: Quantity) -> bool:
        if _squeeze(left.value) == _squeeze(right.value):
            return left.factor == right.factor
        clocks = [_clock(one) for one in (left, right)]
        if any(clocks):
            hours = [(int(one.value), 0) if one.value.isdecimal() and not one.measure else None
                     for one in (left, right)]  # fmt: skip
            first, second = (clock or hour for clock, hour in zip(clocks, hours, strict=True))
            if first and second:
                return first == second
        ratios = [_ratio(one.value) for one in (left, right)]
        if any(ratios):
            return ratios[0] == ratios[1]
        words = [_words(one.value) for one in (left, right)]
        if all(words):
            return words[0] == words[1]
        if any(words) and any(number(one.value) is not None for one in (left, right)):
            return False
        based = [_BASED.fullmatch(_squeeze(one.value)) for one in (left, right)]
        if any(based):
            return _same_digits(based, [_squeeze(one.value) for one in (left, right)])
        percent = [one.value.endswith("%") for one in (left, right)]
        texts = [one.value.removesuffix("%").strip() for one in (left, right)]
        texts = [t if one.factor == 1 else _times(t, one.factor)
                 for t, one in zip(texts, (left, right), strict=True)]  # fmt: skip
        same = self._leaf(*texts)
        if same or percent[0] == percent[1]:
            return same
        hundredth = [_times(t, fractions.Fraction(1, 100)) if p else t
                     for t, p in zip(texts, percent, strict=True)]  # fmt: skip
        return self._leaf(*hundredth)

    def _leaf(self, left: str, right: str) -> bool:
        same = same_number(left, right, self.tolerance)
        return same_expression(left, right, self.tolerance, self.work) if same is None else same


def _in_order(parsed: Parsed) -> Parsed:
    """A list of values of different variables in the order of their names."""
    labels = [item.label for item in parsed.items]
    if parsed.ends != "," or len(set(labels)) < len(labels) or not all(len(x) == 1 for x in labels):
        return parsed
    return dataclasses.replace(
        parsed, items=tuple(sorted(parsed.items, key=lambda item: item.label))
    )


def _of_others(left: str, right: str) -> bool:
    """Whether two labels are known to name different things: x and y, x and |x|, f(2) and f(3)."""
    one, other = (re.sub(r"[\s(){}_]", "", label) for label in (left, right))
    functions = sum(bool(_OF_A_VARIABLE.match(label)) for label in (left, right))
    named = [match.group(1, 3) for match in map(_NAMED.fullmatch, (one, other)) if match]
    return one != other and (
        functions > (1 not in (len(left), len(right)))
        or any(map(_CALCULATED.search, (left, right)))
        or all(map(_ONE_LETTER.fullmatch, (left, right)))
        or bool(_DERIVED.match(left)) != bool(_DERIVED.match(right))
        or (len(named) == 2 and named[0] == named[1] and set(one) != set(other))
    )


def _squeeze(text: str) -> str:
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)  # 1 2 is not 12


def _congruent(left: Quantity, right: Quantity) -> bool:
    """10 and 3 modulo 7; "7 mod 4" is 3, and no other number without a modulus."""
    values = [number(one.value) for one in (left, right)]
    modulus = number(left.modulus or right.modulus)
    if not modulus or values[0] is None or values[1] is None or left.measure or right.measure:
        return False
    plain = [value for value, one in zip(values, (left, right), strict=True) if not one.modulus]
    return all(-modulus < value < modulus for value in plain if value is not None) and (
        values[0] % modulus == values[1] % modulus
    )


def _times(value: str, factor: fractions.Fraction | int) -> str:
    plain = number(value)
    return f"({value}) \\cdot {factor}" if plain is None else str(plain * factor)


def _ratio(value: str) -> list[fractions.Fraction]:
    """ "6:8:10" -> 1, 4/3, 5/3; [] for what is no ratio of three or more numbers."""
    if not _RATIO.fullmatch(value):
        return []
    terms = [fractions.Fraction(term.strip()) for term in value.split(":")]
    return [term / terms[0] for term in terms] if terms[0] else terms


def _same_digits(based: list[re.Match[str] | None], texts: list[str]) -> bool:
    """Numbers with their bases, by value; by digits where one side has no base."""
    digits = [match.group(1) if match else text
              for match, text in zip(based, texts, strict=True)]  # fmt: skip
    if None in based or not all(re.fullmatch(r"-?[\dA-F]+", text) for text in digits):
        return digits[0] == digits[1]
    try:
        values = [int(text, int(match.group(2)) if match else 10)
                  for match, text in zip(based, digits, strict=True)]  # fmt: skip
    except ValueError:  # a digit that the base does not have
        return False
    return values[0] == values[1]


def _clock(one: Quantity) -> tuple[int, int] | None:
    """(hour, minute) of a time of day."""
    half = one.measure.partition("^")[0]
    if _TIME.fullmatch(one.value):
        hours, minutes = map(int, one.value.split(":"))
    elif half in ("am", "pm") and one.value.isdecimal():
        hours, minutes = int(one.value), 0
    else:
        return None
    if half == "pm" and hours < 12:
        hours += 12
    return (0 if half == "am" and hours == 12 else hours), minutes


def _words(text: str) -> str:
    """Words without case, articles and marks; "" for what is no word but mathematics."""
    plain = _OPENING.sub("", text.strip(" .,\"'"))
    if not _WORDS.fullmatch(plain) or set(plain) <= set("xyz "):
        return ""
    if len(plain) == 1:
        return plain if plain.isupper() else ""  # e is a number
    words = re.findall("[a-z]+", plain.lower())
    joined = "".join(
        w.removesuffix("s") if len(w) > 3 else w for w in words if w not in ("the", "a", "an")
    )
    if re.match("(?:an?)?infinite(?:lymany|number)", joined):
        return "infinitelymany"
    return _SYNONYMS.get(joined, joined) or plain


def _choice(text: str, other: str) -> tuple[str, str]:
    r"""("B", "12") of "\text{(B)} 12" and "12 (option B)", ("", text) of what names no choice.

    "B, 12" names one where the other answer is no list.
    """
    match = _CHOICE.fullmatch(text)
    if match and not (match["comma"] and _LISTED.search(other)):
        return (match.group(1) or match.group(2)).upper(), match.group("rest").strip()
    if match := _CHOICE_BESIDE.fullmatch(text):
        letter = match.group("named") or match.group("first") or match.group("last")
        rest = match.group("before") or match.group("value") or match.group("number") or ""
        return letter, rest.strip()
    bare = re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?\s*([A-J])", text)
    return (bare.group(1), "") if bare else ("", text)


def _letters(text: str) -> tuple[str, bool]:
    """("ABD", True) of "A, B and D", ("ABD", False) of "ABD", else ("", False)."""
    if not _LETTERS.fullmatch(text):
        return "", False
    letters = re.sub(r"[^A-J]", "", text)
    return "".join(sorted(letters)), "A" <= text[1] <= "J"


def equal(predicted: str, reference: str, *, tolerance: float = 0.0) -> bool:
    """Whether two final answers are the same; what is not understood is not.

    A unit, label, base or percent sign may be left out on one side. Numbers may differ by
    `tolerance`.
    """
    if _PLAIN.fullmatch(predicted) and _PLAIN.fullmatch(reference):
        return predicted == reference or bool(same_number(predicted, reference, tolerance))
    if max(len(predicted), len(reference)) > _MAX_READ:
        return bool(predicted) and _squeeze(predicted) == _squeeze(reference)
    left, right = (_LEAD.sub("", canonical(text), count=1) for text in (predicted, reference))
    if " by " in left + right:  # 8 by 10 is 8 x 10, as a size: no product
        left, right = (re.sub(r"(?<=\d) ?\\times (?=\d)", " by ", text) for text in (left, right))
    if _squeeze(left) == _squeeze(right):
        return bool(left)
    if max(len(left), len(right)) > MAX_ANSWER_CHARS:
        return False
    several = [_letters(re.sub(r"[()]", "", text)) for text in (left, right)]
    if several[0][0] and several[1][0] and not (several[0][1] and several[1][1]):  # "A, C" and "AC"
        return several[0][0] == several[1][0]
    letters = [_choice(left, right), _choice(right, left)]
    if letters[1][0] and left.upper() == letters[1][0]:
        return True
    if letters[0][0] and letters[1][0]:
        return letters[0][0] == letters[1][0]
    sides = [rest if letter and rest else text
             for (letter, rest), text in zip(letters, (left, right), strict=True)]  # fmt: skip
    comparison = _Comparison(tolerance, Work())
    return any(comparison.same(parse(one), parse(other))
                for one in _spellings(sides[0]) for other in _spellings(sides[1]))  # fmt: skip


def _spellings(text: str) -> list[str]:
    r"""What an answer says in several ways: "2\pi \approx 6.28" -> 2\pi, 6.28; 2 h 30 min."""
    parts = [part for part in re.split(r"\\approx(?![A-Za-z])", text) if part.strip()]
    if match := _AND_PART.fullmatch(text):  # the list, or the mixed number
        parts.append(canonical(f"{match.group(1)} {match.group(2)}"))
    if re.fullmatch(r"[A-Z]'?\([^()]*,[^()]*\)", text):  # the point A(2, 3)
        parts.append(text[text.index("(") :])
    return compound(text) or [*parts, *_vector(text)] or [text]


def _vector(text: str) -> list[str]:
    """["(2, -1)"] of "2i - j", a sum of i, j and k; [] of any other."""
    function = read(text) if _AXIS.search(text) else None
    if function is None or not function.names <= {"j", "k"}:
        return []
    axes, function.work = ("ijk" if "k" in function.names else "ij"), Work()
    points = [[name == axis for name in axes] for axis in axes]
    found = [function(dict(zip(axes, map(fractions.Fraction, point), strict=True)))
             for point in (*points, [0] * len(axes), [1] * len(axes))]  # fmt: skip
    real = [one for one in found if one is not None and abs(one - one.real) < 1e-12]
    if len(real) < len(found) or real[-2] or abs(sum(real[:-1]) - real[-1]) > 1e-12:
        return []
    texts = [
        str(one) if isinstance(one, fractions.Fraction) else f"{one.real:.10f}" for one in real
    ]
    return [f"({', '.join(texts[:-2])})"]
