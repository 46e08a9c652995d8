"""Programs that are compiled without data: what they need, and what is computed in them."""

import types

import jax
import jax.numpy as jnp
import pytest

from dcod_jax.plan import chips, programs

GIB = 2**30


def test_a_program_over_the_limit_is_refused_with_what_it_needs():
    traced = jax.jit(lambda x: (x @ x).sum()).trace(jnp.ones((64, 64)))
    done = programs.compile_program(traced, limit=1e6).memory
    assert done["arguments"] == 64 * 64 * 4
    assert done["peak"] == done["arguments"] + done["temporaries"] > done["arguments"]
    with pytest.raises(programs.DoesNotFitError) as refused:
        programs.compile_program(traced, limit=float(done["peak"] - 1))
    assert refused.value.needed == done["peak"]


@pytest.mark.parametrize(("platform", "peak"), [("tpu", 60), ("cpu", 112), ("gpu", 112)])
def test_the_peak_of_a_tpu_is_what_libtpu_allocates(platform, peak):
    sizes = {"argument": 40, "temp": 70, "output": 42, "alias": 40, "host_argument": 3}
    found = {f"{name}_size_in_bytes": size for name, size in (sizes | {"host_temp": 4}).items()}
    analysis = types.SimpleNamespace(**found, peak_memory_in_bytes=60)
    place = types.SimpleNamespace(device_set=[types.SimpleNamespace(platform=platform)])
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: analysis, input_shardings=((place,), {})
    )
    expected = {"arguments": 40, "temporaries": peak - 40, "peak": peak, "host": 7}
    assert programs.allocated(compiled) == expected


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU ran out of memory. Used 21.25G of 15.75G hbm.", 21.25 * GIB),
        ("the total memory required for HLO temporaries (8.00T) exceeds", 8 * 2**40),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_bytes_that_the_compiler_speaks_of(message, size):
    assert programs.bytes_needed(message) == size


def test_matrix_products_are_counted_through_loops_and_shards():
    def step(x, w):
        body = lambda c, _: (jnp.tanh(c @ w), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(body), x, length=7)[0].sum()

    shapes = jnp.ones((4, 8)), jnp.ones((8, 8))
    forward = 7 * 2 * 4 * 8 * 8
    assert programs.matmul_flops(jax.make_jaxpr(step)(*shapes).jaxpr) == forward
    # The backward pass recomputes each product and takes two more.
    gradient = jax.make_jaxpr(jax.grad(step, argnums=(0, 1)))(*shapes).jaxpr
    assert programs.matmul_flops(gradient) == 4 * forward


def test_clocks_follow_from_peak_and_matrix_units():
    clocks = {c.name: round(c.clock / 1e9, 2) for c in chips.CHIPS.values()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
