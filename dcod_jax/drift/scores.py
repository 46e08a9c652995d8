"""Sequences sampled from student and teacher, and KL and log-probs of both models along them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from dcod_jax.drift.curves import Sequences
from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import UNIFORM
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import batch_shards, constrain, sharding
from dcod_jax.sample.sampler import Sample, bucket_length, decoding_params, sample
from dcod_jax.score.scoring import TraceBatch, batches_by_length
from dcod_jax.train.forward import Forward, TeacherModel
from dcod_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class DriftModel:
    """A model in memory."""

    config: ModelConfig
    params: Params
    compute_dtype: str


@dataclasses.dataclass(frozen=True)
class DriftSettings:
    """How sequences are sampled and scored."""

    mesh: Mesh
    max_new_tokens: int
    seed: int
    eos_ids: Sequence[int]
    valid_vocab: int
    samples: int  # continuations of each prompt
    batch_size: int  # sequences sampled together
    batch_tokens: int  # tokens scored together
    head_chunk: int  # tokens whose logits exist together


@dataclasses.dataclass(frozen=True)
class Scored:
    """N sequences of one model, continued from prompts, scored by both models.

    Entry t of a row describes generated token t (from 0); after a row's length it is 0. kl has one
    entry more than there are tokens: the prediction after the last one.
    """

    prompt: Int[np.ndarray, " N"]  # which prompt the sequence continues
    length: Int[np.ndarray, " N"]  # tokens, the stop token included
    finished: Bool[np.ndarray, " N"]  # ended with a stop token
    tokens: Int[np.ndarray, "N L"]
    kl: Float[np.ndarray, "N M"]  # M = L + 1; KL(p‖q) in nats
    student_logprobs: Float[np.ndarray, "N L"]
    teacher_logprobs: Float[np.ndarray, "N L"]

    def mask(self) -> Bool[np.ndarray, "N L"]:
        """True where there is a token."""
        return np.arange(self.tokens.shape[1]) < self.length[:, None]

    def kls(self) -> Sequences:
        """KL(p‖q) of each token's prediction."""
        return Sequences(self.kl[:, :-1], self.mask(), self.prompt)

    def log_ratios(self) -> Sequences:
        """log q(y_t) − log p(y_t)."""
        ratios = self.student_logprobs - self.teacher_logprobs
        return Sequences(ratios, self.mask(), self.prompt)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Both prefix sets of one student."""

    student: Scored  # sequences that the student sampled
    teacher: Scored  # sequences that the teacher sampled, from the same prompts

    def kls(self) -> tuple[Sequences, Sequences]:
        """(on the student's sequences, on the teacher's)."""
        return self.student.kls(), self.teacher.kls()


def empty(count: int, width: int) -> Scored:
    """Sequences without a token, in the types and shapes of what is measured."""
    return Scored(
        prompt=np.arange(count),
        length=np.zeros(count, np.int64),
        finished=np.zeros(count, bool),
        tokens=np.zeros((count, width), np.int32),
        kl=np.zeros((count, width + 1), np.float32),
        student_logprobs=np.zeros((count, width), np.float32),
        teacher_logprobs=np.zeros((count, width), np.float32),
    )


def to_samples(scored: Scored) -> list[Sample]:
    """The sequences as a sampler gives them; log-probs are the teacher's."""
    return [
        Sample(
            scored.tokens[row, :n].tolist(),
            scored.teacher_logprobs[row, :n].tolist(),
            bool(scored.finished[row]),
        )
        for row, n in enumerate(scored.length.tolist())
    ]


# ---------------------------------------------------------------- measuring


def measure(
    teacher: DriftModel,
    student: DriftModel,
    prompts: Sequence[Sequence[int]],
    settings: DriftSettings,
    *,
    teacher_samples: Sequence[Sample] | None = None,
    first_prompt: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Sample from both models at temperature 1 and take KL(p‖q) along both sets of sequences.

    Prompt i (token ids) is named first_prompt + i. Its name and the seed fix the random numbers of
    its sequences, the same for both models: where they agree they draw the same token, which
    narrows the difference of their errors and leaves its expectation. teacher_samples, as
    draw_samples returns them, spare sampling the teacher again for another student. on_batch(n)
    counts finished sequences, 3 for each sequence of the result (student sampled, both sets scored;
    4 with the teacher sampled). Raises DcodError where teacher and student cannot be compared.
    """
    drawing: dict[str, Any] = {"first_prompt": first_prompt, "on_batch": on_batch}
    if teacher_samples is None:
        teacher_samples = draw_samples(teacher, prompts, settings, **drawing)
    student_samples = draw_samples(student, prompts, settings, **drawing)
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    names = np.repeat(first_prompt + np.arange(len(prompts)), settings.samples)

    def score(drawn: Sequence[Sample]) -> Scored:
        found = _score_sequences(teacher, student, repeated, drawn, settings, on_batch)
        return dataclasses.replace(found, prompt=names)

    return Measured(student=score(student_samples), teacher=score(teacher_samples))


def draw_samples(
    model: DriftModel,
    prompts: Sequence[Sequence[int]],
    settings: DriftSettings,
    *,
    first_prompt: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """settings.samples continuations of each prompt at temperature 1, prompt by prompt."""
    first, count = first_prompt * settings.samples, len(prompts) * settings.samples
    return sample(
        decoding_params(
            model.config,
            model.params,
            valid_vocab=settings.valid_vocab,
            compute_dtype=model.compute_dtype,
            mesh=settings.mesh,
        ),
        [prompt for prompt in prompts for _ in range(settings.samples)],
        max_new_tokens=settings.max_new_tokens,
        temperature=1.0,
        seed=settings.seed,
        batch_size=settings.batch_size,
        eos_ids=settings.eos_ids,
        indices=range(first, first + count),
        on_batch=lambda sequences, _: on_batch(sequences),
    )


def _score_sequences(
    teacher: DriftModel,
    student: DriftModel,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sample],
    settings: DriftSettings,
    on_batch: Callable[[int], None],
) -> Scored:
    """KL(p‖q) and both log-probs along sequences, by the loss code of a live teacher."""
    forward, mesh = _forward(teacher, student, settings), settings.mesh
    out = empty(len(drawn), settings.max_new_tokens)
    for row, one in enumerate(drawn):
        out.length[row], out.finished[row] = len(one.token_ids), one.finished
        out.tokens[row, : len(one.token_ids)] = one.token_ids
    lengths = [len(p) + len(s.token_ids) for p, s in zip(prompts, drawn, strict=True)]
    shards = batch_shards(mesh)
    for group in batches_by_length(lengths, batch_tokens=settings.batch_tokens, shards=shards):
        batch = _batch(prompts, drawn, group)
        placed = jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, ("batch", None))), batch)
        kl, own, other = jax.device_get(_score(forward, student.params, teacher.params, placed))
        for row, i in enumerate(group.members):
            n = int(out.length[i])
            out.kl[i, : n + 1] = kl[row, : n + 1]
            out.student_logprobs[i, :n] = own[row, :n]
            out.teacher_logprobs[i, :n] = other[row, :n]
        on_batch(len(group.members))
    if not np.isfinite(out.kl).all():
        bad = int(np.argmax(~np.isfinite(out.kl).all(axis=1)))
        raise DcodError(
            f"sequence {bad}: KL between teacher and student is not finite; do the weights of one "
            "of them hold NaN or inf?"
        )
    return out


def _forward(teacher: DriftModel, student: DriftModel, settings: DriftSettings) -> Forward:
    config = LossConfig("forward_kl", UNIFORM, teacher="live")
    caps = student.config.final_softcap, teacher.config.final_softcap
    head = VocabHead(settings.head_chunk, settings.valid_vocab, settings.mesh, softcap=caps[0])
    return Forward(
        student.config,
        DistillLoss(config, head, caps[1]),
        jnp.dtype(student.compute_dtype),
        teacher=TeacherModel(teacher.config, jnp.dtype(teacher.compute_dtype)),
    )


def _batch(prompts: Sequence[Sequence[int]], drawn: Sequence[Sample], group: TraceBatch) -> Batch:
    """Prompt and continuation, the head at the last prompt position and all behind it."""
    shape = (group.rows, group.length)
    tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    width = bucket_length(max(len(drawn[i].token_ids) for i in group.members) + 1)
    heads = np.full((group.rows, width), group.length, np.int32)  # length: unused
    for row, i in enumerate(group.members):
        ids = [*prompts[i], *drawn[i].token_ids]
        tokens[row, : len(ids)] = ids
        targets[row, : len(ids) - 1] = ids[1:]
        segment_ids[row, : len(ids)] = 1
        used = len(drawn[i].token_ids) + 1
        heads[row, :used] = len(prompts[i]) - 1 + np.arange(used)
    fields: dict[str, Any] = {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": segment_ids > 0,
        "segment_ids": segment_ids,
        "positions": np.broadcast_to(np.arange(group.length, dtype=np.int32), shape),
        "teacher_logprobs": np.zeros(shape, np.float32),
        "head_positions": heads,
    }
    return Batch(**fields)


@functools.partial(jax.jit, static_argnames=("forward",))
def _score(
    forward: Forward, student: Params, teacher: Params, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(KL, log q, log p) at the head's positions, [B, C]; only the first [C] are the sequence's."""
    _, (_, stats, _) = forward(student, batch, jnp.int32(0), adaptive.initial(), (teacher,))
    found = (stats.divergence, stats.student_logprobs, stats.teacher_logprobs)
    replicated = [constrain(x, forward.mesh, None, None) for x in found]
    return replicated[0], replicated[1], replicated[2]
