"""Sequences sampled from student and teacher, and what each model says along both of them."""

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

from dcod_jax.drift import curves as drift_curves
from dcod_jax.drift.curves import Curve, DriftCurves, LmopsErrors
from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import UNIFORM
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import batch_shards, constrain, make_mesh, sharding
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
class Scored:
    """N sequences of one model, continued from prompts, with both models' words on them.

    Entry t of a row is about generated token t (from 0); behind a row's length it is 0. kl has one
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

    def kl_set(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(kl, mask, prompt): what drift_curves takes."""
        return self.kl[:, :-1], self.mask(), self.prompt


@dataclasses.dataclass(frozen=True)
class Measured:
    """Both prefix sets of one student."""

    student: Scored  # sequences that the student sampled
    teacher: Scored  # sequences that the teacher sampled, from the same prompts

    def curves(self, *, resamples: int = 2000, seed: int = 0) -> DriftCurves:
        """R, E and ExAccErr by length; prompts are resampled."""
        (own, own_mask, own_prompt), (kl, mask, prompt) = (
            self.student.kl_set(),
            self.teacher.kl_set(),
        )
        return drift_curves.drift_curves(
            own,
            own_mask,
            kl,
            mask,
            student_groups=own_prompt,
            teacher_groups=prompt,
            resamples=resamples,
            seed=seed,
        )

    def log_ratios(self, *, resamples: int = 2000, seed: int = 0) -> dict[str, Curve]:
        """Mean log q(y_t) − log p(y_t) by position, on either model's sequences."""
        return {
            name: drift_curves.position_means(
                scored.student_logprobs - scored.teacher_logprobs,
                scored.mask(),
                groups=scored.prompt,
                resamples=resamples,
                seed=seed,
            )
            for name, scored in (("student", self.student), ("teacher", self.teacher))
        }

    def lmops(self) -> LmopsErrors:
        """The published script's numbers on these sequences."""
        arrays = [a for scored in (self.student, self.teacher) for a in _lmops_view(scored)]
        return drift_curves.lmops_errors(*arrays)


def excess_difference(
    first: Measured, second: Measured, *, resamples: int = 2000, seed: int = 0
) -> Curve:
    """ExAccErr of the second student minus the first, paired over prompts."""
    return drift_curves.excess_difference(
        first.student.kl_set(),
        second.student.kl_set(),
        (first.teacher.kl_set(), second.teacher.kl_set()),
        resamples=resamples,
        seed=seed,
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


def _lmops_view(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """[P, S, L]: KL of the prediction after each token, and where that token is no stop token."""
    prompts, samples = np.unique(scored.prompt, return_counts=True)
    if len(set(samples)) != 1:
        raise DcodError("the LMOps numbers need the same number of samples of every prompt")
    order = np.argsort(scored.prompt, kind="stable")
    words = scored.length - scored.finished  # without the stop token
    mask = np.arange(scored.tokens.shape[1]) < words[:, None]
    shape = (len(prompts), int(samples[0]), scored.tokens.shape[1])
    return scored.kl[order, 1:].reshape(shape), mask[order].reshape(shape)


# ---------------------------------------------------------------- measuring


def measure(
    teacher: DriftModel,
    student: DriftModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    eos_ids: Sequence[int],
    valid_vocab: int,
    samples: int = 1,
    batch_size: int = 64,
    batch_tokens: int = 16384,
    head_chunk: int = 512,
    mesh: Mesh | None = None,
    teacher_samples: Sequence[Sample] | None = None,
    first_prompt: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Measured:
    """Sample from both models at temperature 1 and take KL(p‖q) along both sets of sequences.

    `samples` continuations of each prompt (token ids). Prompt i is named first_prompt + i, and with
    (seed, name) the randomness of its sequences is fixed, the same for both models: where they
    agree they draw the same token, which makes the difference of their errors more certain without
    changing what either is expected to be. teacher_samples, as draw_samples returns them, spare
    sampling the teacher again for another student. on_batch(n) counts finished sequences, 3 for
    each sequence of the result (student sampled, both sets scored; 4 with the teacher sampled).
    Raises DcodError where teacher and student cannot be compared.
    """
    mesh = make_mesh(1, devices=jax.devices()[:1]) if mesh is None else mesh
    drawing: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "eos_ids": eos_ids,
        "valid_vocab": valid_vocab,
        "samples": samples,
        "batch_size": batch_size,
        "mesh": mesh,
        "first_prompt": first_prompt,
        "on_batch": on_batch,
    }
    if teacher_samples is None:
        teacher_samples = draw_samples(teacher, prompts, **drawing)
    scored = {
        name: score_sequences(
            teacher,
            student,
            [prompt for prompt in prompts for _ in range(samples)],
            drawn,
            max_new_tokens=max_new_tokens,
            valid_vocab=valid_vocab,
            batch_tokens=batch_tokens,
            head_chunk=head_chunk,
            mesh=mesh,
            on_batch=on_batch,
        )
        for name, drawn in (
            ("student", draw_samples(student, prompts, **drawing)),
            ("teacher", teacher_samples),
        )
    }
    owners = np.repeat(first_prompt + np.arange(len(prompts)), samples)
    return Measured(**{k: dataclasses.replace(v, prompt=owners) for k, v in scored.items()})


def draw_samples(
    model: DriftModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    eos_ids: Sequence[int],
    valid_vocab: int,
    samples: int = 1,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    first_prompt: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[Sample]:
    """`samples` continuations of each prompt at temperature 1, prompt by prompt."""
    first = first_prompt * samples
    return sample(
        decoding_params(
            model.config,
            model.params,
            valid_vocab=valid_vocab,
            compute_dtype=model.compute_dtype,
            mesh=mesh,
        ),
        [prompt for prompt in prompts for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
        batch_size=batch_size,
        eos_ids=eos_ids,
        indices=range(first, first + len(prompts) * samples),
        on_batch=None if on_batch is None else lambda sequences, _: on_batch(sequences),
    )


def score_sequences(
    teacher: DriftModel,
    student: DriftModel,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sample],
    *,
    max_new_tokens: int,
    valid_vocab: int,
    batch_tokens: int = 16384,
    head_chunk: int = 512,
    mesh: Mesh,
    on_batch: Callable[[int], None] | None = None,
) -> Scored:
    """KL(p‖q) and both log-probs along sequences; `prompts` has one entry for each of `drawn`.

    The loss code of a live teacher, whose chunked head keeps both models' logits to head_chunk
    tokens at a time. Each sequence is its own prompt (0, 1, ...) in the result.
    """
    forward = _forward(teacher, student, valid_vocab=valid_vocab, head_chunk=head_chunk, mesh=mesh)
    count = len(drawn)
    out = Scored(
        prompt=np.arange(count),
        length=np.array([len(s.token_ids) for s in drawn]),
        finished=np.array([s.finished for s in drawn]),
        tokens=np.zeros((count, max_new_tokens), np.int32),
        kl=np.zeros((count, max_new_tokens + 1), np.float32),
        student_logprobs=np.zeros((count, max_new_tokens), np.float32),
        teacher_logprobs=np.zeros((count, max_new_tokens), np.float32),
    )
    for row, one in enumerate(drawn):
        out.tokens[row, : len(one.token_ids)] = one.token_ids
    lengths = [len(p) + len(s.token_ids) for p, s in zip(prompts, drawn, strict=True)]
    shards = batch_shards(mesh)
    for planned in batches_by_length(lengths, batch_tokens=batch_tokens, shards=shards):
        batch = _batch(prompts, drawn, planned)
        placed = jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, ("batch", None))), batch)
        rows = jax.device_get(_score(forward, student.params, teacher.params, placed))
        for row, i in enumerate(planned.members):
            n = int(out.length[i])
            out.kl[i, : n + 1] = rows[0][row, : n + 1]
            out.student_logprobs[i, :n] = rows[1][row, :n]
            out.teacher_logprobs[i, :n] = rows[2][row, :n]
        if on_batch is not None:
            on_batch(len(planned.members))
    if not np.isfinite(out.kl).all():
        bad = int(np.argmax(~np.isfinite(out.kl).all(axis=1)))
        raise DcodError(
            f"sequence {bad}: KL between teacher and student is not finite; do the weights of one "
            "of them hold NaN or inf?"
        )
    return out


def _forward(
    teacher: DriftModel, student: DriftModel, *, valid_vocab: int, head_chunk: int, mesh: Mesh
) -> Forward:
    config = LossConfig("forward_kl", UNIFORM, teacher="live")
    return Forward(
        student.config,
        DistillLoss(config, VocabHead(head_chunk, valid_vocab, mesh)),
        jnp.dtype(student.compute_dtype),
        teacher=TeacherModel(teacher.config, jnp.dtype(teacher.compute_dtype)),
    )


def _batch(prompts: Sequence[Sequence[int]], drawn: Sequence[Sample], planned: TraceBatch) -> Batch:
    """Prompt and continuation, the head at the last prompt position and all behind it."""
    shape = (planned.rows, planned.length)
    tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    width = bucket_length(max(len(drawn[i].token_ids) for i in planned.members) + 1)
    heads = np.full((planned.rows, width), planned.length, np.int32)  # length: unused
    for row, i in enumerate(planned.members):
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
        "positions": np.broadcast_to(np.arange(planned.length, dtype=np.int32), shape),
        "teacher_logprobs": np.zeros(shape, np.float32),
        "head_positions": heads,
    }
    return Batch(**fields)


@functools.partial(jax.jit, static_argnames=("forward",))
def _score(
    forward: Forward, student: Params, teacher: Params, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(KL, log q, log p) at the head's positions, [B, C]; only the first [C] are the sequence's."""
    _, (_, stats) = forward(student, batch, jnp.int32(0), adaptive.initial(), teacher)
    found = (stats.divergence, stats.student_logprobs, stats.teacher_logprobs)
    replicated = [constrain(x, forward.mesh, None, None) for x in found]
    return replicated[0], replicated[1], replicated[2]
