"""What device_check.py measures of this code; jax is imported where a part runs."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any


def _shape(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Any:
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    values = dict(zip(names.split(), (vocab, width, mlp, layers, heads), strict=True))
    return values | {
        "num_key_value_heads": kv_heads,
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }


SHAPES = {
    "135m": _shape(49152, 576, 1536, 30, 9, 3) | {"model_type": "llama"},
    "0.5b": _shape(151936, 896, 4864, 24, 14, 2),
    "1.5b": _shape(151936, 1536, 8960, 28, 12, 2),
    "tiny": _shape(256, 64, 128, 2, 4, 2),
}
SFT = {"loss.weights.name": "uniform"}
TOP_K = {"loss.divergence": "forward_kl", "score.top_k": 64}
LIVE = {"loss.divergence": "forward_kl", "loss.teacher": "live"}
LOSSES = {"sft": SFT, "discord": {}, "topk": TOP_K, "live": LIVE}


def step(model: str, rows: int, length: int, loss: str, **changes: Any) -> dict[str, Any]:
    """Options of a train step; changes: {"student_remat": "full"} is student.remat=full."""
    changes = {key.replace("_", ".", 1): value for key, value in changes.items()}
    return {"model": model, "rows": rows, "length": length, "loss": loss, "changes": changes}


def packed(rows: int, length: int, vocab: int) -> dict[str, Any]:
    """NumPy arrays of rows of packed traces of 1/16 to 1/2 of a row; ours and torch's alike."""
    import numpy as np

    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocab, (rows, length + 1), dtype=np.int32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    lengths = []
    for row in range(rows):
        start = 0
        while start < length:
            size = min(int(generator.integers(length // 16, length // 2 + 1)), length - start)
            segments[row, start : start + size] = segments[row].max() + 1
            positions[row, start : start + size] = np.arange(size)
            lengths.append(size)
            start += size
    return {"ids": ids, "segments": segments, "positions": positions, "lengths": lengths}


def _recipe(options: dict[str, Any], directory: Path) -> Any:
    """configs/base.py with the sizes of the part; every device of the machine."""
    import jax

    from dcod_jax import config as configs

    file = directory / "config.json"
    file.write_text(json.dumps(SHAPES[options["model"]]))
    rows, length = options["rows"], options["length"]
    devices = 1 if options.get("rehearse") else len(jax.devices())
    changes = LOSSES[options["loss"]] | options["changes"]
    if options.get("rehearse"):  # XLA's CPU backend lacks some bfloat16 products
        changes |= {"student.compute_dtype": "float32", "teacher.dtype": "float32"}
    values = {
        "student.config": str(file),
        "teacher.path": str(file) if "loss.teacher" in changes else "",
        "data.batch_size": rows * devices,
        "data.seq_len": length,
        "data.max_length": length,
        "mesh.fsdp": devices,
    }
    return configs.replace(configs.load_recipe(configs.BASE), values | changes)


def _batch(config: Any, vocab: int) -> tuple[Any, list[int]]:
    """(a packed batch with all tokens supervised, the traces' lengths)."""
    import jax.numpy as jnp
    import numpy as np

    from dcod_jax.types import Batch

    rows, length = config.data.batch_size, config.data.seq_len
    made = packed(rows, length, vocab)
    segments, generator = made["segments"], np.random.default_rng(1)
    last = np.roll(segments, -1, axis=1) != segments
    last[:, -1] = True
    cache: dict[str, Any] = {}
    if config.loss.divergence != "nll" and config.loss.teacher == "cached":
        k = min(config.score.top_k, vocab)
        first = generator.integers(0, vocab, (rows, length, 1), dtype=np.int32)
        cache = {
            "topk_ids": jnp.asarray((first + np.arange(k, dtype=np.int32)) % vocab),
            "topk_logprobs": jnp.full((rows, length, k), np.log(0.9 / k), jnp.bfloat16),
            "tail_logprobs": jnp.full((rows, length), np.log(0.1), jnp.float32),
        }
    batch = Batch(
        tokens=jnp.asarray(made["ids"][:, :-1]),
        targets=jnp.asarray(made["ids"][:, 1:]),
        loss_mask=jnp.asarray(~last),
        segment_ids=jnp.asarray(segments),
        positions=jnp.asarray(made["positions"]),
        teacher_logprobs=jnp.asarray(-generator.exponential(1.0, (rows, length)), jnp.float32),
        **cache,
    )
    return batch, made["lengths"]


def _random(model: Any, mesh: Any, dtype: Any, *, seed: int) -> Any:
    import jax

    from dcod_jax.models import transformer
    from dcod_jax.parallel.mesh import tree_shardings

    layout = tree_shardings(mesh, transformer.logical_axes(model))
    init = jax.jit(
        lambda key: transformer.init_params(model, key, dtype=dtype), out_shardings=layout
    )
    return init(jax.random.key(seed))


def _setup(config: Any, devices: list[Any]) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """(model config, mesh, forward, teacher parameters) of a config on devices."""
    import jax.numpy as jnp

    from dcod_jax.models import hf
    from dcod_jax.parallel.mesh import make_mesh
    from dcod_jax.train.forward import TeacherModel, make_forward

    model = hf.read_config(config.student.config)
    mesh = make_mesh(**config.mesh, devices=devices)
    teacher, params = None, ()
    if config.loss.teacher == "live":
        dtype = jnp.dtype(config.teacher.dtype)
        teacher = TeacherModel(model, dtype)
        params = (_random(model, mesh, dtype, seed=1),)
    forward = make_forward(config, model, mesh=mesh, valid_vocab=model.vocab_size, teacher=teacher)
    return model, mesh, forward, params


def worker_step(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A train step as the train verb runs it."""
    import jax

    from dcod_jax.models.counts import flops_per_row
    from dcod_jax.parallel.mesh import sharding
    from dcod_jax.plan.chips import peak_flops
    from dcod_jax.train.optim import make_optimizer
    from dcod_jax.train.settings import optim_config
    from dcod_jax.train.step import init_state, make_train_step

    config = _recipe(options, directory)
    devices = jax.devices()[: config.mesh.fsdp]
    model, mesh, forward, teacher = _setup(config, devices)
    optimizer, schedule = make_optimizer(optim_config(config), config.train.steps)
    settings = {"log_every": config.train.log_every, "steps": config.train.steps}
    run: Any = make_train_step(
        forward, optimizer, schedule, batch_size=config.data.batch_size, **settings
    )
    state = init_state(
        _random(model, mesh, "float32", seed=0), optimizer, mesh=mesh, model_config=model
    )
    batch, lengths = _batch(config, model.vocab_size)
    batch = jax.device_put(batch, sharding(mesh, ("batch",)))
    start = time.perf_counter()
    compiled = run.lower(state, batch, *teacher).compile()
    record: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    planned = compiled.memory_analysis()
    record["planned_gib"] = (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 2**30
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        state, values = compiled(state, batch, *teacher)
        loss = float(jax.device_get(values["loss"]))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    flops = sum(flops_per_row(model, n, n) for n in lengths)
    flops *= 4 / 3 if teacher else 1
    peak = peak_flops(devices[0].device_kind)
    stats = devices[0].memory_stats() or {}
    return record | {
        "ms": median * 1e3,
        "tokens_per_s": config.data.batch_size * config.data.seq_len / median,
        "mfu": flops / median / peak / len(devices) if peak else None,
        "peak_gib": stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None,
        "loss": loss,
    }


def worker_versions(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    import importlib.metadata as metadata

    import jax

    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "libtpu")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "platform": device.client.platform_version,
        "limit_gib": limit / 2**30 if limit else None,
        **found,
    }


def worker_parity(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Loss and gradients of a tiny model in float32 against the CPU's, and the bfloat16 kernel."""
    return _model_errors(options, directory) | _kernel_errors(options)


def _model_errors(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Relative error of the loss, and of all gradients as one vector, against the CPU's."""
    import jax
    import numpy as np

    from dcod_jax import config as configs
    from dcod_jax.losses import adaptive
    from dcod_jax.models import transformer

    asked = step("tiny", 2, 128, "discord", student_compute_dtype="float32")
    recipe = _recipe(asked | {"rehearse": True}, directory)
    gradients, losses = [], []
    own = "scanned" if options.get("rehearse") else "auto"
    for device, kernel in ((jax.devices("cpu")[0], "blocked"), (jax.devices()[0], own)):
        config = configs.replace(recipe, {"student.attention": kernel})
        model, _, forward, _ = _setup(config, [device])
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            params = jax.device_get(transformer.init_params(model, jax.random.key(0)))
            batch, _ = _batch(config, model.vocab_size)

            def loss_of(params: Any, batch: Any, forward: Any = forward) -> Any:
                return forward(params, batch, 0, adaptive.initial(), ())[0]

            loss, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss_of))(params, batch))
        losses.append(float(loss))
        gradients.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)]))
    difference = np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])
    return {
        "loss_error": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradient_error": float(difference),
    }


def _kernel_errors(options: dict[str, Any]) -> dict[str, Any]:
    """Largest relative error of the device's bfloat16 attention and its gradients, by segments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dcod_jax.models import attention
    from dcod_jax.parallel.mesh import make_mesh

    mesh = make_mesh(devices=jax.devices()[:1])
    length = 128 if options.get("rehearse") else 2048

    def pulled(query: Any, key: Any, value: Any, cotangent: Any, ids: Any, kind: str) -> Any:
        def attend(query: Any, key: Any, value: Any) -> Any:
            return attention.attention(query, key, value, ids, mesh=mesh, kind=kind)

        mixed, pull = jax.vjp(attend, query, key, value)
        return mixed, *pull(cotangent)

    run, record = jax.jit(pulled, static_argnames="kind"), {}
    for segments in (5, 40, 100):
        ids = jnp.asarray(1 + np.arange(length) * segments // length, jnp.int32)[None]
        keys = jax.random.split(jax.random.key(segments), 4)
        heads = [
            jax.random.normal(key, (1, n, length, 128), jnp.bfloat16)
            for key, n in zip(keys, (12, 2, 2, 12), strict=True)
        ]
        got = run(*heads, ids, kind="auto")
        with jax.default_matmul_precision("highest"):
            wanted = run(*(x.astype(jnp.float32) for x in heads), ids, kind="scanned")
        record[f"kernel_error_{segments}_segments"] = max(
            float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
            for a, b in zip(got, wanted, strict=True)
        )
    return record


def worker_decode(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Greedy decoding of random prompts; no token ends a row. The second call is measured."""
    import jax
    import jax.numpy as jnp

    from dcod_jax.models import hf, transformer
    from dcod_jax.sample.sampler import decoding_params, sample

    file = directory / "config.json"
    file.write_text(json.dumps(SHAPES[options["model"]]))
    model = hf.read_config(file)
    init = jax.jit(lambda key: transformer.init_params(model, key, dtype=jnp.bfloat16))
    decoding = decoding_params(
        model, init(jax.random.key(0)), valid_vocab=model.vocab_size, compute_dtype="bfloat16"
    )
    rows, width, new = options["rows"], options["prompt"], options["new"]
    prompts = packed(rows, width, model.vocab_size)["ids"][:, :width].tolist()

    def generate() -> float:
        start = time.perf_counter()
        settings: dict[str, Any] = {"temperature": 0.0, "seed": 0, "eos_ids": ()}
        samples = sample(decoding, prompts, max_new_tokens=new, batch_size=rows, **settings)
        assert sum(len(s.token_ids) for s in samples) == rows * new
        return time.perf_counter() - start

    first, second = generate(), generate()
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "compile_s": first - second,
        "ms": second * 1e3,
        "tokens_per_s": rows * new / second,
        "peak_gib": peak / 2**30 if peak else None,
    }
