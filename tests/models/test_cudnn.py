"""cuDNN's kernel without a GPU: what it is called with, and the program lowered for CUDA."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from dcod_jax.errors import DcodError
from dcod_jax.models import attention, cudnn
from dcod_jax.parallel import mesh as meshes


def gpu(capability="9.0"):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.fixture
def hopper(monkeypatch):
    """The mesh's device is taken for a Hopper GPU, and jax for one that found it and cuDNN."""
    monkeypatch.setattr(meshes, "platform", lambda _: "gpu")
    monkeypatch.setattr(cudnn, "device_of", lambda _: gpu())
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    return meshes.make_mesh(devices=jax.devices()[:1])


def as_documented(query, key, value, *, q_seqlen, q_offsets, kv_seqlen, kv_offsets, **options):
    """What cuDNN computes of offsets and lengths [B, most], scores in full; NaN elsewhere."""
    assert options["mask_type"] is fused.MaskType.PADDING_CAUSAL
    assert q_seqlen is kv_seqlen
    assert q_offsets is kv_offsets
    assert key.shape == value.shape == query.shape
    at = jnp.arange(query.shape[1])
    starts, ends = q_offsets[:, :-1], q_offsets[:, :-1] + q_seqlen
    inside = (at >= starts[..., None]) & (at < ends[..., None]) & (q_seqlen[..., None] > 0)
    together = jnp.einsum("bst,bsu->btu", inside.astype(int), inside.astype(int)) > 0
    visible = together & (at[:, None] >= at)
    if (window := options["sliding_window_length"]) is not None:
        visible &= at[:, None] - at < window
    scores = jnp.einsum("btnh,bunh->bntu", query, key) * options["scale"]
    probs = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bntu,bunh->btnh", probs, value)


@pytest.mark.parametrize(("segments", "window"), [(1, None), (3, 37), (40, None), (100, None)])
def test_packed_rows_are_those_of_the_other_kernels(monkeypatch, segments, window):
    """Few segments, many, and more than cuDNN is compiled for; the last of a row is padding."""
    monkeypatch.setattr(fused, "dot_product_attention", as_documented)
    generator = np.random.default_rng(segments)
    length = 150
    heads = [generator.normal(size=(2, n, length, 8)).astype(np.float32) for n in (4, 2, 2, 4)]
    cuts = [np.sort(generator.permutation(length - 1)[: n - 1]) for n in (segments, 2)]
    ids = np.stack([1 + (np.arange(length)[:, None] > cut).sum(1) for cut in cuts])
    ids[:, -1] = 0

    def pulled(kind):
        def run(*heads):
            options = {"window": window}
            if kind == "cudnn":
                other = functools.partial(attention.attention, kind="scanned", **options)
                options |= {"scale": 8**-0.5, "otherwise": other}
                return cudnn.attention(*heads, jnp.asarray(ids), **options)
            return attention.attention(*heads, jnp.asarray(ids), kind=kind, **options)

        mixed, pull = jax.vjp(run, *map(jnp.asarray, heads[:3]))
        return mixed, *pull(jnp.asarray(heads[3]))

    got, wanted = (jax.jit(functools.partial(pulled, kind))() for kind in ("cudnn", "scanned"))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


def test_runs_have_offsets_and_lengths():
    ids = jnp.array([[1, 1, 2, 0], [0, 0, 0, 0]])
    offsets, lengths = cudnn.runs(ids, 4)
    np.testing.assert_array_equal(offsets, [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 1, 1, -1], [4, -1, -1, -1]])


def lowered(mesh, *, length, kind="auto", window=None):
    """StableHLO for CUDA of attention and its gradients, [2, length] packed rows."""
    shapes = [jax.ShapeDtypeStruct((2, n, length, 64), jnp.bfloat16) for n in (4, 2, 2)]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(query, key, value, ids):
        options = {"mesh": mesh, "kind": kind, "window": window}
        mixed = attention.attention(query, key, value, ids, **options)
        return mixed.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def square_tensors(text, length):
    """Types in which the length occurs twice, beside the keys' own dimension: scores of a row."""
    shapes = {tuple(map(int, s[:-1].split("x"))) for s in re.findall(r"tensor<((?:\d+x)+)", text)}
    return [shape for shape in shapes if sum(n >= length for n in shape) > 1]


def test_the_program_for_cuda_calls_cudnn_and_holds_no_scores(hopper):
    text = lowered(hopper, length=640, window=100)
    calls = re.findall(r'custom_call @"?(__cudnn[$\w]+)', text)
    sizes = len(cudnn.MOST_SEGMENTS)  # each compiled once forward, and forward and back behind it
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == sizes
    assert calls.count("__cudnn$fmhaSoftmax") >= sizes
    config = text.replace("\\22", '"')
    assert set(re.findall(r'"max_seg_per_batch": (\d+)', config)) == {"8", "64"}
    assert set(re.findall(r'"sliding_window_length": (\d+)', config)) == {"100"}
    assert square_tensors(text, 640) == []
    # The check can fail: blocks of an eighth are no square, all queries against all keys are.
    assert square_tensors("tensor<2x4x640x640xf32>", 640)


def test_what_cudnn_cannot_take_is_scanned_or_refused_where_it_was_asked_for(hopper, monkeypatch):
    def refused(match, *, dtype=jnp.bfloat16, width=64, rows=2):
        query = jax.ShapeDtypeStruct((rows, 4, 256, width), dtype)
        with pytest.raises(DcodError, match=match):
            jax.eval_shape(
                functools.partial(attention.attention, mesh=hopper, kind="cudnn"),
                *[query] * 3,
                jax.ShapeDtypeStruct((rows, 256), jnp.int32),
            )

    with monkeypatch.context() as patch:
        patch.setattr(meshes, "platform", lambda _: "cpu")
        with pytest.raises(DcodError, match="float32 on CPU, not bfloat16; take blocked"):
            lowered(hopper, length=8, kind="scanned")
    refused("not float32; set student.compute_dtype", dtype=jnp.float32)
    refused("head_dim=256 must be a multiple of 8, at most 128", width=256)
    refused("beyond its int32 offsets", rows=2**15)
    monkeypatch.setattr(cudnn, "device_of", lambda _: gpu("8.0"))
    refused("compute capability 9.0, not 8.0")
    text = lowered(hopper, length=640)
    assert "__cudnn" not in text
    assert square_tensors(text, 640) == []
