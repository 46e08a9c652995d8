"""The hash of a model's weights: computed once by a process, a machine and a run."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dcod_jax import copies, files
from dcod_jax.errors import DcodError
from dcod_jax.models import hf
from dcod_jax.parallel import hosts


@pytest.fixture
def hashed(monkeypatch, copy_cache):
    """The files that are hashed, in their order; nothing is remembered at first."""
    real, read = files.hashlib.file_digest, []
    monkeypatch.setattr(
        files.hashlib,
        "file_digest",
        lambda file, name: (read.append(file.name), real(file, name))[1],
    )
    copies._digest.cache_clear()
    return read


def test_unchanged_weights_are_hashed_once_by_a_process_and_by_a_machine(
    tmp_path, hashed, monkeypatch
):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / hf.SINGLE)
    first = hf.weights_fingerprint(tmp_path)
    assert hf.weights_fingerprint(tmp_path) == first
    assert len(hashed) == 1
    copies._digest.cache_clear()  # as another process has it: so young a file is read again
    assert hf.weights_fingerprint(tmp_path) == first
    assert len(hashed) == 2
    monkeypatch.setattr(copies, "_SETTLED", -1.0)
    for expected in (3, 3, 3):
        copies._digest.cache_clear()
        assert hf.weights_fingerprint(tmp_path) == first
        assert len(hashed) == expected
    assert not hf.weights_changed(tmp_path)
    kept = (tmp_path / hf.SINGLE).stat()
    save_file({"x": np.ones(3, np.float32)}, tmp_path / hf.SINGLE)
    os.utime(tmp_path / hf.SINGLE, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert hf.weights_changed(tmp_path)
    assert len(hashed) == 3
    assert hf.weights_fingerprint(tmp_path) != first
    assert not hf.weights_changed(tmp_path)


def test_a_damaged_note_of_a_hash_is_named(tmp_path, copy_cache, hashed, monkeypatch):
    monkeypatch.setattr(copies, "_SETTLED", -1.0)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / hf.SINGLE)
    hf.weights_fingerprint(tmp_path)
    [note] = copy_cache.glob("*.json")
    note.write_text('{"state": "1"}')
    with pytest.raises(DcodError, match=f"{note.name}: sha256"):
        hf.weights_fingerprint(tmp_path)


def test_of_several_processes_the_first_one_hashes(tmp_path, hashed, monkeypatch):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / hf.SINGLE)
    alone = hf.weights_fingerprint(tmp_path)
    said = []
    monkeypatch.setattr(hosts, "_joined", [SimpleNamespace(process=1, moved=lambda: None)])
    monkeypatch.setattr(hosts, "exchange", lambda name, text: [alone, said.append(text) or text])
    del hashed[:]
    copies._digest.cache_clear()
    assert hf.weights_fingerprint(tmp_path / "not seen here") == alone
    assert (hashed, said) == ([], [None])  # it looks for nothing, and says so
    with hosts.alone():
        assert hf.weights_fingerprint(tmp_path) == alone
    assert len(hashed) == 1
