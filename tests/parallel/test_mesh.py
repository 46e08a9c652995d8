"""Mesh, rules, the arithmetic of what is refused, and state that moves between meshes."""

import re

import jax
import numpy as np
import pytest

from dcod_jax.errors import DcodError
from dcod_jax.models import lora, transformer
from dcod_jax.parallel import collectives
from dcod_jax.parallel import mesh as meshes
from dcod_jax.train.checkpointer import Checkpointer, Snapshot
from dcod_jax.train.optim import OptimConfig, make_optimizer
from dcod_jax.train.step import init_state
from tests.train.test_train_step import MODEL

OPTIMIZER = make_optimizer(OptimConfig(1e-3, "constant", 0, 0.1, 0.0, 0.9, 0.95, 1e-8, 1.0), 10)[0]


class Chip:
    """A TPU device as the mesh sees it."""

    platform, device_kind, process_index = "tpu", "fake", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index
        self.coords, self.core_on_chip = (number % 4, 0, 0), 0


@pytest.mark.parametrize("free", ["data", "fsdp", "expert", "context", "tensor"])
def test_one_size_fills_what_is_left(free):
    mesh = meshes.make_mesh(**{"data": 1, "fsdp": 2, "context": 1, "tensor": 1, free: -1})
    assert mesh.size == 8
    assert mesh.shape[free] == (8 if free == "fsdp" else 4)
    assert tuple(mesh.shape) == ("slices", "data", "fsdp", "expert", "context", "tensor")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"data": 1, "fsdp": 3},
            "mesh.data=1 * fsdp=3 * context=1 * tensor=1 = 3, but there are 8",
        ),
        (
            {"fsdp": 3},
            "mesh.data=2 * fsdp=3 * context=1 * tensor=1 = 6, but there are 8 devices; set",
        ),
        (
            {"slices": 2, "data": 1, "tensor": 8},
            "mesh.slices=2 * data=1 * fsdp=1 * context=1 * tensor=8 = 16, but there are 8 devices",
        ),
        ({"fsdp": -1}, "at most one may be -1"),
        ({"data": 1, "tensor": 0}, "'tensor': 0"),
        ({"slices": 0}, "mesh.slices=0"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, text):
    with pytest.raises(DcodError, match=re.escape(text)):
        meshes.make_mesh(**sizes)


def test_slices_are_contiguous_groups_where_devices_know_of_none():
    mesh = meshes.make_mesh(slices=2, tensor=2)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(2, 4), np.arange(8).reshape(2, 4))
    assert mesh.shape["data"] == 2


def test_tpu_slices_are_taken_from_the_devices_and_another_number_is_refused(monkeypatch):
    chips = [Chip(number, number // 4) for number in range(8)]
    assert meshes._count_slices(-1, chips) == 2
    with pytest.raises(DcodError, match=re.escape("mesh.slices=1, but the 8 devices are in 2 TPU")):
        meshes.make_mesh(slices=1, devices=chips)
    mixed = [chips[i] for i in (4, 0, 5, 1, 6, 2, 7, 3)]  # any order: a slice stays together
    laid_out = meshes._arrange(mixed, (2, 1, 4, 1, 1))
    assert [[chip.slice_index for chip in row.flat] for row in laid_out] == [[0] * 4, [1] * 4]


SNAKE = [(x if y % 2 == 0 else 3 - x, y, 0) for y in range(4) for x in range(4)]


@pytest.mark.parametrize(
    ("places", "sizes"),
    [
        ([(x, 0) for x in range(8)], [8]),  # a line
        ([(x, y) for x in range(4) for y in range(2)], [4, 2]),
        (SNAKE, [4, 4]),  # the order of a v5e 4x4 slice
        ([(x, y, z) for x in range(4) for y in range(2) for z in range(4)], [4, 2, 4]),
        ([(0, 0), (1, 1), (0, 1), (1, 0)], [4]),  # no line at all
    ],
)
def test_a_scatter_along_a_torus_goes_one_dimension_after_the_other(places, sizes):
    stages = collectives.torus_stages(np.array(places))
    assert [len(groups[0]) for groups in stages] == sizes
    pieces = [list(range(len(places)))] * len(places)  # what each position still holds
    for groups in stages:
        assert sorted(i for group in groups for i in group) == list(range(len(places)))
        for group in groups:
            assert len({tuple(pieces[i]) for i in group}) == 1  # they add up the same pieces
            if len(stages) > 1:
                moved = (np.array([places[i] for i in group]) != places[group[0]]).any(0)
                assert moved.sum() == 1
            for place, i in enumerate(group):
                size = len(pieces[i]) // len(group)
                pieces[i] = pieces[i][place * size : (place + 1) * size]
    assert pieces == [[i] for i in range(len(places))]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_partial_sums_are_added_over_the_shards_and_split(sizes):
    """Also where a device's rows (here 16 and 32) are scattered in several parts."""
    mesh = meshes.make_mesh(1, **sizes)
    shards = 8 // sizes.get("tensor", 1)
    partials = np.random.default_rng(0).normal(size=(shards, 128, 6)).astype(np.float32)
    got = jax.jit(lambda x: collectives.sum_shards(x, mesh, "embed", "vocab"))(partials)
    np.testing.assert_allclose(got, partials.sum(0), atol=1e-5)
    assert got.sharding.is_equivalent_to(meshes.sharding(mesh, ("embed", "vocab")), 2)


def test_a_mesh_axis_is_used_once():
    assert meshes.spec(("batch", "shards"))[1] == "context"
    assert meshes.spec(("embed", "batch"))[1] == ("slices", "data")


def test_parameters_are_never_split_over_slices():
    """Only gradients cross the data-centre network."""
    axes = jax.tree.leaves(transformer.logical_axes(MODEL))
    assert {"embed", "vocab", "heads", "kv_heads", "mlp"} <= set(axes)
    assert not any("slices" in meshes.RULES.get(name, ()) for name in axes)


@pytest.mark.parametrize(
    ("key", "logical", "size", "text"),
    [
        ("num_attention_heads", "heads", 14, "=14 must be a multiple of mesh.tensor=4; change num"),
        ("hidden_size", "embed", 33, "=33 must be a multiple of 2 = mesh.fsdp=1 * context=2; cha"),
        ("data.seq_len", "length", 1001, "=1001 must be a multiple of mesh.context=2; change da"),
    ],
)
def test_what_the_mesh_cannot_split_is_refused_with_the_arithmetic(key, logical, size, text):
    mesh = meshes.make_mesh(tensor=4, context=2)
    with pytest.raises(DcodError, match=re.escape(key + text)):
        meshes.check_divides(mesh, {key: (logical, size)})
    meshes.check_divides(mesh, {key: (logical, 16)})


def _layout(mesh):
    return meshes.tree_shardings(mesh, transformer.logical_axes(MODEL))


def test_random_parameters_are_made_in_their_pieces_and_do_not_depend_on_the_mesh():
    key = jax.random.key(3)
    one = lora.init_trained(MODEL, key, meshes.make_mesh(devices=jax.devices()[:1]))
    mesh = meshes.make_mesh(1, 2, context=2, tensor=2)
    many = lora.init_trained(MODEL, key, mesh)
    kernel = many["layers"]["mlp"]["up_proj"]["kernel"]  # [2, 32, 48]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 24)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    # no device ever holds a whole matrix of the stack
    lowered = jax.jit(
        lambda key: transformer.init_params(MODEL, key), out_shardings=_layout(mesh)
    ).lower(jax.random.key(3))
    assert "f32[2,32,48]" not in lowered.compile().as_text()


MESHES = (
    {"data": 1, "fsdp": 8},
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    {"slices": 2},
    {"devices": jax.devices()[:1]},
)


def test_a_checkpoint_moves_from_mesh_to_mesh_and_keeps_its_bits(tmp_path):
    layouts = [meshes.make_mesh(**sizes) for sizes in MESHES]
    state = init_state(
        lora.init_trained(MODEL, jax.random.key(3), layouts[0]),
        OPTIMIZER,
        mesh=layouts[0],
        model_config=MODEL,
    )
    expected = jax.device_get(state.params)
    shapes = transformer.param_shapes(MODEL)
    for number, mesh in enumerate(layouts[1:], 1):
        checkpointer = Checkpointer(tmp_path / str(number))
        checkpointer.save(Snapshot(state=state, step=number, config={}))
        checkpointer.close()
        like = init_state(shapes, OPTIMIZER, mesh=mesh, model_config=MODEL, abstract=True)
        state = Checkpointer(tmp_path / str(number)).restore(like).state
        placed = jax.tree.map(lambda x, at: x.sharding == at.sharding, state.params, like.params)
        assert all(jax.tree.leaves(placed))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected)
