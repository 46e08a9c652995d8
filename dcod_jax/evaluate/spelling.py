r"""One spelling of a final answer: Unicode, LaTeX and number formats brought to one form.

`canonical` is the entry. Standard library only; an answer is short (MAX_ANSWER_CHARS).
"""

from __future__ import annotations

import fractions
import functools
import re
import unicodedata
from collections.abc import Callable

from dcod_jax.evaluate.numerals import in_digits, latex

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")
_UNICODE = {sign: new for new, signs in {
    "-": "−–—‐‑‒﹣", r"\cdot ": "·⋅∙•", "|": "∣｜", r"\langle ": "⟨〈", r"\rangle ": "⟩〉",
    ", ": "，、", "[": "【［", "]": "】］", r"\times ": "×", "/": "÷⁄∕", r"\le ": "≤⩽≦",
    r"\ge ": "≥⩾≧", r"\ne ": "≠", r"\approx ": "≈", r"\equiv ": "≡", r"\infty ": "∞",
    r"\cup ": "∪", r"\cap ": "∩", r"\in ": "∈", r"\emptyset ": "∅", r"\pm ": "±",
    r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ", r"\mathbb{N}": "ℕ", r"\mathbb{Q}": "ℚ",
    r"\mathbb{C}": "ℂ", r"^\circ ": "°º", r"^\circ C": "℃", r"^\circ F": "℉", ".": "٫。",
    ",": "٬", " cent": "¢", r"\land ": "∧", r"\setminus ": "∖", '"': "″", r"\mu ": "µ",
    "": "✓✅✔\ufe0f", r"\sqrt[3]√": "∛", r"\sqrt[4]√": "∜", r"\ldots ": "…", "'": "’′",
    r"\phi ": "ϕ", r"\epsilon ": "ϵ",
}.items() for sign in signs}  # fmt: skip
_NAMES = "(?:arc)?(?:sin|cos|tan)|sinh|cosh|tanh|cot|sec|csc|cis|ln|log|exp|abs|gcd|lcm"
_COMMANDS = {name: new for new, names in {
    "": "tiny small normalsize large Large LARGE huge Huge checkmark underline ensuremath "
        "displaystyle limits boldsymbol bf rm it tt hat vec mathbf mathrm therefore "
        "Rightarrow ( ) [ ]",
    " ": "quad qquad enspace thinspace , ; : >",
    r"\frac": "dfrac tfrac cfrac nicefrac sfrac xfrac",
    r"\binom": "dbinom tbinom",
    r"\le ": "leqslant leqq leq le",
    r"\ge ": "geqslant geqq geq ge",
    r"\ne ": "neq ne",
    r"\emptyset ": "varnothing empty O",
    r"^\circ ": "degree degrees",
    "...": "ldots cdots dots",
    **{f"\\{name}": f"var{name}" for name in "epsilon kappa phi rho sigma theta".split()},
    **{"i": "imath", "j": "jmath", r" \\ ": "cr"},
    "|": "mid vert lvert rvert",
    "￥": "textdollar dollar",
    "€": "euro euros",
    **{"<": "lt", ">": "gt", "[": "lbrack", "]": "rbrack", r"\{": "lbrace", r"\}": "rbrace"},
    **{":": "colon", "£": "pounds", "Ω": "Omega", "triangle ": "triangle"},
    **{sign: sign for sign in "%#&"},
}.items() for name in names.split()} | {" ": " "}  # fmt: skip
EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_THOUSAND = {"k": "thousand", "m": "million", "b": "billion"}
_BASES: dict[str, int] = {name: base for base, name in enumerate(
    "two three four five six seven eight nine ten eleven twelve".split(), 2)}  # fmt: skip
_BASE = rf"({'|'.join(_BASES)}|\d{{1,2}})"
_BRACKET = re.compile(r"[(\[]|\\\{")
_ROOT = re.compile(
    r"(?:√|(?<![A-Za-z\\])sqrt)\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\pi|\{([^{}]*)\})"
)
_ROOT_OF = re.compile(r"(?:√|(?<![A-Za-z\\])(?:sqrt|(cbrt)))\s*\(")
_INDEXED_ROOT = re.compile(r"\^\{(\d)\}√")
_ARGUMENT = re.compile(r"\s*(\{|\\[A-Za-z]+|[^\s{}\\])")
# "1 in 6" and "one out of six" are probabilities, "5 in" is a length.
_CHANCE = re.compile(
    r"(?:an? )?(\d[\d,]*|[a-z]{3,9})\s*(?:in|out of)(?: every)?\s*"
    r"(\d[\d,]*|[a-z]{3,9})\s*(?:chances?|probability)?",
    re.IGNORECASE,
)


def braced(text: str, start: int, limit: int, pair: str = "{}") -> str | None:
    """The content of the balanced {...} that opens at `start`, of at most `limit` characters."""
    depth = 0
    for index in range(start, min(len(text), start + limit)):
        if text[index] in pair and text[index - 1 : index] != "\\":
            depth += 1 if text[index] == pair[0] else -1
            if depth == 0:
                return text[start + 1 : index]
    return None


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand in no bracket."""
    if not separator.search(text):
        return [text.strip()] if text.strip() else []
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        match = separator.match(text, place) if depth == 0 else None
        if match and not (match.group(0)[0].isalpha() and text[place - 1 : place].isalpha()):
            parts.append(text[start:place])
            start = place = match.end()
            continue
        depth += (text[place] in "([{⟨") - (text[place] in ")]}⟩")
        place += 1
    return [part for part in (p.strip() for p in [*parts, text[start:]]) if part]


def _letter(character: str) -> str:
    r"""What NFKC does not do: "π" -> "\pi ", "½" -> "\frac{1}{2}"."""
    if character in _UNICODE:
        return _UNICODE[character]
    if unicodedata.category(character) == "So":  # a smiley
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("GREEK SMALL LETTER ") and len(name.split()) == 4:
        return f"\\{name.split()[3].lower()} "
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}" if slash and denominator else character


def _ascii(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{m.group(0).translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{m.group(0).translate(_SUBSCRIPTS)}}}", text)
    if not text.isascii():
        text = re.sub("(?<=[①-⑩])[、，,]\\s*(?=[①-⑩])", "", text)
        text = re.sub(r"^([A-J])[、．](?!\s*[A-J](?![A-Za-z.]))", r"\1. ", text)
        text = unicodedata.normalize("NFKC", "".join(map(_letter, text)))
    text = _INDEXED_ROOT.sub(r"\\sqrt[\1]√", text)
    for match in reversed(list(_ROOT_OF.finditer(text))):
        inner = braced(text, match.end() - 1, len(text), "()")
        if inner is not None:
            root = rf"\sqrt{'[3]' if match[1] else ''}{{{inner}}}"
            text = text[: match.start()] + root + text[match.end() + len(inner) + 1 :]
    for _ in range(4):  # from the innermost braces outwards
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(2) or m.group(1)}}}", text)
    return re.sub(r"(\\sqrt\[\d\])\\sqrt", r"\1", text)


def _with_braces(text: str) -> str:
    r"""Arguments of \frac and \sqrt in braces: "\frac \pi4" -> "\frac{\pi}{4}"."""
    for match in reversed(
        list(re.finditer(r"\\(frac|sqrt|binom)(?![A-Za-z])(\s*\[[^\[\]]*\])?", text))
    ):
        rest, arguments = match.end(), ""
        for _ in range(1 if match.group(1) == "sqrt" else 2):
            found = _ARGUMENT.match(text, rest)
            if found is None:
                break
            one = found.group(1)
            if one == "{":
                inner = braced(text, found.start(1), len(text))
                if inner is None:
                    break
                one, rest = inner, found.start(1) + len(inner) + 2
            else:
                rest = found.end()
            arguments += f"{{{one.strip()}}}"
        text = text[: match.end()] + arguments + text[rest:]
    return text


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = (int(g) for g in match.groups() if g is not None)
    if top >= bottom:
        return match.group(0)
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, *period = match.group(1, 2, 3, 4) if match.group(1) else match.group(5, 6, 7)
    digits = next(p for p in period if p)
    scale = 10 ** len(fixed)
    value = fractions.Fraction(int(whole + fixed), scale)
    return latex(value + fractions.Fraction(int(digits), (10 ** len(digits) - 1) * scale))


def _base(match: re.Match[str]) -> str:
    return f"_{{{_BASES.get(match[1], match[1])}}}"


def _chance(match: re.Match[str]) -> str:
    of, among = (in_digits(part.lower().replace(",", "")) for part in match.groups())
    known = of.isdecimal() and among.isdecimal() and int(among)
    return f"\\frac{{{of}}}{{{among}}}" if known else match.group(0)


def without_blanks(text: str) -> str:
    """The text with no run of more than eight blanks, so that no search tries its every part."""
    return re.sub(r"\s{9,}", lambda m: "\n\n" if "\n" in m.group(0) else "  ", text)


Rows = list[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]]]


def _table(*rows: tuple[str, str, str | Callable[[re.Match[str]], str]]) -> Rows:
    """What every match of a pattern has in it and is quick to look for, the pattern, its text."""
    return [(key, re.compile(pattern), new) for key, pattern, new in rows]


def _rewritten(text: str, table: Rows) -> str:
    for key, pattern, new in table:
        if key in text:
            text = pattern.sub(new, text)
    return text


_LATEX = _table(
    (",", r"(?<=\d)\s*(?:\{,\}|,\\!)\s*(?=\d{3}(?!\d))", ""),
    ("", r"(?<=\d)(?:\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),
    # Commands with arguments of their own come before the others.
    ("\\", r"\\(?:(?:(?:text)?color\s*\{\w*\}|(?:phantom|[hv]space|tag)\*?\s*\{[^{}]*\})|!\s*)",
     ""),
    ("\\", r"\\(?:emph|bm|rm|text(?:bf|it|rm|s[cfl]|tt|normal|md|up)?"
     r"|math(?:rm|bf|it|sf|tt|normal)|[mh]box|operatorname\*?)\s*(?=\{)", r"\\text"),
    ("\\text", r"\\[dt]?frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}(\^\{?\d\}?)?\}",
     r" \1/\2\3"),
    ("\\text", r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    ("quad", r"(?<=\S)\s*\\q?quad\s*(?:and\s*)?(?=[-\d]|\\frac|\([a-z]\))", ", "),
    ("\\", r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
    ("\\mu", r"\\mu(?![A-Za-z])\s*(?=[A-Za-z])", "u"),
    ("\\", r"\\(?:mathbb|Bbb)\s*\{?\s*([A-Z])\s*\}?", r"\\mathbb{\1}"),
    ("\\", r"\\([A-Za-z]+|[,;:> ()\[\]%#&])", lambda m: _COMMANDS.get(m[1], m[0])),
    ("\n", r"\n", r" \\\\ "),
    ("**", r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    ("<=", "<=", r"\\le "),
    (">=", ">=", r"\\ge "),
    ("~", "~", " "),
    ("\\circ", r"\\?\b((?:sin|cos|tan|cot|sec|csc|cis)(?:\^\{?\w+\}?)?)\s*(\()?\s*"
     r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?(?(2)\s*\))", r"\\\1(\\frac{\\pi}{180}\\cdot \3)"),
    ("\\circ", r"\^\s*\{?\s*\\circ\s*\}?\s*([CF])(?![A-Za-z])", r" deg\1"),
    ("^", r"\^\s*(?:\{\s*(?:\\circ|o)\s*\}|(?:\\circ|o)(?![A-Za-z]))", ""),
    ("", r"(?<=\d)\s*\^?\s*\{?\s*(?:st|nd|rd|th)(?![A-Za-z])(?:\s*\})?", ""),
)  # fmt: skip
# The one spelling of what has several.
_PHRASES = _table(
    ("", r"\s+", " "),
    (".", r"(?<!\.) ?\. ?$", ""),
    ("", r"^ | $", ""),
    ('"', r'^"([^"]*)"$', r"\1"),
    ("=", r"^=\s*", ""),
    ("+", r"(^|[(\[,=])\s*\+\s*(?=\S)", r"\1"),
    ("\\", r"(?:^|\{)((?:[^{}]|\{[^{}]*\})*?)\\(over|choose)(?![A-Za-z])"
     r"((?:[^{}]|\{[^{}]*\})*)(?:\}|$)",
     lambda m: f"\\{'frac' if m[2] == 'over' else 'binom'}{{{m[1]}}}{{{m[3]}}}"),
    ("", r"(?<![\w\\])(?:\{\}\s*)?[_^]?\s*\{?(\d+)\}?\s*([CP])\s*_?\{?(\d+)\}?(?!\w)",
     r"\2(\1,\3)"),
    ("^", r"(?<![A-Za-z\\])([CP])_\{?(\w{1,3})\}?\^\{?(\w)\}?(?!\w)", r"\1(\2,\3)"),
    ("^", r"(?<![A-Za-z\\])([CP])\^\{?(\w)\}?_\{?(\w{1,3})\}?(?!\w)", r"\1(\3,\2)"),
    ("+", r"(?<=\S)\s*\+\s*(?:c|const\.?|constant)$", " + C"),
    ("\\dot", r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
    (".\\", r"(?<!\d)\.(?=\\(?:overline|bar|dot))", "0."),
    ("万", r"(?<=\d)万", r" \\times 10^4"),
    ("亿", r"(?<=\d)亿", r" \\times 10^8"),
    ("0b", r"^0b([01]+)$", r"\1_{2}"),
    ("", r"(?i)^(?:0x([\da-f]+)|([\da-f]+)_\{?1[1-6]\}?)$",
     lambda m: f"{m[1].upper()}_{{16}}" if m[1] else m[0].upper()),
    ("root of ", r"(?:the )?(?:square|(cube)|(\d)) root of (\d+|[a-z])(?!\w)",
     lambda m: f"\\sqrt{'[3]' if m[1] else f'[{m[2]}]' if m[2] else ''}{{{m[3]}}}"),
    ("choose", r"(\d+) choose (\d+)", r"\\binom{\1}{\2}"),
    (" factorial", r"(?<=\d) factorial\b", "!"),
    (" ", r"(?<=\d) (?:squared|(?:raised )?to the (?:power of )?(\d+)(?: power)?)$",
     lambda m: f"^{{{m[1] or 2}}}"),
    ("multiplicity", r"\s*\(?(?:with |of )?multiplicity (?:of )?\w+\)?", ""),
    (" ", r"^(?:for )?(?:all|any|every) (?=[a-z] ?(?:[<>]|\\[lgn]e))", ""),
    (" times ", r"(?<=\d) times (?=[\d\\])", r" \\cdot "),
    ("", r"^(?:plus or minus|plus/minus)|\+/-", r"\\pm "),
    ("log", r"\blog(2|10)\s*(?=\()", r"\\log_{\1}"),
    (" in the ", r"(?<=\d) (?:o'clock )?in the (morning|afternoon|evening)$",
     lambda m: " am" if m[1] == "morning" else " pm"),
    # k\pi, k \in Z -> n\pi: the name of a variable that is any integer does not count.
    ("in", r"^(.*?[^,\s(])[\s,(]*(?:(?:where|for|with) )?(?:(?:any|some|all|every) )?(integers? )?"
     r"(?<![A-Za-z])([a-z])\s*(?:\\in\s*(?:\\mathbb\{Z\}|Z)|(?:is|are) (?:an |any )?integers?"
     r"|(?(2)|(?!)))\)?$", lambda m: re.sub(rf"(?<![A-Za-z\\]){m[3]}(?![A-Za-z])", "n", m[1])),
    ("￥", r"(?<![A-Za-z])(?:US|USD|A|AU|C|CA|HK|NZ|S)\s*(?=￥)", ""),
    ("USD", r"(?<![A-Za-z])USD\s*(?=\d)", "￥"),
    ("", r"^(?:AUD|CAD|EUR|GBP|INR|RMB|CNY|JPY|HKD|NZD)\s*(?=\d)", ""),
    ("", r"(?<=[￥€£])([\d.,]+)\s*([kKMB]|mn|bn)$",
     lambda m: f"{m[1]} {_THOUSAND[m[2][0].lower()]}"),
    ("Rs", r"(?<![A-Za-z])Rs\.?\s*(?=\d)", "₹"),
    ("", r"^(?:#|No\.|the )\s*(?=\d)", ""),
    ("", r"^(?:about|approx(?:imately|\.)?|roughly|around|nearly|\\approx|\\sim)\s*(?=[\d.\\-])",
     ""),
    (":", r"(^|, )([A-Za-z]{3,}(?: [A-Za-z]+)*) ?: (?=[-\d\\￥])", r"\1\2 = "),
    (",", r"(?<=\d) ?, (?:the|an?|which) [a-z ]+$", ""),
    ("=", r"(?<=\S)\s*(?:,? (?:for|where) (?:all|any|every|each) [^=]*"
     r"|\([a-z] ?\\in(?![a-z])[^=()]*\))$", ""),
    ("\\cdot", r"(?<=[A-Za-z}])\s*\\cdot\s*(?=[A-Za-z])", " "),
    ("base", r"_\{\s*base\s*", "_{"),
    ("not ", r"^not .+?,?\s*\bbut\s+(?=\S)", ""),
    ("not", r"^([^A-Za-z]*[\d}])\s*,\s*not\s+\S+$", r"\1"),
    ("U", r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    ("", r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    ("I", r"^(?=.*\d)(?:[-+*/().\d\s^{}I]|\\(?:sqrt|frac|pi))*$",
     lambda m: m[0].replace("I", "i")),  # as SymPy writes it
    ("<", r"^<\s*([^<>]*,[^<>]*)>$", r"\\langle \1\\rangle"),
    (" is ", r"\s*\bis (?:(greater|more|larger)|less|smaller) than\b(?! or)\s*",
     lambda m: " > " if m[1] else " < "),
    (" is at ", r"\s*\bis at (?:(least)|most)\b\s*", lambda m: f" \\{'gl'[not m[1]]}e "),
    ("(", r"(?<![A-Za-z\\])a(sin|cos|tan)(?=\s*\()", r"arc\1"),
    ("", rf"(?<![A-Za-z\\])({_NAMES})(?![A-Za-z])(?=\s*[\d(\\_]|\s+[a-z](?![A-Za-z]))", r"\\\1 "),
    ("pi", r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (" over ", r"(?<=[\di])\s+over (?=\d)", "/"),
    ("noon", r"^(?:12(?::00)? )?noon$", "12:00 pm"),
    ("midnight", r"^(?:12(?::00)? )?midnight$", "12:00 am"),
    ("o'clock", r"^(\d{1,2})(?::00)? o'clock$", r"\1:00"),
    ("", r"\b(Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Oct|Nov|Dec)t?\.?(?= \d|$)",
     lambda m: next(month for month in MONTHS.split("|") if month.startswith(m[1]))),
    (" ", rf"(?i)^(\d{{1,2}}) (?:of )?({MONTHS})\b,?", r"\2 \1"),
    (", ", rf"^({MONTHS}) (\d{{1,2}}), (\d{{4}})$", r"\1 \2 \3"),
    ("_", r"(?<![\w}])\(([\dA-F]+)\)(?=\s*_)", r"\1"),
    ("}", r"\{([:.=<>])\}|(?<=\S)\{\}$", r"\1"),
    ("{,}", r"(?<=\d)\{,\}(?=\d{1,2}(?!\d))", "."),
    (" (", r"^[a-z]+(?:[ -][a-z]+)? \((\d[\d,.]*)\)$", r"\1"),  # "twenty (20)"
    ("(a) ", r"^\(a\) .*", lambda m: re.sub(r"[\s,;]+(?=\([b-h]\) )", ", ", m[0])),
    ("", r"(?i)^(yes|no|true|false)\b\s*[,.;:(]\s*(?!yes|no|true|false).*$", r"\1"),
    ("to", r"^(\d+)\s*to\s*(\d+)$", r"\1:\2"),
    ("=", r"^(-?\d[\d.]*)\s*=\s*([A-Za-z])$", r"\2 = \1"),
    (" ", r"^[A-Z][A-Za-z ]{1,40}\b(?:is|are|has|have|had|needs?|gets?|made|makes?)\s*"
     r"(?=[-￥]?\d)", ""),
)  # fmt: skip
_DIGITS = _table(
    (".", r"(\d{1,30})\.(\d{0,30})(?:\\(?:overline|bar|dot)\s*\{?(\d{1,20})\}?|\((\d{1,20})\))"
     r"|(\d{1,30})\.(\d{0,20}?)(\d{1,6}?)\7{2,20}\s*\.\.\.", _repeating),
    ("...", r"(\d\.\d+)\s*\.\.\.$", r"\1"),
    ("per", r"(?<=[\d}]) ?per ?cent\b", "%"),
    ("", r"(?<=\d)[_'](?=\d{3}(?!\d))", ""),
    (".", r"(?<![\d.])[1-9]\d{0,2}(?:\.\d{3}){2,}$", lambda m: m[0].replace(".", "")),
    (" ", r"(?<![\d.,/^_} ])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| \d)",
     lambda m: m[0].replace(" ", "")),
    ("", r"(?<![\d.,/^_\w}])(\d{1,9})"
     r"(?: (\d{1,9})/(\d{1,9})|\s*\\frac\{(\d{1,9})\}\{(\d{1,9})\})(?![\d/.])", _mixed),
    (",", r"(?<![\d.,])(?:\d{1,3}(?:,(?: (?=000))?\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?!\d|,\d)",
     lambda m: m[0] if _BRACKET.search(m.string) else re.sub("[, ]", "", m[0])),
    ("_", rf"(?<=\d)\s*_\s*\{{?\s*\(?{_BASE}\)?\s*\}}?", _base),
    ("base", rf"\s*\(?\b(?:in )?base[ -]?\s*\{{?{_BASE}\b\)?\s*\}}?", _base),
)  # fmt: skip


@functools.lru_cache(1024)
def canonical(answer: str) -> str:
    r"""One spelling for what is written in many ways: `$x = 10{,}000.$` -> `x = 10000`.

    Text stands between spaces; single spaces stay, as they part words.
    """
    text = _ascii(without_blanks(answer).strip().strip("*`").rstrip("\\").strip())
    # A new row of a matrix; elsewhere a backslash that was escaped twice.
    text = re.sub(r"(\\\\)\s*\[-?[\d.]+\s*[a-z]{2}\]", r"\1", text)
    text = text.replace("\\\\", "\n" if "\\begin" in text else "\\").replace("\\$", "￥")
    # What LaTeX prints as a dollar sign, and one that opens no formula.
    text = re.sub(r"^(-?)\$(?=[\d.,]+(?:\s?[kKMB]?$| and ))", r"\1￥", text).replace("$", "")
    text = _rewritten(_with_braces(_rewritten(text, _LATEX)), _PHRASES).strip()
    if match := _CHANCE.fullmatch(text):
        text = _chance(match)
    return _rewritten(in_digits(text), _DIGITS).strip().rstrip(",;").strip()
