"""Dropless dispatch: assignments sorted by expert, run through grouped matrix products. Exact, drops nothing.

Differs from MegaBlocks (Gale et al. 2022, arXiv 2211.15841), whose idea it is: static blocks in portable XLA instead of
block-sparse kernels. Collectives: none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.dispatch.base import DispatchConfig, Dispatcher, ExpertWeights, expert_mlp
from moe.kernels.grouped import block_rows, make_blocks, permute
from moe.routing.base import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroplessConfig(DispatchConfig):
    """Every assignment is computed; cost follows the tokens."""

    def build(self) -> Dispatcher:
        return dropless


def dropless(x_BSD: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
    B, S, D = x_BSD.shape
    E = weights.gate_EDF.shape[0]
    expert_R, weight_R = routing.expert_BR.reshape(-1), routing.weight_BR.reshape(-1)
    R = expert_R.shape[0]
    blocks = make_blocks(expert_R, E, block_rows(R, E))
    flat_Nb = blocks.assignment_Nb.reshape(-1)

    x_RD = _to_assignments(x_BSD, routing)
    x_NbD = permute(x_RD, flat_Nb, blocks.slot_R).reshape(*blocks.assignment_Nb.shape, D)
    weight_Nb = permute(weight_R, flat_Nb, blocks.slot_R).reshape(blocks.assignment_Nb.shape)
    y_NbD = expert_mlp(x_NbD, weight_Nb, weights.take(blocks.expert_N))
    y_RD = permute(y_NbD.reshape(-1, D), blocks.slot_R, flat_Nb)
    return _to_tokens(y_RD, routing, S).astype(x_BSD.dtype), jnp.zeros((B,), jnp.int32)


def _to_assignments(x_BSD: jax.Array, routing: Routing) -> jax.Array:
    """[B*R, D] the token of every assignment."""
    B, S, D = x_BSD.shape
    if routing.num_selected is not None:  # token-major: a broadcast, whose gradient is a sum instead of a scatter
        return jnp.broadcast_to(x_BSD[:, :, None], (B, S, routing.num_selected, D)).reshape(-1, D)
    return jnp.take_along_axis(x_BSD, routing.token_BR[..., None], axis=1).reshape(-1, D)


def _to_tokens(y_RD: jax.Array, routing: Routing, num_positions: int) -> jax.Array:
    """[B, S, D] the sum over every token's assignments, in float32."""
    B, R = routing.token_BR.shape
    y_BRD = y_RD.reshape(B, R, -1).astype(jnp.float32)
    if routing.num_selected is not None:
        return y_BRD.reshape(B, num_positions, routing.num_selected, -1).sum(axis=2)
    zeros = jnp.zeros((num_positions, y_BRD.shape[-1]), jnp.float32)
    return jax.vmap(lambda token_R, y: zeros.at[token_R].add(y))(routing.token_BR, y_BRD)
