"""Token vectors into the rows of a buffer and back: two linear maps, each the other's transpose.

    take:  row n    = x[token of row n]                       0 in an empty row
    put:   token t  = sum of the rows that belong to it       in float32, then back to the dtype of the rows

So the gradient of each is the other, and nothing of the size of tokens times K is kept or made: where every token has
K assignments, both are gathers, and `put` adds K of them up one after the other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Which token is in which row, both ways."""

    token_N: jax.Array
    """int32 token in every row; T where the row is empty."""
    row_TK: jax.Array | None
    """int32 row of each of a token's K assignments, N where it has none; None if tokens have no common K."""


def places(token_R: jax.Array, assignment_N: jax.Array, row_R: jax.Array, num_tokens: int, K: int | None) -> Places:
    """Of assignments in rows: assignment_N of every row (R: empty), row_R of every assignment (N: none)."""
    token_N = jnp.take(token_R, assignment_N, mode="fill", fill_value=num_tokens)
    return Places(token_N, None if K is None else row_R.reshape(num_tokens, K))


def take(x_TD: jax.Array, at: Places) -> jax.Array:
    """x [T, D] -> rows [N, D]."""
    return _take(x_TD.shape[0], x_TD, at)


def put(rows_ND: jax.Array, at: Places, num_tokens: int) -> jax.Array:
    """rows [N, D] -> sums [T, D]."""
    return _put(num_tokens, rows_ND, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(num_tokens: int, x_TD: jax.Array, at: Places) -> jax.Array:
    return jnp.take(x_TD, at.token_N, axis=0, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _put(num_tokens: int, rows_ND: jax.Array, at: Places) -> jax.Array:
    if at.row_TK is None:
        zeros = jnp.zeros((num_tokens, rows_ND.shape[-1]), jnp.float32)
        return zeros.at[at.token_N].add(rows_ND.astype(jnp.float32), mode="drop").astype(rows_ND.dtype)

    def rows(row_T: jax.Array) -> jax.Array:
        return jnp.take(rows_ND, row_T, axis=0, mode="fill", fill_value=0).astype(jnp.float32)

    first, others = at.row_TK[:, 0], at.row_TK[:, 1:].T
    total, _ = jax.lax.scan(lambda sum_TD, row_T: (sum_TD + rows(row_T), None), rows(first), others, unroll=8)
    return total.astype(rows_ND.dtype)


def _take_forward(num_tokens: int, x_TD: jax.Array, at: Places) -> tuple[jax.Array, Places]:
    return _take(num_tokens, x_TD, at), at


def _take_backward(num_tokens: int, at: Places, grad_ND: jax.Array) -> tuple[jax.Array, None]:
    return _put(num_tokens, grad_ND, at), None


def _put_forward(num_tokens: int, rows_ND: jax.Array, at: Places) -> tuple[jax.Array, Places]:
    return _put(num_tokens, rows_ND, at), at


def _put_backward(num_tokens: int, at: Places, grad_TD: jax.Array) -> tuple[jax.Array, None]:
    return _take(num_tokens, grad_TD, at), None


_take.defvjp(_take_forward, _take_backward)
_put.defvjp(_put_forward, _put_backward)
