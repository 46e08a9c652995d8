"""A config of prepare over a few traces."""

from pathlib import Path

import pytest
from prepare_inputs import record, save_tokenizer, write

from dcod_jax.configs.base import get_config


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), merges=[("h", "e")])


@pytest.fixture
def config(tmp_path, tokenizer_dir):
    c = get_config()
    c.run_dir = str(tmp_path / "run")
    c.student.tokenizer = str(tokenizer_dir)
    c.data.traces = str(write(tmp_path / "traces.jsonl", [record(i) for i in range(5)]))
    c.train.progress = False
    return c
