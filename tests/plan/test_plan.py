"""The plan verb on the host's own devices, and, where libtpu is installed, on a TPU slice."""

import importlib.util
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.models.config import from_hf
from dcod_jax.models.counts import flops_per_row
from dcod_jax.plan import command as plan
from dcod_jax.plan import estimate, hlo, programs
from dcod_jax.plan.remat import choose_remat
from dcod_jax.train.metrics import BINS

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
    return configs.replace(configs.load_recipe(configs.BASE), values | changes)


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """What plan writes for a recipe that fits two slices of four devices."""
    tmp_path = tmp_path_factory.mktemp("plan")
    changes = {"plan.hbm_gib": 0.01, "mesh.fsdp": 4, "plan.slices": 2}
    changes |= {"teacher.path": str(student), "score.batch_tokens": 512}
    config = recipe(student, tmp_path, **changes)
    return config, plan.plan(config)


def test_a_plan_reads_a_config_only_and_writes_what_it_returns(whole):
    config, result = whole
    written = json.loads((Path(config.run_dir) / "plan.json").read_text())
    assert written == json.loads(json.dumps(result))
    train = result["train"]
    assert 0 < train["temporaries"] <= train["peak"] <= 0.01 * GIB
    assert [attempt["setting"] for attempt in result["attempts"]] == ["as the recipe says"]
    # Parameters and two moments in float32, a quarter of each on a device.
    assert train["arguments"] > 3 * 4 * result["parameters"] / 4
    assert train["seconds"] is None
    assert result["score"]["fits"]
    assert result["score"]["rows"] * result["score"]["length"] <= 512


def test_operations_are_the_formula_s_and_the_program_s(whole):
    _, result = whole
    train = result["train"]
    assert train["model_flops"] == 16 * flops_per_row(from_hf(tiny.raw_config()), 64, 64)
    # Recomputation adds a forward pass of the layers; the head has none.
    assert 1.0 < train["executed_flops"] / train["model_flops"] < 2.0


def test_between_two_slices_only_gradients_and_statistics_travel(whole):
    _, result = whole
    rows = {(row["kind"], row["network"]): row for row in result["train"]["collectives"]}
    across = {kind for kind, network in rows if network == "dcn"}
    assert across == {"all-reduce"}
    # Gradients are scattered over the four devices of a slice; what each then holds, float32, is
    # all-reduced, 2 (n - 1)/n of it, with small sums and, at log steps, the two histograms of the
    # weights, whose size no batch changes. Parameters are gathered inside a slice only.
    gradients, histograms = 4 * result["parameters"] / 4, 2 * 7 / 8 * 2 * 4 * BINS
    assert gradients < rows["all-reduce", "dcn"]["bytes"] - histograms < 2 * gradients
    assert rows["all-gather", "ici"]["bytes"] > gradients


# ---------------------------------------------------------------- searches, on a model of memory

RECOMPUTED = {"none": 1.0, "dots": 0.7, "attention": 0.5, "full": 0.4, "offload": 0.2}


@pytest.fixture
def modelled(monkeypatch):
    """Memory as a formula instead of a compilation: {"compiles": number of them so far}."""
    count = {"compiles": 0}

    def measure(config, target):
        count["compiles"] += 1
        rows = config.data.batch_size // len(target.devices) / config.train.microbatches
        moments = 0.0 if config.optim.offload else 2.0
        parameters = (1.0 + moments) * 8 / max(config.mesh.fsdp, 1)
        peak = int((parameters + rows * RECOMPUTED[config.student.remat]) * 1e6)
        if peak > target.limit:
            raise programs.DoesNotFitError(float(peak))
        return {"peak": peak, "seconds": None, "arguments": 0, "temporaries": 0, "host": 0} | {
            "collectives": [], "assumptions": [],
            "model_flops": 1.0, "executed_flops": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(plan, "_try", measure)
    return count


@pytest.mark.parametrize("limit", [4.0, 6.5, 40.0, 173.0])
def test_the_largest_batch_fits_and_one_step_more_does_not(
    student, tmp_path, modelled, limit, caplog
):
    caplog.set_level("INFO")
    changes = {"plan.largest_batch": True, "plan.hbm_gib": limit * 1e6 / GIB}
    found = plan.plan(recipe(student, tmp_path, **changes))["largest_batch"]
    assert found["rows"] == 8 * int((limit - 3.0) / 0.4 + 1e-9)
    assert found["refused"] == found["rows"] + 8
    assert modelled["compiles"] <= 8
    # Each compilation of a large model takes minutes: what came of it is said at once.
    told = caplog.text
    assert "compiling the train step: as the recipe says" in told
    assert told.count(" rows need ") == modelled["compiles"] - 1


def test_out_of_memory_is_a_table_and_names_the_first_remedy_that_fits(
    student, tmp_path, modelled, capsys
):
    changes = {"mesh.fsdp": 2, "student.remat": "none", "data.batch_size": 64}
    config = recipe(student, tmp_path, **changes, **{"plan.hbm_gib": 7.0e6 / GIB})
    result = plan.plan(config)
    settings = [(a["setting"], round(a["needs"] / 1e6, 1)) for a in result["attempts"]]
    assert settings == [
        ("as the recipe says", 20.0),
        ("student.remat=dots", 17.6),
        ("student.remat=attention", 16.0),
        ("student.remat=full", 15.2),
        ("train.microbatches=2", 13.6),
        ("train.microbatches=4", 12.8),
        ("train.microbatches=8", 12.4),
        ("mesh.fsdp=4", 6.4),
    ]
    printed = capsys.readouterr().out
    assert "too much" in printed
    assert "mesh.fsdp=4" in printed
    changes = "--config.student.remat=full --config.train.microbatches=8 --config.mesh.fsdp=4"
    assert f"student: {result['parameters']:,} parameters" in printed
    assert f"what follows is with {changes} --config.mesh.data=2" in printed


def test_where_nothing_fits_the_table_is_written_and_the_error_says_what_to_do(
    student, tmp_path, modelled
):
    config = recipe(student, tmp_path, **{"plan.hbm_gib": 0.5e6 / GIB})
    with pytest.raises(DcodError, match=r"nothing fits cpu:8.*a larger slice"):
        plan.plan(config)
    written = json.loads((Path(config.run_dir) / "plan.json").read_text())
    assert written["train"] is None
    assert written["attempts"][-1]["setting"] == "optim.offload=true"


def test_remedies_come_cheapest_first_and_build_on_each_other(student, tmp_path):
    config = recipe(student, tmp_path, **{"mesh.fsdp": 2, "student.remat": "none"})
    names = [what for what, _ in plan.remedies(config, jax.devices())]
    assert names == [
        "student.remat=dots",
        "student.remat=attention",
        "student.remat=full",
        "train.microbatches=2",
        "mesh.fsdp=4",
        "mesh.fsdp=8",
        "student.remat=offload",
        "optim.offload=true",
    ]
    last = list(plan.remedies(config, jax.devices()))[-1][1]
    assert last == {
        "student.remat": "offload",
        "train.microbatches": 2,
        "mesh.fsdp": 8,
        "mesh.data": 1,
        "optim.offload": True,
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # The axis that fills is counted, and stays what it is.
        ({"data": 4, "fsdp": 1, "tensor": -1}, [(2, 2), (4, 1)]),
        ({"data": 2, "fsdp": 2, "context": -1}, [(4, 1)]),
        ({"data": 1, "fsdp": -1}, []),
        # Parameters are not split over slices.
        ({"fsdp": 1, "slices": 2}, [(2, 2), (4, 1)]),
    ],
)
def test_more_fsdp_is_asked_for_only_where_the_mesh_can_have_it(student, tmp_path, sizes, expected):
    keys = {f"mesh.{axis}": size for axis, size in ({"fsdp": 1} | sizes).items()}
    config = recipe(student, tmp_path, **keys)
    found = list(plan.remedies(config, jax.devices()))
    larger = [changes for what, changes in found if what.startswith("mesh.fsdp")]
    assert [(c["mesh.fsdp"], c["mesh.data"]) for c in larger] == expected
    for changes in larger:
        programs.train_program(configs.replace(config, changes), jax.devices())


@pytest.mark.parametrize(("hidden", "expected"), [(24, [2, 4, 8]), (12, [2, 4])])
def test_more_fsdp_than_the_model_can_be_cut_into_is_not_asked_for(tmp_path, hidden, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.raw_config(hidden_size=hidden, num_attention_heads=2)))
    found = plan.remedies(recipe(path, tmp_path, **{"mesh.fsdp": 1}), jax.devices())
    assert [changes["mesh.fsdp"] for what, changes in found if "mesh.fsdp" in what] == expected


def test_a_remedy_that_is_taken_already_is_not_tried_again(student, tmp_path):
    keys = {"student.remat": "offload", "optim.offload": True, "data.batch_size": 8}
    assert list(plan.remedies(recipe(student, tmp_path, **keys), jax.devices())) == []


def test_auto_takes_the_least_recomputation_that_fits(student, tmp_path, monkeypatch, caplog):
    """Of 2 layers; between attention and dots the peak is linear in the layers that are kept."""
    caplog.set_level("INFO")
    compiled: list[str] = []
    address = itertools.count(10)
    peaks = RECOMPUTED | {"dots:1": (RECOMPUTED["dots"] + RECOMPUTED["attention"]) / 2}

    def traced(config, devices):
        text = f"{config.student.remat} {config.data.seq_len} at 0x{next(address):x}"
        return types.SimpleNamespace(remat=config.student.remat, jaxpr=text)

    def pretend(traced, *, limit):
        compiled.append(traced.remat)
        if peaks[traced.remat] > limit / GIB:
            raise programs.DoesNotFitError(peaks[traced.remat] * GIB)
        return programs.Program({"peak": int(peaks[traced.remat] * GIB)}, hlo.Summary(""), "")

    monkeypatch.setattr(programs, "train_program", traced)
    monkeypatch.setattr(programs, "compile_program", pretend)

    def chosen(remat, limit=0.0, **more):
        changes = {"student.remat": remat, "plan.hbm_gib": limit, **more}
        compiled.clear()
        return choose_remat(recipe(student, tmp_path, **changes), jax.devices()[:8])

    limits = (2.0, 0.9, 0.65, 0.55, 0.45, 0.3)
    expected = ["none", "dots", "dots:1", "attention", "full", "offload"]
    assert [chosen("auto", limit) for limit in limits] == expected
    assert "student.remat=auto: dots, 0.70 GiB of 0.90" in caplog.text
    assert "dots:1, 0.60 GiB of 0.65; dots for all layers needs 0.70" in caplog.text
    assert chosen("auto", 0.65) == "dots:1"
    assert compiled == ["none", "dots", "attention", "dots:1"]
    assert (chosen("auto", 0.65), compiled) == ("dots:1", [])  # known by the program's hash
    assert (chosen("auto", 0.9), compiled) == ("dots", ["none", "dots"])
    [kept] = tmp_path.rglob("remat.json")
    known = json.loads(kept.read_text())
    for junk in (None, 5, [], {}, ["dots"], "dots:-1", "x", "9" * 5000, True):
        for key in known:
            kept.write_text(json.dumps(known | {key: junk}))
            assert chosen("auto", 0.9) == "dots"
    for text in ("[]", "{", "[" * 99_999, "5"):
        kept.write_text(text)
        with pytest.raises(DcodError, match=r"remat\.json"):
            chosen("auto", 0.9)
    kept.unlink()
    assert chosen("auto", 0.9, **{"data.seq_len": 128}) == "dots"
    assert compiled == ["none", "dots"]  # another program
    assert chosen("auto") == "none"  # no limit is known of a CPU
    assert chosen("full", 0.01) == "full"
    with pytest.raises(
        DcodError, match=r"none of none, dots, attention, full, offload fits 0\.10 GiB"
    ):
        chosen("auto", 0.1)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("gpu:1", "the host has 0 GPU devices; pip install"),
        ("cpu:99", "--xla_force_host_platform_device_count=99"),
        ("v9:4x4", "is not known: v4:AxB"),
        ("v5e:16", "is not known"),
        ("v5e:64x64", "at most 256 chips, this is 64x64 = 4096; several slices are --num-slices"),
        ("v6e:4x4x4", "v6e slices have 2 dimensions"),
        ("v5p:2x2x0", "this is 2x2x0 = 0"),
        ("", "plan.topology is empty"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(student, tmp_path, topology, message):
    with pytest.raises(DcodError, match=message):
        plan.plan(recipe(student, tmp_path, **{"plan.topology": topology}))


def test_kernels_are_those_of_attention_and_of_experts(student, tmp_path):
    """Each pass of what no matrix product outside of kernels computes, recomputed or kept."""
    file = tmp_path / "config.json"
    shape = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    shape |= {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 4}
    file.write_text(json.dumps(tiny.raw_config() | shape))
    model = from_hf(json.loads(file.read_text()))
    experts = 2 * 64 * 4 * 2 * 3 * model.hidden_size * model.mlp_width
    attention = 64 * 4 * 4 * model.num_heads * model.head_dim * 65 / 2
    keys = {"student.config": str(file), "teacher.path": str(file)}
    passes = {"none": (4.5, 3), "dots": (4.5, 3), "attention": (4.5, 4), "full": (5.5, 4)}
    passes |= {"none:1": (4.5, 3.75), "dots:1": (4.5, 3.75)}
    for remat, (of_attention, of_experts) in passes.items():
        config = recipe(student, tmp_path, **keys, **{"student.remat": remat})
        found = estimate.flops_in_kernels(config, 64)
        assert found == attention * of_attention + experts * of_experts
    live = configs.replace(config, {"loss.teacher": "live"})
    assert estimate.flops_in_kernels(live, 64) == found + attention + experts


def test_the_scoring_step_has_a_time_and_its_assumptions_too(capsys):
    report = {"seconds": 0.25, "tokens_per_day": 3.1e9, "assumptions": ["half of the peak"]}
    plan._say_speed(64, report)
    assert capsys.readouterr().out.splitlines() == [
        "step: 0.250 s estimated, 3.10 G tokens a day (rows of 64, padding included)",
        "  assumed: half of the peak",
    ]


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
        "from dcod_jax.configs.base import get_config as base\n"
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
    command += ["--topology", "v5e:2x2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
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
