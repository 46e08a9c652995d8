"""Ids of a tokenizer with holes: its length is the highest id + 1, and no id may move."""

import json

import pytest

from dcod_jax.data.tokenizer import decode, load_tokenizer
from dcod_jax.errors import DcodError
from tests.tiny import ALPHABET, SPECIAL, write_tokenizer

COUNT = len(SPECIAL) + len(ALPHABET)


def edited(path, change):
    """A tiny tokenizer whose tokenizer.json a test has changed."""
    file = write_tokenizer(path) / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return path


def test_the_length_is_the_highest_id_and_one(tmp_path):
    def hole(content):
        content["model"]["vocab"]["z"] = 80

    assert len(load_tokenizer(write_tokenizer(tmp_path / "plain"))) == COUNT
    tokenizer = load_tokenizer(edited(tmp_path / "hole", hole))
    assert len(tokenizer) == 81
    ids = tokenizer.encode("fuzz", add_special_tokens=False)
    assert ids[-1] == 80
    assert decode(tokenizer, ids) == "fuzz"
    tokenizer.save_pretrained(tmp_path / "again")
    assert len(load_tokenizer(tmp_path / "again")) == 81


def test_an_added_token_whose_id_the_library_moves_is_refused(tmp_path):
    def late(content):
        content["added_tokens"].append({**content["added_tokens"][0], "id": 70, "content": "<x>"})

    with pytest.raises(DcodError, match=f"gives '<x>' the id 70, .* reads it as {COUNT}"):
        load_tokenizer(edited(tmp_path, late))
