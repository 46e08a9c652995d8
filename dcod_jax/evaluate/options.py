"""Multiple choice: the options of a record, shown in its prompt and named in its reference."""

from __future__ import annotations

import re
from typing import Any

from dcod_jax.errors import DcodError
from dcod_jax.evaluate.equality import equal

FIELDS = ("options", "choices")
LETTERS = "ABCDEFGHIJ"
_LABELLED = re.compile(r"\s*[(\[]?([A-Ja-j])\s*[).:\]]\s*(.*)", re.DOTALL)
_IN_A_LINE = re.compile(r"(?<![^,;\s])[(\[]?([a-jA-J])\s*[).:\]]\s*")  # MathQA, SAT


def read_options(record: dict[str, Any], source: str) -> dict[str, str]:
    """Letter -> text of the field `options` or `choices`; {} where a record has neither.

    A list of texts, with or without "A)", {"A": text}, {"label": […], "text": […]},
    "a ) 3 , b ) 4" and "A) 3 B) 4" are read. Raises DcodError for another form.
    """
    field = next((name for name in FIELDS if record.get(name)), "")
    if not field:
        return {}
    value = record[field]
    if isinstance(value, str):
        marks: list[re.Match[str]] = []
        for mark in _IN_A_LINE.finditer(value):  # "(a)" in the text of option B is none
            order = LETTERS.lower() if (marks or [mark])[0][1].islower() else LETTERS
            marks += [mark] if mark[1] == order[len(marks) : len(marks) + 1] else []
        ends = [*(mark.start() for mark in marks[1:]), len(value)]
        value = {mark[1]: value[mark.end() : end].strip(" ,;")
                 for mark, end in zip(marks, ends, strict=False)}  # fmt: skip
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        texts = [one.get("text") if isinstance(one, dict) else one for one in value]
        labelled = [_LABELLED.fullmatch(one) if isinstance(one, str) else None for one in texts]
        letters = [match[1].upper() if match else "" for match in labelled]
        if letters == list(LETTERS[: len(letters)]):
            texts = [match[2] for match in labelled if match]
        value = dict(zip(LETTERS, texts, strict=False)) if len(texts) <= len(LETTERS) else {}
    pairs = value.items() if isinstance(value, dict) else ()
    options = {str(key).upper(): text for key, text in pairs}
    if len(options) < 2 or not all(
        key in LETTERS and len(key) == 1 and isinstance(text, str | int | float)
        for key, text in options.items()
    ):
        raise DcodError(
            f"{source}: field {field!r} must be 2 to {len(LETTERS)} options, such as "
            f'["A) 3", "B) 4"] or {{"A": "3", "B": "4"}}, got {str(record[field])[:60]!r}; rename '
            "the field where it is something else"
        )
    return {key: str(text).strip() for key, text in options.items()}


def with_options(prompt: str, options: dict[str, str]) -> str:
    """The prompt with its options behind it, unless it shows every one of them already."""
    squeezed = "".join(prompt.split())
    marks = r"[).:\]]+"
    shown = (
        re.search(f"{letter}{marks}{re.escape(''.join(text.split()))}", squeezed)
        for letter, text in options.items()
    )
    lines = "\n".join(f"{letter}) {text}" for letter, text in options.items())
    return prompt if all(shown) else f"{prompt}\n\n{lines}"


def option_reference(value: Any, options: dict[str, str], source: str) -> str:
    """ "(B) 12": the reference whose letter or value an answer must have.

    `value` is a letter, the text of an option, or a whole number that counts from 0. Raises
    DcodError where it is no option.
    """
    letters = list(options)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        letter = letters[value]
    else:
        text = str(value).strip()
        named = re.fullmatch(r"[(\[]?([A-Ja-j])[)\].:]?", text)
        same = [one for one in letters if options[one] == text or equal(text, options[one])]
        letter = named[1].upper() if named and named[1].upper() in options else "".join(same)
    if letter not in options:
        raise DcodError(
            f"{source}: the answer {str(value)[:60]!r} is none of the options "
            f"{', '.join(f'{key}) {text[:20]}' for key, text in options.items())}; expected a "
            "letter, the text of one option, or its place from 0"
        )
    return f"({letter}) {options[letter]}"
