"""Where a completion is cut at a stop string."""

import pytest

from dcod_jax.errors import DcodError
from dcod_jax.sample.sampler import StopStrings

PIECES = ["", "a", "b", "ab", "\n", "\n\n", "Q:", " x\nQ", ":", "\ufffd", "é"]


def decode(ids):
    """Pieces side by side; id 9 alone is half a character, with another 9 behind it an é."""
    return "".join(PIECES[i] for i in ids).replace("\ufffd\ufffd", "é")


def stops(*strings):
    return StopStrings(strings, decode)


@pytest.mark.parametrize(
    ("strings", "ids", "expected"),
    [
        (("Q:",), [1, 2, 6, 1], (3, "ab", True)),
        (("Q:",), [1, 7, 8, 1, 1], (3, "a x\n", True)),  # begins inside a piece, ends in the next
        (("\n\n",), [1, 4, 2, 4, 4, 5], (5, "a\nb", True)),
        (("\n\n",), [1, 4, 2], (3, "a\nb", False)),
        (("b", "ab"), [3, 1], (1, "", True)),  # the one that begins first
        (("é",), [1, 9, 9, 1], (3, "a", True)),
        (("b",), [], (0, "", False)),
    ],
)
def test_cut(strings, ids, expected):
    assert stops(*strings).cut(ids, checked=0) == expected


def test_cutting_in_parts_gives_the_same_as_at_once():
    ids = [1, 4, 2, 7, 8, 1]
    searcher = stops("Q:", "zzz")
    whole = searcher.cut(ids, checked=0)
    assert whole == (5, "a\nb x\n", True)
    for first in range(5):
        assert searcher.cut(ids[:first], checked=0)[2] is False
        assert searcher.cut(ids, checked=first) == whole


@pytest.mark.parametrize(
    ("strings", "decoder", "message"),
    [
        ("Q:", decode, "must be a sequence of non-empty strings"),
        (("Q:", ""), decode, "non-empty"),
        (("Q:",), None, "need decode"),
    ],
)
def test_wrong_stop_strings_are_refused(strings, decoder, message):
    with pytest.raises(DcodError, match=message):
        StopStrings(strings, decoder)
    assert not StopStrings((), None)
