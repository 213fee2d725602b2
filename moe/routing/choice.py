"""What token-choice routers share: picking the best K, and writing the picks down as a `Routing`."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.kernels.highest import highest
from moe.routing.base import SAVED_NAME, Context, Routing


def top_k(select_BSE: jax.Array, num_selected: int) -> tuple[jax.Array, jax.Array]:
    """(int32 expert [B, S, K] by falling score, float32 margin [B, S] to the first one left out). No gradient.

    Of equal scores the lower expert wins.
    """
    K, E = num_selected, select_BSE.shape[-1]
    best, expert_BSk = highest(jax.lax.stop_gradient(select_BSE), min(K + 1, E))
    margin_BS = best[..., K - 1] - best[..., K] if E > K else jnp.full(best.shape[:-1], jnp.inf)
    return checkpoint_name(expert_BSk[..., :K], SAVED_NAME), margin_BS


def token_choice(
    context: Context, *, expert_BSK: jax.Array, weight_BSK: jax.Array, probs_BSE: jax.Array, log_z_BS: jax.Array,
    margin_BS: jax.Array, taken_BSK: jax.Array | None = None, priority_BSK: jax.Array | None = None,
    select_BSE: jax.Array | None = None,
) -> Routing:  # fmt: skip
    """K assignments a token, token-major, with padding (and what is not `taken`) made void."""
    B, S, K = expert_BSK.shape
    E = probs_BSE.shape[-1]
    mask_BS = context.mask_BS
    real_BSK = jnp.broadcast_to(mask_BS[..., None], (B, S, K))
    real_BSK = real_BSK if taken_BSK is None else real_BSK & taken_BSK
    token_SK = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], (S, K))
    return Routing(
        token_BR=jnp.broadcast_to(token_SK.reshape(-1), (B, S * K)),
        expert_BR=jnp.where(real_BSK, expert_BSK, E).reshape(B, S * K).astype(jnp.int32),
        weight_BR=jnp.where(real_BSK, weight_BSK, 0.0).reshape(B, S * K),
        probs_BSE=jnp.where(mask_BS[..., None], probs_BSE, 0.0),
        log_z_BS=jnp.where(mask_BS, log_z_BS, 0.0),
        margin_BS=jnp.where(mask_BS, margin_BS, jnp.inf),
        priority_BR=None if priority_BSK is None else jax.lax.stop_gradient(priority_BSK).reshape(B, S * K),
        select_BSE=None if select_BSE is None else jax.lax.stop_gradient(select_BSE),
        num_selected=K,
    )


def unscored(context: Context, expert_BSK: jax.Array, num_experts: int, probs_BSE: jax.Array | None = None) -> Routing:
    """`token_choice` without scores: weights 1 / K, no log_z, an infinite margin; `probs` 1 / K on the chosen."""
    K = expert_BSK.shape[-1]
    if probs_BSE is None:
        probs_BSE = (expert_BSK[..., None] == jnp.arange(num_experts)).any(axis=-2).astype(jnp.float32) / K
    nothing_BS = jnp.zeros(context.token_BS.shape, jnp.float32)
    return token_choice(
        context,
        expert_BSK=checkpoint_name(expert_BSK.astype(jnp.int32), SAVED_NAME),
        weight_BSK=jnp.full(expert_BSK.shape, 1.0 / K, jnp.float32),
        probs_BSE=probs_BSE,
        log_z_BS=nothing_BS,
        margin_BS=jnp.full_like(nothing_BS, jnp.inf),
    )
