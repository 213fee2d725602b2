"""Products with weights that are stored in more pieces than they are used in: values, gradients, what is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies

from moe import axes
from moe.axes import MeshConfig
from moe.kernels.project import project

B, S, D, F = 4, 8, 16, 24
WHOLE = ("batch", "position", None)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, S, D)).astype(np.float32), rng.normal(size=(D, F)).astype(np.float32)


def up(x: jax.Array, weight: jax.Array) -> jax.Array:
    return project("bsd,df->bsf", x, weight, (None, "mlp"), WHOLE)


def test_values_and_gradients_are_those_of_the_product_on_one_device_and_on_eight() -> None:
    x, weight = inputs()
    expected = np.einsum("bsd,df->bsf", x, weight)
    seed = np.cos(np.arange(expected.size, dtype=np.float32)).reshape(expected.shape)

    def step(x: jax.Array, weight: jax.Array) -> Any:
        y, back = jax.vjp(up, x, weight)
        return y, back(jnp.asarray(seed))

    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2), jax.devices())
    alone = jax.jit(step)(x, weight)
    with jax.set_mesh(mesh):
        where = axes.sharding(mesh, ("batch", "stream", None)), axes.sharding(mesh, ("embed", "mlp"))
        cut = jax.jit(step)(*jax.device_put((x, weight), where))
    for y, (d_x, d_weight) in (alone, cut):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_x, np.einsum("bsf,df->bsd", seed, weight), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_weight, np.einsum("bsd,bsf->df", x, seed), rtol=1e-5, atol=1e-5)


def kept(function: Any, *args: Any) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of what the forward pass keeps for the backward pass."""
    return {(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(jax.vjp(function, *args)[1])}


def test_the_cast_weight_is_made_again_for_the_backward_pass_and_not_kept() -> None:
    x, weight = (jnp.asarray(part) for part in inputs())
    low = x.astype(jnp.bfloat16)
    assert kept(up, low, weight) == {("bfloat16", (B, S, D)), ("float32", (D, F))}
    plain = kept(lambda x, w: x @ w.astype(x.dtype), low, weight)
    assert ("bfloat16", (D, F)) in plain  # what the line above guards against


def test_remat_policies_see_the_product() -> None:
    x, weight = (jnp.asarray(part) for part in inputs())

    def layer(policy: Any) -> Any:
        return jax.checkpoint(lambda x, w: jnp.sin(up(x, w)), policy=policy)

    product = ("float32", (B, S, F))
    assert product in kept(layer(checkpoint_policies.dots_with_no_batch_dims_saveable), x, weight)
    assert product not in kept(layer(checkpoint_policies.nothing_saveable), x, weight)
