"""How servers are asked for the log-probs of a prompt, and what their answers must be.

A dialect is one entry of DIALECTS: the request for a trace, and where the answer says what. An
answer is somebody else's data: its form, ids, texts and numbers are checked (`scored`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from dcod_jax.data.tokenizer import Tokenizer, decode, token_bytes
from dcod_jax.errors import DcodError
from dcod_jax.score.scoring import TAIL_FLOOR
from dcod_jax.types import Trace

Body: TypeAlias = dict[str, Any]
_IMPOSSIBLE = -1000.0  # servers write -inf, which JSON has not, as a number below this
_LEAST_TAIL = math.log(2.0**-24)  # of 1 minus a sum of float32 probabilities


class Candidate(NamedTuple):
    """A token at one position, and what the server says of it."""

    token_id: int
    logprob: Any
    text: Any


class Position(NamedTuple):
    """What the server says at a completion token."""

    own: Candidate
    top: list[Candidate]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A trace, and how it is scored."""

    trace: Trace
    places: list[int]  # of its completion tokens
    top_k: int
    model: str
    tokenizer: Tokenizer

    @property
    def ids(self) -> list[int]:
        """The trace's token ids as a list."""
        return self.trace.token_ids.tolist()


# ---------------------------------------------------------------- dialects


def _vllm_bodies(asked: Asked) -> list[Body]:
    # What is sampled behind the prompt is not read; the settings keep an older server, whose
    # prompt log-probs follow them, at the model's own distribution.
    body = {"model": asked.model, "prompt": asked.ids, "max_tokens": 1, "temperature": 1.0}
    body |= {"top_p": 1.0, "repetition_penalty": 1.0, "prompt_logprobs": max(asked.top_k, 1)}
    return [body]


def _vllm_read(answers: Sequence[Any], asked: Asked) -> list[Position]:
    """prompt_logprobs: null, then for each token {id: {logprob, rank, decoded_token}}."""
    entries = answers[0]["choices"][0]["prompt_logprobs"]
    _length(entries, len(asked.ids), "prompt_logprobs")
    found = []
    for place in asked.places:
        if entries[place] is None:
            raise DcodError(
                f"prompt_logprobs[{place}] is null, as from an older vLLM that reads a prompt's "
                "begin from its cache; start it with --no-enable-prefix-caching"
            )
        given = {
            (own := _id(key)): Candidate(own, value["logprob"], value.get("decoded_token"))
            for key, value in entries[place].items()
        }
        own = asked.ids[place]
        if own not in given:
            raise DcodError(f"prompt_logprobs[{place}] does not have the trace's token {own}")
        found.append(Position(given[own], list(given.values())))
    return found


def _id(key: str) -> int:
    """The id of a key; ValueError for "01" or " 1", beside which "1" may stand."""
    if str(token_id := int(key)) != key:
        raise ValueError(f"no token id: {key!r}")
    return token_id


def _sglang_bodies(asked: Asked) -> list[Body]:
    body = {
        "input_ids": asked.ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0},
        "return_logprob": True,
        "logprob_start_len": asked.places[0] - 1,  # the first one it speaks of is null
        "top_logprobs_num": asked.top_k,
        "return_text_in_logprobs": True,
    }
    return [body]


def _sglang_read(answers: Sequence[Any], asked: Asked) -> list[Position]:
    """meta_info.input_token_logprobs and input_top_logprobs: [log-prob, id, text]."""
    about, first = answers[0]["meta_info"], asked.places[0] - 1
    _length(about["input_token_logprobs"], len(asked.ids) - first, "input_token_logprobs")
    tops = about["input_top_logprobs"] if asked.top_k else about["input_token_logprobs"]
    _length(tops, len(asked.ids) - first, "input_top_logprobs")
    found = []
    for place in asked.places:
        own = _listed(about["input_token_logprobs"][place - first])
        if own.token_id != asked.ids[place]:
            raise DcodError(
                f"token {place} of the trace is {asked.ids[place]}, the server has {own.token_id}"
            )
        top = [_listed(entry) for entry in tops[place - first]] if asked.top_k else []
        found.append(Position(own, top))
    return found


def _listed(entry: Any) -> Candidate:
    logprob, token_id, text = entry
    return Candidate(token_id, logprob, text)


def _llama_cpp_bodies(asked: Asked) -> list[Body]:
    text = decode(asked.tokenizer, asked.ids)  # it takes no ids
    body = {"model": asked.model, "prompt": text, "max_tokens": 1, "temperature": 0.0}
    return [body | {"echo": True, "logprobs": 1}]


def _llama_cpp_read(answers: Sequence[Any], asked: Asked) -> list[Position]:
    """logprobs.tokens (texts, without those of bos tokens), token_logprobs and top_logprobs.

    llama-cpp-python gives a text that does not begin with bos the log-probs of the position before.
    The greedy token behind the text tells: it must be the most probable one at its own position.
    """
    [answer] = answers
    count, given = answer["usage"]["prompt_tokens"], answer["choices"][0]["logprobs"]
    texts, bos = given["tokens"], asked.tokenizer.bos_token_id
    kept = [place for place, token_id in enumerate(asked.ids) if token_id != bos]
    for place, text in zip(kept, texts, strict=False):
        _check_candidate(asked, Candidate(asked.ids[place], None, text), place)
    sampled = len(texts) - len(kept)
    if count != len(asked.ids) or sampled not in (0, 1):
        raise DcodError(
            f"it splits the text into {count} tokens, the trace has {len(asked.ids)}: another "
            "tokenizer, or a bos token that it puts before the text"
        )
    _length(given["token_logprobs"], len(texts), "token_logprobs")
    _length(given["top_logprobs"], len(texts), "top_logprobs")
    if asked.ids[0] != bos or sampled:
        greedy = given["token_logprobs"][-1] if sampled else -math.inf
        if not greedy >= max(given["top_logprobs"][-1].values()):  # of NaN neither holds
            raise DcodError(
                "its log-probs are of the position before: the greedy token behind the text is not "
                "the most probable one there. llama-cpp-python does this for texts that do not "
                "begin with the tokenizer's bos token"
            )
    found = [
        Position(Candidate(asked.ids[place], given["token_logprobs"][at], texts[at]), [])
        for at, place in enumerate(kept)
        if asked.trace.completion_mask[place]
    ]
    if len(found) != len(asked.places):
        raise DcodError("the completion holds the bos token, which it gives no log-prob")
    return found


def _llama_server_bodies(asked: Asked) -> Iterator[Body]:
    """One request for each completion token: the server tells of tokens that it samples alone.

    A bias makes it sample the trace's token; the log-probs are of the logits without the bias. Of
    a token that ends inside a character it tells nothing: there it samples the one that ends the
    trace, and tells of the whole vocabulary.
    """
    ids = asked.ids
    for place in asked.places:
        inside = _ends_inside_character(asked.tokenizer, ids[place])
        yield {
            "prompt": ids[:place],
            "n_predict": 1,
            "n_probs": len(asked.tokenizer) if inside else max(asked.top_k, 1),
            "logit_bias": [[ids[asked.places[-1]] if inside else ids[place], 1e4]],
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": False,
            "cache_prompt": True,  # the tokens before are read once
            "response_fields": ["completion_probabilities", "tokens_evaluated"],
        }


def _llama_server_read(answers: Sequence[Any], asked: Asked) -> list[Position]:
    """completion_probabilities[0] of each: id, token, logprob, and top_logprobs of that form."""
    found = []
    for place, answer in zip(asked.places, answers, strict=True):
        if (read := answer["tokens_evaluated"]) != place:
            raise DcodError(f"it read {read} of the {place} tokens before token {place}")
        [sampled] = answer["completion_probabilities"]
        said = [sampled, *sampled["top_logprobs"]]
        given = [Candidate(one["id"], one["logprob"], one["token"]) for one in said]
        own = [one for one in given if one.token_id == asked.ids[place]]
        if not own:
            raise DcodError(f"it has no log-prob of the token {asked.ids[place]} at {place}")
        if any(one.logprob != one.logprob for one in given):  # NaN, which no order has
            raise DcodError(f"the log-probability of a token at {place} is nan")
        top = sorted(given[1:], key=lambda one: -one.logprob)[: asked.top_k]
        found.append(Position(own[0], top))  # of a whole vocabulary the last have no probability
    return found


def _ends_inside_character(tokenizer: Tokenizer, token_id: int) -> bool:
    [piece] = token_bytes(tokenizer, [token_id])
    last = re.search(rb"[\xc0-\xff][\x80-\xbf]*$", piece)  # its first byte tells its length
    return last is not None and len(last[0]) < 2 + (last[0] >= b"\xe0") + (last[0] >= b"\xf0")


class Dialect(NamedTuple):
    """How a kind of server is asked, and its answers read."""

    path: str  # of the requests, below the server's URL
    about: str  # where the server tells of itself; empty: nowhere
    told: tuple[str, ...]  # what of that belongs to the model's identity; empty: all
    bodies: Callable[[Asked], Iterable[Body]]  # the requests of a trace
    read: Callable[[Sequence[Any], Asked], list[Position]]


DIALECTS = {
    "vllm": Dialect("/v1/completions", "/version", (), _vllm_bodies, _vllm_read),
    "sglang": Dialect("/generate", "/get_model_info", (), _sglang_bodies, _sglang_read),
    "llama_cpp": Dialect("/v1/completions", "", (), _llama_cpp_bodies, _llama_cpp_read),
    "llama_server": Dialect(
        "/completion",
        "/props",
        ("model_path", "model_ftype", "build_info"),
        _llama_server_bodies,
        _llama_server_read,
    ),
}


# ---------------------------------------------------------------- what an answer must be


def _length(values: Any, count: int, name: str) -> None:
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
        raise DcodError(f"{name} must be a list of {count} entries, found {found}")


def _number(value: Any, place: int) -> float:
    """A log-probability; what rounding left just above 0 becomes 0."""
    plain, shown = type(value) in (int, float), str(value)[:40]
    if not plain or not -math.inf < value <= 1e-3:
        raise DcodError(
            f"the log-probability at token {place} is {shown}; expected a finite number <= 0"
        )
    if value <= _IMPOSSIBLE:
        raise DcodError(f"it gives token {place} the probability 0 (log-probability {shown})")
    return min(float(value), 0.0)


@functools.lru_cache(maxsize=1 << 18)
def _same_text(tokenizer: Tokenizer, token_id: int, text: str) -> bool:
    """Whether a server's text of a token is ours; parts of a character cannot be compared."""
    ours = decode(tokenizer, [token_id])
    raw = str(tokenizer.convert_ids_to_tokens(token_id))
    if "\ufffd" in ours or "\ufffd" in text:
        return len(text) <= 64 + len(raw)  # each text is kept
    if not text and token_id in tokenizer.added_tokens_decoder:  # llama.cpp shows none
        return True
    if text == f"token_id:{token_id}":  # vLLM's --return-tokens-as-token-ids
        return True
    return text == raw or ours.strip() == text.replace("\u2581", " ").strip()


def _check_candidate(asked: Asked, candidate: Candidate, place: int) -> None:
    token_id, text, valid = candidate.token_id, candidate.text, len(asked.tokenizer)
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < valid:
        raise DcodError(
            f"a token at {place} has the id {str(token_id)[:40]}, our tokenizer has {valid}"
        )
    if text is not None and not (
        isinstance(text, str) and _same_text(asked.tokenizer, token_id, text)
    ):
        raise DcodError(
            f"it has another tokenizer: the first difference is at token {place}, where id "
            f"{token_id} is {str(text)[:40]!r} there and {decode(asked.tokenizer, [token_id])!r} "
            "in ours"
        )


def scored(asked: Asked, positions: Sequence[Position]) -> Trace:
    """The trace with the server's log-probs, of which every one is checked."""
    k, rows = asked.top_k, []
    for place, position in zip(asked.places, positions, strict=True):
        _check_candidate(asked, position.own, place)
        own, top = _number(position.own.logprob, place), []
        if k:
            for candidate in position.top:
                _check_candidate(asked, candidate, place)
                top.append((-_number(candidate.logprob, place), candidate.token_id))
            if len({token_id for _, token_id in top}) != len(top) or len(top) < k:
                raise DcodError(
                    f"{len(top)} top tokens at token {place}; score.top_k={k} asks for {k} "
                    "different ones (vLLM: start it with --max-logprobs)"
                )
        rows.append((own, sorted(top)[:k]))
    logprobs = np.array([own for own, _ in rows], np.float32)
    if not k:
        return dataclasses.replace(asked.trace, logprobs=logprobs)
    values = -np.array([[value for value, _ in top] for _, top in rows])
    mass = np.exp(values).sum(-1)
    if mass.max() > 1 + 1e-3:
        place = asked.places[int(mass.argmax())]
        raise DcodError(f"the top-{k} probabilities at token {place} add up to {mass.max():.4f}")
    tail = np.log(np.maximum(1 - mass, math.exp(_LEAST_TAIL)))
    return dataclasses.replace(
        asked.trace,
        logprobs=logprobs,
        topk_ids=np.array([[token_id for _, token_id in top] for _, top in rows], np.int32),
        topk_logprobs=values.astype(ml_dtypes.bfloat16),
        tail_logprobs=np.where(k == len(asked.tokenizer), TAIL_FLOOR, tail).astype(np.float32),
    )
