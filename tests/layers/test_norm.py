"""RMSNorm by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.layers.norm import RMSNorm


def scaled(scale: list[float], eps: float) -> RMSNorm:
    return param.bind(RMSNorm(len(scale), eps), {"scale": jnp.asarray(scale)})


def test_values_by_hand() -> None:
    # mean(x^2) = (9 + 16) / 2 = 12.5; eps = 3.5 makes the root 4.
    y = scaled([1.0, 2.0], 3.5)(jnp.array([[3.0, 4.0], [-3.0, 4.0]]))
    np.testing.assert_allclose(y, [[0.75, 2.0], [-0.75, 2.0]], rtol=1e-6)


def test_the_root_mean_square_of_the_result_is_one() -> None:
    x = 7.0 * jax.random.normal(jax.random.key(0), (2, 3, 64))
    y = RMSNorm(64)(x)
    np.testing.assert_allclose(np.sqrt(np.square(y).mean(-1)), np.ones((2, 3)), rtol=1e-5)


def test_zeros_stay_zeros_with_a_finite_gradient() -> None:
    norm, x = RMSNorm(4), jnp.zeros((1, 4))
    np.testing.assert_array_equal(norm(x), x)
    assert bool(jnp.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all())


def test_the_dtype_is_kept_and_the_square_does_not_overflow() -> None:
    x = jnp.array([[300.0, 400.0]], jnp.float16)  # 400^2 is more than float16 can hold
    y = RMSNorm(2)(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, np.array([[3.0, 4.0]]) / np.sqrt(12.5), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_float32_rounded_once(dtype: jnp.dtype) -> None:
    norm = scaled(list(np.linspace(0.5, 2.0, 32)), 1e-6)
    x = jax.random.normal(jax.random.key(1), (5, 32)).astype(dtype)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(dtype))
