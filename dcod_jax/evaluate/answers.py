r"""Final answers found in a completion by stated rules.

Standard library only, and every search is linear in the text: what a model wrote is read here.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re

from dcod_jax.evaluate.equality import MAX_ANSWER_CHARS
from dcod_jax.evaluate.spelling import braced
from dcod_jax.evaluate.units import NOT_UNITS

_TRIED = 20  # matches of one rule, from the end; bounds the search in a text of nothing but \boxed{
_READ = 600  # characters behind a mark
_LINE = 2_000  # characters of a line searched for its last number
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_THOUGHT = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|scratchpad)>|<\|end_of_thought\|>|\[/THINK\]"
    r"|◁/think▷|<\|channel\|>final<\|message\|>|<\|begin_of_solution\|>",
    re.IGNORECASE,
)
_CALCULATION = re.compile(r"<<[^<>\n]{0,100}>>")  # GSM8K's own: 2+2=<<2+2=4>>4
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
# What parts two boxes of one answer: "$\boxed{3}$ and $y = \boxed{4}$", "(a) \boxed{3} (b) ...".
_GLUE = re.compile(
    r"(?:[\s$&*.]|(?P<joint>[,;•]|\\q?quad|\n\s*-|\b(?:and|or)\b|\(?\b(?:[a-h]|[ivx]{1,4}|\d)[).:](?=\s))"
    r"|\\[()\[\]\\,;! ]|\\text\{\s*|\}|\\?[A-Za-z]\w?(?:_\{?\w\}?)?\s*=)*"
)
# "and the perimeter is \boxed{14}" goes on with the answer, "and so it is \boxed{14}" corrects.
_GOES_ON = re.compile(
    r"[\s$\\)\]]*,?\s*(?:and|or)\b[^\n.!?]{0,80}"
    r"|[ $\\)\]*]*[,;\n][\s*•-]*[A-Za-z][\w ]{0,40}:[*$\\(\[\s]*(?:\\?[A-Za-z]\w?\s*=\s*)?"
)
_CORRECTS = re.compile(
    r"\b(?:so|thus|hence|therefore|then|answer|final(?:ly)?|no|not|wait|actually|which|giv\w+|equal\w*"
    r"|simplif\w+|because|since|where|get|obtain|have|substitut\w+)\b",
    re.IGNORECASE,
)
_HASH = re.compile(r"####(?!#)[ \t]*(?=\S)")
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_-]{0,8}(?:(?i:(?:(?:the|my|our) )?(?:(?:final|correct) )?answer)|A|答|答案)"
    r"[*_ \t]{0,4}[:：][*_ \t]{0,4}\s{0,8}(?=\S)"
    r"|^[ \t]*(?:#{1,6}|\*\*)[ \t]*(?i:(?:the )?(?:final )?answer)[*_ \t]{0,4}\n\s{0,8}(?=\S)",
    re.MULTILINE,
)
_ANSWER_IS = re.compile(
    r"(?i:\banswers?\b[^\n.:;?!]{0,80}?(?<![A-Za-z])(?:is|are|(?:would|must|will) be)(?![A-Za-z]))"
    r"[ \t*_]{0,4}[:：]?[*_]{0,2}\s{0,4}(?=\S)"
    r"|答案\s*(?:应?[是为選选]|[:：])?\s*[:：]?\s{0,4}(?=\S)"
)
_TAG = re.compile(r"<(answer|final_answer|solution)>(?=\s*\S)", re.IGNORECASE)
_JSON = re.compile(r"""["'](?:final[_ ]?|the[_ ]?|correct[_ ]?)?answer["']\s*:\s*""", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?i:\b(?:option|choice|alternative|choose|pick|select|go with)(?: would be| is)?:?"
    r"|故?选(?:项|择)?[是为]?[:：]?)\s{0,3}(?:\\text(?:bf)?\{)?[*_$(\"']{0,4}"
    r"([A-J])(?![A-Za-z'])(?! [a-z]+ing)"
)
# "B" as the last line, and "B is the correct answer".
_BARE = re.compile(
    r"^[ \t>*_(]{0,6}([A-J])[ \t)*_.]{0,6}\s{0,9}\Z"
    r"|(?<![A-Za-z])([A-J])[)*_]{0,3} is (?:the )?(?:correct|right|best|answer)[^\n]{0,40}\Z",
    re.MULTILINE,
)
_OPTION_LINE = re.compile(r"^[ \t>*#_]{0,6}\(?([B-J])[*_]{0,2}[.):][*_]{0,2}[ \t]+\S", re.MULTILINE)
_STOP = re.compile(
    r"(?P<math>\$(?!\d[\d.,]*\s+[a-z]{2,}\s)(?:\\.|[^$\\\n]){1,300}\$|\\\(.{1,300}?\\\))|(?P<short>\b(?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|Mt|vs|"
    r"No|a\.m|p\.m|A\.M|P\.M|U\.S|e\.g|i\.e|etc|approx|ft|in|oz|lb|sq|cu)\.)|(?P<end>"
    r"[!?](?=\s|$|[*\"'])|\.(?=\s|$|[*\"')])|[。．！？])"
)
_SPAN = r"(?<!\\)\$(?!\d[\d.,]*\s+[a-z]{2,}\s)(?:\\.|[^$\\\n]){1,200}\$|\\\([^\n]{1,200}?\\\)"
_VALUE = (
    rf"(?:[-+−–]\s?)?(?:\\?[$€£¥₹]\s?)?(?:{_NUMBER})(?:/(?:{_NUMBER})|:\d\d(?!\d))?"
    r"(?:\s?\\?%|°|\s?[apAP]\.?[mM]\b\.?)?"
)
_LEADING = re.compile(rf"((?:{_SPAN}|{_VALUE})(?:\s*(?:,|;|and|or)\s*(?:{_SPAN}|{_VALUE}))*)(.*)")
_LEAD = re.compile(
    r"(?:that|simply|just|therefore|thus|clearly|equal to|equals|given by|approximately|about|"
    r"around|exactly|option|choice|indeed|now|then|hence|=|:)\s+(?=\S)",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"(?<=\S)(?:,\s*|\s+)(?:because|since|so that|so|which|when|where|if|as|but|not|after|"
    r"assuming|given that|while|whereas|rather)\b.*|，?因为.*",
    re.IGNORECASE | re.DOTALL,
)
_VERB = re.compile(
    r"(?<!\\)\b(?:is|are|was|were|be|has|have|had|needs?|gets?|makes?|made|pays?|paid|costs?|earns?|earned|"
    r"takes?|took|spends?|spent|equals?|becomes?|remains?|left|contains?|weighs?|sells?|sold|buys?|"
    r"bought|saves?|saved|eats?|ate|runs?|ran|gives?|gave|receives?|received|owes?|should|will|can)\b"
    r"|="
)  # fmt: skip
_UNIT_WORDS = re.compile(rf"[*$]{{0,3}}({_NUMBER})[*$]{{0,3}}((?: [A-Za-z]{{1,20}}){{1,4}})\**")
_MULTIPLIER = re.compile(
    r"\s*\b(?:dozen|hundred|thousand|million|billion|trillion|percent|times|half|over|plus|"
    r"(?:or|and|to) (?:\D?\d|a|half)|minus|squared|cubed|[ap]\.?m)\b",
    re.IGNORECASE,
)
_TERM = (
    rf"(?:(?<![A-Za-z0-9_.\\^])(?:{_NUMBER})(?![A-Za-z0-9]*[_^])(?:[A-Za-z](?![A-Za-z]))?"
    r"|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|√\(?\d+\)?|\\pi\b|π"
    r"|\\frac\{[^{}]{1,40}\}\{[^{}]{1,40}\}|\\sqrt\{[^{}]{1,40}\})"
)
_SIGN = r"(?:(?<=[^\s\d)]) [-−–] ?|(?<![\d)A-Za-z])[-−–])?"
_EXPRESSION = re.compile(
    rf"(?P<span>{_SPAN})"
    rf"|(?P<long>{_SIGN}{_TERM}(?:(?:\s?[-+−–*/^×÷·]\s?|(?=[√\\])){_TERM}){{1,20}})"
    rf"|(?P<ordinal>\bthe (?:{_NUMBER})(?:st|nd|rd|th)\b)"
    rf"|(?P<time>(?<![A-Za-z0-9_.^])\d{{1,3}}:\d{{1,2}}(?!\d))"
    rf"|(?P<number>{_SIGN}[€£¥₹]?(?<![A-Za-z0-9_.^])(?:{_NUMBER})(?:\s?\\?%)?)"
)
_RESULT = re.compile(r"[=≈]\s*(?:\\?[$€£¥₹]\s?)?(?=[-−–]?[\d.])")
_JOINS = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*(?:[a-z]\s*=\s*)?")
_COMPARED = re.compile(r"(?<![A-Za-z])[a-z]\s*(?:[<>]=?|≤|≥)\s*$")
_DISPLAY = re.compile(r"\\\[\s*([^\[\]]{1,300}?)\s*\\\]|\$\$\s*([^$]{1,300}?)\s*\$\$")
_REVISED = re.compile(r"\b(?:which (?:is|means|rounds|equals)|or|that is|round(?:s|ed))\b")
_PHRASE = re.compile(
    r"\b(?:infinitely many(?: \w+)?|no (?:\w+ )?(?:solutions?|values?|roots?|answer)|"
    r"do(?:es)? not exist|undefined|impossible|cannot be determined)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The final answer of a text and the rule that found it."""

    answer: str
    rule: str


# ---------------------------------------------------------------- boxes


def boxed(text: str) -> str:
    r"""The content of the last \boxed{}, or of the last boxes that are one answer, joined by ", ".

    "" where there is none. "x = \boxed{3} or x = \boxed{4}" -> "3, 4".
    """
    found: list[str] = []
    start = len(text)
    for match in reversed(collections.deque(_BOXED.finditer(text), _TRIED)):
        end = match.end()
        if text[end : end + 1] == "{":
            content = braced(text, end, 4 * MAX_ANSWER_CHARS)
            end += len(content or "") + 2
        else:  # \boxed 5
            bare = re.match(r"[^\s$\\]+", text[end : end + 50])
            content = bare.group(0).rstrip(".,") if bare else None
            end += len(content or "")
        if content is None or not content.strip():
            continue
        if found and not _one_answer(text[end:start]):
            break
        found.append(content.strip())
        start = match.start()
    return ", ".join(dict.fromkeys(reversed(found)))


def _one_answer(between: str) -> bool:
    """Whether two boxes with this text between them are parts of one answer."""
    if len(between) > 120:
        return False
    if glue := _GLUE.fullmatch(between):
        return glue.group("joint") is not None
    return bool(_GOES_ON.fullmatch(between)) and not _CORRECTS.search(between)


# ---------------------------------------------------------------- marks in prose


def _sentence(text: str) -> str:
    r"""The first sentence: "$1.8$ m. So" -> "$1.8$ m", "Mrs. Hilt. She" -> "Mrs. Hilt"."""
    for match in _STOP.finditer(text):
        if match.lastgroup == "end":
            return text[: match.start()].strip()
    return text.strip()


def _json_value(text: str) -> str:
    """The value that a JSON text begins with: '"5"}' -> "5"; '[1, 2]}' -> "1, 2"."""
    try:
        value = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):  # Python's quotes, or cut off
        return re.split(r"[,}\n]", text.strip("'\""), maxsplit=1)[0].strip("'\" ")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(text: str) -> str:
    """The answer that a text behind a mark begins with, without the words around it."""
    text = re.split(r"</\w{1,20}>", text.strip(), maxsplit=1)[0]
    if fence := re.match(r"```[A-Za-z]*\s*\n?", text):
        text = text[fence.end() :].partition("```")[0].strip()
    if match := _JSON.search(text[:_READ]):
        return _json_value(text[match.end() :])
    if match := re.match(r"\\\[\s*(.+?)\s*\\\]|\$\$\s*(.+?)\s*\$\$", text, re.DOTALL):
        return (match.group(1) or match.group(2)).strip().rstrip(".")
    words = _sentence(text.partition("\n")[0]).strip("*_` ").removesuffix("\\").strip()
    for _ in range(3):
        words = _LEAD.sub("", words, count=1) if _LEAD.match(words) else words
    words = _right_side(_CLAUSE.sub("", words, count=1).strip().strip("*_"))
    if re.search("[\u4e00-\u9fff]", words) and (numbers := list(re.finditer(_VALUE, words))):
        return numbers[-1].group(0).strip()
    if match := _UNIT_WORDS.fullmatch(words):
        units = set(match.group(2).lower().split())
        if not units & NOT_UNITS and not _MULTIPLIER.match(match.group(2)):
            return match.group(1)
    if (leading := _before_words(words)) is not None:
        return leading
    if len(words.split()) > 3 and (verb := _VERB.search(words)):
        for place in range(verb.end(), len(words)):
            if (leading := _before_words(words[place:].strip())) is not None:
                return leading
    return words


def _right_side(text: str) -> str:
    """The result of a calculation: "3 + 4 = 7" and "x = 7" -> "7"; "y + z = 7" stays."""
    left, sign, right = text.rpartition("=")
    if not sign or left[-1:] in "<>!=" or right[:1] == "=":
        return text
    variables = re.sub(r"\\?[A-Za-z]{2,}|\$", "", left)
    if re.search("[A-Za-z]", variables) and not re.fullmatch(r"[\s\w'(){}]*", variables.strip()):
        return text
    return f"${right.strip()}" if text.startswith("$") and right.endswith("$") else right.strip()


def _before_words(text: str) -> str | None:
    """The values at the start of a text that goes on with words: "66 passengers ride" -> "66"."""
    match = _LEADING.match(text)
    if match is None or _MULTIPLIER.match(match.group(2)):
        return None
    after = match.group(2)
    if re.search(r"\band\s+\D?\d", after):  # "5 apples and 6 oranges"
        return None
    return match.group(1).strip() if re.match(r"[*_]{0,2}(?:,?\s+\(?[A-Za-z]|$)", after) else None


def _hash_value(text: str) -> str:
    """What follows ####, or "" where that is a heading."""
    line, _, rest = text.partition("\n")
    if re.match(r"(?i)(?:final )?answer\b", line) or line.rstrip().endswith(":"):
        return ""
    heading = re.match(r"[A-Za-z]{2,}|\d{1,2}[.)]\s+[A-Za-z]", line)
    return "" if heading and rest.strip() else line.strip().strip("*_").strip()


# Each kind of mark, and what shows in a text that was cut off that the answer behind it is whole.
_MARKS = {
    "hash": (_HASH, r"\n"),
    "answer_line": (_ANSWER_LINE, r"\n|[.!?]\s|。"),
    "answer_is": (_ANSWER_IS, r"\n|[.!?]\s|。"),
    "tag": (_TAG, r"</"),
    "json": (_JSON, r"[,}\n]"),
    "choice": (_CHOICE, r"\W"),
}


def _marked(text: str, *, complete: bool) -> Extraction | None:
    """The answer behind the last mark that has one."""
    found: tuple[int, Extraction] | None = None
    for rule, (pattern, ended) in _MARKS.items():
        for match in reversed(collections.deque(pattern.finditer(text), _TRIED)):
            behind = text[match.end() : match.end() + _READ]
            if "\n" in match.group(0):  # an item of a list, no minus
                behind = re.sub(r"^[-*•] ", "", behind)
            if found and match.end() <= found[0]:
                break
            if not complete and not re.search(ended, behind):
                continue
            if rule == "hash":
                answer = _hash_value(behind)
            elif rule == "tag":
                inner = behind.partition("</")[0].strip()
                answer = boxed(inner) or (inner if len(inner) < 60 else _value(inner))
            elif rule == "json":
                answer = _json_value(behind)
            else:
                answer = match.group(1) if rule == "choice" else _value(behind)
            if answer:
                found = match.end(), Extraction(answer, rule)
                break
    bare = _BARE.search(text)
    if bare and complete and (found is None or found[0] < bare.start()):
        return Extraction(bare.group(1) or bare.group(2), "choice")
    options = list(itertools.islice(_OPTION_LINE.finditer(text), 2))
    if len(options) == 1 and complete and (found is None or found[0] < options[0].start()):
        return Extraction(options[0].group(1), "choice")
    return found[1] if found else None


# ---------------------------------------------------------------- the last expression


def _last_expression(text: str) -> str:
    """The last number with the expression that it stands in: "is 16/9." -> "16/9"."""
    text = _DISPLAY.sub(lambda m: f" ${' '.join((m.group(1) or m.group(2)).split())}$ ", text)
    for line in reversed(text.splitlines()):
        line = line[-_LINE:]
        found = [m for m in _EXPRESSION.finditer(line)
                 if re.search(r"\d", m.group(0)) or m.lastgroup == "span"]  # fmt: skip
        best = next((m for m in reversed(found) if m.lastgroup != "ordinal"), None)
        best = best or (found[-1] if found else None)
        if phrase := _PHRASE.search(_sentence(line[best.end() if best else 0 :])):
            return phrase.group(0)
        if best is None:
            continue
        if results := list(_RESULT.finditer(line)):  # "= 3 more than 1/5 pound": the result
            behind = _EXPRESSION.match(line, results[-1].end())
            if behind and best.lastgroup != "span" and not _REVISED.search(line, behind.end()):
                best = behind
        return _with_neighbours(line, found, best)
    return ""


def _with_neighbours(line: str, found: list[re.Match[str]], best: re.Match[str]) -> str:
    """An expression with the list, the brackets or the relation that it is a part of."""
    items, start = [_bare(best)], best.start()
    before = [match for match in found if match.end() <= best.start()]
    while before and _JOINS.fullmatch(line[before[-1].end() : start]):
        start = before[-1].start()
        items.insert(0, _bare(before.pop()))
    opening, closing = line[:start][-1:], line[best.end() : best.end() + 1]
    if len(items) > 1 and opening and closing and opening in "([" and closing in ")]":
        return f"{opening}{', '.join(items)}{closing}"
    relation = _COMPARED.search(line[:start])
    return f"{relation.group(0)}{items[0]}" if relation and len(items) == 1 else ", ".join(items)


def _bare(match: re.Match[str]) -> str:
    answer = match.group(0).removeprefix("the ")
    if match.lastgroup == "span":
        answer = _right_side(answer[1:-1] if answer[0] == "$" else answer[2:-2])
    return re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", answer).strip().rstrip(".,")


def extract_answer(text: str, *, complete: bool = True) -> Extraction | None:
    r"""The final answer of a completion: in a box, behind the last mark, or the last expression.

    What follows the model's thoughts is searched first. Of a text that was cut off
    (`complete=False`) the last expression is no answer, nor what a mark has at the very end.

    >>> extract_answer("so 4 eggs.\n#### 4")
    Extraction(answer='4', rule='hash')
    """
    text = _CALCULATION.sub("", text)
    thoughts = list(_THOUGHT.finditer(text))
    for part in (text[thoughts[-1].end() :], text) if thoughts else (text,):
        if answer := boxed(part):
            return Extraction(answer, "boxed")
        if found := _marked(part, complete=complete):
            return found
        if answer := _last_expression(part) if complete else "":
            return Extraction(answer, "last_number")
    return None


def reference_answer(answer: str) -> str:
    r"""The answer in a reference: a worked solution ending `#### N`, `A: N` or \boxed{N} is read.

    A reference without such a mark is the answer itself ("The answer is" is not looked for).
    """
    if answer_in_box := boxed(answer):
        return answer_in_box
    for pattern in (_HASH, _ANSWER_LINE):
        last = collections.deque(pattern.finditer(answer), 1)
        if last:
            return answer[last[0].end() :].partition("\n")[0].strip()
    return answer.strip()
