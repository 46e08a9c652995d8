"""A run goes on with the data that it learned from, or says what differs."""

import pytest

from dcod_jax.errors import DcodError
from dcod_jax.files import as_path
from dcod_jax.train.checkpointer import Record
from dcod_jax.train.learned_from import goes_on_with, position

PARTS = {
    "training traces": "a1",
    "held-out traces": "b1",
    "teacher of the log-probs": "c1",
    "top-k of the log-probs": 64,
    "tokenizer": "d1",
    "chat template": "e1",
}
RUN = as_path("runs/x/checkpoints")


def go_on(now, *, accept=False, steps=8, data=None):
    then = {"parts": PARTS, "changes": []} if data is None else data
    found = Record(step=4, data=then)
    return goes_on_with(now, found, RUN, accept=accept, steps=steps)


@pytest.mark.parametrize("part", [*PARTS, "live teacher"])
def test_each_part_that_differs_is_named_with_both_values(part):
    now = PARTS | {part: "new"}
    with pytest.raises(DcodError, match=rf"step 4:\n  {part}: {PARTS.get(part)} then, new now\n"):
        go_on(now)
    [change] = go_on(now, accept=True)["changes"]
    assert change == {"step": 4, "part": part, "then": PARTS.get(part), "now": "new"}


def test_accepted_changes_add_up_and_hold_for_the_next_start():
    first = go_on(PARTS | {"tokenizer": "d2"}, accept=True)
    second = go_on(PARTS, accept=True, data=first)
    assert [change["now"] for change in second["changes"]] == ["d2", "d1"]
    assert go_on(PARTS, data=second) == second


def test_the_same_data_changes_nothing():
    assert go_on(dict(PARTS)) == {"parts": PARTS, "changes": []}


def test_a_finished_run_is_told_and_keeps_its_record(caplog):
    caplog.set_level("INFO")
    assert go_on(PARTS | {"tokenizer": "d2"}, steps=4)["parts"] == PARTS
    assert "all steps were done with other data" in caplog.text


def test_other_traces_are_begun_with_the_next_epoch():
    state = {"epoch": 2, "row": 5, "stream": "old"}
    assert position(state, "old", accept=True) == state
    assert position(state, "new", accept=False) == state  # which the pipeline refuses
    assert position(state, "new", accept=True) == {"epoch": 3, "row": 0, "stream": "new"}
