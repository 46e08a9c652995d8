"""One stream for each use of random numbers, and the shuffle's as it always was."""

import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dcod_jax import seeds

PACKAGE = Path(seeds.__file__).parent
# jax.random.key(number) below a seed that the caller derived, and shapes that need any key.
MAKES_KEYS = {"seeds", "models.transformer", "sample.sampler", "train.setup", "study.lab"}


def test_no_two_domains_share_a_stream():
    """Not at any index, and an index as large as a domain's number is no domain."""
    numbers = itertools.product((0, 1, 7, 2**40), seeds.DOMAINS, range(8))
    drawn = [number for use in numbers for number in seeds.bits(*use).random_raw(16).tolist()]
    assert len(set(drawn)) == len(drawn)
    for seed in (0, 1, 7):
        keys = [jax.random.key(seeds.key_seed(seed, domain)) for domain in seeds.DOMAINS]
        below = [jax.random.key_data(jax.random.split(key, 8)) for key in keys]
        below += [
            jax.random.key_data(jax.random.fold_in(key, i + 8)) for key in keys for i in (0, 1)
        ]
        words = np.concatenate([np.reshape(x, (-1, 2)) for x in below])
        assert len(np.unique(words, axis=0)) == len(words)


def test_the_shuffle_and_the_teachers_samples_are_those_of_existing_runs():
    before = np.random.Philox(np.random.SeedSequence((3, 7))).random_raw(4)
    np.testing.assert_array_equal(seeds.bits(3, "shuffle", 7).random_raw(4), before)
    assert seeds.key_seed(3, "generate") == 3
    assert seeds.bits(3, "on_policy", 7).random_raw() != before[0]
    with pytest.raises(KeyError):
        seeds.bits(0, "another")


def test_a_runs_streams_are_made_in_one_place():
    making = {"SeedSequence|Philox": {"seeds"}, r"random\.key\(": MAKES_KEYS}
    for pattern, allowed in making.items():
        for path in PACKAGE.rglob("*.py"):
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            assert name in allowed or not re.search(pattern, path.read_text()), name
