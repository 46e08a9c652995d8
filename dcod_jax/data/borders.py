"""A text's tokens with borders at given characters, and how many it has where it is long."""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Sequence

from dcod_jax.data.tokenizer import Tokenizer, decode, library_errors
from dcod_jax.data.turns import shared_prefix, special_names, special_tokens
from dcod_jax.errors import DcodError


@functools.lru_cache(maxsize=1)
def _known(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The ids of texts that `encode_ahead` was given and nobody has asked for yet."""
    return {}


def encode_ahead(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encode what `encode_plain` will be asked for: together, it takes less time."""
    known, backend = _known(tokenizer), tokenizer.backend_tokenizer
    known.clear()
    with contextlib.suppress(ValueError), library_errors():  # told of the text that is asked for
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        known |= {text: encoding.ids for text, encoding in zip(texts, found, strict=True)}


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without those of the template or the tokenizer around it."""
    if (known := _known(tokenizer).pop(text, None)) is not None:
        return known
    try:
        with library_errors():
            return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except ValueError as error:
        raise DcodError(f"the tokenizer cannot encode {text[:60]!r}: {error}") from error


def _cuts(
    tokenizer: Tokenizer, text: str, borders: Sequence[int], whole: list[int]
) -> list[int | None]:
    """How many tokens of `whole` come before each border; None inside a token."""
    # Nothing merges with a special token: the text behind the last one tells.
    marks = list(special_tokens(tokenizer).finditer(text))
    ends, names = [mark.end() for mark in marks], special_names(tokenizer)
    places = [place for place, token in enumerate(whole) if token in names]
    known = [names[whole[place]] for place in places] == [mark[0] for mark in marks]
    found: list[int | None] = []
    for border in borders:
        last = bisect.bisect_right(ends, border) - 1
        if known and last >= 0:
            rest = encode_plain(tokenizer, text[ends[last] : border])
            start = places[last] + 1
            if whole[start : start + len(rest)] == rest:
                found.append(start + len(rest))
                continue
        prefix = encode_plain(tokenizer, text[:border])
        found.append(len(prefix) if whole[: len(prefix)] == prefix else None)
    return found


def encode_at(
    tokenizer: Tokenizer, text: str, borders: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of `text` with token borders at the given characters; and the token index of each.

    The whole text is encoded, and each prefix must be a prefix in tokens too. Where a token
    would cross a border (a completion that starts with a newline) the pieces are encoded alone,
    as sampling does; that must decode to the same text.
    """
    whole = encode_plain(tokenizer, text)
    found = _cuts(tokenizer, text, borders, whole)
    if len(cuts := [cut for cut in found if cut is not None]) == len(borders):
        return whole, cuts
    ids, cuts, last = [], [], 0
    for border in [*borders, len(text)]:
        ids += encode_plain(tokenizer, text[last:border])
        cuts.append(len(ids))
        last = border
    decoded = decode(tokenizer, ids)
    if decoded != text:
        place = shared_prefix(decoded, text)
        raise DcodError(
            "a token of this tokenizer crosses the border between prompt and completion, near "
            f"{text[max(0, place - 20) : place + 20]!r}; end the generation prompt of the "
            "template with a special token or a newline (student.chat_template)"
        )
    return ids, cuts[:-1]


def tokens_above(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> int:
    """A number of tokens above `limit` that the texts surely have; 0 where that is not sure.

    Long texts are counted in pieces, since tokenising takes some 400 bytes a character.
    """
    piece = 1 << 16
    if sum(map(len, texts)) <= piece + 16 * limit:
        return 0
    count = 0
    for text in texts:
        for start in range(0, len(text), piece):
            # A cut adds the few tokens of one word; far more are taken off.
            count += max(0, len(encode_plain(tokenizer, text[start : start + piece])) - 64)
            if count > limit:
                return count
    return 0
