"""Per-token divergences between teacher and student; nothing here sums over tokens or weighs them.

A divergence sees two aligned log-distributions over the same events (losses/distributions.py makes
them: the whole vocabulary, or top-k ids and one tail bucket), so a sparse and a dense teacher share
every line of this file. p is the teacher, q the student; only q carries a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogDistribution = Float[Array, "*N E"]  # over E events: V entries, or K ids and a tail
PerToken = Float[Array, "*N"]


def kl(log_a: LogDistribution, log_b: LogDistribution) -> PerToken:
    """Σ a log(a/b). An event of probability 0 has a finite log-probability here and adds 0."""
    return (jnp.exp(log_a) * (log_a - log_b)).sum(axis=-1)


def _mixture(log_a: Array, log_b: Array, share: Array | float) -> Array:
    """log(share·a + (1 − share)·b), 0 < share < 1."""
    return jnp.logaddexp(log_a + jnp.log(share), log_b + jnp.log1p(-share))


def reverse_kl(log_p: LogDistribution, log_q: LogDistribution) -> PerToken:
    """KL(q‖p)."""
    return kl(log_q, log_p)


def jsd(log_p: LogDistribution, log_q: LogDistribution, *, beta: float) -> PerToken:
    """β KL(p‖M) + (1−β) KL(q‖M), M = βp + (1−β)q.

    β = 0 and 1 mean KL(p‖q) and KL(q‖p) by definition. The interior tends to 0 at both ends, so
    β = 0.999 is not almost the reverse KL: it is almost nothing.
    """
    if beta in (0.0, 1.0):
        return reverse_kl(log_p, log_q) if beta else kl(log_p, log_q)
    log_m = _mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def todi(log_p: LogDistribution, log_q: LogDistribution) -> PerToken:
    """Both KLs entry by entry, each where it corrects more: σ(log p/q) and σ(log q/p), no gradient.

    At an event y the second coefficient is q(y)/(q(y)+p(y)): the `sigmoid` weight of y.
    """
    toward = jax.lax.stop_gradient(jax.nn.sigmoid(log_p - log_q))
    back = jax.lax.stop_gradient(jax.nn.sigmoid(log_q - log_p))
    forward = jnp.exp(log_p) * (log_p - log_q)
    reverse = jnp.exp(log_q) * (log_q - log_p)
    return (toward * forward + back * reverse).sum(axis=-1)


def skew_kl(log_p: LogDistribution, log_q: LogDistribution, *, skew: float) -> PerToken:
    """KL(p‖λp + (1−λ)q), λ the skew."""
    return kl(log_p, _mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: LogDistribution, log_q: LogDistribution, *, skew: float) -> PerToken:
    """KL(q‖(1−λ)p + λq), λ the skew."""
    return kl(log_q, _mixture(log_q, log_p, skew))


def taid(
    log_p: LogDistribution, log_q: LogDistribution, *, interpolation: Array | float
) -> PerToken:
    """Cross-entropy to softmax((1−s) sg(z_q) + s z_p); s is the train state's interpolation.

    Log-probabilities serve as logits (they differ by a constant). A cross-entropy is not 0 where
    student and target agree: it is the target's entropy there.
    """
    s = interpolation
    blend = (1 - s) * jax.lax.stop_gradient(log_q) + s * log_p
    target = jax.nn.softmax(blend, axis=-1)
    return -(target * log_q).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One entry of the registry; the texts make docs/losses.md."""

    value: Callable[..., Array] | None  # (log p, log q); None: the trace token is enough
    formula: str
    source: str
    choose: str  # when to choose it
    parameter: str = ""  # keyword of `value`: a field of LossConfig, or TAID's "interpolation"
    acts_on_student: bool = False  # a top-k cache misleads it where the student is far


DIVERGENCES: dict[str, Divergence] = {
    "nll": Divergence(
        None,
        "−log q(y)",
        "supervised fine-tuning",
        "the traces are all you have; with weights this is DisCorD on SFT, with `dft` weights DFT",
    ),
    "forward_kl": Divergence(
        kl,
        "Σ p log(p/q)",
        "Hinton et al. 2015, arXiv 1503.02531",
        "the student can hold the teacher's whole distribution; it covers every mode",
    ),
    "reverse_kl": Divergence(
        reverse_kl,
        "Σ q log(q/p)",
        "MiniLLM, arXiv 2306.08543",
        "the student is much smaller; it keeps to the modes it can reach",
        acts_on_student=True,
    ),
    "jsd": Divergence(
        jsd,
        "β KL(p‖M) + (1−β) KL(q‖M), M = βp + (1−β)q; β = 0: KL(p‖q), β = 1: KL(q‖p)",
        "GKD, arXiv 2306.13649, Eq. 1",
        "bounded, between the two KLs; the usual choice with on-policy samples",
        parameter="beta",
    ),
    "todi": Divergence(
        todi,
        "Σ sg[σ(log p/q)] p log(p/q) + sg[σ(log q/p)] q log(q/p)",
        "ToDi, arXiv 2505.16297",
        "forward KL where the student is too low, reverse KL where it is too high, entry by entry",
        acts_on_student=True,
    ),
    "skew_kl": Divergence(
        skew_kl,
        "KL(p‖λp + (1−λ)q)",
        "DistiLLM, arXiv 2402.03898",
        "forward KL whose gradient stays bounded where q is tiny",
        parameter="skew",
    ),
    "skew_reverse_kl": Divergence(
        skew_reverse_kl,
        "KL(q‖(1−λ)p + λq)",
        "DistiLLM, arXiv 2402.03898",
        "reverse KL that stays bounded where p is tiny",
        parameter="skew",
    ),
    "taid": Divergence(
        taid,
        "−Σ sg[t] log q, t = softmax((1−s) z_q + s z_p), s rising to 1",
        "TAID, arXiv 2501.16937",
        "a wide gap between teacher and student: the target moves from the student to the teacher",
        parameter="interpolation",
        acts_on_student=True,
    ),
}
