"""Export: opens in transformers with equal logits, checked on writing, never half there."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from dcod_jax.config import BASE, load_recipe
from dcod_jax.data.templates import TemplateChoice
from dcod_jax.data.tokenizer import (
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError
from dcod_jax.export import command as exports
from dcod_jax.export.command import export, export_model, export_runs
from dcod_jax.losses.adaptive import initial
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.parallel.mesh import make_mesh, tree_shardings
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.types import TrainState

CARD = {
    "base_model": "base",
    "step": 30,
    "metrics": {"eval/loss": 1.25},
    "data": {
        "train": {
            "totals": {"records": 5, "tokens": 100, "completion_tokens": 60},
            "teacher": {"name": "big", "revision": "", "weights": "abc", "dtype": "bfloat16"},
            "mean_logprob": -0.5,
            "counts": {"kept": 5},
        }
    },
    "config": {"seed": 3},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The start: config, tokenizer, and weights that are not the trained ones."""
    return tiny.write_model(tmp_path_factory.mktemp("source"), seed=1)


def trained(**changes):
    """Parameters that bfloat16 cannot hold exactly."""
    config = from_hf(tiny.raw_config(**changes))
    return config, transformer.init_params(config, jax.random.key(9))


def write(path: Path, source: Path, *, model=None, **changes):
    config, params = model or trained()
    options = {
        "tokenizer_source": source,
        "dtype": "float32",
        "card": CARD,
        "max_shard_bytes": 1 << 30,
    }
    return export_model(params, config, path, **(options | changes))


def their_logits(path: Path, tokens: np.ndarray, dtype=torch.float32) -> np.ndarray:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


@pytest.mark.parametrize(
    "changes", [{}, QWEN2 | {"tie_word_embeddings": False}], ids=["llama", "qwen2"]
)
def test_a_float32_export_opens_in_transformers_with_equal_logits(tmp_path, source, changes):
    config, params = trained(**changes)
    path = tmp_path / "export"
    report = write(path, source, model=(config, params))
    assert report["max_logit_difference_from_float32"] == 0.0
    tokens = np.random.default_rng(0).integers(0, 49, (2, 20))
    ours = np.asarray(transformer.logits(config, params, jnp.asarray(tokens)))
    np.testing.assert_allclose(their_logits(path, tokens), ours, atol=2e-4)
    for mine, written in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(hf.load_model(path, dtype="float32")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, written)


def test_a_bfloat16_export_in_shards_says_how_far_it_is_from_float32(tmp_path, source):
    path = tmp_path / "export"
    report = write(path, source, dtype="bfloat16", max_shard_bytes=10_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    config, params = trained()
    cast = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 49, (2, 20)))
    rounded = np.asarray(transformer.logits(config, cast, tokens))
    np.testing.assert_allclose(their_logits(path, np.asarray(tokens)), rounded, atol=2e-4)
    assert 0 < report["max_logit_difference_from_float32"] < 0.2


def test_a_base_model_is_exported_with_the_end_that_its_template_writes(tmp_path, source):
    """transformers, and every verb that opens the export, stops where training ended a turn."""
    home, path = tmp_path / "base", tmp_path / "export"
    shutil.copytree(source, home)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (home / name).is_file():
            named = json.loads((home / name).read_text())
            (home / name).write_text(json.dumps(named | {"eos_token": "<system>"}))
    start = load_tokenizer(home)
    assert start.eos_token == "<system>"
    write(path, home)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs.eos_token == "<end>"
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert set(generation.eos_token_id) >= {1, start.eos_token_id}
    again = load_tokenizer(path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(start)
    assert template_fingerprint(again) == template_fingerprint(start)


def test_tokenizer_template_and_generation_config_come_along(tmp_path, source):
    path = tmp_path / "export"
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}<end>")
    write(path, source, template=TemplateChoice(str(template)))
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = theirs.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False)
    assert text == "1+1<end>"
    start = load_tokenizer(source)
    assert theirs("12+7?")["input_ids"] == start("12+7?")["input_ids"]
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert (generation.eos_token_id, generation.pad_token_id) == (1, 0)


def test_every_stop_token_is_in_the_export(tmp_path, source):
    """Those of config.json and the tokenizer's own (1), also where the config does not name it."""
    path = tmp_path / "export"
    write(path, source, model=trained(eos_token_id=[7, 3]))
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert generation.eos_token_id == [1, 3, 7]
    assert set(hf.read_config(path).eos_token_ids) == {1, 3, 7}


def test_a_lost_stop_token_is_found(tmp_path, source, monkeypatch):
    real = exports._write_generation_config

    def forgets(directory, *arguments):
        real(directory, *arguments)
        (directory / "generation_config.json").write_text("{}")

    monkeypatch.setattr(exports, "_write_generation_config", forgets)
    with pytest.raises(DcodError, match=r"stops at \(7, 3\), not at \(1, 3, 7\)"):
        write(tmp_path / "export", source, model=trained(eos_token_id=[7, 3]))
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_recipe_data_and_result(tmp_path, source):
    path = tmp_path / "export"
    write(path, source)
    text = (path / "README.md").read_text()
    for expected in (
        "step 30",
        "eval/loss: 1.25",
        "5 traces, 100 tokens",
        "name `big`",
        '"seed": 3',
    ):
        assert expected in text
    assert json.loads((path / exports.RECIPE).read_text()) == {"seed": 3}
    marker = json.loads((path / exports.MARKER).read_text())
    assert marker["checks"]["tensors_equal_in_dtype"] is True


def test_a_wrong_tensor_on_disk_is_found_and_nothing_is_left(tmp_path, source, monkeypatch):
    real = hf.save_params

    def flips(path, config, params, **options):
        kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
        mlp = {**params["layers"]["mlp"], "up_proj": {"kernel": kernel.at[1, 3, 5].add(1e-3)}}
        real(path, config, {**params, "layers": {**params["layers"], "mlp": mlp}}, **options)

    monkeypatch.setattr(hf, "save_params", flips)
    with pytest.raises(DcodError, match=r"layers\.mlp\.up_proj\.kernel reads back as another"):
        write(tmp_path / "export", source)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_on_disk_is_found(tmp_path, source, monkeypatch):
    real = hf.save_params

    def flips(path, config, params, **options):
        real(path, config, params, **options)
        file = Path(path) / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-6] ^= 0x10
        file.write_bytes(content)

    monkeypatch.setattr(hf, "save_params", flips)
    with pytest.raises(DcodError, match=r"reads back as another than the training"):
        write(tmp_path / "export", source)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_are_not_finite_are_not_exported(tmp_path, source):
    config, params = trained()
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(DcodError, match="not finite"):
        write(tmp_path / "export", source, model=(config, params))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_when_it_is_ours(tmp_path, source, monkeypatch):
    path = tmp_path / "export"
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(DcodError, match="not an export of this program"):
        write(path, source)
    assert [p.name for p in path.iterdir()] == ["thesis.txt"]
    (path / "thesis.txt").unlink()
    write(path, source)
    first = (path / "model.safetensors").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(exports, "verify", lambda *a, **k: (_ for _ in ()).throw(DcodError("no")))
        with pytest.raises(DcodError, match="no"):
            write(path, source, model=trained(initializer_range=0.2))
    assert (path / "model.safetensors").read_bytes() == first  # the old one is untouched

    config = from_hf(tiny.raw_config())
    write(path, source, model=(config, transformer.init_params(config, jax.random.key(10))))
    assert (path / "model.safetensors").read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_file_of_the_user_in_an_export_is_never_replaced(tmp_path, source):
    path = tmp_path / "export"
    write(path, source)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for name, content in {
        "my_notes.txt": b"mine",
        "sub/notes.txt": b"mine",
        "README.md": b"my own card",
        "model.safetensors": b"other weights",
        exports.MARKER: b"{}",
    }.items():
        file = path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with pytest.raises(DcodError, match=file.name):
            exports.check_destination(path)
        assert file.read_bytes() == content
        file.unlink()
        if name in before:
            file.write_bytes(before[name])
    link = path / "mine"
    for make, *of in ((os.symlink, "nowhere"), (os.symlink, tmp_path), (os.mkfifo,)):
        make(*of, link)
        with pytest.raises(DcodError, match="mine is not as an export"):
            exports.check_destination(path)
        link.unlink()
    (path / "README.md").rename(tmp_path / "card")
    (path / "README.md").symlink_to(tmp_path / "card")
    with pytest.raises(DcodError, match=r"README\.md is not as an export"):
        exports.check_destination(path)
    (tmp_path / "card").replace(path / "README.md")
    exports.check_destination(path)


def test_what_the_export_needs_is_checked_before_the_training(tmp_path, source):
    config = load_recipe(BASE)
    home = tmp_path / "student"
    shutil.copytree(source, home)
    config.run_dir, config.student.path = str(tmp_path / "run"), str(home)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}<end>")
    config.student.chat_template = str(template)
    exports.rehearse(config)
    bare = tmp_path / "bare"  # with tokenizer.json alone: no eos, so the model names the end
    bare.mkdir()
    shutil.copy(home / "tokenizer.json", bare)
    config.student.tokenizer = str(bare)
    exports.rehearse(config)
    config.student.tokenizer = ""
    for file, content in (
        ("generation_config.json", "[1]"),
        ("generation_config.json", '{"temperature": NaN}'),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer_config.json", "[" * 99_999),
    ):
        had = (home / file).read_bytes() if (home / file).exists() else None
        (home / file).write_text(content)
        with pytest.raises(DcodError):
            exports.rehearse(config)
        (home / file).unlink() if had is None else (home / file).write_bytes(had)
    config.student.chat_template = str(tmp_path / "absent.jinja")
    with pytest.raises(DcodError, match=r"absent\.jinja"):
        exports.rehearse(config)
    config.student.chat_template = ""
    write(tmp_path / "own", source)
    config.export.path, own = f"{tmp_path}/run/../own", str(tmp_path / "own")
    (tmp_path / "run").mkdir()
    for name, section in (("the start", config.student), ("teacher", config.teacher)):
        before, section.path = section.path, own
        with pytest.raises(DcodError, match=f"own is {name} of the run; set export.path to"):
            exports.rehearse(config)
        section.path = before
    exports.rehearse(config)
    config.export.path = str(tmp_path)
    with pytest.raises(DcodError, match="not an export of this program"):
        exports.rehearse(config)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, source):
    with pytest.raises(DcodError, match="49 entries"):
        write(tmp_path / "export", source, model=trained(vocab_size=40))


def test_the_verb_exports_the_best_checkpoint_and_says_so(tmp_path, source, caplog):
    caplog.set_level("INFO")
    _, params = trained()
    with Checkpoints(tmp_path / "run") as save:
        save(params, 10, {"eval/nll": 1.0})
        worse = jax.tree.map(lambda x: x * 1.5, params)
        save(worse, 20, {"eval/nll": 2.0})
    recipe = load_recipe(BASE)
    recipe.run_dir, recipe.student.path = str(tmp_path / "run"), str(source)
    recipe.export.dtype = "float32"
    path = export(recipe)
    assert path == tmp_path / "run" / "export"
    assert "step 10 in float32, re-opened" in caplog.text
    _, found = hf.load_model(path, dtype=jnp.float32)
    np.testing.assert_array_equal(found["norm"]["scale"], params["norm"]["scale"])
    assert "eval/nll: 1" in (path / "README.md").read_text()
    recipe.export.step, recipe.run_dir, recipe.compare = 20, str(tmp_path), ("run seed=1",)
    export_runs(recipe)  # of each variant
    _, found = hf.load_model(path, dtype=jnp.float32)
    np.testing.assert_array_equal(found["norm"]["scale"], worse["norm"]["scale"])


def test_no_checkpoint_is_said(tmp_path, source):
    recipe = load_recipe(BASE)
    recipe.run_dir, recipe.student.path = str(tmp_path / "run"), str(source)
    with pytest.raises(DcodError, match=r"expected a run directory with .*; no such directory"):
        export(recipe)
    assert not (tmp_path / "run").exists()


def test_sharded_parameters_export_as_whole_ones(tmp_path, source):
    config, params = trained()
    write(tmp_path / "one", source, model=(config, params))
    mesh = make_mesh(2, 2, tensor=2)
    placed = jax.device_put(params, tree_shardings(mesh, transformer.logical_axes(config)))
    write(tmp_path / "many", source, model=(config, placed), mesh=mesh)
    one, many = (tmp_path / name / "model.safetensors" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


class Checkpoints:
    """Writes checkpoints of parameters alone, as a run would."""

    def __init__(self, run_dir: Path):
        self.writer = Checkpointer(run_dir, best_metric="eval/nll")

    def __enter__(self):
        return self.save

    def save(self, params, step, metrics):
        state = TrainState(
            step=jnp.int32(step),
            params=params,
            opt_state={"count": jnp.int32(0)},
            loss_state=initial(),
        )
        self.writer.save(Snapshot(state=state, step=step, config={"seed": 0}, metrics=metrics))
        self.writer.wait()

    def __exit__(self, *details):
        self.writer.close()
