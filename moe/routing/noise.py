"""Random numbers of a token: the same however the batch is cut.

The key folds (layer and step: in `context.key`), the global sequence index and the position in the row, then the draw
is made per token: no array's shape and no device enters.
"""

import jax
import jax.numpy as jnp

from moe.routing.base import Context


def token_keys(context: Context, purpose: int) -> jax.Array:
    """Keys [B, S]; `purpose` tells apart the draws of one router."""
    key = jax.random.fold_in(context.key, purpose)
    position_S = jnp.arange(context.token_BS.shape[1], dtype=jnp.int32)
    of_row = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda row_key: of_row(row_key, position_S))(of_row(key, context.sequence_B))


def uniform(context: Context, count: int, purpose: int = 0, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """float32 [B, S, count], uniform in [low, high)."""
    draw = lambda key: jax.random.uniform(key, (count,), jnp.float32, low, high)  # noqa: E731
    return jax.vmap(jax.vmap(draw))(token_keys(context, purpose))


def gumbel(context: Context, count: int, purpose: int = 0) -> jax.Array:
    """float32 [B, S, count], standard Gumbel."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32)))(token_keys(context, purpose))


JITTER, PRIORITY, DROPOUT, CHOICE = 101, 102, 103, 104
"""Purposes of the routers' own draws."""


def jitter(x_BSD: jax.Array, context: Context, size: float) -> jax.Array:
    """x * U(1 - size, 1 + size) elementwise, in training; x in evaluation, or with size 0."""
    if not (context.train and size):
        return x_BSD
    return x_BSD * uniform(context, x_BSD.shape[-1], JITTER, 1.0 - size, 1.0 + size)
