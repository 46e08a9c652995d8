"""Where a run's random numbers come from: a stream for each (seed, domain, index), none twice.

A domain is a use of random numbers; its index counts what it draws for: epochs, steps.
"""

from __future__ import annotations

import numpy as np

# Domain -> its number, which never changes: the streams of existing runs follow from it.
DOMAINS = {
    "shuffle": 0,  # the order of the traces of epoch `index`
    "on_policy": 1,  # whether step `index` is on the student's own text, and its samples
    "init": 2,  # random initial parameters
    "evaluate": 3,  # sampled answers
    "drift": 4,  # sampled continuations
    "generate": 5,  # traces sampled from the teacher
}


def bits(seed: int, domain: str, index: int = 0) -> np.random.Philox:
    """A generator of raw bits, the same on every machine and for every version of NumPy."""
    # NumPy fills the entropy up to its pool before the spawn key, so no index can stand in for one.
    spawn = (DOMAINS[domain],) if DOMAINS[domain] else ()
    return np.random.Philox(np.random.SeedSequence((seed, index), spawn_key=spawn))


def key_seed(seed: int, domain: str) -> int:
    """What jax.random.key is made of: 31 bits of the stream; for "generate" the seed itself."""
    if domain == "generate":
        return seed  # traces that were sampled before there were domains stay the same
    return int(bits(seed, domain).random_raw() >> 33)
