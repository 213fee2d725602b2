"""What token-choice routers share: picking the best K, and writing the picks down as a `Routing`."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.kernels.highest import highest
from moe.routing.base import SAVED_NAME, Context, Routing


@jax.custom_vjp
def softmax(logits_BSE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log p [B, S, E], p [B, S, E], logsumexp [B, S]) of float32 logits, with one pass for the gradients of all three.

    d logits = h - p (sum(h) - d log_z),  h = d log_p + p d p.  Left to autodiff, the weights, the load-balance loss and
    the z-loss together pass over [B, S, E] several times: 1 to 3 % of a small step with 64 experts.
    """
    log_z_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
    log_p_BSE = logits_BSE - log_z_BS[..., None]
    return log_p_BSE, jnp.exp(log_p_BSE), log_z_BS


def _softmax_forward(logits_BSE: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    found = softmax(logits_BSE)
    return found, found[1]


def _softmax_backward(p_BSE: jax.Array, gradient: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array]:
    d_log_p, d_p, d_log_z = gradient
    h_BSE = d_log_p + p_BSE * d_p
    return (h_BSE - p_BSE * (h_BSE.sum(axis=-1) - d_log_z)[..., None],)


softmax.defvjp(_softmax_forward, _softmax_backward)


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
