"""The highest scores: as `jax.lax.top_k`, with gradient, and without gathering a batch that is cut over devices."""

import jax
import jax.numpy as jnp
import numpy as np

from moe import axes
from moe.axes import MeshConfig
from moe.kernels.highest import highest

SCORES = np.random.default_rng(0).integers(0, 5, (8, 4, 3, 16)).astype(np.float32)  # with ties


def test_values_and_indices_are_in_falling_order_and_the_lower_index_wins_a_tie() -> None:
    values, index = highest(jnp.asarray(SCORES), 4)
    expected = np.argsort(-SCORES, axis=-1, kind="stable")[..., :4]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(SCORES, expected, axis=-1))


def test_over_a_mesh_nothing_moves_and_nothing_changes() -> None:
    mesh = axes.make_mesh(MeshConfig(data=2, context=2, tensor=2, expert=2), jax.devices())

    def loss(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, index = highest(scores, 4)
        return (values * jnp.arange(4)).sum(), index

    (value, index), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(SCORES))
    with jax.set_mesh(mesh):
        cut = jax.device_put(SCORES, axes.sharding(mesh, ("batch", "stream")))
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(cut).compile()
        (found, found_index), found_gradient = compiled(cut)
    np.testing.assert_allclose(found, value)
    np.testing.assert_array_equal(found_index, index)
    np.testing.assert_array_equal(found_gradient, gradient)
    assert "all-gather" not in compiled.as_text()
