"""Scores added to a dataset on disk: nothing else changes, and a stop loses nothing."""

import dataclasses
import shutil

import numpy as np
import pytest
from fake_traces import TEACHER, contents, equal, fake_scores, make_traces, write

from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.scores import add_scores
from dcod_jax.errors import DcodError


def test_scoring_adds_log_probs_and_nothing_else(tmp_path):
    given = make_traces(21, scored=False)
    directory = write(tmp_path / "d", given)
    manifest = add_scores(
        directory,
        teacher=TEACHER,
        settings={"top_k": 2},
        score_shard=fake_scores,
    )
    dataset = TraceDataset(directory)
    expected = fake_scores(given)
    assert all(equal(a, b) for a, b in zip(dataset.read(range(21)), expected, strict=True))
    assert dataset.manifest == manifest
    assert (manifest["teacher"], manifest["score"], manifest["top_k"]) == (TEACHER, {"top_k": 2}, 2)
    assert manifest["captured_mass"] == pytest.approx(0.75)
    every = np.concatenate([t.logprobs for t in expected])
    assert manifest["mean_logprob"] == pytest.approx(every.mean())
    listed = {shard["file"] for shard in manifest["shards"]}
    assert set(contents(directory)) == {*listed, "lengths.npy", "manifest.json"}
    # The same call again has nothing to do; another teacher must be told to replace.
    assert (
        add_scores(directory, teacher=TEACHER, settings={"top_k": 2}, score_shard=no_call)
        == manifest
    )
    other = TEACHER | {"name": "bigger", "weights": "def"}
    with pytest.raises(DcodError, match=r"from big.*score.overwrite=True"):
        add_scores(directory, teacher=other, settings={"top_k": 2}, score_shard=no_call)
    replaced = add_scores(
        directory, teacher=other, settings={"top_k": 2}, score_shard=fake_scores, overwrite=True
    )
    assert TraceDataset(directory).manifest == replaced
    assert replaced["teacher"] == other


def no_call(traces):
    raise AssertionError("nothing was left to score")


@pytest.mark.parametrize(
    "change",
    [
        lambda traces: traces[1:],
        lambda traces: traces[::-1],
        lambda traces: [*traces[:-1], dataclasses.replace(traces[-1], logprobs=None)],
        lambda traces: [
            dataclasses.replace(traces[0], token_ids=traces[0].token_ids + 1),
            *traces[1:],
        ],
    ],
    ids=["lost", "reordered", "unscored", "changed"],
)
def test_a_scoring_that_returns_other_traces_is_refused(tmp_path, change):
    directory = write(tmp_path / "d", make_traces(5, scored=False))
    before = contents(directory)
    with pytest.raises(DcodError, match="must return its 5 traces unchanged"):
        add_scores(
            directory, teacher=TEACHER, settings={}, score_shard=lambda t: change(fake_scores(t))
        )
    assert contents(directory) == before


class StoppedError(Exception):
    pass


def stop_after(shards: int):
    left = iter(range(shards))

    def score_shard(traces):
        if next(left, None) is None:
            raise StoppedError
        return fake_scores(traces)

    return score_shard


def test_a_stopped_scoring_goes_on_and_a_damaged_shard_is_done_again(tmp_path):
    directory = write(tmp_path / "d", make_traces(30, scored=False), shard_records=4)
    whole = shutil.copytree(directory, tmp_path / "whole")
    add_scores(whole, teacher=TEACHER, settings={}, score_shard=fake_scores)
    with pytest.raises(StoppedError):
        add_scores(directory, teacher=TEACHER, settings={}, score_shard=stop_after(5))
    assert not TraceDataset(directory).scored  # still the old dataset
    with pytest.raises(DcodError, match=r"unfinished scoring has teacher .*big"):
        add_scores(directory, teacher=TEACHER | {"weights": "x"}, settings={}, score_shard=no_call)
    damaged = next(directory.glob("scored-*-00003.array_record"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    calls = []

    def counted(traces):
        calls.append(len(traces))
        return fake_scores(traces)

    add_scores(directory, teacher=TEACHER, settings={}, score_shard=counted)
    assert calls == [4, 4, 4, 2]
    assert contents(directory) == contents(whole)


def test_hosts_that_do_not_write_compute_along(tmp_path):
    directory = write(tmp_path / "d", make_traces(9, scored=False), shard_records=4)
    before, calls = contents(directory), []

    def counted(traces):
        calls.append(len(traces))
        return fake_scores(traces)

    add_scores(directory, teacher=TEACHER, settings={}, score_shard=counted, write=False)
    assert calls == [4, 4, 1]
    assert contents(directory) == before
