"""Scope: over which sequences the load is counted. One field, the same meaning on 1 and on 10,000 chips.

`"sequence"`: each sequence by itself. An integer n: groups of n consecutive sequences of the global batch, group =
global sequence index // n. `"global"`: every sequence of the optimizer step, across devices and accumulation.
"""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from moe.balance.statistics import load

Scope = Literal["global", "sequence"] | int


def group_size(scope: Scope, num_sequences: int) -> int:
    """Sequences in one group when the batch has `num_sequences`."""
    return num_sequences if scope == "global" else 1 if scope == "sequence" else int(scope)


def scope_problems(field: str, scope: Scope) -> Iterator[tuple[str, str]]:
    if isinstance(scope, int) and scope < 1:
        yield field, "must be 'global', 'sequence' or a number of sequences of at least 1"


def group_problems(field: str, scope: Scope, num_sequences: int) -> Iterator[tuple[str, str]]:
    if isinstance(scope, int) and num_sequences % scope:
        near = [n for n in range(1, num_sequences + 1) if num_sequences % n == 0]
        yield (
            field,
            f"must divide the {num_sequences} sequences of the global batch: one of {', '.join(map(str, near))}",
        )


def pool(count_LBE: jax.Array, n: int) -> jax.Array:
    """Load of every group of n consecutive sequences: [L, B, E] counts -> [L, B/n, E] fractions."""
    L, B, E = count_LBE.shape
    return load(count_LBE.reshape(L, B // n, n, E).sum(axis=2))


def per_sequence_load(count_LBE: jax.Array, n: int) -> jax.Array:
    """Each sequence's own group's load: [L, B, E] counts -> [L, B, E] fractions."""
    return jnp.repeat(pool(count_LBE, n), n, axis=1)


def in_order(count_ALBE: jax.Array) -> jax.Array:
    """[A, L, B, E] -> [L, A*B, E]: the sequences of the whole batch in their global order."""
    A, L, B, E = count_ALBE.shape
    return count_ALBE.transpose(1, 0, 2, 3).reshape(L, A * B, E)
