"""The sampler: a fixed number of rows decode side by side, and a finished row takes a new prompt.

decoding.py compiles the steps; this file decides which prompt goes into which row, looks for stop
strings and returns the samples. docs/generation.md describes the whole.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dcod_jax.errors import DcodError
from dcod_jax.models.cached import check_length
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import batch_shards, put, sharding
from dcod_jax.sample import decoding
from dcod_jax.sample.decoding import DecodingParams, Request
from dcod_jax.sample.sampling import Settings, make_settings
from dcod_jax.types import Params

ROWS_PER_PREFILL = 8  # an eighth of the rows is filled at a time, as soon as it is free
SLOTS_STEP = 64  # a short cache has a multiple of it
STEPS_BETWEEN_CHECKS = 16  # decode steps between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation; the stop token is its last token when it finished."""

    token_ids: list[int]
    logprobs: list[float]  # log-probability of each token at temperature 1, nats
    finished: bool  # False: cut at max_new_tokens
    stop_reason: str | None = None  # "eos", "stop" (a stop string) or "length"
    text: str | None = None  # with stop strings: the text, cut in front of the one that was reached


def bucket_length(length: int, step: int = 32) -> int:
    """Padded length: multiples of `step` to 8 steps, then a quarter of the power of two below.

    33 -> 64, 257 -> 320, 1100 -> 1280: few distinct shapes to compile, at most 25 % padding.
    """
    while length > 8 * step:
        step *= 2
    return -(-length // step) * step


def decoding_params(
    config: ModelConfig,
    params: Params,
    *,
    valid_vocab: int,
    compute_dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> DecodingParams:
    """A copy of the parameters in the form that `sample` decodes with, in compute_dtype."""
    form = decoding.decoding_form(
        config, valid_vocab=valid_vocab, compute_dtype=compute_dtype, mesh=mesh
    )
    used = jax.tree.leaves(params)[0].devices() if mesh is None else set(mesh.devices.flat)
    placed = jax.device_put(params, *used) if len(used) == 1 else params
    return DecodingParams(form, decoding.cast_params(placed, form=form))


def sample(
    model: DecodingParams,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    eos_ids: Sequence[int],
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_strings: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> list[Sample]:
    """Continue every prompt; temperature 0 is greedy. Output in the order of the prompts.

    A completion ends with a stop id, with the token that completes one of stop_strings in
    decode(token_ids), or after max_new_tokens. As in vLLM, its text leaves the stop string out
    while token_ids and logprobs keep the tokens that spelled it.

    The randomness of a token follows from (seed, index of its sequence, step) alone and attention
    sees a row's own tokens only, so a sample does not depend on what else is decoded. `indices`
    names the sequences where their place in `prompts` does not. At most batch_size sequences are
    decoded at a time; on_batch(sequences, tokens) is called whenever some have finished. Raises
    DcodError for settings out of range, an empty prompt, or one that leaves no room for
    max_new_tokens in the model's positions.
    """
    settings = make_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise DcodError(f"{name}={value} must be at least 1")
    numbered = [f"prompt {i}" for i in range(len(prompts))]
    check_room(model.config, prompts, numbered, max_new_tokens=max_new_tokens)
    names = np.arange(len(prompts)) if indices is None else np.asarray(indices, np.int64)
    if len(names) != len(prompts):
        raise DcodError(f"{len(names)} indices for {len(prompts)} prompts")
    strings = StopStrings(stop_strings, decode)
    if not prompts:
        return []
    batch = _Batch(
        model,
        _request(model, seed, settings, eos_ids, max_new_tokens),
        rows=min(batch_size, 1 << (len(prompts) - 1).bit_length()),
        longest=max(map(len, prompts)),
        max_new_tokens=max_new_tokens,
    )
    samples: dict[int, Sample] = {}
    for finished in batch.run(prompts, (names & 0xFFFFFFFF).astype(np.uint32), strings):
        samples |= finished
        on_batch(len(finished), sum(len(s.token_ids) for s in finished.values()))
    return [samples[i] for i in range(len(prompts))]


def _request(
    model: DecodingParams,
    seed: int,
    settings: Settings,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Request:
    """The arguments that all sequences share, whole on every device."""
    ends = sorted(set(eos_ids))
    request = Request(
        key=jax.random.key(seed),
        settings=settings,
        # No token is -1; filled up, so that another number of stop ids compiles nothing new.
        stop_ids=np.array(ends + [-1] * (8 - len(ends) % 8), np.int32),
        max_new_tokens=np.int32(max_new_tokens),
    )
    mesh = model.form.mesh
    everywhere = None if mesh is None else sharding(mesh, ())
    return jax.tree.map(lambda x: put(x, everywhere), request)


def check_room(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    max_new_tokens: int,
    key: str = "max_new_tokens",
) -> None:
    """Refuse an empty prompt and one that leaves no room for max_new_tokens, by its name."""
    room = config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise DcodError(
            f"{key}={max_new_tokens} leaves no room for a prompt: the model has "
            f"max_position_embeddings={config.max_position_embeddings}; lower {key}"
        )
    for name, prompt in zip(names, prompts, strict=True):
        if not 0 < len(prompt) <= room:
            raise DcodError(
                f"{name} has {len(prompt)} tokens; expected 1 to {room} "
                f"(max_position_embeddings={config.max_position_embeddings} of the model less "
                f"{key}={max_new_tokens}); shorten the prompt or lower {key}"
            )


class _Batch:
    """The rows on the devices and which prompt each of them holds."""

    def __init__(
        self,
        model: DecodingParams,
        request: Request,
        *,
        rows: int,
        longest: int,
        max_new_tokens: int,
    ):
        self.params, self.form, self.request = model.params, model.form, request
        pieces = batch_shards(self.form.mesh)
        rows += -rows % pieces
        self.group = max(rows // ROWS_PER_PREFILL, 1)
        self.group += -self.group % pieces
        self.chunk = decoding.prefill_chunk(longest)
        check_length(self.form.config, longest + max_new_tokens)
        self.slots = bucket_length(longest + max_new_tokens, SLOTS_STEP)
        self.rows = decoding.empty_rows(
            jax.tree.leaves(self.params)[0],
            form=self.form,
            rows=rows,
            slots=self.slots,
            places=bucket_length(max_new_tokens),
        )
        self.members: list[int | None] = [None] * rows  # index of the prompt in each row
        self.checked = [0] * rows  # tokens of each row that were searched for stop strings
        self.stopped = np.zeros(rows, bool)  # rows that reached one since the last decode

    def run(
        self, prompts: Sequence[Sequence[int]], names: np.ndarray, stops: StopStrings
    ) -> Iterator[dict[int, Sample]]:
        """Yields {index of the prompt: Sample} of those that finished, until all have.

        Longest first: prompts prefilled together are of about one length, and longer questions
        tend to have longer answers, which should not be started last.
        """
        waiting = collections.deque(
            sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        )
        while waiting or any(member is not None for member in self.members):
            free = [row for row, member in enumerate(self.members) if member is None]
            while waiting and len(free) >= min(self.group, len(waiting)):
                rows, free = free[: self.group], free[self.group :]
                self._fill(rows[: len(waiting)], waiting, prompts, names)
            # Until the next group of rows is free; without a next one, until the last has finished.
            group = min(self.group, len(waiting))
            self.rows = decoding.decode(
                self.params,
                self.rows,
                self.stopped.copy(),
                self.request,
                most_steps=np.int32(STEPS_BETWEEN_CHECKS if stops else np.iinfo(np.int32).max),
                most_alive=np.int32(len(self.members) - group if waiting else 0),
                form=self.form,
            )
            finished = self._collect(stops)
            if finished:
                yield finished

    def _fill(
        self,
        rows: list[int],
        waiting: collections.deque[int],
        prompts: Sequence[Sequence[int]],
        names: np.ndarray,
    ) -> None:
        tokens = np.zeros((self.group, self.slots), np.int32)
        lengths = np.zeros(self.group, np.int32)
        places = np.full(self.group, len(self.members), np.int32)  # out of range: no prompt
        who = np.zeros(self.group, np.uint32)
        for slot, row in enumerate(rows):
            member = waiting.popleft()
            prompt = prompts[member]
            tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
            places[slot], who[slot] = row, names[member]
            self.members[row], self.checked[row], self.stopped[row] = member, 0, False
        self.rows = decoding.prefill(
            self.params,
            self.rows,
            tokens,
            lengths,
            places,
            who,
            self.request,
            chunk=self.chunk,
            form=self.form,
        )

    def _collect(self, stops: StopStrings) -> dict[int, Sample]:
        """The samples that are finished, whose rows are free now; marks rows to stop."""
        rows = self.rows
        alive, counts, drawn, logprobs = jax.device_get(
            (rows.alive, rows.counts, rows.drawn, rows.logprobs)
        )
        ends = set(np.asarray(self.request.stop_ids).tolist())
        finished: dict[int, Sample] = {}
        self.stopped[:] = False
        for row, member in enumerate(self.members):
            if member is None or (alive[row] and not stops):
                continue
            ids, text = drawn[row, : counts[row]].tolist(), None
            reason = "eos" if ids[-1] in ends else "length"
            if stops:
                count, text, reached = stops.cut(ids, checked=self.checked[row])
                self.checked[row], self.stopped[row] = len(ids), reached
                ids, reason = ids[:count], "stop" if reached else reason
            if self.stopped[row] or not alive[row]:
                scores = logprobs[row, : len(ids)].tolist()
                finished[member] = Sample(ids, scores, reason != "length", reason, text)
                self.members[row] = None
        return finished


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
