"""Accumulated error and excess error (ExAccErr) from per-token KLs: numpy in, curves out.

With KL_t = KL(p‖q) of the prediction of generated token t (p teacher, q student, whole vocabulary,
temperature 1), and the first generated token's prediction made by the last prompt position:

    R(l) = Σ_{t≤l} E_{prefix~q} KL_t    E(l) = Σ_{t≤l} E_{prefix~p} KL_t
    ExAccErr(l) = 100 (R(l) − E(l)) / E(l)

(Arora et al. 2022, arXiv 2204.01171; MiniLLM, arXiv 2306.08543, App. B.) A finished sequence leaves
the average over sequences. What is not available is NaN: positions that no sequence reaches, and
ratios to an error of 0.

Intervals are percentile bootstraps over prompts, 95 %. scipy.stats.bootstrap does not serve here:
a prompt brings all its sequences, one product of draws and sums resamples all positions, and
resamples without a sequence of some length are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dcod_jax.errors import DcodError
from dcod_jax.evaluate.statistics import equal

QUANTILES = (0.025, 0.975)
UNDEFINED_SHARE = 0.01  # of the resamples: with more of them undefined there is no interval
_BLOCK = 256  # resamples formed together


class Sequences(NamedTuple):
    """A number for each token of N sequences; values outside the mask are not read."""

    values: Float[np.ndarray, "N L"]
    mask: Bool[np.ndarray, "N L"]  # True where the sequence has a token, its stop token included
    prompt: Int[np.ndarray, " N"]  # which prompt the sequence continues


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number for each position or length l = 1..L, with its interval; NaN: not available."""

    value: Float[np.ndarray, " L"]
    low: Float[np.ndarray, " L"]
    high: Float[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class DriftCurves:
    """Everything by length: entry l − 1 of each array describes the first l tokens."""

    student_alive: Int[np.ndarray, " L"]  # sequences that have a token l
    teacher_alive: Int[np.ndarray, " L"]
    student_kl: Curve  # E_{prefix~q} KL at position l alone
    teacher_kl: Curve
    accumulated: Curve  # R(l)
    reference: Curve  # E(l)
    excess: Curve  # ExAccErr(l), percent

    def reach(self, least: int) -> int:
        """The largest l with at least `least` sequences alive in both sets; 0: there is none."""
        enough = (self.student_alive >= least) & (self.teacher_alive >= least)
        return int(enough.sum())


def drift_curves(
    student: Sequences, teacher: Sequences, *, resamples: int, seed: int = 0
) -> DriftCurves:
    """R, E and ExAccErr by length, from KLs on the student's and on the teacher's own sequences.

    Prompts are drawn with replacement, and each brings all its sequences of both sets, so what a
    prompt makes hard in both cancels. Float64 throughout.
    """
    own, other = _PromptSums(student), _PromptSums(teacher)
    value = _errors(own.mean(), other.mean())
    drawn = _resampled(own, other, resamples=resamples, seed=seed)
    curves = {name: Curve(value[name], *interval(drawn[name])) for name in value}
    return DriftCurves(own.alive(), other.alive(), **curves)


def excess_difference(
    first: tuple[Sequences, Sequences],
    second: tuple[Sequences, Sequences],
    *,
    resamples: int,
    seed: int = 0,
) -> Curve:
    """ExAccErr of the second student minus the first's, paired; each (own KLs, the teacher's)."""
    pairs = [(_PromptSums(own), _PromptSums(other)) for own, other in (first, second)]
    if len({tuple(sums.names) for pair in pairs for sums in pair}) != 1:
        raise DcodError("a paired difference needs both students measured on the same prompts")
    values = [_errors(own.mean(), other.mean())["excess"] for own, other in pairs]
    drawn = [_resampled(*pair, resamples=resamples, seed=seed)["excess"] for pair in pairs]
    return Curve(values[1] - values[0], *interval(drawn[1] - drawn[0]))


def position_means(sequences: Sequences, *, resamples: int, seed: int = 0) -> Curve:
    """Mean over the sequences alive at each position, with its interval."""
    sums = _PromptSums(sequences)
    blocks = [sums.resampled(draws) for draws in _draws(len(sums.names), resamples, seed)]
    return Curve(sums.mean(), *interval(np.concatenate(blocks)))


def interval(
    drawn: Float[np.ndarray, "R L"],
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """95 % percentile interval over resamples.

    Resamples in which the number is undefined (NaN: no sequence of that length was drawn) are left
    out; where they are more than 1 % there is no interval. Nor is there one where all resamples are
    equal, as those of a single prompt are: a KL has no upper bound that could stand in for it.
    """
    low = np.full(drawn.shape[1], np.nan)
    high = np.full(drawn.shape[1], np.nan)
    enough = np.isnan(drawn).mean(axis=0) <= UNDEFINED_SHARE
    enough[enough] = [not equal(column[~np.isnan(column)]) for column in drawn[:, enough].T]
    if enough.any():
        low[enough], high[enough] = np.nanquantile(drawn[:, enough], QUANTILES, axis=0)
    return low, high


# ---------------------------------------------------------------- resampling


class _PromptSums:
    """Sums and counts of one set of sequences by prompt and position."""

    def __init__(self, sequences: Sequences):
        values, mask, prompt = sequences
        self.names, place = np.unique(prompt, return_inverse=True)
        shape = (len(self.names), values.shape[1])
        self.sums, self.counts = np.zeros(shape), np.zeros(shape)
        # where, not a product: values outside the mask may be anything, NaN too.
        np.add.at(self.sums, place, np.where(mask, values, 0.0).astype(np.float64))
        np.add.at(self.counts, place, mask.astype(np.float64))

    def resampled(self, draws: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R L"]:
        """Means of resamples; draws counts how often each prompt was drawn."""
        return _ratio(draws @ self.sums, draws @ self.counts)

    def mean(self) -> Float[np.ndarray, " L"]:
        return _ratio(self.sums.sum(axis=0), self.counts.sum(axis=0))

    def alive(self) -> Int[np.ndarray, " L"]:
        return self.counts.sum(axis=0).astype(np.int64)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _errors(student_kl: np.ndarray, teacher_kl: np.ndarray) -> dict[str, np.ndarray]:
    """The five curves of DriftCurves by length (last axis), of the data or of resamples."""
    accumulated, reference = (np.cumsum(x, axis=-1) for x in (student_kl, teacher_kl))
    known = reference > 0
    excess = 100 * (accumulated - reference) / np.where(known, reference, 1.0)
    return {
        "student_kl": student_kl,
        "teacher_kl": teacher_kl,
        "accumulated": accumulated,
        "reference": reference,
        "excess": np.where(known, excess, np.nan),
    }


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R P"]]:
    """Blocks of resamples: how often each prompt is drawn in each."""
    if prompts < 1 or resamples < 1:
        raise DcodError(f"a bootstrap needs sequences and resamples, got {prompts} and {resamples}")
    generator = np.random.default_rng(seed)
    shares = np.full(prompts, 1 / prompts)
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        yield generator.multinomial(prompts, shares, size=count).astype(np.float64)


def _resampled(
    own: _PromptSums, other: _PromptSums, *, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """The curves of every resample, [resamples, L] each."""
    if not np.array_equal(own.names, other.names):
        raise DcodError("student's and teacher's sequences must continue the same prompts")
    draws = _draws(len(own.names), resamples, seed)
    blocks = [_errors(own.resampled(one), other.resampled(one)) for one in draws]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
