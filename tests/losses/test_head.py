"""The chunked head against a naive one: values, gradients, sharding, dtypes and memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.losses.head import MASKED_LOGIT, VocabHead, target_logprobs
from dcod_jax.parallel.mesh import make_mesh, sharding

B, T, D, V = 8, 23, 16, 103  # neither T nor V divides by a chunk of 5 positions


def example(*, vocab: int = V, dtype=jnp.float32, length: int = T):
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "hidden": jax.random.normal(keys[0], (B, length, D), dtype),
        "head_weight": jax.random.normal(keys[1], (vocab, D)) * 0.5,
        "targets": jax.random.randint(keys[2], (B, length), 0, vocab),
        "loss_mask": jax.random.bernoulli(keys[3], 0.6, (B, length)),
        "aux": {"scale": jax.random.uniform(keys[4], (B, length))},
    }


def token_loss(logits, targets, aux, shared):
    """Weighted nll, and the entropy so that the gradient is not only that of a cross-entropy."""
    logprobs = target_logprobs(logits, targets)
    probs = jax.nn.softmax(logits)
    entropy = -(probs * jax.nn.log_softmax(logits)).sum(-1)
    weight = jax.lax.stop_gradient(jax.nn.sigmoid(logprobs)) * aux["scale"] * shared
    return weight * (entropy - logprobs), {"logprobs": logprobs, "weight": weight}


def naive(hidden, head_weight, targets, loss_mask, aux, *, valid_vocab=None):
    logits = jnp.einsum(
        "btd,vd->btv", hidden, head_weight.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if valid_vocab is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < valid_vocab, logits, MASKED_LOGIT)
    loss, stats = token_loss(logits, targets, aux, 2.0)
    return jnp.where(loss_mask, loss, 0).sum(), stats


def chunked(hidden, head_weight, targets, loss_mask, aux, **options):
    head = VocabHead(**options)

    def of(logits, *others):
        return token_loss(head.masked(logits), *others)

    return head.loss(hidden, head_weight, targets, loss_mask, of, aux=aux, shared=2.0)


def token_logprobs(hidden, head_weight, targets, **options):
    head = VocabHead(**options)

    def of(logits, targets, *_):
        return target_logprobs(head.masked(logits), targets)

    return head.observe(hidden, head_weight, targets, of)


def both(function, inputs, **options):
    def of(hidden, head_weight):
        return function(**{**inputs, "hidden": hidden, "head_weight": head_weight}, **options)

    grad = jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))
    return grad(inputs["hidden"], inputs["head_weight"])


def assert_close(got, wanted, *, rtol=2e-5, atol=2e-6):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(
            np.asarray(g, np.float32), np.asarray(w, np.float32), rtol=rtol, atol=atol
        ),
        got,
        wanted,
    )


@pytest.mark.parametrize("chunk", [1, 40, 144, 10_000])
def test_values_and_gradients_equal_the_naive_head(chunk):
    inputs = example()
    assert_close(both(chunked, inputs, chunk=chunk), both(naive, inputs))


def test_without_differentiation_the_values_are_the_same():
    inputs = example()
    (loss, stats), _ = both(chunked, inputs, chunk=40)
    alone = jax.jit(lambda: chunked(**inputs, chunk=40))()
    assert_close(alone, (loss, stats), rtol=1e-6)


def test_padded_vocabulary_rows_have_no_probability_and_no_gradient():
    inputs = example()
    inputs["targets"] = inputs["targets"] % 90
    got = both(chunked, inputs, chunk=40, valid_vocab=90)
    assert_close(got, both(naive, inputs, valid_vocab=90))
    assert not np.any(got[1][1][90:])
    cut = dict(inputs, head_weight=inputs["head_weight"][:90])
    (loss, stats), gradients = both(naive, cut)
    assert_close(got[0], (loss, stats))
    assert_close(got[1][0], gradients[0])
    logprobs = token_logprobs(
        inputs["hidden"], inputs["head_weight"], inputs["targets"], chunk=40, valid_vocab=90
    )
    assert_close(logprobs, stats["logprobs"])


@pytest.mark.parametrize(
    ("vocab", "valid", "by_hand"), [(104, None, True), (104, 99, True), (104, 99, False)]
)
def test_batch_and_vocabulary_sharded_over_eight_devices(vocab, valid, by_hand):
    inputs = example(vocab=vocab)
    inputs["targets"] = inputs["targets"] % (valid or vocab)
    wanted = both(naive, inputs, valid_vocab=valid)
    mesh = make_mesh(2, 2, tensor=2)
    rows = sharding(mesh, ("batch",))
    placed = {
        key: jax.device_put(value, sharding(mesh, ("vocab", "embed")) if "weight" in key else rows)
        for key, value in inputs.items()
    }
    got = both(chunked, placed, chunk=12, mesh=mesh, valid_vocab=valid, placed=by_hand)
    assert_close(got, wanted)
    split = sharding(mesh, ("vocab", "embed"))
    assert got[1][1].sharding.is_equivalent_to(split, 2), got[1][1].sharding


def test_sharded_logits_stay_sharded_and_the_weight_gradient_is_reduced_once():
    mesh = make_mesh(2, 2, tensor=2)
    inputs = example(vocab=104)
    layout = {key: sharding(mesh, ("batch",)) for key in inputs}
    layout["head_weight"] = sharding(mesh, ("vocab", "embed"))
    of = jax.grad(lambda w, rest: chunked(head_weight=w, **rest, chunk=12, mesh=mesh)[0])
    weight_layout = layout.pop("head_weight")
    weight = inputs.pop("head_weight")
    jitted = jax.jit(of, in_shardings=(weight_layout, layout))
    text = jitted.lower(weight, inputs).compile().as_text()
    assert not re.search(r"\[(\d+,)*104[,\]]", text), "an array over the whole vocabulary"
    # Weight-sized traffic: one gather over fsdp before the loop, one reduction after it, scattered
    # over fsdp before what is left is summed over data.
    entry = text.index("\nENTRY")
    found = {}
    for shape in (f"{D},52", f"{D // 2},52"):
        collective = re.compile(rf"= f32\[(?:1,)?{shape}\]\S* (all-\w+|reduce-scatter)\(")
        assert collective.findall(text[:entry]) == []
        found[shape] = collective.findall(text[entry:])
    assert found == {
        f"{D},52": ["all-gather"],
        f"{D // 2},52": ["reduce-scatter", "all-reduce"],
    }


@pytest.mark.parametrize("chunk", [40, 10_000])  # of one piece too, which XLA does not loop over
def test_bfloat16_operands_accumulate_in_float32(chunk):
    inputs = example(dtype=jnp.bfloat16)
    (loss, stats), gradients = both(chunked, inputs, chunk=chunk)
    (wanted, wanted_stats), wanted_gradients = both(naive, inputs)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(stats, wanted_stats, rtol=1e-4, atol=1e-5)
    assert_close(gradients, wanted_gradients, rtol=0.03, atol=0.03)


def test_token_logprobs_equal_log_softmax_and_carry_no_gradient():
    inputs = example()
    logits = jnp.einsum("btd,vd->btv", inputs["hidden"], inputs["head_weight"])
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["targets"][..., None], -1)

    def of(hidden):
        return token_logprobs(hidden, inputs["head_weight"], inputs["targets"], chunk=24)

    assert_close(of(inputs["hidden"]), wanted[..., 0])
    assert not np.any(jax.grad(lambda h: of(h).sum())(inputs["hidden"]))


def test_what_stands_outside_the_mask_changes_nothing():
    inputs = example()
    before = both(chunked, inputs, chunk=40)
    inputs["aux"] = {"scale": jnp.where(inputs["loss_mask"], inputs["aux"]["scale"], jnp.nan)}
    inputs["targets"] = jnp.where(inputs["loss_mask"], inputs["targets"], 0)
    after = both(chunked, inputs, chunk=40)
    np.testing.assert_array_equal(before[0][0], after[0][0])
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_the_loss_sums_cotangent_scales_the_gradient():
    inputs = example()
    _, gradients = both(chunked, inputs, chunk=40)

    def tripled(hidden):
        return 3.0 * chunked(**dict(inputs, hidden=hidden), chunk=40)[0]

    assert_close(jax.grad(tripled)(inputs["hidden"]), 3.0 * gradients[0])


def _compiled(vocab, length, *, chunk=16, forward_only=False):
    inputs = example(vocab=vocab, length=length)

    def of(hidden, head_weight):
        return chunked(**dict(inputs, hidden=hidden, head_weight=head_weight), chunk=chunk)

    function = of if forward_only else jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
    return jax.jit(function).lower(inputs["hidden"], inputs["head_weight"]).compile()


@pytest.mark.parametrize("forward_only", [False, True])
def test_no_buffer_of_tokens_times_vocabulary_is_compiled(forward_only):
    length, vocab = 64, 1009
    text = _compiled(vocab, length, forward_only=forward_only).as_text()
    widest = 0
    for dims in re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text):
        sizes = [int(size) for size in dims.split(",")]
        if vocab in sizes and D not in sizes:
            widest = max(widest, int(np.prod(sizes)) // vocab)
    assert widest == 16, f"{widest} tokens' logits at one time, chunk is 16 of {B * length}"


def test_temporary_memory_does_not_grow_with_vocabulary_times_length():
    # What may grow: V·D (dW, one copy), chunk·V, and B·T·(D + a few numbers).
    def temporary(vocab, length):
        return _compiled(vocab, length).memory_analysis().temp_size_in_bytes

    base, long = temporary(4096, 64), temporary(4096, 256)
    more_tokens = B * (256 - 64)
    assert long - base < more_tokens * (2 * D + 32) * 4
    assert long - base < 0.05 * more_tokens * 4096 * 4
    wide = temporary(8192, 256)
    assert wide - long < 4096 * (2 * D + 4 * 16 + 2) * 4  # 2: jaxlib 0.10.0 takes 0.5 % more


def test_a_batch_that_the_shards_cannot_split_is_refused():
    inputs = example()
    mesh = make_mesh(8)
    cut = {key: value[:6] for key, value in inputs.items() if key in ("hidden", "targets")}
    with pytest.raises(DcodError, match="batch of 6 rows must be a multiple of the 8"):
        token_logprobs(cut["hidden"], inputs["head_weight"], cut["targets"], chunk=8, mesh=mesh)
    with pytest.raises(DcodError, match=r"loss\.head_chunk=0"):
        token_logprobs(inputs["hidden"], inputs["head_weight"], inputs["targets"], chunk=0)
