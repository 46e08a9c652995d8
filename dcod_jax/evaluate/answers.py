r"""Final answers found in a completion by stated rules.

Standard library only, and every search is linear in the text: what a model wrote is read here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable

from dcod_jax.evaluate.equality import MAX_ANSWER_CHARS
from dcod_jax.evaluate.expressions import last_expression, lone
from dcod_jax.evaluate.prose import (
    JSON_KEY,
    LETTERS,
    NUMBER,
    READ,
    SPAN,
    json_answer,
    json_value,
    unwrapped,
    value,
)
from dcod_jax.evaluate.spelling import braced, without_blanks

_TRIED = 20  # matches of one rule, from the end; bounds the search in a text of nothing but \boxed{
_THOUGHT = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|scratchpad)>|<\|end_of_thought\|>|\[/THINK\]"
    r"|◁/think▷|<\|channel\|>final<\|message\|>|<\|begin_of_solution\|>",
    re.IGNORECASE,
)
_CALCULATION = re.compile(r"<<[^<>\n]{0,100}>>")  # GSM8K's own: 2+2=<<2+2=4>>4
# Tags of style, what is struck out, and the tokens that end a turn.
_MARKUP = re.compile(
    r"(?<![\w)])<(?:b|i|u|em|strong|code|span|p)(?: [^<>\n]{0,60})?>"
    r"|</(?:b|i|u|em|strong|code|span|p)>|<br ?/?>|~~[^~\n]{1,60}~~\s?"
    r"|(?<!\w)__(?=[^\s_])|(?<=[^\s_])__(?!\w)|<\|(?:im_end|eot_id|endoftext|end|end_of_text|eom_id|return)\|>|</s>\s*$|<eos>|<end_of_turn>"
)
# "Wait, that's wrong." and the rest of its sentence: what follows is the answer.
_RETRACTED = re.compile(
    r"(?:^|(?<=[.!:;\n}$—–]))[ \t$*]{0,9}(?:(?:oh|hmm|ah|no|but|and)\b[,. ]*){0,2}"
    r"(?:(?:wait|oops|sorry|hold on|actually|hmm|no|apologies|my mistake)\b[^.!?\n]{0,60}?"
    r"(?:wrong|incorrect|not (?:right|correct)|mistake|error|misread|miscalculated"
    r"|forgot|missed|overlooked|should have)"
    r"[^.!?:\n]{0,60}?[.!:,;]"
    r"|(?:actually|wait),? (?:it's|it is|it should be|the answer is) (?=[-$\\]*\d)"
    r"|(?:wait|sorry|oops),? no\b[ ,.:;—–]*|correction:|scratch that[;,.]|no,? wait,|oops,)",
    re.IGNORECASE,
)
# Hyphens, the sign of a ratio, and digits, letters and signs of full width.
_PLAIN = dict.fromkeys(map(ord, "‐‑‒﹣－"), "-") | {ord("∶"): ":"} | {
    ord(sign) + 0xFEE0: sign
    for sign in "%+0123456789<=>ABCDEFGHIJKLMNOPQRSTUVWXYZ"
}  # fmt: skip
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_UNBRACED = re.compile(r"\\[dt]?frac\s*(?:\d\s*\d|\{[^{}]*\}\{[^{}]*\})|[^\s$\\]+")
_BOX_LABEL = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\{?\w\}?)?)\s*=\s*$")
# What parts two boxes of one answer: "$\boxed{3}$ and $y = \boxed{4}$", "(a) \boxed{3} (b) ...".
_GLUE = re.compile(
    r"(?:(?P<joint>\n|[,;•，；、和或]|\\q?quad|\n\s*-|\b(?:and|or)\b|\(?\b(?:[a-h]|[ivx]{1,4}|\d)[).:](?=[\s*]))"
    r"|[\s$&*.]|\\[()\[\]\\,;! ]|\\text\{\s*|\}|\\?[A-Za-z]\w?(?:_\{?\w\}?)?\s*=)*"
)
# "and the perimeter is \boxed{14}" goes on with the answer, "and so it is \boxed{14}" corrects.
_GOES_ON = re.compile(
    r"[\s$\\)\]]*(?:[a-z]{2,15}\b)?,?\s*(?:and|or)\b[^\n.!?]{0,80}"
    r"|[\s$\\)\]]*\s[a-z]{2,15}(?: [a-z]{2,15})?,\s*(?:and )?[$\\(\s]*"  # "5 apples, 6 pears"
    r"|[$\s]*[，；、](?![^$]*[不应改即所故因])[\u4e00-\u9fff]{1,8}[=$\s]*"
    r"|[ $\\)\]*]*[,;\n][\s*•-]*[A-Za-z][\w ]{0,40}:[*$\\(\[\s]*(?:\\?[A-Za-z]\w?\s*=\s*)?"
)
_NEXT_PART = re.compile(r"[\s\S]{0,200}[.\n;,]\s*(?:Part )?\(?(?:[b-h]|ii|iii|iv)\)[\s\S]{0,200}")
_CORRECTS = re.compile(
    r"\b(?:so|thus|hence|therefore|then|answer|final(?:ly)?|no|not|wait|actually|which|giv\w+|equal\w*"
    r"|simplif\w+|because|since|where|get|obtain|have|substitut\w+)\b",
    re.IGNORECASE,
)
_HASH = re.compile(r"####(?!#)[ \t]*(?=\S)")
_LANGUAGES = (
    r"(?i:respuesta|réponse|antwort|resposta|risposta|ответ|đáp án|đáp số)|答え|解答|정답|답|उत्तर"
    r"|الإجابة|الجواب"
)
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_-]{0,8}(?:(?i:(?:(?:the|my|our) )?(?:(?:final|correct) )?(?:answers?|ans|result))"
    rf"|A|答|答案|{_LANGUAGES})"
    r"(?:[*_ \t]{0,4}(?:[:：=→⇒]|->|—|(?<=[Aa]ns)\.)|[*_]{0,2}[ \t]{1,4}[-–](?=[ \t*]))"
    r"[*_ \t]{0,4}\s{0,8}(?=\S)"
    r"|^[ \t]*(?:#{1,6}|\*\*)[ \t]*(?i:(?:the )?(?:final )?answer)[*_ \t]{0,4}\n\s{0,8}(?=\S)"
    r"|^[ \t]*(?i:(?:the )?(?:final )?answer)[ \t]*\n(?:[-=]{3,}[ \t]*\n)?\s{0,8}"
    r"(?=[-\d$\\*(`>]|is\b|[A-J]\b)"
    r"|^\|[* ]*(?i:(?:the )?(?:final )?answer)[* ]*\|[* ]*(?=[^\s|])",
    re.MULTILINE,
)
_ANSWER_IS = re.compile(
    r"(?i:\banswers?\b(?:(?:(?<=[.!] answer)|(?<=[.!] final answer))(?= ?:)"
    r"|(?!>| (?:choice|option)s?\b)(?:[^\n.:;?!\"]|\"[^\n\"]{0,80}\"){0,80}?"
    r"(?:\n\s{0,3}(?=is\b|to\b|of\b|for\b)"
    r"[^\n.:;?!]{0,60}?)?(?<![A-Za-z])(?:is|are|(?:would|must|will|should) be)(?![A-Za-z])))"
    r"[ \t*_]{0,4}[:：]?[*_]{0,2}\s{0,8}(?=\S)"
    r"|答案】?\s*(?:应?[是为選选]|[:：])?\s*[:：]?\s{0,4}(?=\S)"
)
_OTHER_IS = re.compile(
    r"(?i:\b(?:respuesta|réponse|antwort|resposta|risposta)\b[^\n.:;?!]{0,60}?"
    r"\s(?:es|est|ist|é|è)\s{1,4})(?=\S)|(?:答えは|정답은|답은|الجواب هو|الإجابة هي)\s{0,4}(?=\S)"
)
_COMMA_LANGUAGES = re.compile("(?i)respuesta|réponse|antwort|r[ei]sposta|ответ")
_TAG = re.compile(
    r"<(answer|ans|final_answer|solution)>(?=\s*\S)|\[(?:answer|ans)\](?=\s*\S)", re.IGNORECASE
)
_CHOICE = re.compile(
    r"(?i:\b(?:(?:option|choice|alternative)s?|choose|pick|select|go with)"
    r"(?: would be| must be| is| are)?:?"
    r"|故?选(?:项|择)?[是为]?[:：]?|正确的是)\s{0,3}(?:\\text(?:bf)?\{)?[*_$(\"']{0,4}"
    rf"({LETTERS}|[A-J]|(?<=\()[a-j](?=\)))(?![A-Za-z'])(?! [a-z]+ing)"
    r"(?![)*_]{0,3} (?:is|are)(?: both)? (?:wrong|incorrect|false|not)\b)"
)
_CHOICE_VALUE = re.compile(rf"[)*_]{{0,3}}[.:)]?\s+({SPAN}|(?:{NUMBER})[\w %/.]{{0,12}}?)\s*\.?$")
# "B" as the last line, "B is the correct answer", "so it must be B".
_BARE = re.compile(
    r"^[ \t>*_(\[]{0,6}([A-J])[ \t)*_.\]。．]{0,6}\s{0,9}\Z"
    r"|(?<![A-Za-z])([A-J])(?:[)*_]{0,3}|\) [\w.$/%\\]{1,15}) is (?:(?:the )?(?:correct|right|best"
    r"|answer)[^\n]{0,40}|true[.!]?\s*)\Z"
    r"|\A[\s(\[*]{0,6}([a-e])[)\].*]{0,4}\s*\Z"
    r"|\A[\s(\[*]{0,6}([A-J])[)\].*]{0,4}, (?:because|since|as) [^\n]{0,200}\Z"
    r"|\b(?i:so|hence|thus|therefore|must be|(?:best|correct|right|true)(?: (?:one|choice))? is"
    r"|it's|it is|answer|leaving(?: only)?)[,:]? (?:it's |it is |it must be )?"
    r"[*(]{0,3}([A-J])[)*]{0,3}(?:, not \(?[A-J]\)?)?[.!]?\s*\Z"
    r"|\b[Oo]nly ([A-J]) [a-z]+[.!]?\s*\Z"
    rf"|\A\s*(?:[Bb]oth\s+)?({LETTERS})[).!]{{0,2}}\s*\Z",
    re.MULTILINE,
)
_OPTION_LINE = re.compile(
    r"^[ \t>*#_]{0,6}\(?([B-J])[*_]{0,2}(?:[.):][*_]{0,2}[ \t]+|[）、])\S", re.MULTILINE
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
    labels: list[str] = []
    start = len(text)
    for match in reversed(collections.deque(_BOXED.finditer(text), _TRIED)):
        end = match.end()
        if text[end : end + 1] == "{":
            content = braced(text, end, 4 * MAX_ANSWER_CHARS)
            end += len(content or "") + 2
        else:  # \boxed 5
            bare = _UNBRACED.match(text[end : end + 50])
            content = bare.group(0).rstrip(".,") if bare else None
            end += len(content or "")
        if content is None or content.strip(" .…") in ("", "answer", "\\ldots", "\\dots"):
            continue
        if found and not _one_answer(text[end:start]):
            break
        found.append(content.strip())
        start = match.start()
        label = _BOX_LABEL.search(text, max(0, start - 40), start)
        labels.append(label.group(1) if label else "")
    if len(found) > 1 and all(labels) and len(set(labels)) == len(found):
        found = [f"{label} = {one}" for label, one in zip(labels, found, strict=True)]
    return ", ".join(dict.fromkeys(reversed(found)))


def _one_answer(between: str) -> bool:
    """Whether two boxes with this text between them are parts of one answer."""
    if _NEXT_PART.fullmatch(between):  # "\boxed{4}. (b) The median is \boxed{7}"
        return True
    if len(between) > 120:
        return False
    if glue := _GLUE.fullmatch(between):
        return glue.group("joint") is not None
    return bool(_GOES_ON.fullmatch(between)) and not _CORRECTS.search(between)


# ---------------------------------------------------------------- marks in prose


def _hash_value(text: str) -> str:
    """What follows ####, or "" where that is a heading."""
    line, _, rest = text.partition("\n")
    if re.match(r"(?i)[*_]{0,3}(?:final )?answer\b", line) or line.rstrip("*_ ").endswith(":"):
        return ""
    heading = re.match(r"[*_]{0,3}(?:[A-Za-z]{2,}|\d{1,2}[.)]\s+[A-Za-z])", line)
    if heading and (stated := re.match(r"(?i)(?:conclusion|result|solution|total)\s*:\s*", line)):
        return value(line[stated.end() :])
    return "" if heading and rest.strip() else unwrapped(line.strip().strip("*_").strip())


# Each kind of mark; what shows in a text that was cut off that the answer behind it is whole; and
# what every such mark has among its first _REACH characters, which is quick to look for.
_SENTENCE = r"\n|[.!?]\s|。"
_OTHER_WORDS = "espuesta|ESPUESTA|esposta|ESPOSTA|isposta|ISPOSTA|éponse|ÉPONSE|ntwort|NTWORT"
_MARKS = {rule: (pattern, ended, hints.split("|")) for rule, pattern, ended, hints in (
    ("hash", _HASH, r"\n", "####"),
    ("answer_line", _ANSWER_LINE, _SENTENCE, "nswer|NSWER|ans|Ans|ANS|esult|ESULT|A:|A |A*|A_|A="
     f"|A-|A—|A：|A→|A⇒|答|твет|ТВЕТ|áp |ÁP |답|उत्तर|الإجابة|الجواب|{_OTHER_WORDS}"),
    ("answer_is", _ANSWER_IS, _SENTENCE, "nswer|NSWER|答案"),
    ("answer_in_other_words", _OTHER_IS, _SENTENCE, f"답은|答え|الجواب|الإجابة|{_OTHER_WORDS}"),
    ("tag", _TAG, r"</|\[/", ">|]"),
    ("json", JSON_KEY, r"[,}\n]", "\"|'"),
    ("choice", _CHOICE, r"\W", "ption|hoice|lternative|hoose|ick |elect|o with|选|确|OPTION"),
)}  # fmt: skip
_REACH = 200
# "- x = 5" and "- y = 6", one a line.
_ITEM = (
    r"[-*•]? ?[$*\\(]*([A-Za-z](?:_\{?\w\}?)? = [^\n$*]{1,40}?)(?:\\\))?[$*.,;]*(?=\s*(?:\n|\Z))"
)
_VALUES = re.compile(rf"{_ITEM}(?:\s*\n\s*{_ITEM})+")
_ALONE = re.compile("[A-J](?![A-Za-z])")
_SHORT = 20  # characters that "(b)." and its blanks may have
_OPTION = re.compile("[B-J][*_]{0,2}[.):）、]")
# Every text in which something is taken back has one of these in it.
_RETRACTIONS = (
    "wrong|ncorrect|not right|not correct|istake|error|mis|forgot|verlooked|should have"
    "|ctually|orrection:|cratch that|ait|ops,|orry, no"
).split("|")


def _first(text: str, words: Iterable[str], start: int = 0) -> int:
    """Where the first of these words stands, -1 where none does."""
    rest = text[start:]
    there = [word for word in words if word in rest]
    return start + min(map(rest.find, there)) if there else -1


def _marked(text: str, *, complete: bool) -> Extraction | None:
    """The answer behind the last mark that has one."""
    whole = json_answer(text)
    found = (whole[0], Extraction(whole[1], "json")) if whole and whole[1] else None
    for rule, (pattern, ended, hints) in _MARKS.items():
        first = _first(text, hints, max(0, found[0] - _REACH) if found else 0)
        if first < 0:
            continue
        matches = pattern.finditer(text, max(0, first - _REACH))
        for match in reversed(collections.deque(matches, _TRIED)):
            behind = text[match.end() : match.end() + READ]
            if found and match.end() <= found[0]:
                break
            if not complete and not re.search(ended, behind):
                continue
            if answer := _behind(rule, match, behind):
                if rule == "choice" and found and (stated := _stated(text, found, match)):
                    answer = f"({answer}) {stated}"
                found = match.end(), Extraction(answer, rule)
                break
    place, tail = found[0] if found else -1, max(0, len(text) - _REACH)
    short = not found and len(text) < _SHORT
    alone = complete and (short or _ALONE.search(text, max(place, tail)))
    if alone and (bare := _BARE.search(text, tail)) and place < bare.start():
        return Extraction(_letters(next(filter(None, bare.groups()))), "choice")
    if complete and _OPTION.search(text, max(place, 0)):
        options = list(itertools.islice(_OPTION_LINE.finditer(text), 2))
        if len(options) == 1 and place < options[0].start():
            return Extraction(options[0].group(1), "choice")
    return found[1] if found else None


def _behind(rule: str, match: re.Match[str], behind: str) -> str:
    """The answer that stands behind a mark of this rule."""
    if "\n" in match.group(0):  # an item of a list, no minus
        if several := _VALUES.match(behind):
            return ", ".join(re.findall(_ITEM, several[0]))
        behind = re.sub(r"^(?:[-*•>] |1[.)] (?=[^\n]*\s*\Z))", "", behind)
    if match.group(0).lstrip().startswith("|"):  # a cell of a table
        behind = behind.partition("|")[0]
    if _COMMA_LANGUAGES.search(match.group(0)):  # "ist 3,5"
        behind = re.sub(r"(?<=\d),(?=\d{1,2}(?!\d))", ".", behind)
    if rule == "hash":
        return _hash_value(behind)
    if rule == "tag":
        inner = re.split(r"</|\[/", behind, maxsplit=1)[0].strip()
        return boxed(inner) or (inner if len(inner) < 60 and "{" not in inner else value(inner))
    if rule == "json":
        return json_value(behind)
    if rule == "choice":
        shown = _CHOICE_VALUE.match(behind.partition("\n")[0])
        letter = _letters(match.group(1))
        return f"({letter}) {shown.group(1)}" if shown else letter
    return value(behind)


def _letters(choices: str) -> str:
    """ "A and (C)" -> "A, C"."""
    return ", ".join(re.findall("[A-J]", choices.replace("and", "").upper()))


def _stated(text: str, found: tuple[int, Extraction], match: re.Match[str]) -> str:
    """The value before a choice: "The answer is 12, which is option C" -> "12"."""
    place, before = found
    between = text[place : match.start()]
    plain = before.rule == "answer_is" and re.fullmatch(r"[^A-J]*\d[^A-J]*", before.answer)
    return (
        before.answer if plain and len(between) < 60 and not re.search(r"\n|\.\s", between) else ""
    )


# ---------------------------------------------------------------- the whole text


def extract_answer(text: str, *, complete: bool = True) -> Extraction | None:
    r"""The final answer of a completion: in a box, behind the last mark, or the last expression.

    What follows the model's thoughts is searched first, and in it what follows the last answer
    that it takes back. Of a text that was cut off (`complete=False`) the last expression is no
    answer, nor what a mark has at the very end.

    >>> extract_answer("so 4 eggs.\n#### 4")
    Extraction(answer='4', rule='hash')
    """
    text = without_blanks(text if text.isascii() else text.translate(_PLAIN))
    text = _CALCULATION.sub("", text)
    if _first(text, ("<", "__", "~~")) >= 0:
        text = _MARKUP.sub("", text)
    thoughts = list(_THOUGHT.finditer(text)) if _first(text, ("<", "[/", "◁")) >= 0 else ()
    for part in (text[thoughts[-1].end() :], text) if thoughts else (text,):
        if found := _corrected(part, complete=complete) or _final(part, complete=complete):
            return found
    return None


def _final(part: str, *, complete: bool) -> Extraction | None:
    if answer := boxed(part):
        return Extraction(unwrapped(answer), "boxed")
    if found := _marked(part, complete=complete):
        return found
    answer = (lone(part) or last_expression(part)) if complete else ""
    return Extraction(answer, "last_number") if answer else None


def _corrected(part: str, *, complete: bool) -> Extraction | None:
    """The answer behind the last "wait, that's wrong"; None where nothing is taken back."""
    if _first(part, _RETRACTIONS) < 0:
        return None
    last = collections.deque(_RETRACTED.finditer(part), 1)
    return _final(part[last[0].end() :], complete=complete) if last else None


@functools.lru_cache(1024)
def reference_answer(answer: str) -> str:
    r"""The answer in a reference: a worked solution ending `#### N`, `A: N` or \boxed{N} is read.

    A reference without such a mark is the answer itself ("The answer is" is not looked for).
    """
    answer = without_blanks(answer)
    if answer_in_box := boxed(answer):
        return answer_in_box
    for pattern in (_HASH, _ANSWER_LINE):
        last = collections.deque(pattern.finditer(answer), 1)
        if last:
            return answer[last[0].end() :].partition("\n")[0].strip()
    return unwrapped(answer.strip())
