r"""A canonical answer taken apart: lists, sets, tuples, matrices, intervals and relations.

`parse` is the entry. Standard library only; an answer is short (MAX_ANSWER_CHARS).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re

from dcod_jax.evaluate.algebra import read
from dcod_jax.evaluate.numerals import number
from dcod_jax.evaluate.operations import EXACT
from dcod_jax.evaluate.regions import LINE, End, Region, interval, point, where
from dcod_jax.evaluate.spelling import EQUALS, braced, split

_LABEL = re.compile(
    r"([^=<>+*/^\d,;(-](?:[^=<>+*/^,;(-]|-(?=[a-z]{2}))*(?:\([^()=]*\))?|\([^()=]*\))\s*(?:=|\\equiv|\\approx)(?!=)"
)
_SET_BUILDER = re.compile(
    r"(?:\\\{)?\s*([A-Za-z])\s*(?:\\in\s*(?:\\mathbb\{R\}|R))?\s*(?:\||:)\s*(.*?)(?:\\\})?",
    re.DOTALL,
)
_MEMBER = re.compile(
    r"(?:[A-Za-z]|\([a-z](?:,\s*[a-z])+\))\s*\\in\s*(?=[(\[\]]|\\mathbb|\\\{|\\empty)"
)
_RELATION = re.compile(r"\s*(\\le|\\ge|\\ne|<|>)\s*")
_CONJUNCTION = r"\\(?:land|wedge)(?![A-Za-z])"
_SEPARATOR = re.compile(
    r"[,;]\s*(?:(?:and|or)\b)?|&|(?:and|or)\b|或|和"
    rf"|\\l?(?:or|vee)(?![A-Za-z])|{_CONJUNCTION}",
    re.IGNORECASE,
)
_AND = re.compile(rf"\band\b|{_CONJUNCTION}", re.IGNORECASE)
_ENUMERATED = re.compile(
    r"^(?:\(?(?:[a-e]|i{1,3}|iv|[1-5])\)\s+|\([1-5]\))(?=\S)"
)  # "(a) 3, (b) 4"
_EXCLUDED = re.compile(
    r"([A-Za-z](?:_\{?\w\}?)?)\s*(?:\\ne\s*(?=[^<>=]*[,;]|\\pm)|\\not\s*\\?in(?![a-z]))([^<>=]*)"
)
_SETS = {
    "∪": re.compile(r"\\cup(?![A-Za-z])"),
    "∩": re.compile(r"\\cap(?![A-Za-z])"),
    "∖": re.compile(
        r"\\(?:setminus|backslash)(?![A-Za-z])"
        r"|(?:except|excluding)(?: for)?\b|(?<=\})\s*-\s*(?=\\\{)"
    ),
}
_COMMA = re.compile("[,;]")
_OUTSIDE = re.compile(r"([\[\]])([^\[\]]+[,;][^\[\]]+)([\[\]])")  # ]1,3[ for (1,3)
_MATRIX = re.compile(
    r"\s*[(\[]?\\begin\{(?P<kind>[pbBv]?matrix|smallmatrix|array|cases|aligned|gathered)\*?\}"
    r"(?:\{[clr| ]*\})?(?P<rows>.*)\\end\{(?P=kind)\*?\}[)\]]?"
    r"(?P<turned>\s*\^\s*\{?\s*(?:T|\\top|\\intercal)\s*\}?)?",
    re.DOTALL,
)
_TRANSPOSED = re.compile(r"(?<=[)\]])\s*\^\s*\{?\s*(?:T|\\top|\\intercal)\s*\}?$")
_MOST_ROWS = 4  # of a determinant
_WHOLE_LINE = {"\\mathbb{r}", "allrealnumbers", "allreals", "allrealvalues", "realnumbers"}
_SET_NAMES = {name: of for of, names in {
    "\\emptyset": "\\{\\} \\emptyset emptyset theemptyset nosolution nosolutions norealsolution "
                 "norealsolutions",
    "\\mathbb{Z}": "\\mathbb{z} allintegers integers",
}.items() for name in names.split()}  # fmt: skip
_FLIPPED = {">": "<", "\\ge": "\\le"}
SPANS = ("()", "[]", "(]", "[)")


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A canonical answer in its parts.

    `ends` is "" for a single answer, "," for a list, the two brackets of a tuple, interval or set,
    "row" or "column" for a vector, "∪", "∩" and "∖" for a union, an intersection and what the
    second leaves of the first. A relation such as 1 < x is an interval of `variable`.
    """

    text: str
    ends: str = ""
    items: tuple[Parsed, ...] = ()
    variable: str = ""
    label: str = ""  # what stands before an equals sign
    held: Region | None = None  # of a relation that is no interval of its variable, such as x^2 < 4


def _enclosed(text: str) -> tuple[str, str]:
    r"""(brackets, content) where one pair encloses the text, else "": "[1,2)" -> ("[)", "1,2")."""
    if text[:1] == "⟨" and text[-1] == "⟩":
        return "<>", text[1:-1]
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


# ---------------------------------------------------------------- relations


def _relation(text: str) -> Parsed | None:
    r"""x<3, 1\le x<4 or x^2<4 as a set of real numbers, another with its signs pointing one way."""
    parts = _RELATION.split(text)
    terms, signs = parts[::2], parts[1::2]
    if len(terms) not in (2, 3) or not all(terms):
        return None
    for end, infinite in ((0, "-\\infty"), (-1, "\\infty")):
        if len(terms) > 2 and terms[end] == infinite:
            del terms[end], signs[end]
    if len(terms) == 2 and "\\infty" in terms[1] and signs == ["<"]:
        return dataclasses.replace(_line(text), variable=terms[0])
    if found := where(terms, signs):
        return Parsed(text, "<", variable=found[0], held=found[1])
    if all(sign in (">", "\\ge") for sign in signs):
        terms, signs = terms[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    return Parsed("".join(itertools.chain(*itertools.zip_longest(terms, signs, fillvalue=""))))


def _line(text: str) -> Parsed:
    return Parsed(text, "()", (Parsed("-\\infty"), Parsed("\\infty")))


# ---------------------------------------------------------------- parse


def _matrix(match: re.Match[str], text: str) -> Parsed:
    rows = [row.strip() for row in re.split(r"\\\\", match.group("rows")) if row.strip()]
    if match.group("kind") in ("cases", "aligned", "gathered"):
        return parse(", ".join(row.replace("&", "").rstrip(",;. ") for row in rows))
    if match.group("kind") == "vmatrix":
        return Parsed(_determinant([row.split("&") for row in rows[:_MOST_ROWS]]) or text)
    cells = [tuple(parse(cell) for cell in row.split("&")) for row in rows]
    if match.group("turned") and len(set(map(len, cells))) == 1:
        cells = list(zip(*cells, strict=True))
    if len(cells) == 1:
        (row,) = cells
        return row[0] if len(row) == 1 else Parsed(text, "row", row)
    if all(len(row) == 1 for row in cells):
        return Parsed(text, "column", tuple(row[0] for row in cells))
    return Parsed(text, "[]", tuple(Parsed(text, "[]", row) for row in cells))


def _determinant(rows: list[list[str]]) -> str:
    """Laplace's expansion along the first row, as an expression; "" of what is not square."""
    if not rows or any(len(row) != len(rows) for row in rows):
        return ""
    if len(rows) == 1:
        return rows[0][0]
    minors = ([row[:k] + row[k + 1 :] for row in rows[1:]] for k in range(len(rows)))
    terms = zip(itertools.count(), rows[0], map(_determinant, minors), strict=False)
    return "+".join(f"(-1)^{k}({cell})({minor})" for k, cell, minor in terms)


def _scaled(parsed: Parsed, factor: str) -> Parsed:
    """A number before a matrix is one before each of its cells."""
    items = tuple(_scaled(item, factor) for item in parsed.items)
    text = parsed.text if items else f"({factor})({parsed.text})"
    return dataclasses.replace(parsed, text=text, items=items)


def _several(text: str, parts: list[str]) -> Parsed:
    """A list, or what several relations of one variable have in common or cover together."""
    items = tuple(parse(_ENUMERATED.sub("", part)) for part in parts)
    variables = {item.variable for item in items} - {""}
    single = len(variables) == 1 and all(
        item.variable or (item.label in variables and number(item.text) is not None)
        for item in items
    )
    if single:
        regions = [region(item) for item in items]
        known = [one for one in regions if one is not None]
        covered = len(known) == len(regions) and functools.reduce(operator.or_, known).same(LINE)
        both = _AND.search(text) or "\\ne" in text or (covered and not re.search(r"\bor\b", text))
        return Parsed(text, "∩" if both else "∪", items, variables.pop())
    flat = (i for item in items for i in (item.items if item.ends == "," else (item,)))
    return Parsed(text, ",", tuple(flat))


def _whole(text: str) -> Parsed | None:
    """What is no list, whatever separators it has: a known set, a matrix, a set builder."""
    squeezed = re.sub("^there(?:is|are)", "", text.replace(" ", "").lower())
    if squeezed in _WHOLE_LINE or text == "R":
        return _line(text)
    if re.fullmatch(r"[a-z]\\in(?:\\mathbb\{r\}|r)", squeezed):
        return dataclasses.replace(_line(text), variable=text[0])
    if squeezed in _SET_NAMES:
        return Parsed(_SET_NAMES[squeezed])
    if "\\begin" in text and len(sides := split(text, EQUALS)) == 2 and "\\begin" in sides[0]:
        return parse(sides[1])
    if match := _MATRIX.fullmatch(text):
        return _matrix(match, text)
    if "\\begin" in text:
        label = _LABEL.match(text)
        start = label.end() if label else text.index("\\begin")
        if (match := _MATRIX.fullmatch(text, start)) is None:
            return Parsed(text)
        if label:
            return dataclasses.replace(_matrix(match, text), label=label[1].strip())
        return _scaled(_matrix(match, text), text[:start])
    if match := _SET_BUILDER.fullmatch(text):
        inner = parse(match.group(2))
        if inner.variable or inner.ends == "∪":
            return inner
    if match := _OUTSIDE.fullmatch(text):
        ends = "[("[match.group(1) == "]"] + "])"[match.group(3) == "["]
        return (
            parse(f"{ends[0]}{match.group(2)}{ends[1]}")
            if match.group(1, 3) != ("[", "]")
            else None
        )
    if match := _EXCLUDED.fullmatch(text):
        return Parsed(text, "∖", (_line(text), parse(match.group(2))), match.group(1))
    return None


def parse(text: str) -> Parsed:
    """A canonical answer in its parts: "x=1 or x=2" is a list of two labelled values."""
    text = text.strip().replace("\\langle", "⟨").replace("\\rangle", "⟩")
    while braced(text, 0, len(text)) == text[1:-1] and text[:1] == "{":
        text = text[1:-1].strip()
    if number(text) is not None:
        return Parsed(text)
    if whole := _whole(text):
        return whole
    if len(sides := split(text, _SETS["∖"])) == 2:
        return Parsed(text, "∖", tuple(map(parse, sides)))
    if len(parts := split(text, _SEPARATOR)) > 1:
        return _several(text, parts)
    text = _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text
    if (label := _LABEL.match(text)) and label[0].count("{") == label[0].count("}"):
        value = parse(text[label.end() :].rpartition("=")[2])
        return dataclasses.replace(value, text=text, label=label.group(1).strip()) if (
            value.ends
        ) else Parsed(value.text, label=label.group(1).strip())  # fmt: skip
    for sign in "∪∩":
        if len(parts := split(text, _SETS[sign])) > 1:
            return Parsed(text, sign, tuple(map(parse, parts)))
    brackets, content = _enclosed(_TRANSPOSED.sub("", text))
    if brackets:
        parts = split(content, _COMMA)
        if brackets == "()" and len(parts) == 1:  # each part is parsed once: brackets may be deep
            return parse(content)
        if brackets == "{}" and len(parts) == 1 and (one := parse(content)).ends == "()":
            return one
        if len(parts) > 1 or brackets == "{}":
            ends = "column" if _TRANSPOSED.search(text) else brackets
            return Parsed(text, ends, tuple(map(parse, parts)))
    if len(pair := re.split(r"\\(?:pm|mp)(?![A-Za-z])", text)) == 2:
        return Parsed(text, ",", tuple(parse(sign.join(pair)) for sign in "+-"))
    return _relation(text) or Parsed(text)


# ---------------------------------------------------------------- regions

_INFINITE = {"\\infty": math.inf, "+\\infty": math.inf, "-\\infty": -math.inf}


def _end(text: str) -> End | None:
    if (known := _INFINITE.get(text.replace(" ", ""), number(text))) is not None:
        return known
    expression = read(text)
    value = expression({}) if expression and not expression.names else None
    if isinstance(value, complex):
        return value.real if abs(value.imag) < EXACT * abs(value) else None
    return value


def region(parsed: Parsed) -> Region | None:
    """The real numbers that an answer holds; None where its ends are no plain numbers."""
    if parsed.held is not None:
        return parsed.held
    if parsed.ends == "":
        value = _end(parsed.text)
        return None if value is None else point(value)
    if parsed.ends in SPANS:
        ends = [_end(item.text) for item in parsed.items]
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            return None
        closed = (parsed.ends[0] == "[", ends[0]), (parsed.ends[1] == "]", ends[1])
        if any(shut and math.isinf(end) for shut, end in closed):
            return None
        return interval(parsed.ends, ends[0], ends[1])
    found = [region(item) for item in parsed.items]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or not known or parsed.ends in ("row", "column", "<>"):
        return None
    if parsed.ends == "∖":
        return known[0] & ~known[1]
    return functools.reduce(operator.and_ if parsed.ends == "∩" else operator.or_, known)


def is_region(parsed: Parsed) -> bool:
    """Whether the spelling shows that a set of real numbers is meant, not a pair or a list."""
    return bool(parsed.variable) or parsed.ends in ("∪", "∩", "∖")
