"""Divergences a second time: float64, plain loops for values, closed forms for gradients.

Nothing here is shared with dcod_jax: a mistake would have to be made twice. p is the teacher, q the
student, E events (a vocabulary, or K ids and a tail); everything is a log-probability.
"""

from __future__ import annotations

import math

import numpy as np

# name -> the knob (beta, skew or interpolation) of each case that tests go through.
CASES = [
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    ("jsd", 0.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 1.0),
    ("todi", 0.0),
    ("skew_kl", 0.1),
    ("skew_kl", 0.7),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.7),
    ("taid", 0.4),
    ("taid", 1.0),
]
NAMES = tuple(dict.fromkeys(name for name, _ in CASES))


def label(case: tuple[str, float]) -> str:
    return f"{case[0]}-{case[1]}"


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else 1 - 1 / (1 + math.exp(x))


def taid_target(knob: float, log_p, log_q) -> np.ndarray:
    return np.exp(log_softmax((1 - knob) * np.asarray(log_q) + knob * np.asarray(log_p)))


def _token(name: str, knob: float, log_p, log_q, frozen_q) -> float:
    """One token; frozen_q is what stands behind the stop-gradients of todi and taid."""
    if name == "jsd" and knob in (0.0, 1.0):
        name = "reverse_kl" if knob else "forward_kl"
    target = taid_target(knob, log_p, frozen_q) if name == "taid" else None
    terms = []
    for v, (lp, lq) in enumerate(zip(log_p.tolist(), log_q.tolist(), strict=True)):
        p, q = math.exp(lp), math.exp(lq)
        if name == "forward_kl":
            term = p * (lp - lq)
        elif name == "reverse_kl":
            term = q * (lq - lp)
        elif name == "jsd":
            m = knob * p + (1 - knob) * q
            term = knob * p * (lp - math.log(m)) + (1 - knob) * q * (lq - math.log(m))
        elif name == "todi":
            toward = _sigmoid(lp - frozen_q[v])
            term = toward * p * (lp - lq) + (1 - toward) * q * (lq - lp)
        elif name == "skew_kl":
            term = p * (lp - math.log(knob * p + (1 - knob) * q))
        elif name == "skew_reverse_kl":
            term = q * (lq - math.log((1 - knob) * p + knob * q))
        else:
            assert target is not None
            term = -target[v] * lq
        terms.append(term)
    return math.fsum(terms)


def values(name: str, knob: float, log_p, log_q, *, frozen_q=None) -> np.ndarray:
    """[N, E], [N, E] -> [N], one event after another."""
    frozen_q = log_q if frozen_q is None else frozen_q
    rows = zip(log_p, log_q, frozen_q, strict=True)
    return np.array([_token(name, knob, *row) for row in rows])


def gradients(name: str, knob: float, log_p, log_q) -> np.ndarray:
    """d value / d (logits of q), [N, E]: g - q Σg with g the derivative in log q."""
    p, q = np.exp(log_p), np.exp(log_q)
    ahead = log_q - log_p
    if name == "jsd" and knob in (0.0, 1.0):
        name = "reverse_kl" if knob else "forward_kl"
    if name == "forward_kl":
        g = -p
    elif name == "reverse_kl":
        g = q * (ahead + 1)
    elif name == "jsd":
        m = knob * p + (1 - knob) * q
        g = (1 - knob) * q * (log_q - np.log(m))  # what comes from m sums up to -q, and drops out
    elif name == "todi":
        back = np.exp(-np.logaddexp(0, -ahead))
        g = -np.exp(-np.logaddexp(0, ahead)) * p + back * q * (ahead + 1)
    elif name == "skew_kl":
        g = -p * (1 - knob) * q / (knob * p + (1 - knob) * q)
    elif name == "skew_reverse_kl":
        m = (1 - knob) * p + knob * q
        g = q * (log_q - np.log(m) + 1) - knob * q * q / m
    else:
        g = -taid_target(knob, log_p, log_q)
    return g - q * g.sum(-1, keepdims=True)


def top_k(log_p, k: int, *, floor: float = -100.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [N, K], their log-probs, log of the mass of all others), as a cache holds them."""
    order = np.argsort(-log_p, axis=-1)
    ids, rest = order[:, :k], order[:, k:]
    tail = np.exp(np.take_along_axis(log_p, rest, -1)).sum(-1)
    tail = np.maximum(np.log(np.maximum(tail, 1e-300)), floor)
    return ids, np.take_along_axis(log_p, ids, -1), tail


def buckets(ids, logprobs, tail, log_q) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log p, log q) over the K ids and the tail, and where each vocabulary entry went, [N, V].

    An empty tail (K = V) gets the log-probability -1e4 on the student's side.
    """
    known = log_softmax(np.concatenate([np.asarray(logprobs, np.float64), tail[:, None]], -1))
    n, vocab = log_q.shape
    event = np.full((n, vocab), ids.shape[1])
    np.put_along_axis(event, ids, np.arange(ids.shape[1])[None], -1)
    rest = np.where(event == ids.shape[1], np.exp(log_q), 0).sum(-1)
    log_rest = np.log(np.maximum(rest, 1e-300))
    log_rest = np.where(rest > 0, log_rest, -1e4)
    return known, np.concatenate([np.take_along_axis(log_q, ids, -1), log_rest[:, None]], -1), event


def bucket_gradients(name: str, knob: float, log_p, log_q_events, event, log_q) -> np.ndarray:
    """Gradient in the student's logits over the vocabulary: an event's is shared as q is in it."""
    by_event = gradients(name, knob, log_p, log_q_events)
    share = np.exp(log_q - np.take_along_axis(log_q_events, event, -1))
    return np.take_along_axis(by_event, event, -1) * share
