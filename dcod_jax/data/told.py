"""What a record tells of a completion beside its text: that it was cut off, that it is wrong."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from dcod_jax.data.columns import Row
from dcod_jax.data.presets import leaves, listed, plain
from dcod_jax.data.reasoning import unfinished
from dcod_jax.data.records import BadRecordError, RawTrace, truth

# What ends a completion before it is whole, and what ends a whole one, in the words of the APIs.
_CUT_OFF = re.compile(
    "length|max|limit|exceed|filter|safety|recitation|blocklist|prohibited|spii|guardrail|abort|"
    "cancel|error|fail|time|incomplete|truncat|insufficient|malformed|refusal|pause|toxic|language|"
    "sensitive|repet|interrupt|disconnect|preempt|user(?!_stop)|budget|out_of|too_|cost|context"
)
_WHOLE = re.compile("stop|eos|eot|end|complete|finish|tool|function|done|succe")
# Names of columns and keys, as `plain` writes them: finish_reasons is finishreasons.
_FINISH = re.compile(
    r"(.*finish|done|stop|exit|terminat(ed|ion))(reason|status|condition)s?|stoptypes?|status"
)
_KNOWN_WORDS = re.compile(r"finishreasons?|donereason")  # the others may hold anything
_STATUS = re.compile("(in)?completed?|fail(ed|ure)|error|cancel+ed|truncated|timed?_?out|aborted")
_COMPLETE = re.compile(
    r"(is|was|has)?(reasoning|generation|response|completion|output)?(completed?|finished|done|ended)|"
    r"(has|(ends|ended|stops|stopped)(with|on|at)?)?eos"
)
_LIMIT = "(max|length|limit|token|context)"
_CUT = re.compile(
    r"(is|was|got|has)?(truncated|truncation|cutoff|incomplete|unfinished|overlong|clipped|partial|"
    r"aborted|cancell?ed|interrupted|timedout)|(is|has|had)error|stoppedlimit|"
    rf"(hit|reached|exceeded|exceeds){_LIMIT}.*|{_LIMIT}.*(hit|reached|exceeded)"
)
_OF = "is|was|all|answer|final|response|solution|generation|completion|output|model|tests?|r1|unit"
_OF = rf"({_OF}|extracted|llm|judge|gold|majority|rule|verification|verifier|generated|gen|overall"
_OF = f"{_OF}|symbolic)*"
_RIGHT = re.compile(
    rf"{_OF}(correct|correctness|verified|verify|passed|verdict|judge?ment|mathverify)"
    r"(mathverify|llama)?(s|list)?|acc|(is)?(success|successful|resolved|solved|accepted)"
)
_WRONG = re.compile(rf"{_OF}(incorrect|wrong|failed)")
_BOOLEAN = re.compile(
    r"label|ktotag|pass|(is)?(valid|right|equivalent)|(is|exact|gold|answer)?match|judge|result|"
    r"verificationresult|(grade|score|reward)s?"
)
_REJECTED = {"empty": True, "truncated": True, "wrong_answer": False, "no_answer": False}
_KINDS = {"finish": _FINISH, "rejected": re.compile("rejected"), "complete": _COMPLETE, "cut": _CUT}
_KINDS |= {"right": _RIGHT, "wrong": _WRONG, "boolean": _BOOLEAN}
_MOST = 100  # columns that tell; each is read for each completion
_WORDS: dict[str, bool] = dict.fromkeys("correct right pass passed verified valid".split(), True)
_WORDS |= dict.fromkeys("incorrect wrong fail failed unverified invalid".split(), False)


def finish(value: Any) -> str:
    """A finish reason in lower case: {"type": "stop"} and FinishReason.STOP are stop."""
    value = value.get("type") if isinstance(value, dict) else value
    text = str(value or "").lower().rpartition(".")[2]
    return "" if text in ("none", "null", "unknown", "finish_reason_unspecified") else text


def is_cut_off(reason: str) -> bool | None:
    """Whether a completion with this finish reason is not whole; None where it is not known."""
    if _CUT_OFF.search(reason):
        return True
    return False if _WHOLE.search(reason) else None


@functools.lru_cache(maxsize=4096)
def _kind(name: str, verdict: str) -> str:
    """What a column or key of this name tells of a completion; "" for nothing."""
    leaf = plain(name.rpartition(".")[2])
    if name and name == verdict:
        return "right"
    if leaf == "status" and "." in name:
        return ""
    return next((kind for kind, names in _KINDS.items() if names.fullmatch(leaf)), "")


def _reason(name: str, value: Any) -> str:
    reason = finish(value) if isinstance(value, str | dict) else ""
    if name == "status" and not _STATUS.fullmatch(reason):
        return ""
    known = _KNOWN_WORDS.fullmatch(plain(name))
    # A sentence, as of when to stop, is no code.
    if len(reason.split()) > 4 and re.search("exit|terminat|condition", plain(name)):
        return ""
    return "" if not known and is_cut_off(reason) is None else reason


def _verdict(name: str, value: Any, kind: str) -> bool | None:
    if not isinstance(value, str | bool | int | float):
        return None
    # The last word of a judge's reasons: "They are the same.\nJudgement: Yes".
    head, colon, word = str(value).lower().rpartition(":")
    asked = re.split(r"[^\w -]", head.rstrip(" *"))[-1]
    if colon and not _RIGHT.fullmatch(plain(asked)):
        return None  # of something else: "The same. Any errors: No"
    word, nested = word.strip(" \n.*"), "." in name
    if kind == "boolean" and not nested and word not in ("true", "false", *_WORDS):
        return None  # a label may be a class
    if nested and isinstance(value, int | float) and not isinstance(value, bool):
        return None  # a count
    found = _WORDS.get(word, truth(word))
    return not found if found is not None and kind == "wrong" and not colon else found


def _telling(row: Row) -> list[tuple[str, str, Any]]:
    """(name, kind, value or list) of the columns that tell, looked for once a record."""
    if row.telling is None:
        kinds = ((name, _kind(name, row.fields.verdict), value) for name, value in row.leaves)
        row.telling = [(name, kind, listed(value)) for name, kind, value in kinds if kind]
        if len(row.telling) > _MOST:
            told = ", ".join(name for name, *_ in row.telling[:3])
            raise BadRecordError(f"more than {_MOST} columns tell of a completion: {told}, ...")
    return row.telling


def _tells(row: Row, trace: RawTrace, at: tuple[int, int]) -> Iterator[tuple[int, str, str, Any]]:
    """(turn, name, kind, value) of what tells of one completion: in its objects, in the record."""
    for turn, known in enumerate(trace.told):
        for name, value in leaves(known):
            if kind := _kind(name, ""):
                yield turn, name, kind, value
    for name, kind, value in _telling(row):
        if isinstance(given := value, list):
            if at[1] > 1 and len(given) != at[1] and "." not in name:
                raise BadRecordError(f"{name} has {len(given)} entries for {at[1]} completions")
            value = given[at[0]] if len(given) == at[1] else None
        yield -1, name, kind, value


def numbered(row: Row, name: str) -> dict[str, Any]:
    """What columns with a completion's number tell of it: correct_2 of response_2."""
    number = (re.findall(r"_?\d+$", name) or [""])[0]
    named = {n: n.removesuffix(number) for n in row.record if number and n.endswith(number)}
    own = {n: stem for n, stem in named.items() if n != name and _kind(stem, "")}
    row.used.update(own)
    return {stem: row.record[n] for n, stem in own.items()}


def _place_of(row: Row, text: str, index: int, count: int) -> tuple[int, int]:
    """(index, length) of the record's lists that tell of this completion."""
    if count > 1:
        return index, count
    for value in row.record.values():
        if isinstance(value, list) and len(value) > 1 and text in value:
            return value.index(text), len(value)
    return 0, 1


def judged(row: Row, trace: RawTrace, text: str, index: int, count: int) -> RawTrace:
    """With what the record tells of this completion: that it was cut off, that it is wrong."""
    if trace.failed:
        return trace
    reasons, others, sign, read = [trace.finish_reason], [""], "", set()
    verdicts: dict[int, dict[str, bool]] = {}  # of each turn of several; -1: of the whole
    for turn, name, kind, value in _tells(row, trace, _place_of(row, text, index, count)):
        if kind == "finish":
            found = _reason(name, value) or None
            stop = plain(name.rpartition(".")[2]).startswith("stopreason")
            (others if stop else reasons).append(found or "")
        elif kind == "rejected":  # of a pair, or by generate_traces, whose words these are
            found = False if value is True else _REJECTED.get(str(value))
            found = None if "chosen" in row.record else found
            if found:
                sign = sign or f"{name} is {value}"
            elif found is False:
                verdicts.setdefault(-1, {})[name] = False
        elif kind in ("complete", "cut"):
            found = truth(value)
            cut = found is (kind == "cut") and found is not None
            sign = sign or (f"{name} is {str(found).lower()}" if cut else "")
        elif (found := _verdict(name, value, kind)) is not None:
            verdicts.setdefault(turn if len(trace.told) > 1 else -1, {})[name] = found
        if found is not None:
            row.used.add(name)
            read.add(name)
    # Beside a finish_reason, a stop_reason may be the text that ended it (vLLM).
    given = list(filter(None, reasons)) or list(filter(None, others))
    return dataclasses.replace(
        trace,
        finish_reason=next(filter(is_cut_off, given), next(iter(given), "")),
        unfinished=sign,
        verdict=all(any(of.values()) for of in verdicts.values()) if verdicts else None,
        verdict_of=", ".join(dict.fromkeys(name for of in verdicts.values() for name in of)),
        extras=frozenset(e for e in trace.extras if e.partition("].")[2] not in read),
        told=(),
    )


def finished(trace: RawTrace) -> RawTrace:
    """With `unfinished` from all signs of it, in any supervised turn."""
    why = trace.unfinished
    for index in trace.supervised():
        message = trace.messages[index]
        if "tool_calls" not in message:  # a call is an answer
            why = why or unfinished(message["content"])
    cut = is_cut_off(trace.finish_reason) if trace.finish_reason else False
    if cut is None:
        raise BadRecordError(
            f"finish_reason is {trace.finish_reason[:60]!r}, and whether the completion ended by "
            "itself is not known; write stop where it did, length where it was cut off"
        )
    if cut:
        why = f"finish_reason is {trace.finish_reason}"
    return dataclasses.replace(trace, unfinished=why) if why != trace.unfinished else trace
