"""One step through the real tiny model: packing, padding, micro-batches, devices, determinism.

With SGD at rate 1 the change of the parameters is the gradient, so comparing parameters compares
gradients. float32 throughout; tolerances are relative 2e-5 of each array's largest entry.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.losses import reduce
from dcod_jax.losses.distill import DistillLoss, LossConfig
from dcod_jax.losses.head import VocabHead
from dcod_jax.losses.weights import WeightConfig
from dcod_jax.models import transformer
from dcod_jax.models.config import from_hf
from dcod_jax.parallel import hosts
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.plan import hlo
from dcod_jax.train.forward import Forward
from dcod_jax.train.optim import OptimConfig, make_optimizer
from dcod_jax.train.step import (
    check_batch,
    compiled_apart,
    init_state,
    make_eval_step,
    make_train_step,
)
from dcod_jax.types import Batch

VOCAB, VALID, ROWS, LENGTH, DOCUMENTS = 64, 61, 8, 24, 24
MODEL = from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.1,
    }
)


def loss_config(**changes) -> LossConfig:
    values = {
        "name": "sigmoid",
        "temperature": 1.0,
        "offset": 0.0,
        "clip": 2.0,
        "scope": "token",
        "normalize": "mean",
        "warmup_steps": 0,
    }
    return LossConfig(divergence="nll", weights=WeightConfig(**values | changes))


def forward_of(cfg, mesh, **more) -> Forward:
    """The tiny student under a loss; more: fields of Forward."""
    more = {"compute_dtype": jnp.dtype("float32"), **more}
    return Forward(MODEL, DistillLoss(cfg, VocabHead(20, VALID, mesh)), **more)


@functools.cache
def documents() -> list[dict[str, np.ndarray]]:
    """Three a row: lengths 5..8, the first tokens of each are prompt."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(DOCUMENTS):
        n, prompt = int(generator.integers(5, 9)), int(generator.integers(1, 4))
        ids = generator.integers(0, VALID, n + 1)
        mask = np.arange(n) >= prompt - 1
        teacher = np.where(mask, -generator.exponential(2.0, n), 0.0)
        made.append({"tokens": ids[:-1], "targets": ids[1:], "mask": mask, "teacher": teacher})
    return made


def pack(rows: list[list[int]], *, length: int = LENGTH, pad: int = 0) -> Batch:
    """Rows of document numbers -> a batch; padding holds `pad`."""
    fields = {
        name: np.full((len(rows), length), pad) for name in ("tokens", "targets", "positions")
    }
    mask, segments = np.zeros((len(rows), length), bool), np.zeros((len(rows), length), int)
    teacher = np.zeros((len(rows), length))
    for row, numbers in enumerate(rows):
        at = 0
        for segment, number in enumerate(numbers, 1):
            document = documents()[number]
            here = slice(at, at + len(document["tokens"]))
            fields["tokens"][row, here] = document["tokens"]
            fields["targets"][row, here] = document["targets"]
            fields["positions"][row, here] = np.arange(len(document["tokens"]))
            mask[row, here], teacher[row, here] = document["mask"], document["teacher"]
            segments[row, here] = segment
            at = here.stop
    return Batch(
        **{name: jnp.asarray(value, jnp.int32) for name, value in fields.items()},
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments, jnp.int32),
        teacher_logprobs=jnp.asarray(teacher, jnp.float32),
    )


def packed(**options) -> Batch:
    return pack([[i, i + ROWS, i + 2 * ROWS] for i in range(ROWS)], **options)


@functools.cache
def params() -> dict:
    return jax.device_get(transformer.init_params(MODEL, jax.random.key(1)))


@functools.cache
def step_of(
    sizes=(1, 1, 1), microbatches=1, cfg=None, rows=ROWS, dtype="float32", optim="sgd", **more
):
    """(jitted step, function that makes a fresh state); cached, for compilation is the cost."""
    devices = jax.devices()[: int(np.prod(sizes))]
    names = ("data", "fsdp", "tensor", "context", "slices")
    mesh = make_mesh(**dict(zip(names, sizes, strict=False)), devices=devices)
    optimizer, schedule = optax.sgd(1.0), optax.constant_schedule(1.0)
    if optim == "adamw":
        values = (3e-3, "cosine", 0, 0.1, 0.01, 0.9, 0.95, 1e-8, 1.0)
        optimizer, schedule = make_optimizer(OptimConfig(*values), 100)
    offload = {"offload": more.pop("offload", False)}
    logging = {name: more.pop(name) for name in ("log_every", "token_weights") if name in more}
    step = make_train_step(
        forward_of(cfg or loss_config(), mesh, compute_dtype=jnp.dtype(dtype), **more),
        optimizer,
        lambda step: jnp.asarray(schedule(step)),
        batch_size=rows,
        microbatches=microbatches,
        **offload,
        **logging,
    )
    return step, lambda: init_state(
        jax.tree.map(jnp.array, params()), optimizer, mesh=mesh, model_config=MODEL, **offload
    )


def one_step(batch, **options):
    step, fresh = step_of(**options)
    state, values = step(fresh(), batch)
    return jax.device_get(state.params), {key: float(value) for key, value in values.items()}


def assert_same(got, wanted, *, rtol=2e-5):
    def close(g, w, p):
        change = np.abs(w - p).max()
        assert change > 0
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * change + 1e-7)

    jax.tree.map(close, got[0], wanted[0], params())
    for key, value in wanted[1].items():
        assert got[1][key] == pytest.approx(value, rel=rtol, abs=1e-6, nan_ok=True), key


# One weight a trace, in units of the spread of this very batch.
TRACE = loss_config(scope="sequence", temperature=0.7, unit="spread", smoothing=0.0)


@pytest.mark.parametrize(
    ("sizes", "microbatches", "cfg"),
    [
        pytest.param((1, 1, 1), 4, None, marks=pytest.mark.long),
        ((2, 2, 2), 2, TRACE),
        ((1, 2, 2, 2), 1, None),
    ],
    ids=["accumulated", "trace-eight-devices", "context"],
)
def test_microbatches_and_devices_change_nothing(sizes, microbatches, cfg):
    wanted = one_step(packed(), cfg=cfg)
    assert_same(one_step(packed(), sizes=sizes, microbatches=microbatches, cfg=cfg), wanted)


@pytest.mark.usefixtures("compiled_as_for_users")
@pytest.mark.parametrize("more", [{"offload": True}, {"remat": "offload"}], ids=str)
def test_what_waits_in_host_memory_changes_no_bit(more):
    options = {"sizes": (2, 2, 2), "optim": "adamw"}
    states = []
    for chosen in ({"remat": "full"}, {"remat": "full", **more}):
        step, fresh = step_of(**options, **chosen)
        state = fresh()
        for _ in range(2):
            state, _ = step(state, packed())
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(states[1].opt_state) if x.ndim}
    assert kinds == ({"pinned_host"} if "offload" in more else {"device"})


SCOPED = loss_config(scope="prefix", normalize="sequence", temperature=0.7)


@pytest.mark.parametrize(
    "cfg", [pytest.param(None, marks=pytest.mark.long), SCOPED], ids=["token", "prefix"]
)
def test_packed_equals_unpacked(cfg):
    together = one_step(packed(), cfg=cfg)
    alone = one_step(pack([[i] for i in range(DOCUMENTS)], length=9), cfg=cfg, rows=DOCUMENTS)
    assert_same(alone, together)


def test_rows_split_over_devices_and_a_compact_head_change_nothing():
    """Weights that look at the whole completion, rows over four devices, in each of two slices."""
    batch = packed()
    positions = np.full((ROWS, LENGTH - 2), LENGTH, np.int32)
    for row, mask in zip(positions, np.asarray(batch.loss_mask), strict=True):
        row[: mask.sum()] = np.flatnonzero(mask)
    compact = dataclasses.replace(batch, head_positions=jnp.asarray(positions))
    wanted = one_step(batch, cfg=SCOPED)
    assert_same(one_step(compact, cfg=SCOPED, sizes=(1, 1, 1, 4, 2)), wanted)


def test_padding_content_and_the_order_of_rows_and_documents_change_nothing():
    wanted = one_step(packed())
    noisy = one_step(packed(pad=37))
    jax.tree.map(np.testing.assert_array_equal, noisy, wanted)  # bit for bit; NaN equals NaN
    reordered = pack([[i + ROWS, i + 2 * ROWS, i] for i in reversed(range(ROWS))])
    assert_same(one_step(reordered), wanted)


def test_the_loss_is_the_naive_one():
    batch = packed()
    logits = transformer.logits(
        MODEL,
        jax.tree.map(jnp.asarray, params()),
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
    )
    logprobs = np.asarray(jax.nn.log_softmax(logits[..., :VALID]), np.float64)
    picked = np.take_along_axis(logprobs, np.asarray(batch.targets)[..., None], -1)[..., 0]
    mask = np.asarray(batch.loss_mask)
    w = 1 / (1 + np.exp(-(picked - np.asarray(batch.teacher_logprobs))))
    _, values = one_step(batch)
    assert values["nll"] == pytest.approx(-picked[mask].mean(), rel=1e-5)
    assert values["loss"] == pytest.approx(-(w * picked)[mask].sum() / w[mask].sum(), rel=1e-5)
    assert values["weights/mean"] == pytest.approx(w[mask].mean(), rel=1e-5)
    assert values["tokens/completion"] == mask.sum()
    assert values["tokens/total"] == (np.asarray(batch.segment_ids) > 0).sum()
    r = (picked - np.asarray(batch.teacher_logprobs))[mask]
    assert values["weights/log_ratio"] == pytest.approx(r.mean(), rel=1e-5)
    assert values["nonfinite"] == 0
    assert values["learning_rate"] == 1.0


def test_the_evaluation_step_gives_the_same_sums():
    _, fresh = step_of()
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluate = make_eval_step(forward_of(loss_config(), mesh))
    state = fresh()
    halves = [jax.tree.map(lambda x, h=h: x[h : h + 4], packed()) for h in (0, 4)]
    total = reduce.add(*(evaluate(state, half) for half in halves))
    _, values = one_step(packed())
    assert float(reduce.finish(total, "mean")) == pytest.approx(values["loss"], rel=1e-5)
    assert float(reduce.mean_nll(total)) == pytest.approx(values["nll"], rel=1e-5)


def test_training_learns_compiles_once_donates_and_is_bit_deterministic():
    step, fresh = step_of(optim="adamw", microbatches=2)
    batch, runs = packed(), []
    for _ in range(2):
        state, losses = fresh(), []
        for _ in range(6):
            before = state
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
            assert before.params["embed_tokens"]["embedding"].is_deleted()
        runs.append((losses, jax.device_get(state)))
    assert runs[0][0] == runs[1][0]
    jax.tree.map(np.testing.assert_array_equal, runs[0][1], runs[1][1])
    assert runs[0][0][-1] < runs[0][0][0] - 0.1
    assert int(runs[0][1].step) == 6
    assert step._cache_size() == 1


def test_four_devices_stay_within_the_bound_that_the_page_states():
    """Of one device, over six AdamW steps; docs/hosts.md, Exactness."""
    ends, losses = [], []
    for devices in (1, 4):
        step, fresh = step_of(sizes=(1, devices, 1), optim="adamw", microbatches=2)
        state, own = fresh(), []
        for _ in range(6):
            state, values = step(state, packed())
            own.append(float(values["loss"]))
        ends.append(jax.device_get(state.params))
        losses.append(own)
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-6)
    changes = [
        np.concatenate(
            [(new - old).ravel() for new, old in zip(*map(jax.tree.leaves, pair), strict=True)]
        )
        for pair in ((ends[0], params()), (ends[1], ends[0]))
    ]
    assert np.linalg.norm(changes[1]) <= 1e-5 * np.linalg.norm(changes[0])


def test_a_batch_without_completion_tokens_has_loss_zero_and_changes_nothing():
    batch = packed()
    empty = Batch(
        **{
            **{name: getattr(batch, name) for name in ("tokens", "targets", "segment_ids")},
            "positions": batch.positions,
            "loss_mask": jnp.zeros_like(batch.loss_mask),
            "teacher_logprobs": batch.teacher_logprobs,
        }
    )
    new, values = one_step(empty)
    assert values["loss"] == values["grad_norm"] == values["nonfinite"] == 0
    assert np.isnan(values["nll"])
    jax.tree.map(np.testing.assert_array_equal, new, params())


def test_a_loss_that_is_not_finite_is_flagged():
    step, fresh = step_of()
    state = fresh()
    state.params["norm"]["scale"] = state.params["norm"]["scale"].at[0].set(jnp.nan)
    _, values = step(state, packed())
    assert float(values["nonfinite"]) == 1


def test_bfloat16_with_unit_weights_keeps_float32_masters_and_reports_no_log_ratio():
    _, wanted = one_step(packed())
    new, values = one_step(packed(), dtype="bfloat16", cfg=loss_config(name="uniform"))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {np.dtype("float32")}
    assert values["nll"] == pytest.approx(wanted["nll"], rel=0.01)
    assert "weights/log_ratio" not in values
    assert "weights/log_ratio" in wanted
    assert values["weights/mean"] == values["weights/ess"] == 1
    assert values["weights/std"] == 0
    assert values["loss"] == pytest.approx(values["nll"], rel=1e-6)


def test_the_abstract_state_is_the_real_ones_shape_and_sharding():
    mesh = make_mesh(2, 2, tensor=2)
    optimizer, _ = make_optimizer(
        OptimConfig(1e-3, "constant", 0, 0.1, 0.0, 0.9, 0.95, 1e-8, 1.0), 10
    )
    options = {"mesh": mesh, "model_config": MODEL}
    shapes = transformer.param_shapes(MODEL)
    abstract = init_state(shapes, optimizer, **options, abstract=True)
    real = init_state(jax.tree.map(jnp.array, params()), optimizer, **options)

    def same(a, r):
        assert (a.shape, a.dtype) == (r.shape, r.dtype)
        assert a.sharding.is_equivalent_to(r.sharding, len(a.shape))

    jax.tree.map(same, abstract, real)
    moments = real.opt_state[1][0].mu["embed_tokens"]["embedding"]
    assert moments.sharding == real.params["embed_tokens"]["embedding"].sharding


def test_a_batch_that_cannot_be_split_is_refused_with_the_arithmetic():
    mesh = make_mesh(2, 2, tensor=2)
    check_batch(16, 2, mesh)
    text = "data.batch_size=12 must be a multiple of 8 = train.microbatches=2 * 4 batch shards"
    with pytest.raises(DcodError, match=re.escape(text)):
        check_batch(12, 2, mesh)


def test_beyond_the_gradient_an_automatic_temperature_takes_three_sums():
    """Of one vector each: the step's sums, and two passes of the solver. Log steps aside."""
    step, fresh = step_of(sizes=(8, 1, 1), cfg=loss_config(temperature="auto"), log_every=5)
    text = step.lower(fresh(), packed()).compile().as_text()
    text = "\n".join(line for line in text.splitlines() if " conditional(" not in line)
    own = [one for one in hlo.Summary(text).collectives if len(one.groups[0]) > 1]
    of_gradients = MODEL.num_layers + 1  # the layers' one by one, then the rest
    assert sum(one.times for one in own if one.size <= 4096) == 2, own
    assert sum(one.times for one in own) <= of_gradients + 3, own


def test_a_program_is_compiled_and_memory_released_before_its_first_run(monkeypatch):
    done = []
    monkeypatch.setattr(hosts, "release_memory", lambda: done.append("released"))

    def double(x, more):
        jax.debug.callback(lambda: done.append("ran"))
        return x * 2 if more is None else x + more

    step = compiled_apart(jax.jit(double))
    for x, more, expected in ((1.0, None, 2.0), (2.0, None, 4.0), (3.0, 4.0, 7.0), (1.0, 1.0, 2.0)):
        args = [None if value is None else jnp.float32(value) for value in (x, more)]
        assert float(jax.block_until_ready(step(*args))) == expected
        jax.effects_barrier()
    assert done == ["released", "ran", "ran", "released", "ran", "ran"]
