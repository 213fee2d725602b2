"""Parameters: declared once, float32, with axes that exist; modules as trees of arrays and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe import param


class Pair(nnx.Module):
    def __init__(self, key: jax.Array):
        self.w = param.normal(key, (6, 4), ("embed", "mlp"), 0.5)
        self.scale = param.declare(jnp.ones(4), ("norm",))


def test_axes_must_fit_the_shape_and_exist() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 logical axes, got \('embed',\)"):
        param.declare(jnp.ones((2, 3)), ("embed",))
    with pytest.raises(KeyError, match=r"logical axis 'embde'"):
        param.declare(jnp.ones((2, 3)), ("embde", None))


def test_initial_values_are_float32_truncated_at_three_deviations() -> None:
    value = param.normal(jax.random.key(0), (400, 400), ("embed", "mlp"), 0.5).get_value()
    assert value.dtype == jnp.float32
    assert float(jnp.abs(value).max()) <= 1.5
    np.testing.assert_allclose(value.std(), 0.5 * 0.9866, rtol=5e-3)  # of a normal cut at 3
    np.testing.assert_allclose(value.mean(), 0.0, atol=5e-3)


def test_bind_and_pure_are_inverse_and_leave_the_module_alone() -> None:
    module = Pair(jax.random.key(0))
    before = jax.device_get(param.pure(module))
    doubled = jax.tree.map(lambda w: 2 * w, param.pure(module))
    bound = param.bind(module, doubled)
    np.testing.assert_array_equal(bound.w[...], 2 * before["w"])
    np.testing.assert_array_equal(module.w[...], before["w"])
    assert jax.tree.structure(param.pure(bound)) == jax.tree.structure(before)


def test_an_abstract_module_can_be_bound() -> None:
    abstract = jax.eval_shape(lambda: Pair(jax.random.key(0)))
    params = param.pure(Pair(jax.random.key(1)))
    np.testing.assert_array_equal(param.bind(abstract, params).w[...], params["w"])


def test_stacked_modules_have_a_layer_dimension_that_is_not_cut() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = param.stack(Pair, keys)
    assert stacked.w[...].shape == (3, 6, 4)
    for layer in range(3):
        np.testing.assert_array_equal(stacked.w[...][layer], Pair(keys[layer]).w[...])
    assert param.specs(stacked) == {"w": PartitionSpec(None, "fsdp", "tensor"), "scale": PartitionSpec(None, None)}
    assert param.specs(Pair(keys[0])) == {"w": PartitionSpec("fsdp", "tensor"), "scale": PartitionSpec(None)}
