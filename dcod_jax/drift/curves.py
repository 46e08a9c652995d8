"""Accumulated error and excess error (ExAccErr) from per-token KLs: numpy in, curves out.

With KL_t = KL(p‖q) of the prediction of generated token t (p teacher, q student, whole vocabulary,
temperature 1), and the first generated token's prediction made by the last prompt position:

    R(l) = Σ_{t≤l} E_{prefix~q} KL_t    E(l) = Σ_{t≤l} E_{prefix~p} KL_t
    ExAccErr(l) = 100 (R(l) − E(l)) / E(l)

(Arora et al. 2022, arXiv 2204.01171; MiniLLM, arXiv 2306.08543, App. B.) A finished sequence leaves
the average over sequences. Intervals are percentile bootstraps over prompts, 95 %. What is not
available is NaN: positions that no sequence reaches, and ratios to an error of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from dcod_jax.errors import DcodError

QUANTILES = (0.025, 0.975)
UNDEFINED_SHARE = 0.01  # of the resamples: with more of them undefined there is no interval
LMOPS_INDEX = 15  # the entry of its arrays that the published script prints
_BLOCK = 256  # resamples formed together


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number for each position or length l = 1..L, with its interval; NaN: not available."""

    value: Float[np.ndarray, " L"]
    low: Float[np.ndarray, " L"]
    high: Float[np.ndarray, " L"]

    def at(self, length: int) -> tuple[float, float, float]:
        """(value, low, high) at length l, counted from 1."""
        return tuple(float(x[length - 1]) for x in (self.value, self.low, self.high))  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class DriftCurves:
    """Everything by length: entry l − 1 of each array speaks about the first l tokens."""

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


Values = Float[np.ndarray, "N L"]
Mask = Bool[np.ndarray, "N L"]
Groups = Int[np.ndarray, " N"]


def drift_curves(
    student_kl: Values,
    student_mask: Mask,
    teacher_kl: Float[np.ndarray, "M L"],
    teacher_mask: Bool[np.ndarray, "M L"],
    *,
    student_groups: Groups | None = None,
    teacher_groups: Int[np.ndarray, " M"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> DriftCurves:
    """R, E and ExAccErr by length, from KLs on the student's and on the teacher's own sequences.

    A mask is True where the sequence has a token at that position (its stop token included).
    Groups name the prompt of each sequence: prompts are drawn with replacement, and each brings
    all its sequences of both sets, so what a prompt makes hard in both cancels. Without groups the
    sequences are drawn, for each set on its own. Float64 throughout.
    """
    own = _Set(student_kl, student_mask, student_groups)
    other = _Set(teacher_kl, teacher_mask, teacher_groups)
    value = _Errors.of(own.mean(), other.mean())
    drawn = _resampled(own, other, resamples=resamples, seed=seed)
    curves = {
        field.name: Curve(getattr(value, field.name), *interval(getattr(drawn, field.name)))
        for field in dataclasses.fields(_Errors)
    }
    return DriftCurves(own.alive(), other.alive(), **curves)


def excess_difference(
    first: tuple[Values, Mask, Groups],
    second: tuple[Values, Mask, Groups],
    teacher: tuple[tuple[Values, Mask, Groups], tuple[Values, Mask, Groups]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Curve:
    """ExAccErr of the second student minus that of the first, in percentage points, paired.

    first and second are (kl, mask, groups) on each student's own sequences, teacher the same of
    each on the teacher's sequences. All four are resampled by the same draws of prompts.
    Raises DcodError when the sets have different prompts.
    """
    names = {tuple(np.unique(part[2])) for part in (first, second, *teacher)}
    if len(names) != 1:
        raise DcodError("a paired difference needs both students measured on the same prompts")
    sets = [(_Set(*own), _Set(*other)) for own, other in zip((first, second), teacher, strict=True)]
    values = [_Errors.of(own.mean(), other.mean()).excess for own, other in sets]
    drawn = [_resampled(*pair, resamples=resamples, seed=seed).excess for pair in sets]
    return Curve(values[1] - values[0], *interval(drawn[1] - drawn[0]))


def position_means(
    values: Values,
    mask: Mask,
    *,
    groups: Groups | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Curve:
    """Mean over the sequences alive at each position, with its interval."""
    one = _Set(values, mask, groups)
    blocks = [_ratio(*one.totals(w)) for w in _draws(len(one.names), resamples, seed)]
    return Curve(one.mean(), *interval(np.concatenate(blocks)))


def interval(
    drawn: Float[np.ndarray, "R L"],
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """95 % percentile interval over resamples.

    Resamples in which the number is undefined (NaN: no sequence of that length was drawn) are left
    out; where they are more than 1 % there is no interval.
    """
    low = np.full(drawn.shape[1], np.nan)
    high = np.full(drawn.shape[1], np.nan)
    enough = np.isnan(drawn).mean(axis=0) <= UNDEFINED_SHARE
    if enough.any():
        low[enough], high[enough] = np.nanquantile(drawn[:, enough], QUANTILES, axis=0)
    return low, high


# ---------------------------------------------------------------- resampling


class _Set:
    """Sums and counts of one set of sequences by prompt and position."""

    def __init__(self, values: np.ndarray, mask: np.ndarray, groups: np.ndarray | None):
        self.grouped = groups is not None
        groups = np.arange(len(values)) if groups is None else groups
        self.names, place = np.unique(groups, return_inverse=True)
        shape = (len(self.names), values.shape[1])
        self.sums, self.counts = np.zeros(shape), np.zeros(shape)
        # where, not a product: what stands outside the mask may be anything, NaN too.
        np.add.at(self.sums, place, np.where(mask, values, 0.0).astype(np.float64))
        np.add.at(self.counts, place, mask.astype(np.float64))

    def totals(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums and counts of resamples: draws [R, prompts] counts how often each was drawn."""
        return draws @ self.sums, draws @ self.counts

    def mean(self) -> np.ndarray:
        return _ratio(self.sums.sum(axis=0), self.counts.sum(axis=0))

    def alive(self) -> np.ndarray:
        return self.counts.sum(axis=0).astype(np.int64)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class _Errors:
    """The five numbers of each length (last axis), of the data or of resamples."""

    student_kl: np.ndarray
    teacher_kl: np.ndarray
    accumulated: np.ndarray
    reference: np.ndarray
    excess: np.ndarray

    @classmethod
    def of(cls, student_kl: np.ndarray, teacher_kl: np.ndarray) -> _Errors:
        accumulated, reference = (np.cumsum(x, axis=-1) for x in (student_kl, teacher_kl))
        known = reference > 0
        excess = np.where(
            known, 100 * (accumulated - reference) / np.where(known, reference, 1.0), np.nan
        )
        return cls(student_kl, teacher_kl, accumulated, reference, excess)


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of [R, prompts]: how often each prompt is drawn in each resample."""
    if prompts < 1 or resamples < 1:
        raise DcodError(f"a bootstrap needs sequences and resamples, got {prompts} and {resamples}")
    generator = np.random.default_rng(seed)
    shares = np.full(prompts, 1 / prompts)
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        yield generator.multinomial(prompts, shares, size=count).astype(np.float64)


def _resampled(own: _Set, other: _Set, *, resamples: int, seed: int) -> _Errors:
    """The numbers of every resample, [resamples, L] each."""
    if own.grouped != other.grouped:
        raise DcodError("give the prompts of both sets of sequences, or of neither")
    if own.grouped and not np.array_equal(own.names, other.names):
        raise DcodError("student's and teacher's sequences must continue the same prompts")
    pairs = zip(
        _draws(len(own.names), resamples, seed),
        _draws(len(other.names), resamples, seed if own.grouped else seed + 1),
        strict=True,
    )
    blocks = [
        _Errors.of(_ratio(*own.totals(mine)), _ratio(*other.totals(theirs)))
        for mine, theirs in pairs
    ]
    joined = {
        field.name: np.concatenate([getattr(block, field.name) for block in blocks])
        for field in dataclasses.fields(_Errors)
    }
    return _Errors(**joined)


# ---------------------------------------------------------------- the published script


@dataclasses.dataclass(frozen=True)
class LmopsErrors:
    """What the LMOps script computes, by its own names; arrays over generated positions."""

    ex_acc_err: Float[np.ndarray, " L"]
    mean_r: Float[np.ndarray, " L"]
    mean_eps: Float[np.ndarray, " L"]
    std_err: Float[np.ndarray, " L"]
    std_r: Float[np.ndarray, " L"]
    std_eps: Float[np.ndarray, " L"]


def lmops_errors(
    student_kl: Float[np.ndarray, "P S L"],
    student_mask: Bool[np.ndarray, "P S L"],
    teacher_kl: Float[np.ndarray, "P S L"],
    teacher_mask: Bool[np.ndarray, "P S L"],
) -> LmopsErrors:
    """The numbers of microsoft/LMOps minillm/evaluate_exposure_bias.py, P prompts × S samples.

    It differs from the definition above in four ways, all reproduced: entry t is the KL of the
    prediction *after* generated token t (the first token's own prediction is left out), counted
    where token t is not padding, which for its tokenizers is the stop token too; a prompt whose
    samples have all ended adds 0; a mean over samples has 1e-3 added to its divisor; and std_err
    divides std_eps by itself, so that its second term is always 1. Standard deviations are over
    prompts (n − 1); one prompt has none (NaN).
    """
    means, deviations = [], []
    for kl, mask in ((student_kl, student_mask), (teacher_kl, teacher_mask)):
        total = np.where(mask, kl, 0.0).astype(np.float64).sum(axis=1)
        by_prompt = np.cumsum(total / (mask.sum(axis=1) + 1e-3), axis=-1)
        means.append(by_prompt.mean(axis=0))
        several = len(by_prompt) > 1
        deviations.append(
            by_prompt.std(axis=0, ddof=1) if several else np.full(by_prompt.shape[1], np.nan)
        )
    (mean_R, mean_eps), (std_R, std_eps) = means, deviations
    with np.errstate(divide="ignore", invalid="ignore"):  # an error of 0 divides as it does there
        ex_acc_err = (mean_R - mean_eps) / mean_eps * 100
        std_err = (np.abs(std_R / mean_R) + np.abs(std_eps / std_eps)) * ex_acc_err
    return LmopsErrors(ex_acc_err, mean_R, mean_eps, std_err, std_R, std_eps)
