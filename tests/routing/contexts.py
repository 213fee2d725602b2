"""Contexts for calling a router by itself."""

import jax
import jax.numpy as jnp

from moe.routing.base import Context


def context_for(B: int, S: int, *, padding: int = 0, first: int = 0, train: bool = True) -> Context:
    """Two documents a sequence, then `padding` positions of padding."""
    position = jnp.arange(S, dtype=jnp.int32)
    segment = jnp.where(position < S - padding, 1 + (position >= S // 2), 0)
    tile = lambda row: jnp.broadcast_to(row, (B, S)).astype(jnp.int32)  # noqa: E731
    return Context(
        token_BS=tile(position % 7), segment_BS=tile(segment), position_BS=tile(position % max(S // 2, 1)),
        task_BS=tile(position >= S // 2),
        sequence_B=first + jnp.arange(B, dtype=jnp.int32), step=jnp.int32(5), key=jax.random.key(3), train=train,
    )  # fmt: skip
