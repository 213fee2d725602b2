"""What every sublayer must pass, whatever it computes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from moe import axes, param
from moe.axes import MeshConfig
from moe.layers.base import Sublayer, SublayerConfig
from moe.routing.base import Context
from tests.routing.contexts import context_for

NO_BIAS = jnp.zeros((0,))
B, S, D = 8, 8, 16


def inputs(seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, D)), dtype)


def build(config: SublayerConfig, width: int = D, init_std: float = 0.3, out_std: float = 0.3, seed: int = 0) -> Any:
    return config.build(jax.random.key(seed), width, init_std, out_std)


def run(module: Sublayer, x: jax.Array, context: Context | None = None) -> jax.Array:
    return _run(*nnx.split(module), x, context_for(*x.shape[:2]) if context is None else context)


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, x: jax.Array, context: Context) -> jax.Array:
    y, statistics = nnx.merge(graph, state)(x, context, NO_BIAS)
    assert statistics is None
    return y


def value_and_gradient(module: Sublayer, params: Any, x: jax.Array, context: Context) -> Any:
    """((sum of squares, y), gradient for (params, x)), to be jitted."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, _ = param.bind(module, params)(x, context, NO_BIAS)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def check_contract(config: SublayerConfig) -> None:
    """bfloat16 stays bfloat16; every parameter learns; eight devices compute what one does."""
    module, context = build(config), context_for(B, S)
    low = run(module, inputs(dtype=jnp.bfloat16))
    assert low.dtype == jnp.bfloat16 and bool(jnp.isfinite(low).all())
    assert config.routed_experts == 0
    params = param.pure(module)
    (_, y), gradients = jax.jit(lambda *a: value_and_gradient(module, *a))(params, inputs(), context)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, f"no gradient for {jax.tree_util.keystr(path)}"
    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2, expert=2, expert_tensor=2))
    placed = jax.device_put(params, param.shardings(module, mesh))
    batch = axes.sharding(mesh, ("batch", "stream", None))
    with jax.set_mesh(mesh):
        over = jax.jit(lambda *a: value_and_gradient(module, *a))
        (_, found), found_gradients = over(placed, jax.device_put(inputs(), batch), context)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def decoded(module: Sublayer, x: jax.Array, pieces: tuple[int, ...], length: int) -> jax.Array:
    """What `decode` makes of x, one document, cut in pieces."""
    cache, first, found = module.empty_cache(x.shape[0], length, x.dtype), 0, []
    context = one_document(x.shape[0], x.shape[1])
    for size in pieces:
        here = jax.tree.map(lambda leaf, a=first, b=first + size: leaf[:, a:b] if leaf.ndim == 2 else leaf, context)
        y, cache = module.decode(x[:, first : first + size], here, NO_BIAS, cache)
        found.append(y)
        first += size
    return jnp.concatenate(found, axis=1)


def one_document(batch: int, positions: int) -> Context:
    context = context_for(batch, positions)
    position = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32), (batch, positions))
    return Context(
        token_BS=context.token_BS, segment_BS=jnp.ones_like(position), position_BS=position,
        task_BS=context.task_BS, sequence_B=context.sequence_B, step=context.step, key=context.key,
    )  # fmt: skip


def cuts(module: Sublayer) -> dict[str, PartitionSpec]:
    """Parameter path -> how the table of axes cuts it."""
    is_spec = lambda part: isinstance(part, PartitionSpec)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(param.specs(module), is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): part for path, part in leaves}
