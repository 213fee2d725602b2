"""What comes out of the decoder: hidden vectors, their logits, their loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.models.cross_entropy import summed


class Predictions(NamedTuple):
    """What the decoder makes of a batch: hidden vectors behind the final norm, for `Decoder.logits` or `.nats`."""

    hidden_BSD: jax.Array
    """Of the next token."""
    statistics: Statistics | None
    later: tuple[jax.Array, ...]
    """[B, S, D] for each block of `ahead`: of the token after the next one, and so on."""


def logits(hidden_BSD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 [B, S, V] = h W, products in the dtype of h."""
    with jax.named_scope("logits"):
        hidden_BSD = constrain(hidden_BSD, "batch", "position", None)
        head_DV = head_DV.astype(hidden_BSD.dtype)
        found = jnp.einsum("bsd,dv->bsv", hidden_BSD, head_DV, preferred_element_type=jnp.float32)
        return constrain(found, "batch", "position", "vocab")


def token_losses(logits_BSV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """float32 [B, S] nats: -log softmax(logits)[target]."""
    logits = logits_BSV.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, target_BS[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def nats(hidden_BSD: jax.Array, head_DV: jax.Array, target_BS: jax.Array, real_BS: jax.Array, chunk: int) -> jax.Array:
    """float32 scalar: `token_losses` summed where `real_BS`; in chunks of so many tokens of a device, 0: all at once.

    The two agree but for rounding; with bfloat16 activations the chunks round the gradient by the logits to bfloat16.
    """
    if chunk:
        return summed(hidden_BSD, head_DV, target_BS, real_BS, chunk)
    return jnp.where(real_BS, token_losses(logits(hidden_BSD, head_DV), target_BS), 0.0).sum()
