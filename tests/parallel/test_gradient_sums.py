"""The dtype in which devices sum the gradients of a layer's weights: bounds, and the program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax import config as configs
from dcod_jax.config_checks import config_errors
from dcod_jax.models import linear, transformer
from dcod_jax.parallel import mesh as meshes
from dcod_jax.parallel.collectives import WeightDtypes
from dcod_jax.train.forward import make_forward
from dcod_jax.train.settings import loss_config
from tests.train.test_train_step import MODEL

ROWS, LENGTH, INNER, OUTER = 8, 24, 32, 48
NAMES = {"q_proj": {"kernel": ("layers", "embed", "heads"), "bias": ("layers", "heads")}}


@functools.cache
def arrays() -> tuple[jax.Array, jax.Array]:
    """(x, gradient of the output), bfloat16."""
    generator = np.random.default_rng(0)
    shapes = ((ROWS, LENGTH, INNER), (ROWS, LENGTH, OUTER))
    x, g = (jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return x, g


def gradients(mesh, dtype: str, *, placed: bool) -> dict[str, np.ndarray]:
    """Of sum(g · affine(x, weights)) in the weights, through the layers' own path."""
    x, g = arrays()
    zeros = {"q_proj": {"kernel": jnp.zeros((INNER, OUTER)), "bias": jnp.zeros(OUTER)}}
    dtypes = WeightDtypes(jnp.dtype("bfloat16"), jnp.dtype(dtype))

    def loss(layer, x, g):
        y = transformer._with_weights(
            lambda layer, x: linear.affine(
                x, layer["q_proj"]["kernel"], layer["q_proj"]["bias"], linear.PLAIN
            ),
            layer,
            NAMES,
            ("q_proj",),
            ((("batch", None, None), x),),
            ("batch", None, "heads"),
            dtypes=dtypes,
            mesh=mesh,
            placed=placed,
        )
        return (y * g).sum(dtype=jnp.float32)

    layout = {name: meshes.sharding(mesh, axes[1:]) for name, axes in NAMES["q_proj"].items()}
    step = jax.jit(jax.grad(loss), out_shardings={"q_proj": layout})
    rows = meshes.sharding(mesh, ("batch",))
    inputs = (jax.device_put(zeros, {"q_proj": layout}), *jax.device_put((x, g), rows))
    return jax.device_get(step(*inputs))["q_proj"]


@pytest.mark.parametrize(
    ("sizes", "placed"),
    [
        ((1, 8, 1), True),
        ((1, 8, 1), False),
        ((4, 2, 1), True),
        ((2, 2, 2), True),
        ((1, 1, 1), True),
    ],
    ids=str,
)
def test_float32_sums_are_exact_to_float32_and_bfloat16_sums_to_bfloat16(sizes, placed):
    """Against float64, on every path of the weights: own shards, the partitioner's, one device."""
    x, g = (np.asarray(a, np.float64).reshape(ROWS * LENGTH, -1) for a in arrays())
    wanted = {"kernel": x.T @ g, "bias": g.sum(0)}
    size = {"kernel": np.abs(x).T @ np.abs(g), "bias": np.abs(g).sum(0)}
    mesh = meshes.make_mesh(*sizes[:2], tensor=sizes[2], devices=jax.devices()[: np.prod(sizes)])
    wide, narrow = (gradients(mesh, t, placed=placed) for t in ("float32", "bfloat16"))
    for name in wanted:
        float32 = ROWS * LENGTH * 2.0**-24 * size[name]
        assert (np.abs(wide[name] - wanted[name]) <= float32).all(), name
        error = np.abs(narrow[name] - wanted[name])
        assert (error <= ROWS * 2.0**-8 * size[name]).all(), name
        assert error.max() > 30 * float32.max(), name  # or the choice chose nothing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "plain"])
def test_the_program_sums_the_layers_in_the_chosen_dtype(dtype):
    """Seven matrices a layer, in one scan; train.gradient_sums=plain leaves all to the partitioner.

    Its sums come when it compiles, so the program names none.
    """
    placed, dtype = dtype != "plain", "float32" if dtype == "plain" else dtype
    mesh = meshes.make_mesh(1, 8)
    tokens = jnp.zeros((8, 16), jnp.int32)

    def loss(params):
        options = {"compute_dtype": jnp.bfloat16, "gradient_dtype": jnp.dtype(dtype)}
        options |= {"mesh": mesh, "placed": placed}
        return transformer.hidden_states(MODEL, params, tokens, **options).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(transformer.param_shapes(MODEL)))
    found = re.findall(r":(\w+)\[[\d,]*\]\S* = reduce_scatter\[", program)
    assert found == [{"float32": "f32", "bfloat16": "bf16"}[dtype]] * 7 * placed


def test_the_config_chooses_and_refuses_what_would_not_be_done():
    for dtype in ("float32", "bfloat16"):
        changes = {"train.gradient_dtype": dtype}
        config = configs.replace(configs.load_recipe(configs.BASE), changes)
        forward = make_forward(config, MODEL, mesh=meshes.make_mesh(), valid_vocab=None)
        assert forward.gradient_dtype == jnp.dtype(dtype)
        assert forward.kernel == "auto"
        assert forward.loss.head.placed
        assert not config_errors(configs.keys(config), loss_config(config))
    other = {"train.gradient_sums": "plain", "student.attention": "blocked"}
    forward = make_forward(
        configs.replace(config, other), MODEL, mesh=meshes.make_mesh(), valid_vocab=None
    )
    assert (forward.kernel, forward.loss.head.placed) == ("blocked", False)
    config = configs.replace(config, {"student.compute_dtype": "float32"})
    wrong = config_errors(configs.keys(config), loss_config(config))
    assert wrong[0].startswith("train.gradient_dtype=bfloat16 needs student.compute_dtype=bfloat16")
