"""A teacher with another tokenizer: spans of its tokens and the student's that are the same text.

The conversation is encoded for the teacher with its own template, and supervised turns are matched
in order. In a turn both tokenisations are cut where both have a border between tokens:

    student  |The| ans|wer| is| 4|2|<end>|        spans  |The| answer| is| 42|<end>|
    teacher  |The| answer| i|s| |42|<eos>|

The tokens that end the turn are a span whatever their text. What one template writes inside a turn
and the other does not (an opened <think>) is certain to it: log p = 0 of such student tokens, and
such teacher tokens are read but not counted. Texts are equal byte by byte, but for the space that
SentencePiece puts before a first word, and for canonically equal characters (NFC, NFD).
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dcod_jax.data.chat import EMPTY_THINKING
from dcod_jax.data.conversation import recall
from dcod_jax.data.reasoning import of_channels, opening, split, without_marks
from dcod_jax.data.tokenizer import Tokenizer, added_tokens, adds_space, steps_of, token_bytes
from dcod_jax.data.turns import shared_prefix
from dcod_jax.errors import DcodError
from dcod_jax.types import Trace

FORMS = ("NFC", "NFD")  # of canonically equal texts
ONLY_TEXT = (
    "its distribution is over other tokens than the student's, so only the log-prob of the trace's "
    "text can be compared, which loss.divergence=nll with weights reads"
)


class Alignment(NamedTuple):
    """A trace in the teacher's tokens, and the span of each completion token of both sides."""

    teacher: Trace
    student_spans: Int[np.ndarray, " C"]
    teacher_spans: Int[np.ndarray, " N"]  # -1: of the template alone


def align(student: Tokenizer, teacher: Tokenizer, trace: Trace) -> Alignment:
    """Encode the student's trace for the teacher and match the two, or refuse it by name."""
    conversation = recall(student, trace)
    try:
        try:
            ids, mask = conversation.encode(teacher)
        except DcodError as error:  # whose mends are keys
            raise DcodError(str(error).replace("student.", "teacher.")) from error
        ours = _turns("student", student, trace.token_ids, trace.completion_mask)
        theirs = _turns("teacher", teacher, ids, mask)
        if not len(ours) == len(theirs) == len(conversation.supervised):
            raise DcodError(
                f"{len(ours)} supervised turns in the student's tokens and {len(theirs)} in the "
                f"teacher's, of {len(conversation.supervised)} messages"
            )
        spans: tuple[list[int], list[int]] = ([], [])
        for index, one, other in zip(conversation.supervised, ours, theirs, strict=True):
            found = _turn_spans(conversation.messages[index]["content"], one, other)
            first = max(spans[0], default=-1) + 1
            for side, numbers in zip(spans, found, strict=True):
                side += [number + first if number >= 0 else -1 for number in numbers]
    except DcodError as error:
        raise DcodError(f"trace {trace.id!r} for the teacher's tokenizer: {error}") from error
    return Alignment(Trace(trace.id, ids, mask), *map(np.asarray, spans))


def with_scores(trace: Trace, alignment: Alignment, logprobs: Float[np.ndarray, " N"]) -> Trace:
    """The trace with each span's log p (`logprobs` of its tokens) in equal shares of its tokens."""
    of_ours, of_theirs = alignment.student_spans, alignment.teacher_spans
    counted, sizes = of_theirs >= 0, np.bincount(of_ours)
    totals = np.bincount(
        of_theirs[counted], logprobs[counted].astype(np.float64), minlength=len(sizes)
    )
    shares = (totals / sizes)[of_ours].astype(np.float32)
    starts = np.diff(of_ours, prepend=-1) != 0
    return dataclasses.replace(trace, logprobs=shares, span_starts=None if starts.all() else starts)


def score_aligned(
    traces: Sequence[Trace],
    *,
    student: Tokenizer,
    teacher: Tokenizer,
    score: Callable[..., list[Trace]],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Trace]:
    """The traces with the log-probs of a teacher that `score`s its own token ids."""
    found = [align(student, teacher, trace) for trace in traces]
    own, theirs = (
        [t.token_ids.size for t in side] for side in (traces, [a.teacher for a in found])
    )
    share = sum(own) / max(sum(theirs), 1)
    scored = score(
        [one.teacher for one in found], on_tokens=lambda count: on_tokens(round(count * share))
    )
    return [
        with_scores(trace, one, np.asarray(other.logprobs))
        for trace, one, other in zip(traces, found, scored, strict=True)
    ]


# ---------------------------------------------------------------- one turn


class _Turn(NamedTuple):
    """The tokens of a supervised turn but for the one that ends it."""

    side: str
    tokenizer: Tokenizer
    ids: list[int]


class _Place(NamedTuple):
    """Where a turn's tokens write a text: bytes [start, stop) of all that they write."""

    turn: _Turn
    text: str  # in the form that the tokens have it in
    pieces: list[bytes]
    start: int
    stop: int


def _turns(side: str, tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[_Turn]:
    """The runs of supervised tokens."""
    borders = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [_Turn(side, tokenizer, ids[a : b - 1].tolist()) for a, b in borders.tolist()]


def _turn_spans(content: str, ours: _Turn, theirs: _Turn) -> tuple[list[int], list[int]]:
    """The span of each token of a turn, the one that ends it included; -1 as in Alignment."""
    one, other, to_ours = _places(content, ours, theirs)
    # What both templates write around the text belongs to it.
    wholes = [b"".join(place.pieces) for place in (one, other)]
    left = shared_prefix(wholes[0][: one.start][::-1], wholes[1][: other.start][::-1])
    right = shared_prefix(wholes[0][one.stop :], wholes[1][other.stop :])
    for place, whole in zip((one, other), wholes, strict=True):
        for rest in (whole[: place.start - left], whole[place.stop + right :]):
            _check_template(place.turn, rest.decode("utf-8", "replace"))

    def ends(place: _Place, to_ours: Float[np.ndarray, " P"]) -> tuple[np.ndarray, np.ndarray]:
        """(where each token ends in our text, -1 in front of it, 0 inside, 1 behind it)."""
        sizes = np.array([len(piece) for piece in place.pieces], int)  # none: an empty turn
        last = np.cumsum(sizes) - place.start
        first = last - sizes
        length = place.stop - place.start
        side = np.where((first < -left) & (last <= -left), -1, 0)
        side[(first >= length + right) & (last > length + right)] = 1
        inner = to_ours[np.clip(last, 0, length)] + np.clip(last, -left, 0)
        return inner + np.clip(last - length, 0, right), side

    mine, our_side = ends(one, np.arange(one.stop - one.start + 1.0))
    their, their_side = ends(other, to_ours)
    borders = np.intersect1d(mine[our_side == 0], their[their_side == 0])
    before, behind = (int((our_side == side).sum()) for side in (-1, 1))
    end = before + len(borders) + behind
    numbers = np.arange(len(mine))  # each token that only our template writes is alone
    numbers[our_side == 0] = before + np.searchsorted(borders, mine[our_side == 0])
    numbers[our_side == 1] = before + len(borders) + np.arange(behind)
    others = np.where(their_side == 0, before + np.searchsorted(borders, their), -1)
    return [*numbers.tolist(), end], [*others.tolist(), end]


def _check_template(turn: _Turn, text: str) -> None:
    """Refuse text that one side alone has in a turn, other than blanks and a mark of reasoning."""
    bare = "".join(text.split())
    if bare not in ("", EMPTY_THINKING) and opening(bare) != bare:
        raise DcodError(
            f"the {turn.side}'s template writes {text[:60]!r} in a turn, the other one does not; "
            "log-probs of the same text need templates that write it alike (student.chat_template, "
            "teacher.chat_template); tool calls differ between most"
        )


_Places = tuple[_Place, _Place, Float[np.ndarray, " P"]]  # with the place in ours of each byte


def _places(content: str, ours: _Turn, theirs: _Turn) -> _Places:
    """Where both write the content of the message, or what stands behind its opened reasoning."""
    text = content.strip()
    behind = [text.removeprefix(mark).strip()] if (mark := opening(text)) else []
    missing = ours
    for part in (text, *behind):
        forms = (part, *(unicodedata.normalize(form, part) for form in FORMS))
        if (mine := _place(ours, forms)) is None:
            continue
        if their := _place(theirs, (mine.text, *forms)):
            return mine, their, _positions(their.text, mine.text)
        missing = theirs
    if found := _apart(content, ours, theirs):
        return found
    written = b"".join(token_bytes(missing.tokenizer, missing.ids)).decode("utf-8", "replace")
    at = max(shared_prefix(written.lstrip(), text) - 10, 0)
    steps = (str(step["type"]) for step in steps_of(missing.tokenizer, "normalizer"))
    changes = ", ".join(steps) or "none"
    raise DcodError(
        f"the {missing.side}'s tokens write {written.lstrip()[at : at + 40]!r} for the text "
        f"{text[at : at + 40]!r}; a tokenizer that changes the text (its normalizer: "
        f"{changes}), or has no token for a part of it, has no log-probs of it"
    )


def _apart(content: str, ours: _Turn, theirs: _Turn) -> _Places | None:
    """Where both write reasoning and answer, each with its own marks around them.

    The marks that begin the reasoning are one span, and so are those between the two.
    """
    found: list[list[_Place]] = [[], []]
    parts = [part.strip() for part in of_channels(content) or split(content) if part.strip()]
    for index, part in enumerate(parts):
        forms = (part, *(unicodedata.normalize(form, part) for form in FORMS))
        for turn, places in zip((ours, theirs), found, strict=True):
            texts = (found[0][index].text, *forms) if turn is theirs else forms
            place = _place(turn, texts, first=index < len(parts) - 1)
            if place is None:
                return None
            places.append(place)
    joined = []
    for first, *rest in found:
        whole, last = b"".join(first.pieces), rest[-1] if rest else first
        between = whole[first.stop : last.start].decode("utf-8", "replace")
        if without_marks(between).strip() or last.start < first.start:
            return None
        joined.append(
            (first._replace(stop=last.stop), whole[: first.start].decode("utf-8", "replace"))
        )
    leads = {lead for _, lead in joined}
    marked = len(leads) > 1 and all(opening(lead) == lead.strip() != "" for lead in leads)
    one, other = (place._replace(start=0) if marked else place for place, _ in joined)
    places = np.full(other.stop - other.start + 1, np.nan)
    places[0] = 0
    for mine, their in zip(*found, strict=True):
        start = their.start - other.start
        inside = mine.start - one.start + _positions(their.text, mine.text)
        places[start : start + len(inside)] = inside
    before = np.maximum.accumulate(np.nan_to_num(places, nan=-1.0))
    return one, other, np.where(np.isnan(places), before + 0.5, places)


def _place(turn: _Turn, texts: Sequence[str], *, first: bool = False) -> _Place | None:
    """Of the first of the texts that the tokens write: its last place, or behind a first mark."""
    for text in texts:
        content = text.encode()
        pieces = _pieces(turn, content)
        whole = b"".join(pieces)
        lead = opening(whole.decode("utf-8", "replace")).encode()
        place = whole.find(content, whole.find(lead) + len(lead)) if first else whole.rfind(content)
        if place >= 0:
            return _Place(turn, text, pieces, place, place + len(content))
    return None


def _pieces(turn: _Turn, text: bytes) -> list[bytes]:
    """What each token writes, without the space that a tokenizer puts before a first word.

    One can be at the begin and behind added tokens, and is one more than the text has there.
    """
    pieces, at = token_bytes(turn.tokenizer, turn.ids), 0
    if adds_space(turn.tokenizer):
        added = added_tokens(turn.tokenizer)
        for i, before in enumerate([None, *turn.ids[:-1]][: len(pieces)]):
            if before is not None:
                if before not in added:
                    continue
                found, size = text.find(added[before].encode(), at), len(added[before].encode())
                at = found + size if found >= 0 else at
            if _spaces(b"".join(pieces[i:])) > _spaces(text[at:]):
                pieces[i] = pieces[i][1:]
    return pieces


def _spaces(text: bytes) -> int:
    """How many it begins with."""
    return len(text) - len(text.lstrip(b" "))


def _positions(theirs: str, ours: str) -> Float[np.ndarray, " P"]:
    """The place in our text of each byte of the equal theirs; a half where forms differ."""
    left, right = _characters(theirs)[::-1], _characters(ours)[::-1]
    places, at = [0.0], 0
    while left:
        one, other = left.pop(), right.pop()
        while one != other:
            x, y = (unicodedata.normalize("NFD", text) for text in (one, other))
            if x == y:
                break
            one += left.pop() if len(x) <= len(y) else ""
            other += right.pop() if len(y) <= len(x) else ""
        size = len(one.encode())
        places += [at + i if one == other else at + 0.5 for i in range(1, size)]
        at += len(other.encode())
        places.append(at)
    return np.asarray(places)


def _characters(text: str) -> list[str]:
    """Each character with the combining marks behind it."""
    found: list[str] = []
    for character in text:
        if found and unicodedata.combining(character):
            found[-1] += character
        else:
            found.append(character)
    return found
