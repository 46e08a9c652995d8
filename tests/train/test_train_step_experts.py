"""A student with experts: the load-balance loss and the router's statistics of the global batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import MODEL as DENSE
from test_train_step import ROWS, VALID, forward_of, loss_config, packed

from dcod_jax.errors import DcodError
from dcod_jax.losses import adaptive, reduce, routing
from dcod_jax.losses.distill import DistillLoss
from dcod_jax.losses.head import VocabHead
from dcod_jax.models import transformer
from dcod_jax.models.mixtures import Mixture
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.train.forward import Forward
from dcod_jax.train.step import init_state, make_train_step

MODEL = dataclasses.replace(
    DENSE, model_type="mixtral", qkv_bias=False, mixture=Mixture(4, 2, 24, normalized=True)
)
BALANCE = 3.0


@functools.cache
def params():
    return jax.device_get(transformer.init_params(MODEL, jax.random.key(1)))


def forward(mesh, *, balance):
    cfg = dataclasses.replace(loss_config(), router_balance=balance)
    return Forward(MODEL, DistillLoss(cfg, VocabHead(20, VALID, mesh)), jnp.dtype("float32"))


def test_the_balance_and_its_gradient_are_of_the_global_batch():
    """Two micro-batches on four devices, two of which split the experts, against one formula."""
    mesh = make_mesh(1, 2, expert=2, devices=jax.devices()[:4])
    rate = optax.sgd(1.0)
    step = make_train_step(
        forward(mesh, balance=BALANCE),
        rate,
        lambda step: jnp.float32(1),
        batch_size=ROWS,
        microbatches=2,
    )
    state = init_state(jax.tree.map(jnp.array, params()), rate, mesh=mesh, model_config=MODEL)
    state, measured = step(state, packed())
    alone = forward(make_mesh(devices=jax.devices()[:1]), balance=0.0)
    balanced = forward(alone.mesh, balance=BALANCE)

    @jax.jit
    def wanted(params):
        more = (packed(), jnp.int32(0), adaptive.initial(), ())

        def loss(params):
            total, (sums, _, routed) = alone(params, *more)
            numbers = routing.statistics(routed.sum(0), sums.tokens)
            mean = total * reduce.inverse_divisor(jax.lax.stop_gradient(sums), "mean")
            return mean + BALANCE * numbers["router/balance"], (numbers, sums)

        gradient, (numbers, sums) = jax.grad(loss, has_aux=True)(params)
        # One batch, not cut: the same share of the loss.
        share = (balanced(params, *more)[0] - sums.loss) / (BALANCE * sums.weight)
        return gradient, numbers, share

    gradient, numbers, share = jax.device_get(wanted(params()))
    np.testing.assert_allclose(share, numbers["router/balance"], rtol=1e-4)

    def close(new, old, change):
        np.testing.assert_allclose(old - new, change, atol=3e-5 * np.abs(change).max() + 1e-7)

    jax.tree.map(close, jax.device_get(state.params), params(), gradient)
    for name, value in numbers.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)
    assert 0 < numbers["router/smallest"] < 0.5 < numbers["router/largest"] <= 1
    assert 0 < numbers["router/entropy"] < np.log(4)


def test_a_balance_without_experts_is_refused():
    cfg = dataclasses.replace(loss_config(), router_balance=0.1)
    with pytest.raises(DcodError, match=r"loss\.router_balance=0\.1 .*'qwen2' has none"):
        forward_of(cfg, make_mesh(devices=jax.devices()[:1]))
