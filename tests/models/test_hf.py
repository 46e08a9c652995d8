"""HF directories: byte-identical round trips, sharded index, and every refusal by tensor name."""

from __future__ import annotations

import functools
import json
import os
import platform
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import _SMALL
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from dcod_jax.errors import DcodError
from dcod_jax.models import config as configs
from dcod_jax.models import hf, tensor_files, transformer
from dcod_jax.models import tensors as tensor_forms
from dcod_jax.models.tensors import flatten
from dcod_jax.parallel import mesh as meshes

LARGE = 10**9


def _write_config(directory, config, dtype="float32"):
    directory.mkdir(exist_ok=True)
    content = configs.to_hf(config, dtype=dtype)
    (directory / "config.json").write_text(json.dumps(content))


def _tensors(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _assert_same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("shard_bytes", [LARGE, 20_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_byte_identical(pair, tmp_path, dtype, shard_bytes):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = AutoModelForCausalLM.from_pretrained(pair.directory, dtype=getattr(torch, dtype))
    model.save_pretrained(theirs, max_shard_size=shard_bytes)
    assert (theirs / tensor_files.INDEX).exists() == (shard_bytes != LARGE)
    config, params = hf.load_model(theirs, dtype=dtype)
    hf.save_params(ours, config, params, dtype=dtype, max_shard_bytes=shard_bytes)
    _assert_same_bytes(_tensors(ours), _tensors(theirs))
    # float32 holds every value of the narrower types, so it gives the same bytes back too
    params = hf.load_params(theirs, config, dtype=jnp.float32)
    hf.save_params(ours, config, params, dtype=dtype, max_shard_bytes=shard_bytes)
    _assert_same_bytes(_tensors(ours), _tensors(theirs))
    names = {path.name for path in ours.iterdir()}
    assert (tensor_files.INDEX in names) == (shard_bytes != LARGE)
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("shard_bytes", [LARGE, 20_000])
def test_transformers_loads_what_we_write(pair, tmp_path, shard_bytes):
    hf.save_params(tmp_path, pair.config, pair.params, dtype="float32", max_shard_bytes=shard_bytes)
    _write_config(tmp_path, pair.config)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, pair.model(tokens).logits)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_sharded_load_equals_plain(pair):
    mesh = meshes.make_mesh(2, 2, tensor=2)
    with pytest.raises(DcodError, match="vocab_size=131"):
        hf.load_model(pair.directory, dtype=jnp.float32, mesh=mesh)
    mesh = meshes.make_mesh(-1, 4)
    _, sharded = hf.load_model(pair.directory, dtype=jnp.float32, mesh=mesh)
    kernel = sharded["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 48)
    jax.tree.map(np.testing.assert_array_equal, sharded, pair.params)


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_saving_sharded_params_gives_the_same_file(pair, tmp_path):
    mesh = meshes.make_mesh(-1, 4)
    _, sharded = hf.load_model(pair.directory, dtype=jnp.float32, mesh=mesh)
    hf.save_params(tmp_path, pair.config, sharded, dtype="float32", max_shard_bytes=LARGE)
    _assert_same_bytes(_tensors(tmp_path), _tensors(pair.directory))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_piece_goes_through_the_host_in_blocks(model_dir, monkeypatch, devices):
    """Of whole rows or layers, of at most so many bytes, on each device once; and back."""
    directory, _ = model_dir
    config, plain = _load(directory)
    mesh = meshes.make_mesh(1, 2, devices=jax.devices()[:2]) if devices == 2 else None
    held, real = [], tensor_forms._piece_reader

    def counts(*arguments, **options):
        read = real(*arguments, **options)
        return lambda path, part: (held.append((path, read(path, part))), held[-1][1])[1]

    monkeypatch.setattr(tensor_forms, "STAGED", 100)
    monkeypatch.setattr(tensor_forms, "_piece_reader", counts)
    _, params = hf.load_model(directory, dtype=jnp.float32, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    pieces = {path: leaf.addressable_shards for path, leaf in flatten(params).items()}
    assert all(host.nbytes <= max(100, host[0].nbytes) for _, host in held)
    for path, shards in pieces.items():
        own = {str(shard.index): shard.data.nbytes for shard in shards}
        assert sum(host.nbytes for place, host in held if place == path) == sum(own.values())
    hf.check_saved(directory, config, params, dtype="float32")
    for path in ("embed_tokens.embedding", "layers.mlp.down_proj.kernel"):
        other = flatten(params)
        other[path] = other[path].at[(-1,) * other[path].ndim].add(1e-3)
        with pytest.raises(DcodError, match=f"{path} reads back as another"):
            hf.check_saved(directory, config, tensor_forms.unflatten(other), dtype="float32")


def test_writing_holds_one_file_and_nothing_of_the_last(tmp_path, monkeypatch):
    """Counted exactly, for a model of a tensor a file, the largest of which hold two matrices."""
    monkeypatch.setattr(tensor_forms, "STAGED", 1 << 14)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024}
    config = configs.from_hf(_SMALL | shape | {"model_type": "phi3", "tie_word_embeddings": True})
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), transformer.param_shapes(config))
    save = functools.partial(hf.save_params, tmp_path, config, params, dtype="float32")
    save(max_shard_bytes=1 << 20)  # compiles, which leaves objects of its own
    tracemalloc.start()
    try:
        save(max_shard_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert largest > 2 << 20
    assert peak < 1.3 * largest


@pytest.fixture
def model_dir(tmp_path):
    """A small llama directory (untied) whose tensors a test can change: (directory, tensors)."""
    config = configs.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    )
    _write_config(tmp_path, config)
    rng = np.random.default_rng(0)
    names = {slot.name: slot.shape for slot in hf.slots(config, "hf")}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    save_file(tensors, tmp_path / hf.SINGLE)
    return tmp_path, tensors


def _load(directory):
    return hf.load_model(directory, dtype=jnp.float32)


def _edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_missing_tensor_is_named(model_dir):
    directory, tensors = model_dir
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / hf.SINGLE)
    with pytest.raises(DcodError, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(directory)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "x"]
)
def test_unexpected_tensor_is_named(model_dir, name):
    directory, tensors = model_dir
    save_file({**tensors, name: np.zeros(8, np.float32)}, directory / hf.SINGLE)
    with pytest.raises(DcodError, match=name):
        _load(directory)


def test_wrong_shape_is_named_with_both_shapes(model_dir):
    directory, tensors = model_dir
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    save_file(tensors, directory / hf.SINGLE)
    with pytest.raises(DcodError, match=r"model\.norm\.weight has shape \(9,\).*\(8,\)"):
        _load(directory)


def test_integer_weights_are_refused(model_dir):
    directory, tensors = model_dir
    tensors["model.norm.weight"] = np.zeros(8, np.int8)
    save_file(tensors, directory / hf.SINGLE)
    with pytest.raises(DcodError, match=r"model\.norm\.weight has type I8"):
        _load(directory)


def test_old_rotary_buffers_are_tolerated(model_dir):
    directory, tensors = model_dir
    _, before = _load(directory)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    save_file({**tensors, **extra}, directory / hf.SINGLE)
    _, after = _load(directory)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_tied_head_duplicate_must_equal_the_embedding(model_dir):
    directory, tensors = model_dir
    _edit_config(directory, tie_word_embeddings=True)
    with pytest.raises(DcodError, match=r"lm_head\.weight differs"):
        _load(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / hf.SINGLE)
    _, params = _load(directory)
    assert "lm_head" not in params
    del tensors["lm_head.weight"]
    save_file(tensors, directory / hf.SINGLE)
    _load(directory)
    _edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(DcodError, match=r"lm_head\.weight.*tie_word_embeddings=true"):
        _load(directory)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(model_dir, keep):
    directory, _ = model_dir
    file = directory / hf.SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DcodError, match="not a whole safetensors file"):
        _load(directory)


def test_index_that_names_a_missing_file_or_tensor(model_dir):
    directory, tensors = model_dir
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:-1]}
    (directory / hf.SINGLE).unlink()
    save_file(first, directory / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names[:-1], "model-00001-of-00002.safetensors")
    weight_map[names[-1]] = "model-00002-of-00002.safetensors"
    (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DcodError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        _load(directory)
    weight_map[names[-1]] = "model-00001-of-00002.safetensors"
    (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DcodError, match=f"{names[-1]} is not in model-00001"):
        _load(directory)
    (directory / tensor_files.INDEX).write_text("{}")
    with pytest.raises(DcodError, match="weight_map is missing"):
        _load(directory)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(DcodError, match="path is empty"):
        _load("")
    with pytest.raises(DcodError, match=r"no such model directory; .* holds nothing"):
        _load(tmp_path / "absent")
    with pytest.raises(DcodError, match=r"no such model directory.*hf download owner/model"):
        _load("owner/model")
    with pytest.raises(DcodError, match=r"no config\.json"):
        _load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(DcodError, match="is not valid JSON"):
        _load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DcodError, match="JSON object"):
        _load(tmp_path)


def test_directory_without_safetensors(model_dir):
    directory, _ = model_dir
    (directory / hf.SINGLE).unlink()
    with pytest.raises(DcodError, match=f"no {hf.SINGLE}"):
        _load(directory)
    (directory / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(DcodError, match="save_pretrained"):
        _load(directory)


def test_config_is_read_from_a_file_too(model_dir):
    directory, _ = model_dir
    assert hf.load_config(directory / "config.json") == hf.load_config(directory)


@pytest.mark.parametrize(
    ("own", "named", "merged"),
    [(2, [2, 0, 5], (2, 0, 5)), ([4, 2], 7, (4, 2, 7)), (None, [3], (3,)), ([1, 2], None, (1, 2))],
)
def test_texts_end_at_the_ids_of_both_configs(model_dir, own, named, merged):
    directory, _ = model_dir
    _edit_config(directory, eos_token_id=own)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert _load(directory)[0].eos_token_ids == merged
    assert hf.read_config(directory / "config.json").eos_token_ids == merged
    (directory / "generation_config.json").write_text("{}")
    assert _load(directory)[0].eos_token_ids == tuple(np.ravel([] if own is None else own))


@pytest.mark.parametrize("wrong", ["2", [2, None], 1.5, True, [-1]])
def test_stop_ids_that_are_no_ids_are_refused(model_dir, wrong):
    directory, _ = model_dir
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(DcodError, match=r"generation_config.json: eos_token_id=.* must be a token"):
        _load(directory)


def test_failed_save_leaves_the_old_weights(model_dir, monkeypatch):
    directory, tensors = model_dir
    config, params = _load(directory)

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", disk_full)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(DcodError, match="No space left"):
        hf.save_params(directory, config, changed, dtype="float32", max_shard_bytes=LARGE)
    _assert_same_bytes(_tensors(directory), tensors)
    monkeypatch.undo()
    # Of a killed process, whose lock nobody holds; a lock of another host may not be seen.
    (directory / f".dcod_jax.partial-{platform.node()}-1").mkdir()
    (directory / ".dcod_jax.partial-another-host-1").mkdir()
    hf.save_params(directory, config, changed, dtype="float32", max_shard_bytes=LARGE)
    left = [".dcod_jax.partial-another-host-1", "config.json", hf.SINGLE]
    assert sorted(os.listdir(directory)) == left


def test_saving_over_another_layout_leaves_no_stale_file(model_dir):
    directory, tensors = model_dir
    config, params = _load(directory)
    for shard_bytes in (400, 900, LARGE, 400):
        hf.save_params(directory, config, params, dtype="float32", max_shard_bytes=shard_bytes)
        _assert_same_bytes(_tensors(directory), tensors)
        names = {file.name for file in directory.glob("*.safetensors")}
        assert names == {file.name for file in set(tensor_files.weight_map(directory).values())}


def test_save_refuses_params_of_another_config(model_dir):
    directory, _ = model_dir
    config, params = _load(directory)
    del params["lm_head"]
    with pytest.raises(DcodError, match=r"lm_head\.embedding should be \(20, 8\), is absent"):
        hf.save_params(directory, config, params, dtype="float32", max_shard_bytes=LARGE)
    with pytest.raises(DcodError, match="max_shard_bytes=0"):
        hf.save_params(directory, config, params, dtype="float32", max_shard_bytes=0)


def test_fingerprint_follows_the_content(model_dir):
    directory, tensors = model_dir
    first = hf.weights_fingerprint(directory)
    _edit_config(directory, bos_token_id=7)
    assert hf.weights_fingerprint(directory) == first
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, directory / hf.SINGLE)
    assert hf.weights_fingerprint(directory) != first


def test_half_precision_values_survive(model_dir):
    directory, tensors = model_dir
    narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(narrow, directory / hf.SINGLE)
    _, params = _load(directory)
    embedding = flatten(params)["embed_tokens.embedding"]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, narrow["model.embed_tokens.weight"])
