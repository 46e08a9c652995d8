r"""The answer in words: what a text behind a mark ("the answer is") begins with, and JSON.

Standard library only, and every search is linear in the text: what a model wrote is read here.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from dcod_jax.evaluate.units import measured

READ = 600  # characters behind a mark
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"\s*(-?(?:{NUMBER}))[.\s]*")
SPAN = r"(?<!\\)\$(?!\d[\d.,]*\s+[a-z]{2,}\s)(?:\\.|[^$\\\n]){1,200}\$|\\\([^\n]{1,200}?\\\)"
# "1 in 6", with nothing behind it that makes it "20 in 30 minutes"
CHANCE = (
    rf"(?:{NUMBER}) (?:in|out of)(?: every)? (?:{NUMBER})"
    r"(?=\s*(?:$|[.,;!?)*]|chance|probability))(?: chance)?"
)
_MEASURE = (
    r"(?:hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|days?|weeks?|months?|years?|dollars?|cents?"
    r"|feet|foot|ft|inch(?:es)?|pounds?|lbs?|ounces?|oz|kg|g|km|m|cm|meters?|in(?=\.?$))(?![A-Za-z])"
)
COMPOUND = (
    rf"(?:(?:{NUMBER})\s?{_MEASURE}|\$(?:{NUMBER}))"
    rf"(?:\.?,? (?:and )?(?:{NUMBER})\s?{_MEASURE}){{1,3}}"
)
# "A, C", "A and (C)", "AC"
LETTERS = r"\(?[A-H](?:\)?(?:, ?(?:and )?| and | ?& ?|、|和|)\(?[A-H](?![A-Za-z'])){1,7}"
_VALUE = (
    rf"(?:[-+−–]\s?|(?:minus|negative)\s)?(?:\\?[$€£¥₹]\s?)?(?:{NUMBER})"
    rf"(?:/(?:{NUMBER})|:\d\d(?!\d))?(?:\s?\\?%|°|¢|[万亿]|\s?[apAP]\.?[mM]\b\.?)?"
)
_STOP = re.compile(
    r"(?P<math>\$(?!\d[\d.,]*\s+[a-z]{2,}\s)(?:\\.|[^$\\\n]){1,300}\$|\\\(.{1,300}?\\\))|(?P<short>\b(?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|Mt|vs|"
    r"No|a\.m|p\.m|A\.M|P\.M|U\.S|e\.g|i\.e|etc|approx|ft|in|oz|lb|sq|cu)\.)|(?P<end>"
    r"[!?](?=\s|$|[*\"'])|\.(?=\s|$|[*\"')])|[。．！？])"
)
BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(-])")
_LEADING = re.compile(
    rf"((?:{SPAN}|{CHANCE}|{COMPOUND}|{_VALUE})"
    rf"(?:\s*(?:,|;|and|or)\s*(?:{SPAN}|{_VALUE}))*)(.*)"
)
_LEAD = re.compile(
    r"(?:that|simply|just|therefore|thus|clearly|equal to|equals|given by|approx(?:imately|\.)?|"
    r"about|either|both|around|exactly|option|choice|(?:(?:la |a )?(?:opci[óo]n|opção|alternativa)"
    r"|l['’]option|l['’]opzione|die option|вариант)(?= [A-J]\b)|"
    r"indeed|now|then|hence|is:?|out of (?:the )?\d+ [a-z]+(?=,)|"
    r"an?(?= \d)|the(?= \d+(?:st|nd|rd|th))|=|:),?\s+(?=\S)",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"(?<=\S)(?:,\s*|\s+)\(?(?:because|since|so that|so|who|which|when|where|if|as|but|"
    r"(?<!(?-i:[a-z]) )(?:and )?not|after|instead|assuming|given that|while|whereas|rather)\b.*"
    r"|[，,（(]?(?:因为|而?不是|而非).*",
    re.IGNORECASE | re.DOTALL,
)
_NOT_BUT = re.compile(
    r"(?:not|no longer)\s[^\n]{1,60}?(?:,?\sbut\s(?:rather\s|instead\s|actually\s)?"
    r"|[.;,]\s(?:it|the answer|this|that)(?:'s|\s(?:is|should be|must be))\s(?:actually\s)?)(?=\S)",
    re.IGNORECASE,
)
# How a number was rounded, which is no number of the answer.
PRECISION = re.compile(
    r"\s*,?\s*\(?(?:rounded |correct |accurate )*\bto (?:the nearest [\w.]+"
    r"|\w+ (?:significant (?:figures?|digits?)|decimal places?|decimals?|d\.?p|s\.?f)\b\.?)\)?",
    re.IGNORECASE,
)
VERB = re.compile(
    r"(?<!\\)\b(?:is|are|was|were|be|has|have|had|needs?|gets?|makes?|made|pays?|paid|costs?|earns?|earned|"
    r"takes?|took|spends?|spent|equals?|becomes?|remains?|left|contains?|weighs?|sells?|sold|buys?|"
    r"bought|saves?|saved|eats?|ate|runs?|ran|gives?|gave|receives?|received|owes?|should|will|can)\b"
    r"|(?<![<>!])="
)  # fmt: skip
SUBJECT = re.compile(  # "Mrs. Hilt has more"
    r"(?!(?:It|This|That|There|The|Th[eo]se|Yes|No|He|She|They|We|You|Both|None|Each|All|Neither"
    r"|What|Who|Which|How) )"
    r"((?:[A-Z][a-z]+\.? )*[A-Z][a-z]+) (?:is|was|has|had|have|will|wins|won|runs|ran|gets|got)\b"
)
_OTHER_VERB = re.compile(
    r"\b(?!radius|plus|minus|times|units|less|axis|is|class|bus|towards|degrees)[a-z]+(?:s|ed) "
    r"(?:at )?(?=\$?\d)"
)
_MULTIPLIER = re.compile(
    r"\s*\b(?:dozen|hundred|thousand|million|billion|trillion|percent|times|half|over|plus|"
    r"choose|factorial|(?:or|and|to) (?:\D?\d|a|half|the (?:power|\d))|minus|squared|cubed|x 10"
    r"|in base|[ap]\.?m)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(  # a word, a remark
    r"[*_]{0,2}(?:,?\s+\(?[^\W\d_]|\.?$|;\s+[a-z]|:\s\d+ [a-z]|\s?[—–]\s?[a-z]"
    r"|\s\([^()]*[A-Za-z]{3})"
)
_LETTERED = re.compile(
    r"[*_]{0,2}\(?[A-J]\)?[*_]{0,2}[.):][*_]{0,2}\s+\S[^\n]{0,80}$", re.MULTILINE
)
VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
JSON_KEY = re.compile(
    r"""["'](?:(?:final|the|correct)[_ ]?)?(?:answer|result|solution|choice)["']\s*:\s*""",
    re.IGNORECASE,
)
_JSON_WORDS = ("answer", "choice", "result", "solution", "value")  # the first that an object has
# "\frac" that a JSON text does not escape twice is read as a form feed and "rac".
_ESCAPES = {"\f": "\\f", "\b": "\\b", "\t": "\\t", "\r": "\\r"}


# ---------------------------------------------------------------- JSON


def json_answer(text: str, tries: int = 20) -> tuple[int, str] | None:
    """(where it ends, the answer) of the last JSON object that has one."""
    found, place = None, 0
    if '"' not in text:
        return None
    for start in itertools.islice((m.start() for m in re.finditer(r"\{(?=\s*\")", text)), tries):
        if start < place:  # inside the last one
            continue
        try:
            whole, place = json.JSONDecoder().raw_decode(text, start)
            if any(JSON_KEY.match(f'"{key}":') for key in whole) or (start, place) == (
                0,
                len(text),
            ):
                found = place, json_text(whole)
        except (ValueError, RecursionError):
            continue
    return found


def json_text(value: Any) -> str:
    r"""A JSON value as an answer: [1, 2] -> "1, 2"; {"value": 5, "unit": "cm"} -> "5 cm"."""
    if isinstance(value, dict):
        names = {key.lower(): key for key in value}
        held = [names[n] for word in _JSON_WORDS for n in names if n.endswith(word)]
        unit = value.get("unit")
        inner = json_text(value[held[0]]) if held else ", ".join(
            f"{name} = {json_text(one)}" for name, one in value.items())  # fmt: skip
        return f"{inner} {unit}".strip() if inner and isinstance(unit, str) else inner
    if isinstance(value, list):
        texts = [(json_text(one), isinstance(one, list) and len(one) > 1) for one in value]
        return ", ".join(rf"\langle {text}\rangle" if held else text for text, held in texts)
    if value is None:
        return ""
    return re.sub("[\f\b\t\r](?=[a-z])", lambda m: _ESCAPES[m.group(0)], str(value))


def json_value(text: str) -> str:
    """The value that a JSON text begins with: '"5"}' -> "5"; '[1, 2]}' -> "1, 2"."""
    try:
        return json_text(json.JSONDecoder().raw_decode(text)[0])
    except (ValueError, RecursionError):  # Python's quotes, or cut off
        return re.split(r"[,}\n]", text.strip("'\""), maxsplit=1)[0].strip("'\" ")


def unwrapped(text: str) -> str:
    r"""What a JSON object that is a whole answer holds: '{"answer": 5}' -> "5"."""
    plain = text.replace("\\{", "{").replace("\\}", "}").strip() if '"' in text else ""
    found = json_answer(plain) if plain[:1] == "{" else None
    return found[1] if found and found[1] and found[0] == len(plain) else text


# ---------------------------------------------------------------- words


def sentence(text: str) -> str:
    r"""The first sentence: "$1.8$ m. So" -> "$1.8$ m", "Mrs. Hilt. She" -> "Mrs. Hilt"."""
    for match in _STOP.finditer(text):
        if match.lastgroup == "end":
            return text[: match.start()].strip().rstrip(".")
    return text.strip()


def value(text: str) -> str:
    """The answer that a text behind a mark begins with, without the words around it."""
    if plain := _NUMBER.fullmatch(text):
        return plain[1]
    text = re.split(r"</\w{1,20}>", text.strip(), maxsplit=1)[0]
    if fence := re.match(r"```[A-Za-z]*\s*\n?", text):
        text = text[fence.end() :].partition("```")[0].strip()
    if text.startswith("{") and (whole := unwrapped(text.partition("\n")[0].rstrip("."))) != text:
        text = whole
    if match := re.match(r"\\\[\s*(.+?)\s*\\\]|\$\$\s*(.+?)\s*\$\$", text, re.DOTALL):
        return (match.group(1) or match.group(2)).strip().rstrip(".")
    if match := _LETTERED.match(text):
        return match.group(0).replace("*", "")
    if match := _NOT_BUT.match(text):
        text = text[match.end() :]
    words = (
        BOLD.sub("", sentence(text.partition("\n")[0])).strip("*_`, ").removesuffix("\\").strip()
    )
    for _ in range(3):
        words = _LEAD.sub("", words, count=1) if _LEAD.match(words) else words
    words = PRECISION.sub("", words)
    words = right_side(_CLAUSE.sub("", words, count=1).strip().strip("*_"))
    if re.search("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]", words):
        if match := re.match(rf"({SPAN}|{_VALUE})\s*(?:[，,]|$)", words):
            return match.group(1).strip()
        several = rf"({SPAN}|{_VALUE})(?:\s*[、和或]\s*({SPAN}|{_VALUE}))*"
        if numbers := list(re.finditer(several, words)):
            return numbers[-1].group(0).strip()
    if re.fullmatch(r"[^()]*\d[^()]* \([A-J]\)", words):
        return words
    if choices := re.match(rf"({LETTERS})[)*]* (?:are|is)\b", words):
        return choices.group(1)
    if not re.search(r"\d", words) and (name := SUBJECT.match(words)):
        return name.group(1)
    found = _number_of(words) or words
    return re.sub(r"^\$([^$]+)\$(?=$| [a-z]+$)|^\$(?=[\d.,]+(?: [a-z]+)?$)", r"\1", found)


def _number_of(words: str) -> str | None:
    """The value that a sentence states; None where it is not known to be a number."""
    if (leading := _before_words(words)) is not None:
        return leading
    if len(words.split()) > 3 and (verb := VERB.search(words) or _OTHER_VERB.search(words)):
        for place in range(verb.end(), len(words)):
            if (leading := _before_words(words[place:].strip())) is not None:
                return leading
    return None


def right_side(text: str) -> str:
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
    if re.search(r"\band\s+\D?\d|^ [a-z]+, \d+ [a-z]+$", after):  # "5 apples and 6 oranges"
        return None
    return match.group(1).strip() + measured(after) if _REMARK.match(after) else None
