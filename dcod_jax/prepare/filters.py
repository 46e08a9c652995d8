"""What is kept of raw traces, and under which reason the rest is dropped.

A trace is dropped for the first of these that holds, counted and written to the quarantine:
bad_record (with prepare.on_bad_record=quarantine; otherwise it stops the run), failed_request,
truncated, no_reasoning (with prepare.reasoning=keep), wrong_answer, no_answer (with a reference
answer or the record's own verdict), held_out_prompt, duplicate, overlap, too_long. What could not
be tokenised for its length is too_long at once.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dcod_jax.data import chat
from dcod_jax.data.borders import encode_ahead, tokens_above
from dcod_jax.data.conversation import remember
from dcod_jax.data.kept import Kept
from dcod_jax.data.presets import fields_of
from dcod_jax.data.reasoning import has_reasoning
from dcod_jax.data.records import RawTrace
from dcod_jax.data.teachers import TEACHER, WEIGHT, teacher_entries, teacher_of_file
from dcod_jax.data.tokenizer import Tokenizer
from dcod_jax.data.traces import HINT, Source, read_traces
from dcod_jax.data.turns import Text, reasoning_rule, render_turns_ahead
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.grading import REJECTED_AS, Grade, graded
from dcod_jax.prepare import overlap
from dcod_jax.prepare.delivered import as_sampled, delivered_logprobs
from dcod_jax.types import Trace

MOST_NAMES = 10_000  # of columns, models or temperatures in a manifest
BLOCK, BLOCK_CHARACTERS = 64, 1 << 19  # most traces rendered together; about so many characters


@dataclasses.dataclass
class Counts:
    """Numbers of one split: every trace read is kept, or dropped for one reason."""

    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def manifest(self) -> dict[str, Any]:
        """The counts as the manifest has them."""
        read = self.kept + sum(self.dropped.values())
        return {"read": read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


class _Dropped(NamedTuple):
    """Why a trace is not kept."""

    detail: str
    reason: str = "bad_record"


_Graded = tuple[RawTrace, Grade | None]


def _blocks(items: Iterable[_Graded]) -> Iterator[list[_Graded]]:
    """Traces whose texts are rendered together."""
    block: list[_Graded] = []
    size = 0
    for trace, grade in items:
        block.append((trace, grade))
        size += sum(len(message["content"]) for message in trace.messages)
        if len(block) == BLOCK or size > BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


class Filter:
    """The filters with what they remember: keys seen, prompts held out, ids given."""

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        quarantine: io.TextIOBase,
        *,
        advance: Callable[[int], None],
    ):
        self.config, self.tokenizer, self.quarantine = config, tokenizer, quarantine
        self.advance = advance
        prepare = config.prepare
        self.fields = fields_of(prepare, reasoning_rule(tokenizer, prepare.reasoning))
        self.index = overlap.build_index(
            prepare.overlap_files, size=prepare.overlap_ngram, prompt_field=prepare.prompt_field
        )
        self.seen, self.ids = Kept(), Kept()  # keys of traces; how often an id came
        self.held_out: Kept | None = None  # prompts of data.eval_traces, once they are read
        self.counts = Counts()
        self.models: set[str] = set()
        self.entries = teacher_entries(config)
        self.teachers: set[str] = set()
        self.temperatures: set[float] = set()
        self.unused_logprobs = 0
        self.unread: collections.Counter[str] = collections.Counter()  # columns, by their traces

    def _drop(self, trace: RawTrace, detail: str, reason: str = "bad_record") -> None:
        self.counts.dropped[reason] += 1
        line = {"source": trace.source, "id": trace.id, "reason": reason, "detail": detail}
        line["record"] = trace.record
        self.quarantine.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def run(self, sources: Sequence[Source]) -> Iterator[tuple[RawTrace, Trace]]:
        """(RawTrace, Trace) of what is kept."""
        for block in _blocks(graded(self._to_grade(sources))):
            right = (trace for trace, grade in block if grade is None or grade.correct)
            render_turns_ahead(
                self.tokenizer, ((t.messages, t.supervised(), t.tools) for t in right)
            )
            found = [(trace, self._laid_out(trace, grade)) for trace, grade in block]
            texts = (laid[0] for _, laid in found if not isinstance(laid, _Dropped))
            encode_ahead(self.tokenizer, list(texts))
            for trace, laid in found:
                encoded = laid if isinstance(laid, _Dropped) else self._encode(trace, laid)
                if isinstance(encoded, _Dropped):
                    self._drop(trace, *encoded)
                else:
                    self.counts.kept += 1
                    yield trace, encoded

    def _laid_out(self, trace: RawTrace, grade: Grade | None) -> Text | _Dropped:
        """The trace's text with its supervised spans."""
        if grade is not None and not grade.correct:
            found = f"answer {grade.extracted!r} by rule {grade.rule}"
            return _Dropped(f"{found}, expected {trace.answer!r}", REJECTED_AS[grade.reason])
        if known := self._known(trace):
            return known
        try:
            return chat.lay_out(
                self.tokenizer,
                trace.messages,
                first_completion=trace.first_completion,
                unsupervised=trace.unsupervised,
                tools=trace.tools,
            )
        except DcodError as error:
            return self._bad(trace, error)

    def _bad(self, trace: RawTrace, error: DcodError) -> _Dropped:
        if self.config.prepare.on_bad_record == "error":
            raise DcodError(f"{trace.source}: {error}; {HINT}") from error
        return _Dropped(str(error))

    def _to_grade(self, sources: Sequence[Source]) -> Iterator[tuple[RawTrace, str, str | None]]:
        """(whole trace, completion, reference answer where it is graded)."""
        settings = self.config.prepare
        on_bad = self._drop if settings.on_bad_record == "quarantine" else None
        limit = self.config.data.max_length
        longest = settings.record_bytes or max(1 << 20, 4096 * limit)
        options: Any = {"on_bad": on_bad, "on_drop": self._drop, "on_record": self.advance}
        for trace in read_traces(sources, self.fields, longest=longest, **options):
            known = len(self.unread) < MOST_NAMES
            self.unread.update(n if known or n in self.unread else "others" for n in trace.extras)
            text = trace.completion_text()
            whole = [message["content"] for message in trace.messages]
            if trace.unfinished:
                self._drop(trace, f"{trace.unfinished}: it would teach a false end", "truncated")
            elif settings.reasoning == "keep" and not has_reasoning(text):
                self._drop(trace, "prepare.reasoning=keep, and it has none", "no_reasoning")
            elif count := tokens_above(self.tokenizer, whole, limit):
                self._drop(trace, f"over {count:,} tokens, data.max_length={limit}", "too_long")
            elif settings.filter_correct and trace.verdict is False:
                self._drop(
                    trace, f"the record's own verdict is false: {trace.verdict_of}", "wrong_answer"
                )
            else:
                yield trace, text, trace.answer if settings.filter_correct else None

    def _known(self, trace: RawTrace) -> _Dropped | None:
        """Why not, where this text is held out, came before or is in an evaluation set."""
        if self.held_out is not None and overlap.prompt_key(trace) in self.held_out:
            return _Dropped("the prompt is in data.eval_traces", "held_out_prompt")
        again = _Dropped("an earlier trace has this prompt and completion", "duplicate")
        found, once = self.index.find(trace), self.config.prepare.deduplicate
        key = overlap.trace_key(trace) if once else b""
        if found:
            return again if once and key in self.seen else _Dropped(found, "overlap")
        return again if once and not self.seen.add(key) else None

    def _encode(self, trace: RawTrace, laid: Text) -> Trace | _Dropped:
        """The tokenised trace."""
        limit, logprobs = self.config.data.max_length, None
        try:
            ids, mask = chat.encode_laid(self.tokenizer, laid)
            if self.config.prepare.logprobs == "require":
                ids, mask = as_sampled(self.tokenizer, trace, ids, mask)
            if len(ids) > limit:
                return _Dropped(f"{len(ids)} tokens, data.max_length={limit}", "too_long")
            if self.config.prepare.logprobs == "require":
                logprobs = delivered_logprobs(self.tokenizer, trace, ids[mask])
        except DcodError as error:
            return self._bad(trace, error)
        self.unused_logprobs += trace.logprobs is not None and logprobs is None
        self.models |= {trace.model} - {""}
        if trace.temperature is not None:
            self.temperatures.add(trace.temperature)
        if max(len(self.models), len(self.temperatures)) > MOST_NAMES:
            raise DcodError(
                f"{trace.source}: more than {MOST_NAMES:,} different models or temperatures, which "
                "the manifest would name; take the column out"
            )
        name = trace.id
        if not self.ids.add(name):
            self.ids[name] = again = self.ids.get(name) + 1
            name = f"{name}#{again}"
        meta: dict[str, Any] = {"source": trace.source}
        teacher = trace.teacher or teacher_of_file(self.entries, trace.source)
        for key, value in (("answer", trace.answer), (TEACHER, teacher)):
            meta |= {key: value} if value else {}
        meta |= {} if trace.weight is None else {WEIGHT: trace.weight}
        meta |= remember(self.tokenizer, trace, ids.tolist())
        self.teachers |= {teacher} - {""}
        return Trace(name, ids, mask, logprobs=logprobs, meta=meta)

    def provenance(self) -> dict[str, Any]:
        """Manifest fields: who sampled the traces, as they say, and what became of log-probs."""
        teacher, policy = self.config.teacher, self.config.prepare.logprobs
        models = sorted(self.models)
        fields: dict[str, Any] = {
            "sampled_by": {"models": models, "temperatures": sorted(self.temperatures)},
            "unread_columns": dict(sorted(self.unread.items())),
            "teachers": sorted(self.teachers),
            "weighted": bool(self.fields.weight),
            "delivered_logprobs": {"policy": policy, "traces_ignored": self.unused_logprobs},
        }
        if policy == "require":
            fields["teacher"] = {
                "name": teacher.name or ", ".join(models) or "the source of the traces",
                "revision": teacher.revision,
                "weights": "unknown: log-probs were delivered with the traces",
            }
        return fields
