r"""The last expression of a text: the number, list, interval or phrase that it ends with.

Standard library only, and every search is linear in the text: what a model wrote is read here.
"""

from __future__ import annotations

import re

from dcod_jax.evaluate import prose
from dcod_jax.evaluate.numerals import IN_CHINESE, IN_WORDS
from dcod_jax.evaluate.prose import NUMBER, SPAN, VULGAR, right_side, sentence, value
from dcod_jax.evaluate.spelling import MONTHS
from dcod_jax.evaluate.units import measured

_LINE = 2_000  # characters of a line that are searched
_POWER = r"(?:\^(?:\{[^{}\n]{1,12}\}|\([^()\n]{1,8}\)|-?\w{1,4})|\*\*-?\d{1,3}|[⁰¹²³⁴-⁹⁻]{1,4})"
_CALL = (
    r"(?:(?<![A-Za-z\\])\\?(?:sqrt|cbrt|exp|ln|log(?:_\w{1,3}|[₀-₉]+)?|(?:arc)?(?:sin|cos|tan))"
    r"(?:\([^()\n]{1,30}\)|(?<=[ng]) \d+(?!\d|\.\d))|√\(?[\d.]+\)?|(?<![A-Za-z\\])e(?=[\^⁰¹²³⁴-⁹⁻])"
    r"|\\sqrt(?:\[\d\])?\{[^{}\n]{1,40}\}|\\[dt]?frac\{[^{}\n]{1,40}\}\{[^{}\n]{1,40}\}"
    r"|\\pi\b|π|pi\b|\((?:[\d.+*/^·√π −–-]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])){2,40}\))"
)
_MORE = rf"(?:[eE][-+]?\d{{1,3}}(?!\w)|\s\d{{1,3}}[/⁄]\d{{1,3}}(?![\d/])|[{VULGAR}]|!(?=[.,;)]))"
_DIGITS = rf"(?<![A-Za-z0-9_.\\^])(?:{NUMBER}){_MORE}?(?![A-Za-z0-9]*_)"
_LETTER = r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z'’])"
_RICH = rf"(?:{_DIGITS}(?:{_LETTER}|[A-Za-z](?![A-Za-z]))?{_POWER}?(?: ?{_CALL}{_POWER}?){{0,3}}"
_TERM = rf"{_RICH}|(?<!\d ){_LETTER}{_POWER}?|{_CALL}{_POWER}?(?:{_CALL}{_POWER}?){{0,3}})"
_PRODUCT = (
    rf"(?:{_DIGITS}(?: ?{_CALL}{_POWER}?){{1,3}}|{_DIGITS}{_POWER}"
    rf"|{_CALL}{_POWER}?(?:{_CALL}{_POWER}?){{0,3}})"
)
_SIGN = r"(?:(?<=[^\s\d)]) [-−–] ?|(?<![\d)A-Za-z])[-−–]|± ?|\b(?:negative|minus) )?"
_OPERATOR = r"(?:\s?[-+−–*/^×÷·±⁄]\s?|\sx\s(?=10))"
# No expression begins inside a word, or at these signs: they are passed quickly.
_BEGINS = r"(?![A-Za-z](?<=[A-Za-z]{2})| [^-−–]|[,;:!?=*])"
_EXPRESSION = re.compile(
    rf"{_BEGINS}(?:(?P<span>{SPAN})"
    rf"|(?P<long>{_SIGN}{_TERM}(?:(?:{_OPERATOR}|(?=[√\\])){_TERM}){{1,20}})"
    rf"|(?P<product>{_SIGN}{_PRODUCT})"
    rf"|(?P<ordinal>\bthe (?:{NUMBER})(?:st|nd|rd|th)\b)"
    r"|(?P<time>(?<![A-Za-z0-9_.^])\d{1,3}(?::\d{1,2}){1,3}(?!\d)"
    r"(?:\s?[apAP]\.?\s?[mM]\b\.?| in the (?:morning|afternoon|evening)\b)?"
    r"|(?<![A-Za-z0-9_.^])\d{1,2}\s?[apAP]\.?[mM]\b\.?)"
    rf"|(?P<number>{_SIGN}(?:\\?[$€£¥₹]\s?)?(?<![A-Za-z0-9_.^])"
    rf"(?:\d{{1,3}}(?: \d{{3}})+(?![\d,]|\.\d)|(?:{NUMBER}){_MORE}?)"
    rf"(?:\s?\\?%| percent\b)?|[-−+]?[{VULGAR}∞]))"
)
_REAL = r"[-−]?(?:\d[\d.,/]*+|∞|[a-z](?![a-z]))"
_LESS = r"\s?(?:<=?|≤|>=?|≥|≠)\s?"
_BRACKETS = r"[\[(][^()\[\]\n]{1,30},[^()\[\]\n]{1,30}[\])]"
_COMPARISON = r"\$[^$\n]{1,60}[<>≤≥][^$\n]{0,60}\$"
_ROOT = r"(?:square|cube) root of \d+(?! ?[-+*/^])"
_MONTH = rf"(?:{MONTHS}|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
# What is one answer although it has words or several numbers in it.
_WHOLE = re.compile(
    rf"{_BEGINS}(?:(?<!\d)(?:{prose.CHANCE}|{prose.COMPOUND}|(?:\d+/\d+|\d*√\d+|\d*π) ?≈ ?\d*\.\d+)"
    r"|(?<=ratio is )\d+(?: to | ?: ?)\d+|(?<=ratio of )\d+(?: to | ?: ?)\d+"
    rf"|\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:, \d{{4}})?\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)? (?:of )?{_MONTH}(?: \d{{4}})?\b"
    rf"|\b[a-z] is (?:less|greater|more) than (?:or equal to )?{_REAL}"
    rf"|{_REAL}{_LESS}[a-z]{_LESS}{_REAL}"
    rf"|\b[a-z]{_LESS}{_REAL},? (?:and|or) [a-z]{_LESS}{_REAL}"
    rf"|{_BRACKETS}(?:(?:\s?(?:∪|U)\s?|, (?:and )?|,| and | or ){_BRACKETS})+"
    rf"|{_COMPARISON} (?:and|or) {_COMPARISON}"
    rf"|{_ROOT}|(?<![\d.])\d+(?:'\s?\d+(?:\"|'')| (?:times (?:the )?{_ROOT}|(?:choose|by) \d+"
    r"|factorial\b|to the (?:\d+th power|power of \d+)|squared\b))"
    rf"|\ball real (?:numbers|values)(?: of [a-z])?,? (?:except|excluding)(?: for)? [^.:]*(?=\.?$))"
)
_RESULT = re.compile(r"[=≈]\s*(?:\\?[$€£¥₹]\s?)?(?=[-−–]?[\d.])")
# "When t = 4, the height is 80": an equation that is given, and what follows from it.
_PREMISE = re.compile(
    r"(?:^|[.;] )(?:because|since|as|if|when|with)(?: \S+)?"
    r"(?:(?! (?:he|she|it|they|we|you|the (?:total|cost|price|sum) is) )[^.,;])*$"
    r"|(?:\b(?:at|for|from|if|let|when|with)|(?:^|[.,] )[a-z]+ing(?: in)?)"
    r" (?!\$?\d+ ?[x×] ?\$?\d)[^A-Za-z,;.]{0,9}[A-Za-z]"
    r"(?:[^A-Za-z,;.]|\.\d|\b(?:and|[a-z])\b){0,30}$",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"(?!.*\b(?:which|since|because)\b)"
    r"(?:[^,]*,(?! (?:or|all|enough|worth|saving|remainder|where|and \d)\b).*"
    r"|.*\b(?:is|are|equals|gives|giving|yields|becomes|(?<!\bto )get)[ $]{1,3})"
)
_CIRCLED = re.compile("[①-⑩](?:[、，,]?[①-⑩])*")
_LIST = re.compile(r"[:;]\s|[a-z]\s+[-+]?\d[^,]*(?:,|\bor\b)")
_JOINS = re.compile(r"\s*(?:[,，、或和]|,?\s*\b(?:and|or)\b)\s*(?:[a-z]\s*=\s*)?")
_GIVEN = re.compile(r"\b(?:when|if|for|let|since)\s+(?:[a-z]\s*=\s*)?\Z", re.IGNORECASE)
_COMPARED = re.compile(r"(?<![A-Za-z])[a-z]\s*(?:[<>]=?|[≤≥≦≧⩽⩾≠])\s*$")
_REJECTED = re.compile(
    r"(?:\bnot|n't(?: be)?|rather than|instead of|other than|unlike|不是|而非)\s*$", re.IGNORECASE
)
_LABELLED = re.compile(
    r"[\s>*#_-]*(?!.*\b(?:is|are|was|gets?|gives?|equals?|becomes?|be|by|to|of|and)\b)"
    r"[A-Z][a-z]+(?: [a-z]+){0,2}[*_]{0,2}"
)
_DISPLAY = re.compile(r"\\\[\s*([^\[\]]{1,300}?)\s*\\\]|\$\$\s*([^$]{1,300}?)\s*\$\$")
_ALIGNED = re.compile(
    r"\\begin\{(align|aligned|equation|gather|gathered|split|eqnarray)\*?\}((?:(?!\\begin).){0,1500}?)"
    r"\\end\{\1\*?\}",
    re.DOTALL,
)
_PHRASE = re.compile(
    r"\b(?:infinitely many(?: such)?(?: \w+)?|an infinite number of \w+"
    r"|no (?:\w+ )?(?:solutions?|values?|roots?|answer)|"
    r"do(?:es)? not exist|undefined|impossible|cannot be determined|none of (?:the above|these))\b",
    re.IGNORECASE,
)
_PHRASE_OF = re.compile(
    r"\b(infinitely many|no) (?:\w+ )?(?:solutions?|values?|roots?)"
    r" (?:to|for|of|in|among|with)\b[^.,;:=]*$",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"\b(?:(?:can ?not|can't|could not|couldn't|unable to|not able to|do not know how to) (?:be )?"
    r"(?:solved?|answer(?:ed)?|determined?|find|found|comput\w+|calculat\w+)|(?:don't|do not) know"
    r"|not enough information|insufficient (?:information|data)|as an ai)\b",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"[\W_]*(yes|no|true|false)\b(?:[\W_]*$|,? (?:because|since|as)\b|,(?!.*\d))"
    r"|.*\b(?:is|therefore,?|thus,?|hence,?|so,?)[\s*_\"]+(true|false|yes|no)[\W_]*$",
    re.IGNORECASE,
)
_NAME = re.compile(
    r"\b(?:is|was|be) [*\"]*((?:M[rs]s?\. |Dr\. )?[A-Z][A-Za-z]+(?: [A-Z][a-z]+){0,3})[.!*\"]*$"
    r"|\b((?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|January|February|March|April|June|July"
    r"|August|September|October|November|December)[.!*]*$"
)
_REST = r"(?:(?!\.\s+\S)[^=])*$"  # to the end of the line, of which it is the last sentence
_NO_VERB = r"(?!.*\b(?:is|are|so|has|have|gives?|makes?)\b)"
# What stands behind an answer and has numbers of its own.
_ASIDE = re.compile(
    r"(?<=\d) (?:such )?(?:(?!is|are|was|and|or|by|more|less)[a-z]+ ){1,3}(?:between|less than"
    r"|greater than|smaller than|below|under|up to|at most|not exceeding) "
    r"(?!.*\b(?:is|are|so|has|have|gives|we|then)\b)[^=:]*$"
    r"|(?<=\d)(?P<share>(?: [a-z]+){0,2}?)(?: (?:in|for|on|to|from) (?:each|all|every one))?"
    r" (?:out )?of (?:the|these|those|his|her|their|its|our) \d+(?! ?[=/])[^=\d]*$"
    r"|, not (?:[A-Z][a-z]+|\$?-?\d+\$?)(?=[.!]?$)|"
    r"(?<=\d)(?: [a-z]+){0,2},? (?:after|found) (?!.*\b(?:is|are|was|were|has|have|he|she|it)\b)"
    r"[^.!?'=]*(?=[.!?]?\s*$)"
    r"|\[\d{1,2}\](?=[\s.,]|$)"
    r"|\((?:(?:from|see|by|using|as|via|word|to|rounded|step|eq|equation|including|since|because"
    r"|not|or|with|each|about|approx\w*|roughly|i\.e|where|when)\b|[≈~]|\d[\d.]*%? [a-z]{3})"
    r"[^(),\n]{0,60}\)"
    # "-4, occurring at x = 2", "9 is reached when x = 3", "5 when x = 2"
    rf"|(?<=[\d$)}}]),?(?: which)?(?: is)? (?:(?:attained|achieved|reached|obtained"
    rf"|occurr(?:s|ing)) (?:at|when|for|if)|when|for|at)(?= \$?[a-z] ?=){_NO_VERB}[^=]*={_REST}"
    r"|(?<=[\d$)%]),? (?:because|since) (?!.*\b(?:so|has|have|then|gives)\b)(?:(?!\.\s+\S).)*$"
    r"|[，,]?(?:当且仅当|此时)[^，。]*时?[^。]*|（[^（）]*舍[^（）]*）"
    # "55 girls: 25 big and 30 small ones", "4 pens, with 2 left", "8 weeks to save $9"
    rf"|, which is [^,=]*\bthan\b[^,=]*$|(?<=\d)(?P<kept>(?: [a-z]+){{0,2}}){_NO_VERB}"
    r"(?: (?:in|by|during|at the end of) (?:year|week|day|month|hour|round|grade) (?=\d+\.?$)"
    r"|: \d+ [a-z ]+(?:,|and) |, with | with (?=\$[^,]*$)|(?:(?<=days)|(?<=hours)|(?<=weeks)"
    r"|(?<=months)|(?<=years)|(?<=minutes)) to (?!get|make|give|about)(?=[a-z]+ [^=]*\d))"
    + _REST
    + r"|,? or (?:about|approximately|roughly|around) [^,;=]*?(?=\.?$)"
    r"|,? (?:when|if|after) (?:[a-z]+ ){0,3}divided by \$?\d+\$?|,? \(?mod(?:ulo)? \$?\d+\$?\)?"
    r"|(?:,? (?:by|from|in|see|as shown in|using) )"
    r"(?:step|equation|eq\.|figure|table|theorem|lemma)s? \(?\d+\)?"
    r"|^[ \t>*_(]*(?:confidence|word count|note|difficulty|time taken|tokens?)\b[^\n:]{0,30}:.*$"
    r"|(?:(?<=[.!?]) |^)(?:let me know|i hope|hope (?:this|that)|feel free|please let"
    r"|if you (?:have|need|want))[^\n]{0,200}$",
    re.IGNORECASE | re.MULTILINE,
)


# One short line: it begins as mathematics does, or is a word or a name.
_LONE = re.compile(
    r"(?:\(?[A-J]\) ?\S|[-+−±]?(?:[.(\[{$€£¥₹½…∞√πℝ]|\d(?!\d?:\d\d)|\\(?!\w*box|begin))"
    r"|(?:log|ln|sin|cos|tan|plus or|(?:the )?(?:square|cube) root)(?![a-z])"
    r"|(?i:[a-z]{1,2})\s?[-+*/^(<>≤≥≠≧]|(?!(?:[Ss]orry|[Uu]nsure)\b)(?=[^\d\u3040-\ud7a3]{1,40}\Z)"
    r"(?:[^\W_]\S*|[A-Z]\S*(?: (?:and |of |the )?[A-Z]\S*){1,3}|(?i:an?|one|the)[ -]\w+)[.!]?\Z)"
    r"[^\n]{0,60}"
)


_NOT_LONE = (prose.VERB, _REFUSED, _WHOLE, _NAME, _PHRASE, _LIST)


def lone(text: str) -> str:
    """The answer that a text of one short line is: "half", "$2K", "2 dozen"; "" for any other."""
    text = text.strip().strip("*_`># ")
    words = text.replace("=", "")
    if (
        _LONE.fullmatch(text) is None
        or any(pattern.search(words) for pattern in _NOT_LONE)
        or len(sentence(text)) < len(text.rstrip(".!"))
    ):
        return ""
    return value(text) if words == text else text if right_side(text) == text else ""


def last_expression(text: str) -> str:
    """The last number with the expression that it stands in: "is 16/9." -> "16/9"; "": none."""
    if "\\begin" in text:
        text = _ALIGNED.sub(_rows, text)
    if "$$" in text or "\\[" in text:
        text = _DISPLAY.sub(lambda m: f" ${' '.join((m.group(1) or m.group(2)).split())}$ ", text)
    for whole in reversed(text.splitlines()):
        line = prose.BOLD.sub("", whole[-_LINE:].replace("{,}", ","))
        line = _ASIDE.sub(r"\g<kept>\g<share>", line)
        line = prose.PRECISION.sub("", line) if "to " in line else line
        if refusal := _REFUSED.search(line):
            known = re.search("be determined|information|data", refusal.group(0))
            return "cannot be determined" if known else ""
        if match := _VERDICT.match(line):
            return match.group(1) or match.group(2)
        found = [m for m in _EXPRESSION.finditer(line)
                 if re.search(rf"[\d{VULGAR}∞]", m.group(0)) or m.lastgroup == "span"]  # fmt: skip
        found = [m for m in found if not _REJECTED.search(line, 0, m.start())]
        best = next((m for m in reversed(found) if m.lastgroup != "ordinal"), None)
        best = best or (found[-1] if found else None)
        if phrase := _PHRASE.search(sentence(line[best.end() if best else 0 :])):
            return phrase.group(0)
        if best and (phrase := _PHRASE_OF.search(line, 0, best.start())) and best is found[-1]:
            return phrase.group(1)
        if best is None:
            if match := _NAME.search(line.strip()):
                return match.group(1) or match.group(2)
            lead = re.sub(r"(?:so|thus|hence|therefore),? ", "", line.strip(), count=1, flags=re.I)
            if match := prose.SUBJECT.match(lead):
                return match.group(1)
            words = [m.group(0) for p in (IN_WORDS, IN_CHINESE, _CIRCLED) for m in p.finditer(line)]
            if words:
                return words[-1]
            continue
        if results := list(_RESULT.finditer(line)):  # "= 3 more than 1/5 pound": the result
            behind = _EXPRESSION.match(line, results[-1].end())
            between = line[behind.end() : best.start()] if behind else ""
            listed = re.fullmatch(
                r"\s*,[\s\d.,/−-]*(?:\b(?:and|or)\b\s*)?"
                r"|(?: is [^,]*)?,? (?:so(?! that)|then|thus)\b"
                r"(?!.*[, ](?:and there|which) (?:is|are)\b)"
                r".*\b(?:is|are)\b.*"
                r"|.*(?:\b(?:altogether|in total|in all|the (?:total|answer) is)\b|\.\s|时[，,]).*"
                r"|(?!.*\b(?:which|that|this|and)\b)[^,;.]*\b(?:gives|yields)[ $]{1,3}",
                between,
            )
            given = _CONCLUDED.fullmatch(between) and _PREMISE.search(line, 0, results[-1].start())
            if behind and best.lastgroup != "span" and not (listed or given):
                best = behind
        return _with_neighbours(line, found, best)
    return ""


def _rows(match: re.Match[str]) -> str:
    r"""An aligned block as one formula: "x &= 1 \\ &= 2" -> "x = 1 = 2"."""
    rows = [
        row.replace("&", "").strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2))
    ]
    text = "".join((" " if row[:1] in "=≈" else ", ") + row for row in rows if row)
    return text.removeprefix(", ").strip()


def _with_neighbours(line: str, found: list[re.Match[str]], best: re.Match[str]) -> str:
    """An expression with the list, the brackets, the words or the relation that it is a part of."""
    for whole in _WHOLE.finditer(line):
        if (
            whole.start() <= best.start()
            and best.end() <= whole.end()
            and best.group(0) != whole[0]
        ):
            return whole[0] if whole[0].count("$") % 2 else whole[0].replace("$", "")
    items, start = [_bare(best)], best.start()
    if re.match(r" ?[-−–] ", best.group(0)) and _LABELLED.fullmatch(line[: best.start()]):
        items = [items[0].lstrip("-−– ")]  # "Total - 12"
    before = [match for match in found if match.end() <= best.start()]
    while before and _JOINS.fullmatch(line[before[-1].end() : start]):
        if _GIVEN.search(line, 0, before[-1].start()):  # "When x = 2, y = 5."
            break
        start = before[-1].start()
        items.insert(0, _bare(before.pop()))
    opening, closing = line[:start][-1:], line[best.end() : best.end() + 1]
    if len(items) > 1 and opening and closing and opening in "([" and closing in ")]":
        return f"{opening}{', '.join(items)}{closing}"
    if len(items) > 1:
        return ", ".join(items)
    if best.lastgroup == "number" and items[0][-1].isdigit():
        items[0] += measured(line[best.end() :])
    relation = _COMPARED.search(line[:start])
    return f"{relation.group(0)}{items[0]}" if relation else items[0]


def _bare(match: re.Match[str]) -> str:
    answer = match.group(0).removeprefix("the ")
    if match.lastgroup == "span":
        answer = right_side(answer[1:-1] if answer[0] == "$" else answer[2:-2])
    if match.lastgroup == "time":
        return answer.strip()
    if match.lastgroup == "number":  # the dollar sign also opens a formula
        answer = re.sub(r"\\?\$\s?", "", answer)
    answer = re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", answer).strip()
    return re.sub(r"(?:\\[,;! ]|[.,\s])+$", "", answer)
