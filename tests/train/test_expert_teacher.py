"""A mixture of experts through every verb: it samples, scores, teaches, and is cut and adapted."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from dcod_jax import config as configs
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.drift import command as drifts
from dcod_jax.init_student import arguments
from dcod_jax.init_student.command import init_student
from dcod_jax.models import hf
from dcod_jax.models.tensors import flatten
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score
from dcod_jax.train import command, loop, setup

MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "head_dim": 8,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, the student that is its first layer, and prompts."""
    place = tmp_path_factory.mktemp("experts")
    tiny.write_model(place / "teacher", seed=1, **MIXTURE)
    words = [str(place / "teacher"), str(place / "student"), "--layers", "0-0"]
    init_student(arguments.parse(words))
    tiny.write_jsonl(place / "prompts.jsonl", tiny.sums(12))
    return place


def recipe(place, run_dir, **changes):
    config = configs.load_recipe(configs.BASE)
    config.update_from_flattened_dict(
        {
            "run_dir": str(run_dir),
            "student.path": str(place / "student"),
            "student.compute_dtype": "float32",
            "teacher.path": str(place / "teacher"),
            "teacher.dtype": "float32",
            "generate.prompts": str(place / "prompts.jsonl"),
            "generate.samples": 2,
            "generate.temperature": 5.0,
            "generate.max_new_tokens": 32,
            "generate.batch_size": 8,
            "data.dataset": str(place / "dataset"),
            "data.max_length": 48,
            "data.seq_len": 48,
            "data.batch_size": 4,
            "data.eval_fraction": 0.3,
            "prepare.filter_correct": False,
            "score.top_k": 6,
            "score.batch_tokens": 128,
            "loss.divergence": "forward_kl",
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.learning_rate": 1e-2,
            "train.steps": 2,
            "train.log_every": 1,
            "train.progress": False,
            "export.dtype": "float32",
            "evaluate.problems": str(place / "prompts.jsonl"),
            "evaluate.limit": 4,
            "evaluate.batch_size": 8,
            "evaluate.max_new_tokens": 16,
            "drift.limit": 2,
            "drift.samples": 8,
            "drift.batch_size": 8,
            "drift.max_new_tokens": 16,
            "drift.resamples": 20,
            **changes,
        }
    )
    configs.check(config)
    return configs.to_config(config.to_dict())


def torch_logprobs(path, ids):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids.tolist()])).logits[0].log_softmax(-1).numpy()


@pytest.fixture
def one_device(monkeypatch):
    mesh = make_mesh(1, devices=jax.devices()[:1])
    for module in (hosts, loop, setup, drifts):
        monkeypatch.setattr(module, "make_mesh", lambda *_, **__: mesh)


ADAPTERS = {"student.lora.rank": 2, "student.lora.targets": ("q_proj", "o_proj")}


def check_scores(place, config):
    """The log-probs and the best six tokens of a trace against torch."""
    trace = TraceDataset(Path(configs.dataset_dir(config)) / "train").read([0])[0]
    valid = len(tiny.SPECIAL) + len(tiny.ALPHABET)
    wanted = torch_logprobs(place / "teacher", trace.token_ids)[:, :valid]
    wanted = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    wanted = wanted[np.flatnonzero(trace.completion_mask) - 1]
    assert trace.logprobs is not None
    np.testing.assert_array_equal(trace.topk_ids, np.argsort(-wanted, axis=-1)[:, :6])
    at = np.arange(len(wanted)), trace.token_ids[trace.completion_mask]
    np.testing.assert_allclose(trace.logprobs, wanted[at], atol=1e-4)


def check_only_attention_moved(place, run):
    start = flatten(hf.load_model(place / "student", dtype=jnp.float32)[1])
    exported = flatten(hf.load_model(run / "export", dtype=jnp.float32)[1])
    moved = {path for path in start if not np.array_equal(start[path], exported[path])}
    assert moved == {f"layers.self_attn.{name}_proj.kernel" for name in "qo"}


def balance(run):
    """The router's last one."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["router/balance"] for line in lines if "router/balance" in line][-1]


def given_traces(place, tmp_path):
    traces = str(tiny.write_jsonl(tmp_path / "traces.jsonl", tiny.sums(8)))
    given = {"data.traces": traces, "generate.prompts": "", "evaluate.problems": ""}
    given |= {"data.dataset": "", "data.eval_fraction": 0.0, "loss.teacher": "live"}
    return recipe(place, tmp_path / "run", **given, **ADAPTERS, **{"train.steps": 1})


def test_the_scores_of_a_mixture_are_those_of_torch(place, tmp_path, one_device):
    config = given_traces(place, tmp_path)
    prepare(config)
    score(config)
    check_scores(place, config)


@pytest.mark.long
def test_a_mixture_teaches_live(place, tmp_path, one_device):
    """Adapters of attention beside frozen experts, learning from it inside the step."""
    command.train(given_traces(place, tmp_path))
    check_only_attention_moved(place, tmp_path / "run")
    assert balance(tmp_path / "run") >= 1.0
    torch_logprobs(tmp_path / "run" / "export", np.arange(5, 12))


@pytest.mark.long
def test_a_mixture_goes_from_prompts_to_a_student_and_its_drift(place, tmp_path, one_device):
    """Sampled, scored, learned from by its log-probs and then live, graded, and its drift."""
    cached = recipe(place, tmp_path / "cached", **ADAPTERS)
    command.train(cached)
    check_scores(place, cached)
    check_only_attention_moved(place, tmp_path / "cached")
    results = json.loads((tmp_path / "cached" / "evaluation" / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "start", "student"}
    changes = {"loss.teacher": "live", "loss.router_balance": 0.1, "evaluate.problems": ""}
    command.train(recipe(place, tmp_path / "live", **changes))
    assert balance(tmp_path / "live") >= 1.0
    found = drifts.drift(recipe(place, tmp_path / "live"))
    assert set(found["models"]) == {"start", "student"}
