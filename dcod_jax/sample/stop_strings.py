"""Stop strings: where the decoded text of a completion reaches one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dcod_jax.errors import DcodError


class StopStrings:
    """Looks for the first token with which the text contains a stop string."""

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str] | None):
        """decode: token ids to text, without special tokens. Raises DcodError if it is missing."""
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise DcodError(f"stop_strings={strings!r} must be a sequence of non-empty strings")
        if strings and decode is None:
            raise DcodError("stop_strings need decode, the function from token ids to text")
        self.strings, self.decode = tuple(strings), decode

    def __bool__(self) -> bool:
        return bool(self.strings)

    def cut(self, token_ids: Sequence[int], *, checked: int) -> tuple[int, str, bool]:
        """(tokens to keep, text, whether a stop string was reached); the first `checked` have none.

        The text ends in front of the stop string that begins first; without one it is whole.
        "a\\n\\nb" as 4 characters with ("\\n\\n",) -> (3, "a", True).
        """
        assert self.decode is not None
        whole = self.decode(token_ids)
        if self._find(whole) < 0:
            return len(token_ids), whole, False
        for count in range(checked + 1, len(token_ids) + 1):
            text = self.decode(token_ids[:count])
            place = self._find(text)
            if place >= 0:
                return count, text[:place], True
        return len(token_ids), whole[: self._find(whole)], True

    def _find(self, text: str) -> int:
        places = [place for place in map(text.find, self.strings) if place >= 0]
        return min(places, default=-1)
