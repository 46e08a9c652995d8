"""Log-probs that came with a trace, accepted only where they are of exactly our tokens.

A record delivers the completion's tokens as sampled, the end-of-turn token included (vLLM sends
it): one id (or one token text) and one log-prob each. They must equal the supervised tokens of the
trace one by one, and every value must be a finite number not above 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dcod_jax.data.records import RawTrace
from dcod_jax.data.tokenizer import Tokenizer, decode, is_byte_level, token_bytes
from dcod_jax.errors import DcodError

_OTHERWISE = (
    "set prepare.logprobs=ignore and let the score verb compute them, or deliver the sampled ids"
)


def _check_texts(tokenizer: Tokenizer, ours: list[int], texts: list[bytes]) -> None:
    names = [text.decode("utf-8", "replace") for text in texts]
    if all(name.startswith("token_id:") for name in names):  # vLLM return_tokens_as_token_ids
        _check_ids(tokenizer, ours, [int(name.removeprefix("token_id:")) for name in names])
        return
    if not is_byte_level(tokenizer):
        raise DcodError(
            "the record gives token texts, which cannot be compared for a tokenizer that is not "
            f"byte-level; deliver token_ids (vLLM: return_tokens_as_token_ids), or {_OTHERWISE}"
        )
    written = token_bytes(tokenizer, ours)
    for position, (expected, text) in enumerate(zip(written, texts, strict=True)):
        if expected != text:
            raise DcodError(
                f"token {position} of the completion is {expected!r} in our tokenisation, the "
                f"record says {text!r}: another tokenizer, or sampled otherwise; {_OTHERWISE}"
            )


def _check_ids(tokenizer: Tokenizer, ours: list[int], theirs: list[Any]) -> None:
    for position, (token, given) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(given, bool) or not isinstance(given, int):
            raise DcodError(f"token_ids[{position}] is {given!r}; expected an integer")
        if token != given:
            text = tokenizer.convert_ids_to_tokens(token)
            other = tokenizer.convert_ids_to_tokens(given) if 0 <= given < len(tokenizer) else None
            raise DcodError(
                f"token_ids[{position}] is {given} ({other!r}), our tokenisation of the completion "
                f"has {token} ({text!r}): another tokenizer or template, or sampled in another "
                f"split; {_OTHERWISE}"
            )


def as_sampled(
    tokenizer: Tokenizer, trace: RawTrace, ids: Int[np.ndarray, " n"], mask: Bool[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """(ids, mask) with the completion's ids as they were sampled, where they spell the same text.

    A teacher may sample a text in other tokens than the tokenizer gives it, and its log-probs are
    of those.
    """
    given = trace.token_ids
    first, last = int(mask.argmax()), len(mask) - int(mask[::-1].argmax())
    if not given or not mask[first:last].all() or not all(_is_id(tokenizer, id) for id in given):
        return ids, mask
    ours = ids[first:last].tolist()
    if given == ours or decode(tokenizer, given) != decode(tokenizer, ours):
        return ids, mask
    whole = np.concatenate([ids[:first], np.asarray(given, np.int32), ids[last:]])
    supervised = np.zeros(len(whole), bool)
    supervised[first : first + len(given)] = True
    return whole, supervised


def _is_id(tokenizer: Tokenizer, value: Any) -> bool:
    plain = isinstance(value, int) and not isinstance(value, bool)
    return plain and 0 <= value < len(tokenizer)


def delivered_logprobs(
    tokenizer: Tokenizer, trace: RawTrace, completion_ids: Int[np.ndarray, " C"]
) -> Float[np.ndarray, " C"]:
    """The trace's own log-probs as float32, one for each supervised token.

    Raises DcodError (without file and line) that names the first offending position.
    """
    if trace.logprobs is None:
        raise DcodError("no logprobs, and prepare.logprobs=require asks for them")
    if len(trace.supervised()) > 1:
        raise DcodError(
            "log-probs cover one completion, but several assistant messages are supervised; give "
            "the earlier ones as the prompt and the last one as the completion"
        )
    ours, texts = completion_ids.tolist(), trace.token_bytes or None
    given = {"logprobs": trace.logprobs, "token_ids": trace.token_ids, "token texts": texts}
    for what, values in given.items():
        if values is not None and len(values) != len(ours):
            raise DcodError(_wrong_count(tokenizer, ours, len(values), what))
    if trace.token_ids is not None:
        _check_ids(tokenizer, ours, trace.token_ids)
    elif texts is not None:
        _check_texts(tokenizer, ours, texts)
    else:
        raise DcodError(
            "logprobs without token_ids cannot be matched with the tokens; add token_ids, or "
            "set prepare.logprobs=ignore"
        )
    for position, value in enumerate(trace.logprobs):
        name = f"logprobs[{position}] is"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DcodError(f"{name} {value!r}; expected a number")
        if value != value:
            raise DcodError(f"{name} NaN")
        if not -1e300 < value < 1e300:
            raise DcodError(f"{name} {value}; a sampled token has a finite log-prob")
        if value > 1e-4:  # less is a float32 softmax rounded
            raise DcodError(f"{name} {value}, above 0: not a log-probability")
    return np.minimum(np.asarray(trace.logprobs, np.float32), 0)


def _wrong_count(tokenizer: Tokenizer, ours: list[int], count: int, what: str) -> str:
    message = f"{count} {what} for the {len(ours)} tokens of the completion"
    if count == len(ours) - 1:
        end = tokenizer.convert_ids_to_tokens(ours[-1])
        message += (
            f"; the last of ours is the end-of-turn token {end!r}: it needs a log-prob too, and "
            "a trace that was cut off must say finish_reason=length"
        )
    return f"{message}; {_OTHERWISE}"
