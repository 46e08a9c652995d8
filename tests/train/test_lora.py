"""Adapters: their product and gradients, a frozen base, restarts, and exports merged and not."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from flax import nnx, traverse_util
from transformers import AutoModelForCausalLM

from dcod_jax import config as configs
from dcod_jax.config_checks import config_errors
from dcod_jax.errors import DcodError
from dcod_jax.export.command import export
from dcod_jax.models import cached, hf, lora, transformer
from dcod_jax.models.config import Lora
from dcod_jax.models.linear import Linear
from dcod_jax.models.peft import to_peft
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.train import command
from dcod_jax.train.checkpoint_reader import read_params, read_student
from dcod_jax.train.settings import loss_config
from dcod_jax.train.step import init_state, make_eval_step, make_train_step
from tests.train import test_train_step as steps

SETTINGS = {"rank": 4, "alpha": 6.0, "rslora": True, "targets": ("q_proj", r"mlp\..*", "o_proj")}
MODEL = lora.with_adapter(steps.MODEL, SETTINGS)
SCALE = 6.0 / 2.0  # alpha / sqrt(rank)


@functools.cache
def adapter() -> dict:
    """Adapters that change the model: neither matrix is 0."""
    mesh = make_mesh(devices=jax.devices()[:1])
    made = lora.init_trained(MODEL, jax.random.key(3), mesh)
    draw = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: np.float32(np.asarray(x) + 0.05 * draw.normal(size=x.shape)), made
    )


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree))


def merged() -> dict:
    """W + s·A·B by numpy, in float64."""
    whole, low = flat(steps.params()), flat(adapter())
    for *path, name in low:
        if name == "lora_a":
            a, b = (np.asarray(low[(*path, end)], np.float64) for end in lora.ADAPTER)
            whole[(*path, "kernel")] = whole[(*path, "kernel")] + SCALE * (a @ b)
    return traverse_util.unflatten_dict({k: np.asarray(v, np.float32) for k, v in whole.items()})


def test_at_full_rank_the_first_step_is_that_of_the_matrix_itself():
    """With A the identity and scale 1 the gradient of B is the matrix's, bit for bit."""
    options = {"std": 0.1, "rngs": nnx.Rngs(0)}
    names = ("embed", "mlp"), "mlp.up_proj", "ffn_up"
    full = Lora(rank=6, alpha=6.0, targets=("up_proj",))
    maps = [Linear((6, 5), *names, **options, lora=given) for given in (None, full)]
    maps[1].kernel[...], maps[1].lora_a[...] = maps[0].kernel[...], jnp.eye(6)
    draw = np.random.default_rng(0)
    x, wanted = (jnp.asarray(draw.normal(size=(7, n)), jnp.float32) for n in (6, 5))
    changes = []
    for one, leaf in zip(maps, ("kernel", "lora_b"), strict=True):
        gradients = nnx.grad(lambda one: jnp.square(one(x) - wanted).sum())(one)
        changes.append(np.asarray(gradients[leaf][...]))
    assert np.abs(changes[0]).max() > 0.1
    np.testing.assert_array_equal(*changes)


def test_the_product_is_that_of_merged_matrices_in_every_form():
    """Packed forward pass, and decoding with kernels transposed; also by `merge`."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, steps.VALID, (2, 12)), jnp.int32)
    base = jax.tree.map(jnp.asarray, steps.params())
    whole = jax.tree.map(jnp.asarray, lora.join(adapter(), base))
    logits = jax.jit(transformer.logits, static_argnums=0)
    wanted = np.asarray(logits(steps.MODEL, jax.tree.map(jnp.asarray, merged()), ids))
    assert np.abs(wanted - logits(steps.MODEL, base, ids)).max() > 0.1
    np.testing.assert_allclose(logits(MODEL, whole, ids), wanted, atol=2e-5)

    @jax.jit
    def decoded(params, ids):
        options = {"positions": jnp.broadcast_to(jnp.arange(12), (2, 12)), "transposed": True}
        cache = cached.init_cache(MODEL, 2, 12, jnp.float32)
        form = cached.transpose_kernels(params)
        hidden, _ = cached.forward_with_cache(MODEL, form, ids, cache=cache, **options)
        return hidden @ transformer.head_weight(MODEL, params).T

    np.testing.assert_allclose(decoded(whole, ids), wanted, atol=2e-5)
    for path, leaf in flat(lora.merge(MODEL, adapter(), base)).items():
        np.testing.assert_allclose(leaf, flat(merged())[path], atol=1e-6)
    assert base == {}


@functools.cache
def step_of(sizes=(1, 1, 1), microbatches=1):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), devices=devices)
    forward = dataclasses.replace(steps.forward_of(steps.loss_config(), mesh), model=MODEL)
    options = {"batch_size": steps.ROWS, "microbatches": microbatches}
    step = make_train_step(forward, optax.sgd(1.0), lambda step: jnp.float32(1), **options)
    return forward, step


def one_step(**options):
    forward, step = step_of(**options)
    own = jax.tree.map(jnp.asarray, adapter())
    state = init_state(own, optax.sgd(1.0), mesh=forward.mesh, model_config=MODEL)
    state, values = step(state, steps.packed(), steps.params())
    return jax.device_get(state.params), {key: float(value) for key, value in values.items()}


def test_gradients_are_those_of_full_training_through_the_chain_rule():
    step, _ = steps.step_of()
    mesh = make_mesh(devices=jax.devices()[:1])
    start = jax.tree.map(jnp.asarray, merged())
    state = init_state(start, optax.sgd(1.0), mesh=mesh, model_config=steps.MODEL)
    full = flat(step(state, steps.packed())[0].params)
    before, after = flat(adapter()), flat(one_step()[0])
    assert before.keys() == after.keys()
    for *path, name in before:
        if name == "lora_a":
            kernel = (*path, "kernel")
            gradient = np.float64(flat(merged())[kernel]) - full[kernel]
            a, b = (before[(*path, end)] for end in lora.ADAPTER)
            for end, wanted in (
                ("lora_a", SCALE * gradient @ np.swapaxes(b, 1, 2)),
                ("lora_b", SCALE * np.swapaxes(a, 1, 2) @ gradient),
            ):
                got = before[(*path, end)] - after[(*path, end)]
                atol = 1e-4 * np.abs(wanted).max()
                assert atol > 1e-7
                np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


@pytest.mark.long
def test_devices_and_microbatches_change_nothing():
    wanted, got = one_step(), one_step(sizes=(2, 2, 2), microbatches=2)
    for path, leaf in flat(wanted[0]).items():
        change = np.abs(leaf - flat(adapter())[path]).max()
        assert change > 0
        np.testing.assert_allclose(flat(got[0])[path], leaf, rtol=0, atol=2e-5 * change + 1e-7)
    assert got[1]["nll"] == pytest.approx(wanted[1]["nll"], rel=1e-5)


def test_fifty_steps_leave_every_bit_of_the_base_and_the_loss_falls():
    forward, step = step_of()
    base = jax.tree.map(jnp.asarray, steps.params())
    state = init_state(
        jax.tree.map(jnp.asarray, adapter()), optax.sgd(1.0), mesh=forward.mesh, model_config=MODEL
    )
    kept = [leaf.shape for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    assert max(map(np.prod, kept)) <= 2 * 4 * 48  # nothing of the base's size
    losses = []
    for _ in range(50):
        state, values = step(state, steps.packed(), base)
        losses.append(float(values["nll"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), steps.params())
    assert losses[-1] < 0.9 * losses[0]
    held_out = make_eval_step(forward)(state, steps.packed(), base)
    _, values = step(state, steps.packed(), base)
    assert float(held_out.nll / held_out.count) == pytest.approx(float(values["nll"]), rel=1e-5)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    tiny.write_model(place / "base", seed=1, num_hidden_layers=1)
    tiny.write_jsonl(place / "traces.jsonl", tiny.sums(40))
    return place


def recipe(place, run_dir, **changes):
    config = configs.load_recipe(configs.BASE)
    config.update_from_flattened_dict(
        {
            "run_dir": str(run_dir),
            "student.path": str(place / "base"),
            "student.lora.rank": 4,
            "data.traces": str(place / "traces.jsonl"),
            "data.dataset": str(place / "dataset"),
            "data.max_length": 64,
            "data.seq_len": 64,
            "data.batch_size": 8,
            "loss.weights.name": "uniform",
            "optim.schedule": "constant",
            "optim.learning_rate": 1e-2,
            "train.eval_every": 0,
            "train.save_every": 2,
            "train.log_every": 1,
            "train.progress": False,
            "train.steps": 4,
            "export.dtype": "float32",
            **changes,
        }
    )
    configs.check(config)
    return configs.to_config(config.to_dict())


@pytest.fixture(scope="module")
def run(place):
    """A run with adapters from traces to export."""
    command.train(recipe(place, place / "run"))
    return place / "run"


def whole_model(place):
    settings = {"rank": 4, "alpha": 16.0, "rslora": False, "targets": (".*_proj",)}
    return lora.with_adapter(hf.read_config(place / "base"), settings)


@pytest.mark.usefixtures("one_train_step")
def test_a_run_continued_ends_with_the_same_bits(place, run):
    for count in (2, 4):
        command.train(recipe(place, place / "again", **{"train.steps": count}))
    model = whole_model(place)
    like = lora.trained(model, transformer.param_shapes(model))
    found = [flat(read_params(path, like)[0]) for path in (run, place / "again")]
    assert all(path[-1] in lora.ADAPTER for path in found[0])  # no base in the checkpoint
    assert any(np.any(leaf) for path, leaf in found[0].items() if path[-1] == "lora_b")
    for path, leaf in found[0].items():
        np.testing.assert_array_equal(leaf, found[1][path])


def test_the_export_is_the_base_with_the_adapters_merged(place, run):
    _, student, record = read_student(run, place / "base", mesh=None)
    assert record.step == 4
    exported = flat(hf.load_model(run / "export", dtype=jnp.float32)[1])
    start = flat(hf.load_model(place / "base", dtype=jnp.bfloat16)[1])
    for path, leaf in flat(student).items():
        np.testing.assert_array_equal(exported[path], leaf)
        same = np.array_equal(np.float32(start[path]), leaf)
        assert same == (path[-1] != "kernel"), path


@pytest.fixture(scope="module")
def adapters(place, run):
    """The same run exported as a PEFT directory."""
    changes = {"export.adapter": True, "export.path": str(place / "adapters")}
    return export(recipe(place, run, **changes))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_peft_loads_the_adapters_and_its_merged_logits_are_ours(place, run, adapters):
    ids = np.random.default_rng(0).integers(5, 40, (2, 20))
    ours = np.asarray(
        transformer.logits(*hf.load_model(run / "export", dtype="float32"), jnp.array(ids))
    )
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16).float()
    beside = base(torch.tensor(ids)).logits.detach().numpy()
    import peft  # takes seconds, which every worker would pay

    model = peft.PeftModel.from_pretrained(base, adapters)
    for whole in (lambda: model, model.merge_and_unload):
        theirs = whole()(torch.tensor(ids)).logits.detach().numpy()
        np.testing.assert_allclose(theirs, ours, atol=2e-5)
    assert np.abs(beside - ours).max() > 0.01
    assert not list(adapters.glob("model*.safetensors"))


def test_a_peft_directory_is_read_as_the_model_that_it_makes(place, adapters):
    plain = hf.load_model(place / "base", dtype="float32")
    config, params = hf.load_model(adapters, dtype="float32", mesh=make_mesh(data=4, fsdp=2))
    assert config == plain[0]
    low = hf.load_params(adapters, whole_model(place), form="peft")
    wanted = flat(lora.merge(whole_model(place), low, plain[1]))
    for path, leaf in flat(params).items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-7)
    assert hf.weights_fingerprint(adapters) != hf.weights_fingerprint(place / "base")
    for key, value, message in (
        ("use_dora", True, "use_dora=True is not computed"),
        ("bias", "all", "bias='all' is not computed"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern="),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' is not"),
        ("peft_type", "IA3", "only LORA"),
        ("r", 0, "r"),
        ("r", 3, "has shape"),
        ("base_model_name_or_path", str(adapters), "holds adapters, no model; merge them"),
        ("base_model_name_or_path", str(place / "changed"), "holds adapters, no model"),  # itself
    ):
        changed = place / "changed"
        shutil.copytree(adapters, changed, dirs_exist_ok=True)
        settings = json.loads((adapters / "adapter_config.json").read_text()) | {key: value}
        (changed / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(DcodError, match=message):
            hf.load_model(changed, dtype="float32")


def test_another_base_is_refused(place, run):
    other = tiny.write_model(place / "other", seed=2, num_hidden_layers=1)
    with pytest.raises(DcodError, match="adapters were trained beside"):
        read_student(run, other, mesh=None)
    with pytest.raises(DcodError, match=r"base of the adapters: [0-9a-f]+ then"):
        command.train(recipe(place, run, **{"student.path": str(other), "train.steps": 6}))
    changes = {"student.path": str(other), "train.init_from": str(run)}
    with pytest.raises(DcodError, match="adapters were trained beside"):
        command.train(recipe(place, place / "third", **changes))


def test_maps_that_files_hold_in_one_tensor_are_no_peft_adapters():
    model = dataclasses.replace(steps.MODEL, fused=("qkv",))
    with pytest.raises(DcodError, match=r"several maps in one tensor \(.*qkv_proj\.weight\)"):
        to_peft(lora.with_adapter(model, SETTINGS), "base")
    settings = to_peft(lora.with_adapter(model, {**SETTINGS, "targets": ("o_proj",)}), "base")
    assert settings["target_modules"] == ["self_attn.o_proj"]


def test_targets_and_settings_are_checked():
    with pytest.raises(DcodError, match=r"'lm_head' names no linear map.*self_attn\.q_proj"):
        lora.with_adapter(steps.MODEL, {**SETTINGS, "targets": ("q_proj", "lm_head")})
    named = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"]
    assert lora.linear_maps(MODEL) == [*named, "self_attn.q_proj"]
    assert lora.with_adapter(steps.MODEL, {**SETTINGS, "rank": 0}) is steps.MODEL
    base = configs.load_recipe(configs.BASE)
    study = configs.keys(configs.load_recipe(configs.STUDY).study, "study.")
    good = {"student.lora.rank": 4, "student.path": "base"}
    for changes, message in (
        ({}, ""),
        ({"student.path": "", "student.config": "c"}, "needs student.path"),
        ({"student.lora.targets": ("q(",)}, "is no regular expression"),
        ({"student.lora.targets": ()}, "targets is empty"),
        ({"student.lora.alpha": 0.0}, "alpha=0.0 must be a finite number > 0"),
        ({"student.lora.rank": 0, "export.adapter": True}, "export.adapter needs student.lora"),
        ({"student.path": "a.gguf", "export.adapter": True}, "beside a .gguf file"),
        ({"student.lora.rank": -1}, "rank=-1 must not be negative"),
        (study, "study trains all parameters"),
    ):
        flat_config = configs.keys(base) | good | changes
        wrong = config_errors(flat_config, loss_config(base))
        wrong = [line for line in wrong if "student" in line or "adapter" in line]
        assert [message in line for line in wrong] == [True] * bool(message), wrong
