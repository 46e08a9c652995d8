"""The types of what the forms read, checked over a whole record before anything reads it.

A shape is a type, a tuple of shapes (one of them), [shape] for a list, {name: shape} for an object
with other names free, or a function. null fits every shape: it is an absent value.
"""

from __future__ import annotations

from decimal import Decimal  # of a table
from typing import Any

from dcod_jax.data.records import BadRecordError, kind_of

_NAMES = {str: "a string", dict: "an object", int: "an integer", float: "a number"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> str:
    """What is expected where the value is no finite number, else ""."""
    return "" if _is_number(value) and -1e300 < value < 1e300 else "a finite number"


def _logprob(value: Any) -> str:  # NaN and infinity are named where log-probs are used
    known = _is_number(value) and not (_is_integer(value) and abs(value) > 2**53)
    return "" if known else "a number"


def _token_id(value: Any) -> str:
    return "" if _is_integer(value) and 0 <= value < 2**31 else "a token id"


def _byte(value: Any) -> str:
    return "" if _is_integer(value) and 0 <= value < 256 else "a byte, 0 to 255"


_FINISH = (str, {"type": str})
_TOKEN = {"token": str, "logprob": _logprob, "bytes": [_byte]}
_MESSAGE = {"role": str}
_LOGPROBS = {"content": [_TOKEN], "token_logprobs": [_logprob], "tokens": [str]}
_CHOICE = {
    "message": _MESSAGE,
    "finish_reason": _FINISH,
    "logprobs": _LOGPROBS,
    "token_ids": [_token_id],
}
ASKED = {"messages": [dict], "temperature": number}
# The answer of an API in any dialect; SAMPLE: one of several completions with what is beside it.
ANSWER = {
    "choices": [_CHOICE],
    "candidates": [
        {
            "content": {"parts": [dict], "role": str},
            "finishReason": _FINISH,
            "finish_reason": _FINISH,
        }
    ],
    "message": (str, _MESSAGE),
    "content": (str, [dict]),
    "incomplete_details": {"reason": str},
    "stop_reason": _FINISH,
    "done_reason": _FINISH,
}
_BESIDE = ([object], _LOGPROBS)
SAMPLE = {"finish_reason": _FINISH, "token_ids": [_token_id], "logprobs": _BESIDE}
_OUTPUT = {"text": str, "token_ids": [_token_id], "finish_reason": _FINISH, "logprobs": [object]}
_SGLANG = {"finish_reason": _FINISH, "output_token_logprobs": [[object]]}
RESPONSE = {"status_code": int, "body": dict}
RECORD = {
    "response": (str, [object], RESPONSE),
    "request": (str, {"body": ASKED, "params": ASKED, **ASKED}),
    "choices": ([_CHOICE], [str], str, {}),  # of a question, too
    "outputs": (str, [_OUTPUT], [str]),
    "output_ids": [_token_id],
    "meta_info": (str, _SGLANG),
    "temperature": (str, number),
    "token_ids": [_token_id],
    "logprobs": _BESIDE,
    "finish_reason": (_FINISH, [object]),
}


def check(value: Any, shape: Any, name: str = "") -> None:
    """Raises BadRecordError that names the first place where the value has not its shape."""
    if value is None or shape is object:
        return
    if isinstance(shape, tuple):
        _check_one_of(value, shape, name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise BadRecordError(f"{name} must be a list, found {kind_of(value)}")
        for index, item in enumerate(value):
            check(item, shape[0], f"{name}[{index}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise BadRecordError(
                f"{name or 'the record'} must be an object, found {kind_of(value)}"
            )
        for key, inner in shape.items():
            if key in value:
                check(value[key], inner, f"{name}.{key}" if name else key)
    elif isinstance(shape, type):
        if not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
            raise BadRecordError(f"{name} must be {_NAMES[shape]}, found {kind_of(value)}")
    elif expected := shape(value):
        raise BadRecordError(f"{name} must be {expected}, found {str(value)[:30]!r}")


def _check_one_of(value: Any, shapes: tuple[Any, ...], name: str) -> None:
    """The error of the shape that has the value's outer type, where there is one."""
    errors = []
    for shape in shapes:
        try:
            check(value, shape, name)
        except BadRecordError as error:
            rank = 2 if _outer(shape) is type(value) else callable(shape) and shape is not str
            errors.append((rank, error))  # a function says more of a number than "a string"
        else:
            return
    raise max(errors, key=lambda found: found[0])[1]


def _outer(shape: Any) -> Any:
    return type(shape) if isinstance(shape, list | dict) else shape
