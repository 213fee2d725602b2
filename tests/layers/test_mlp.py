"""The gated MLP against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.layers.mlp import MLP, MLPConfig


def by_numpy(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    gate, up = x @ w["w_gate"], x @ w["w_up"]
    return (gate / (1 + np.exp(-gate)) * up) @ w["w_down"]


def test_it_equals_numpy() -> None:
    mlp = MLP(jax.random.key(0), 8, 12, 0.5, 0.5)
    for shape in ((8,), (3, 8), (2, 3, 8)):
        x = np.random.default_rng(0).normal(size=shape)
        found = mlp(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, by_numpy(param.pure(mlp), x), rtol=1e-4, atol=1e-5)


def test_values_by_hand() -> None:
    # silu(2) * 3 * 5 with one hidden unit.
    params = {"w_gate": jnp.array([[2.0]]), "w_up": jnp.array([[3.0]]), "w_down": jnp.array([[5.0]])}
    mlp = param.bind(MLP(jax.random.key(0), 1, 1, 1.0, 1.0), params)
    np.testing.assert_allclose(mlp(jnp.ones((1,))), [2 / (1 + np.exp(-2)) * 15], rtol=1e-6)


def test_the_dtype_is_kept_while_parameters_stay_float32() -> None:
    mlp = MLP(jax.random.key(0), 8, 12, 0.5, 0.5)
    x = jax.random.normal(jax.random.key(1), (3, 8))
    low = mlp(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(param.pure(mlp))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(low.astype(jnp.float32), mlp(x), atol=0.05 * float(jnp.abs(mlp(x)).max()))


def test_the_down_projection_has_its_own_standard_deviation() -> None:
    params = param.pure(MLP(jax.random.key(0), 100, 100, 0.02, 0.005))
    assert abs(float(params["w_gate"].std()) / 0.02 - 0.987) < 0.03
    assert abs(float(params["w_down"].std()) / 0.005 - 0.987) < 0.03


def test_as_a_sublayer_it_has_the_same_parameters_and_values_and_no_statistics() -> None:
    layer, plain = MLPConfig(hidden=12).build(jax.random.key(0), 8, 0.5, 0.1), MLP(jax.random.key(0), 8, 12, 0.5, 0.1)
    jax.tree.map(np.testing.assert_array_equal, param.pure(layer), param.pure(plain))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    y, stats = layer(x, None, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(y, plain(x))
    assert stats is None and layer.empty_cache(2, 5, jnp.float32) == ()
    np.testing.assert_array_equal(layer.decode(x, None, None, ())[0], y)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^hidden = 0: must be at least 1$"):
        check(MLPConfig(hidden=0))
