"""Linear maps with and without heads, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcod_jax.models import layers, linear
from dcod_jax.models.rope import Rope
from tests.models.test_transformer import _assert_close


@pytest.mark.parametrize("inward", [True, False])
def test_heads_are_those_of_the_flat_map(inward):
    """Values, and gradients of input, kernel and bias, against float64 with the heads moved."""
    generator = np.random.default_rng(0)
    heads, flat = (2, 5, 3 * 4), (2, 5, 7)  # 3 heads of 4
    before, after = (flat, heads) if inward else (heads, flat)
    x, g = generator.normal(size=before), generator.normal(size=after)
    kernel, bias = generator.normal(size=(before[-1], after[-1])), generator.normal(size=after[-1])

    def split(x):
        return x.reshape(2, 5, 3, 4).swapaxes(1, 2)

    def joined(x):
        return np.asarray(x).swapaxes(1, 2).reshape(heads)

    form = linear.to_heads(4) if inward else linear.from_heads(4)
    given = [jnp.asarray(a, jnp.float32) for a in (x if inward else split(x), kernel, bias)]
    y, pull = jax.vjp(lambda *a: linear.affine(*a, form), *given)
    in_x, *others = pull(jnp.asarray(split(g) if inward else g, jnp.float32))
    got = [joined(y), in_x] if inward else [y, joined(in_x)]
    wanted = [x @ kernel + bias, g @ kernel.T, np.einsum("bti,bto->io", x, g), g.sum((0, 1))]
    for a, b in zip((*got, *others), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "pairs"),
    [("float32", "halves"), ("bfloat16", "halves"), ("float32", "neighbours")],
)
def test_rotary_positions_equal_their_formula_and_turn_gradients_back(dtype, pairs):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8)).astype(dtype)
    rope = layers.rope_tables(Rope(10000.0), 8, jnp.arange(10).reshape(2, 5))

    def formula(x, cos, sin):
        wide, axis = x.astype(jnp.float32), -2 if pairs == "halves" else -1
        shape = (*x.shape[:-1], 2, 4) if pairs == "halves" else (*x.shape[:-1], 4, 2)
        left, right = jnp.moveaxis(wide.reshape(shape), axis, 0)
        cos, sin = cos[:, None], sin[:, None]
        both = [left * cos - right * sin, right * cos + left * sin]
        return jnp.stack(both, axis).reshape(x.shape).astype(dtype)

    quarter = (jnp.zeros((2, 5, 4)), jnp.ones((2, 5, 4)))  # the halves themselves: to the bit
    np.testing.assert_array_equal(layers.apply_rope(x, *quarter, pairs), formula(x, *quarter))
    got, back = jax.vjp(lambda x: layers.apply_rope(x, *rope, pairs), x)
    wanted, wanted_back = jax.vjp(lambda x: formula(x, *rope), x)
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    _assert_close(got, wanted, tolerance=tolerance)
    _assert_close(back(wanted)[0], wanted_back(wanted)[0], tolerance=tolerance)


@pytest.mark.parametrize("rows", [1, 16, linear.MANY_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_matmul_is_the_plain_one_with_float32_sums(rows, dtype):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, 1, 40)).astype(dtype)
    weight = jax.random.normal(keys[1], (24, 40)).astype(dtype)
    y = jax.jit(linear.transposed_matmul)(x, weight)
    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(y, expected, atol=1e-4)
