"""Two tokenisations of one text: spans of equal bytes, and the sums of their log-probs."""

import functools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_tokenizers import CHATML, TURNS, byte_level, chain, sentencepiece
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from dcod_jax.data import chat
from dcod_jax.data.conversation import FIELDS, recall, remember
from dcod_jax.data.records import RawTrace
from dcod_jax.data.tokenizer import decode, token_bytes
from dcod_jax.data.turns import reasoning_rule
from dcod_jax.errors import DcodError
from dcod_jax.score.alignment import align, score_aligned, with_scores
from dcod_jax.types import Trace

WORDS = ["Hello", "Ġworld", " world", "ell", "or", "é", "中", "日本", "🙂", "  ", "\n", "12", "ld"]


def trace_of(tokenizer, messages, **fields) -> Trace:
    raw = RawTrace(messages, first_completion=fields.pop("first_completion", 1), **fields)
    others = set(range(len(messages))) - set(raw.supervised())
    ids, mask = chat.encode(tokenizer, messages, unsupervised=others, tools=raw.tools)
    return Trace("t", ids, mask, meta=remember(tokenizer, raw, ids.tolist()))


def asked(answer: str, question: str = "Hi there?") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def texts_of(tokenizer, ids, mask, spans) -> list[bytes]:
    """What the tokens of each span write."""
    pieces = token_bytes(tokenizer, ids[mask].tolist())
    found = [b""] * (max(spans) + 1)
    for span, piece in zip(spans, pieces, strict=True):
        if span >= 0:
            found[span] += piece
    return found


def both(student, teacher, trace):
    found = align(student, teacher, trace)
    other = found.teacher
    ours = texts_of(student, trace.token_ids, trace.completion_mask, found.student_spans)
    theirs = texts_of(teacher, other.token_ids, other.completion_mask, found.teacher_spans)
    return found, ours, theirs


BASIC = st.text(st.sampled_from("abHelo wrd 12\n.,é中日本🙂́e"), min_size=1, max_size=30)
MERGES = st.lists(st.sampled_from(WORDS), max_size=6).map(lambda words: tuple(sorted(set(words))))


@functools.lru_cache(maxsize=64)
def of_words(words, template):
    merges = [merge for word in words for merge in chain(word)]
    return byte_level(list(dict.fromkeys(merges)), template=template)


@given(BASIC, MERGES, MERGES)
@settings(max_examples=120, deadline=None)
def test_spans_cover_every_byte_and_are_minimal(text, one, other):
    if not text.strip():
        return
    student, teacher = of_words(one, CHATML), of_words(other, TURNS)
    trace = trace_of(student, asked(text))
    found, ours, theirs = both(student, teacher, trace)
    assert ours[-1:] == [b"<|im_end|>"]
    assert theirs[-1:] == [b"<eos>"]
    at = text.encode()
    assert b"".join(ours[:-1]) == at
    # TURNS trims the completion and puts a space around it.
    assert b"".join(theirs[:-1]).strip() == at.strip()
    if text != text.strip():
        return

    def cuts(tokenizer, trace, lead):
        ids = trace.token_ids[trace.completion_mask][:-1].tolist()
        ends = np.cumsum([len(piece) for piece in token_bytes(tokenizer, ids)]) - lead
        return set(ends.clip(0, len(at)).tolist()) - {0}

    shared = cuts(student, trace, 0) & cuts(teacher, found.teacher, 1)
    assert len(set(found.student_spans[:-1].tolist())) == len(shared)
    assert set(found.teacher_spans[:-1].tolist()) - {-1} == set(range(len(shared)))


def test_the_documented_spans():
    merges = [*chain("answer"), *chain(" ans"), *chain(" wer")]
    student = byte_level(merges)
    teacher = byte_level([*chain(" answer")], template=TURNS)
    trace = trace_of(student, asked("x answer 42"))
    _, ours, theirs = both(student, teacher, trace)
    assert ours == [b"x", b" answer", b" ", b"4", b"2", b"<|im_end|>"]
    assert theirs == [b"x", b" answer", b" ", b"4", b"2", b"<eos>"]  # not the template's spaces


def test_a_tokenizer_with_merges_removed_has_the_students_tokens_as_spans():
    words = ["Hello", " world", " the", "answer", "日本"]
    student = byte_level([merge for word in words for merge in chain(word)])
    teacher = byte_level([])
    trace = trace_of(student, asked("Hello the world: 日本 answer 🙂"))
    count = int(trace.completion_mask.sum())
    found, ours, theirs = both(student, teacher, trace)
    assert found.student_spans.tolist() == list(range(count))
    assert ours == theirs
    logprobs = np.linspace(-3, -0.1, len(found.teacher_spans)).astype(np.float32)
    scored = with_scores(trace, found, logprobs)
    assert scored.span_starts is None
    at = 0
    for share, text in zip(scored.logprobs, ours, strict=True):
        size = 1 if text == b"<|im_end|>" else len(text)
        wanted = logprobs[at : at + size].astype(np.float64).sum()
        np.testing.assert_allclose(share, wanted, rtol=1e-6)
        at += size
    assert at == len(logprobs)


def test_the_same_tokenizer_changes_no_bit():
    tokenizer = byte_level([*chain("Hello"), *chain(" world")])
    trace = trace_of(tokenizer, asked("\n Hello 🙂 world  "))
    logprobs = -np.random.default_rng(0).random(int(trace.completion_mask.sum()), np.float32)
    [scored] = score_aligned(
        [trace],
        student=tokenizer,
        teacher=tokenizer,
        score=lambda traces, **_: [
            Trace(t.id, t.token_ids, t.completion_mask, logprobs) for t in traces
        ],
    )
    assert scored.span_starts is None
    np.testing.assert_array_equal(scored.logprobs, logprobs)
    np.testing.assert_array_equal(scored.token_ids, trace.token_ids)


def test_a_span_of_several_tokens_has_equal_shares_of_its_sum():
    student, teacher = byte_level([]), byte_level([*chain("Hello"), *chain(" world")])
    trace = trace_of(student, asked("Hello world"))
    found = align(student, teacher, trace)
    scored = with_scores(trace, found, np.asarray([-1.0, -3.0, -0.5], np.float32))
    np.testing.assert_allclose(scored.logprobs, [-0.2] * 5 + [-0.5] * 6 + [-0.5], rtol=1e-6)
    assert np.flatnonzero(scored.span_starts).tolist() == [0, 5, 11]


SPACED = ["▁Hello", "▁world", "▁the", "[A]", "[U]", "▁"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("template", [CHATML, TURNS])
def test_the_space_of_sentencepiece_is_no_text(prefix, swap, template):
    pair = (
        byte_level([*chain("Hello"), *chain(" world")]),
        sentencepiece(SPACED, prefix=prefix, template=template),
    )
    student, teacher = pair[::-1] if swap else pair
    trace = trace_of(student, asked("Hello world 中 the"))
    _, ours, theirs = both(student, teacher, trace)
    assert len(ours) == len(theirs)
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.strip() == other.strip()
    assert b"".join(ours[:-1]).strip() == "Hello world 中 the".encode()


SCHEMES = ("bytes", "prepend", "first", "always", "never", "none")


def spaced(scheme):
    """A tokenizer with <tool>, and with a space before first words in this way."""
    tokenizer = sentencepiece(SPACED, prefix=scheme == "prepend", template=CHATML)
    inner, before = tokenizer.backend_tokenizer, pre_tokenizers
    if scheme == "bytes":
        tokenizer = byte_level([*chain(" B")])
        inner = tokenizer.backend_tokenizer
        inner.pre_tokenizer = before.ByteLevel(add_prefix_space=True, use_regex=False)
    elif scheme not in ("prepend", "none"):
        inner.normalizer = None
        inner.pre_tokenizer = before.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
        inner.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_space_before_a_first_word_is_told_from_one_of_the_text(scheme, swap):
    pair = byte_level([]), spaced(scheme)
    student, teacher = pair[::-1] if swap else pair
    trace = trace_of(student, asked("Hello<tool>B <tool> B<tool>  B"))
    _, ours, theirs = both(student, teacher, trace)
    assert len(ours) == len(theirs)
    assert b"".join(theirs[:-1]).count(b"<tool>") == 3
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.strip() == other.strip()


def test_a_turn_of_no_tokens_is_its_end():
    student = byte_level([])
    teacher = byte_level([], template=TURNS, normalizer=normalizers.Strip())
    _, ours, theirs = both(student, teacher, trace_of(student, asked("  ")))
    assert theirs == [b"", b"", b"<eos>"]
    assert ours == [b" ", b" ", b"<|im_end|>"]


def test_turns_and_ends_are_matched_by_role():
    student, teacher = byte_level([]), byte_level([*chain("Hello")], template=TURNS)
    messages = [*asked("Hello"), *asked(" Hello  ", "And?"), *asked("Hello", "Why?")]
    trace = trace_of(student, messages, unsupervised=frozenset([3]))
    assert trace.meta["supervised"] == [1, 5]
    found, ours, theirs = both(student, teacher, trace)
    assert ours == [b"Hello", b"<|im_end|>"] * 2
    assert theirs == [b"Hello", b"<eos>"] * 2
    assert "[A] Hello <eos>[U] And?" in decode(teacher, found.teacher.token_ids.tolist())


OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


@pytest.mark.parametrize("student_opens", [True, False])
def test_reasoning_that_one_template_opens_is_certain_to_it(student_opens):
    pair = byte_level([]), byte_level([])
    pair[0].chat_template = OPENS
    teacher, student = pair if not student_opens else pair[::-1]
    text = "<think>\nso\n</think>\n4"
    trace = trace_of(student, asked(text))
    found, ours, _ = both(student, teacher, trace)
    inside = [bytes([byte]) for byte in b"so\n</think>\n4"]
    mark = [bytes([byte]) for byte in b"<think>\n"]
    assert ours == [*([] if student_opens else mark), *inside, b"<|im_end|>"]
    scored = with_scores(trace, found, np.full(len(found.teacher_spans), -1.0, np.float32))
    if student_opens:
        assert (found.teacher_spans[:8] == -1).all()
        assert (scored.logprobs == -1).all()
    else:
        assert (scored.logprobs == [0] * len(mark) + [-1] * (len(inside) + 1)).all()


# Qwen3's, which takes reasoning out of the text, and gpt-oss's, which has it in a channel.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
    "{% endif %}<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKS = {
    CHATML: (b"<think>", b"</think>", b"<|im_end|>"),
    THINKING: (b"<think>\n", b"\n</think>\n\n", b"<|im_end|>"),
    HARMONY: (
        b"<|channel|>analysis<|message|>",
        b"<|end|><|start|>assistant<|channel|>final<|message|>",
        b"<|return|>",
    ),
}
PAIRS = [(CHATML, THINKING), (THINKING, CHATML), (THINKING, HARMONY), (HARMONY, THINKING)]


@pytest.mark.parametrize(("one", "other"), [*PAIRS, (CHATML, HARMONY)])
@pytest.mark.parametrize("thought", ["2, 3", "think", "é 5"])
def test_reasoning_and_answer_are_matched_by_role(one, other, thought):
    sides = []
    for template, merges in ((one, []), (other, [*chain("2,"), *chain("5")])):
        names = "<|start|> <|end|> <|message|> <|channel|> <|return|>".split()
        sides.append(byte_level(merges))
        sides[-1].chat_template = template
        sides[-1].add_special_tokens({"additional_special_tokens": names})
    rule = reasoning_rule(sides[0], "auto")  # as prepare folds it
    trace = trace_of(sides[0], asked(rule.fold(f"<think>{thought}</think>5", "")))
    found, ours, theirs = both(*sides, trace)
    spans = list(zip(ours, theirs, strict=True))
    assert b"".join(a for a, b in spans if a == b != b"<|im_end|>") == f"{thought}5".encode()
    marks = zip(MARKS[one], MARKS[other], strict=True)
    assert [pair for pair in spans if pair[0] != pair[1]] == [(a, b) for a, b in marks if a != b]
    scored = with_scores(trace, found, np.full(len(found.teacher_spans), -1.0, np.float32))
    assert scored.logprobs is not None
    assert scored.logprobs.sum() == pytest.approx(-len(found.teacher_spans), rel=1e-6)


def test_tool_calls_are_the_same_text_or_refused():
    written = (
        "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<call>{{ c | tojson }}{% endfor %}"
    )
    student, teacher = byte_level([]), byte_level([*chain("<call>")])
    student.chat_template = CHATML.replace("{{ m['content'] }}", written)
    teacher.chat_template = student.chat_template
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = asked("")
    messages[1]["tool_calls"] = [call]
    trace = trace_of(student, messages)
    _, ours, theirs = both(student, teacher, trace)
    assert ours == theirs
    assert ours[0] == b"<call>"
    teacher.chat_template = student.chat_template.replace("<call>", "<function>")
    with pytest.raises(DcodError, match="writes '<call' in a turn, the other one"):
        align(student, teacher, trace)


DECOMPOSED = unicodedata.normalize("NFD", "né 각 é")


@pytest.mark.parametrize("sides", [("NFC", None), (None, "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_canonically_equal_characters_are_the_same_text(sides):
    built = [byte_level([], normalizer=getattr(normalizers, s)() if s else None) for s in sides]
    trace = trace_of(built[0], asked(f"x {DECOMPOSED} y"))
    _, ours, theirs = both(*built, trace)
    for one, other in zip(ours, theirs, strict=True):
        spelled = [
            unicodedata.normalize("NFC", part.decode("utf-8", "replace")) for part in (one, other)
        ]
        assert one == other or spelled[0] == spelled[1]
    text = unicodedata.normalize("NFC", b"".join(theirs[:-1]).decode())
    assert text == unicodedata.normalize("NFC", f"x {DECOMPOSED} y")
    if sides == ("NFC", "NFC"):
        assert ours == theirs == [bytes([b]) for b in text.encode()] + [b"<|im_end|>"]


NESTED = normalizers.Sequence(
    [normalizers.Sequence([normalizers.NFKC()]), normalizers.Strip(right=False)]
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
            "Lowercase",
        ),
        (lambda t: setattr(t.backend_tokenizer, "normalizer", NESTED), "NFKC, Strip"),
        (lambda t: setattr(t.backend_tokenizer, "decoder", decoders.WordPiece()), "WordPiece"),
        (lambda t: setattr(t, "chat_template", "{{ raise_exception('no') }}"), "trace 't'"),
    ],
)
def test_a_tokenizer_that_changes_the_text_is_refused_by_name(change, message):
    student, teacher = byte_level([]), byte_level([])
    change(teacher)
    trace = trace_of(student, asked("The file ﬁ"))
    with pytest.raises(DcodError, match=message) as error:
        align(student, teacher, trace)
    assert "trace 't'" in str(error.value)


def test_a_conversation_is_remembered_in_few_bytes_and_given_back():
    tokenizer = byte_level([], template=TURNS)
    messages = [*asked(" trimmed by the template \n"), *asked("Hello", "Why?")]
    tools = [{"name": "f"}]
    tokenizer.chat_template = "{{ tools | length if tools else '' }}" + TURNS
    trace = trace_of(tokenizer, messages, tools=tools)
    assert set(trace.meta) == set(FIELDS)
    assert trace.meta["messages"][1]["content"] == messages[1]["content"]
    kept = recall(tokenizer, trace)
    assert (kept.messages, kept.supervised, kept.tools) == (messages, [1, 3], tools)
    bare = Trace("old", trace.token_ids, trace.completion_mask)
    with pytest.raises(DcodError, match="prepare the traces again"):
        recall(tokenizer, bare)
