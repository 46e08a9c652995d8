"""The plan verb on the host's own devices, and, where libtpu is installed, on a TPU slice."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from dcod_jax import chips, compiled, estimate, plan
from dcod_jax import config as configs
from dcod_jax.models.config import flops_per_token, from_hf
from dcod_jax.types import DcodError

GIB = 2**30


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "config.json"
    path.write_text(json.dumps(tiny.raw_config()))
    return path


def recipe(student, tmp_path, **changes):
    values = {
        "run_dir": str(tmp_path / "run"),
        "student.config": str(student),
        "student.compute_dtype": "float32",
        "data.seq_len": 64,
        "data.max_length": 64,
        "data.batch_size": 16,
        "loss.head_chunk": 16,
        "mesh.fsdp": 8,
        "plan.topology": "cpu:8",
        "plan.largest_batch": False,
    }
    return compiled.altered(configs.load_recipe(configs.BASE), values | changes)


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """What plan writes for a recipe that fits, with the search for the largest batch."""
    tmp_path = tmp_path_factory.mktemp("plan")
    model = tmp_path / "teacher.json"
    model.write_text(json.dumps(tiny.raw_config()))
    changes = {
        "plan.hbm_gib": 0.003,
        "plan.largest_batch": True,
        "teacher.path": str(model),
        "score.batch_tokens": 512,
    }
    config = recipe(student, tmp_path, **changes)
    result = plan.plan(config)
    return config, result


def test_a_plan_reads_a_config_only_and_writes_what_it_returns(whole):
    config, result = whole
    written = json.loads((Path(config.run_dir) / "plan.json").read_text())
    assert written == json.loads(json.dumps(result))
    train = result["train"]
    assert train["peak"] <= 0.003 * GIB
    assert train["peak"] >= train["temporaries"] > 0
    assert result["attempts"][0]["setting"] == "as the recipe says"
    # fp32 parameters and two moments, an eighth of each on a device.
    assert train["arguments"] > 3 * 4 * result["parameters"] / 8
    assert {row["kind"] for row in train["collectives"]} >= {"all-gather", "all-reduce"}
    assert train["seconds"] is None
    assert result["score"]["fits"]
    assert result["score"]["rows"] * result["score"]["length"] <= 512


def test_operations_are_the_formula_s_and_the_program_s(whole):
    _, result = whole
    model = from_hf(tiny.raw_config())
    train = result["train"]
    assert train["model_flops"] == 16 * 64 * flops_per_token(model, 64)
    # Recomputation adds a forward pass of the layers; the head has none.
    assert 1.0 < train["executed_flops"] / train["model_flops"] < 2.0


def test_the_largest_batch_fits_and_one_step_more_does_not(whole, student, tmp_path):
    config, result = whole
    found = result["largest_batch"]
    assert found["rows"] >= 16
    assert found["peak"] <= 0.003 * GIB
    assert found["refused"] == found["rows"] + 8
    more = compiled.altered(config, {"data.batch_size": found["refused"]})
    traced = compiled.train_program(more, jax.devices()[:8])
    with pytest.raises(compiled.DoesNotFitError):
        compiled.compile_program(traced, limit=0.003 * GIB)


def test_remedies_come_cheapest_first_and_build_on_each_other(student, tmp_path):
    config = recipe(student, tmp_path, **{"mesh.fsdp": 2, "student.remat": "none"})
    names = [what for what, _ in plan.remedies(config, 8)]
    assert names == [
        "student.remat=dots",
        "student.remat=full",
        "train.microbatches=2",
        "mesh.fsdp=4",
        "mesh.fsdp=8",
        "student.remat=offload",
        "optim.offload=true",
    ]
    last = list(plan.remedies(config, 8))[-1][1]
    assert last == {
        "student.remat": "offload",
        "train.microbatches": 2,
        "mesh.fsdp": 8,
        "mesh.data": -1,
        "optim.offload": True,
    }


def test_out_of_memory_is_a_table_and_names_the_first_remedy_that_fits(student, tmp_path, capsys):
    changes = {"mesh.fsdp": 1, "student.remat": "none", "data.batch_size": 32}
    free = plan._try(recipe(student, tmp_path, **changes), target(student, tmp_path))
    limit = 0.9 * free["peak"] / GIB
    result = plan.plan(recipe(student, tmp_path, **changes, **{"plan.hbm_gib": limit}))
    first, *others = result["attempts"]
    assert first["needs"] == free["peak"]
    assert others[-1]["needs"] <= limit * GIB
    assert all(a["needs"] > limit * GIB for a in result["attempts"][:-1])
    printed = capsys.readouterr().out
    assert "too much" in printed
    assert others[-1]["setting"] in printed


def target(student, tmp_path):
    return compiled.target(recipe(student, tmp_path))


def test_auto_takes_the_least_recomputation_that_fits(student, tmp_path, capsys):
    devices = jax.devices()[:8]
    peaks = {}
    for remat in ("none", "dots"):
        config = recipe(student, tmp_path, **{"student.remat": remat})
        peaks[remat] = compiled.compile_program(compiled.train_program(config, devices)).peak
    assert peaks["dots"] < peaks["none"]
    between = (peaks["dots"] + peaks["none"]) / 2 / GIB
    auto = recipe(student, tmp_path, **{"student.remat": "auto", "plan.hbm_gib": between})
    assert compiled.choose_remat(auto, devices) == "dots"
    assert "student.remat=auto: dots" in capsys.readouterr().out
    unlimited = recipe(student, tmp_path, **{"student.remat": "auto"})
    assert compiled.choose_remat(unlimited, devices) == "none"
    given = recipe(student, tmp_path, **{"student.remat": "full"})
    assert compiled.choose_remat(given, devices) == "full"


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("cpu:99", "--xla_force_host_platform_device_count=99"),
        ("v9:4x4", "is not known: v4:AxB"),
        ("v5e:16", "is not known"),
        ("", "plan.topology is empty"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(student, tmp_path, topology, message):
    with pytest.raises(DcodError, match=message):
        plan.plan(recipe(student, tmp_path, **{"plan.topology": topology}))


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU ran out of memory. Used 21.25G of 15.75G hbm.", 21.25 * GIB),
        ("the total memory required for HLO temporaries (8.00T) exceeds", 8 * 2**40),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_bytes_that_the_compiler_speaks_of(message, size):
    assert compiled.bytes_needed(message) == size


def test_matrix_products_are_counted_through_loops_and_shards():
    def step(x, w):
        body = lambda c, _: (jnp.tanh(c @ w), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(body), x, length=7)[0].sum()

    shapes = jnp.ones((4, 8)), jnp.ones((8, 8))
    forward = 7 * 2 * 4 * 8 * 8
    assert compiled.matmul_flops(jax.make_jaxpr(step)(*shapes).jaxpr) == forward
    # The backward pass recomputes each product and takes two more.
    gradient = jax.make_jaxpr(jax.grad(step, argnums=(0, 1)))(*shapes).jaxpr
    assert compiled.matmul_flops(gradient) == 4 * forward


def test_the_flags_are_config_keys():
    words = ["--config", "r.py", "--topology", "v5e:4x4", "--num-slices=2", "--config.seed=3"]
    assert plan.flags(words) == [
        "--config", "r.py", "--config.plan.topology", "v5e:4x4", "--config.plan.slices=2",
        "--config.seed=3",
    ]  # fmt: skip


def test_clocks_follow_from_peak_and_matrix_units():
    clocks = {c.name: round(c.clock / 1e9, 2) for c in chips.CHIPS.values()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_error_says_how_to_get_it(student, tmp_path):
    with pytest.raises(DcodError, match=r'pip install "jax\[tpu\]"'):
        plan.plan(recipe(student, tmp_path, **{"plan.topology": "v5e:2x2"}))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_slice_that_is_not_there(student, tmp_path):
    """In a process of its own: libtpu and this one's fake devices do not go together."""
    file = tmp_path / "recipe.py"
    raw = tiny.raw_config(hidden_size=512, num_attention_heads=4, intermediate_size=1024)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    file.write_text(
        "from configs.base import get_config as base\n"
        "def get_config():\n"
        "    c = base()\n"
        f"    c.run_dir = {str(tmp_path / 'run')!r}\n"
        f"    c.student.config = {str(path)!r}\n"
        "    c.data.seq_len = c.data.max_length = 256\n"
        "    c.data.batch_size = 4\n"
        "    c.mesh.fsdp = 4\n"
        "    c.plan.largest_batch = False\n"
        "    return c\n"
    )
    command = [sys.executable, "-m", "dcod_jax.plan", "--config", str(file)]
    run = subprocess.run(
        [*command, "--topology", "v5e:2x2"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert result["devices"] == 4
    assert result["memory_limit"] == 15.75 * GIB
    train = result["train"]
    assert train["seconds"] > 0
    assert 0 < train["mfu"] < 1
    assert train["kernels"] > 0
    assert train["windowed_products"] == 0
    assert estimate.DAY * 4 * 256 / train["seconds"] == pytest.approx(train["tokens_per_day"])
