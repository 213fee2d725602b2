"""The routing contract: a router turns tokens into a static list of assignments, and never sees an expert.

Everything is kept per sequence. A sequence is the unit no cut of the batch divides, so statistics that are sums over
sequences can be pooled over any scope afterwards, and the arrays are sharded like the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a router may ask about its tokens, beside their hidden vectors."""

    token_BS: jax.Array
    """int32 token ids."""
    segment_BS: jax.Array
    """int32 document number inside the packed sequence, from 1; 0 is padding."""
    position_BS: jax.Array
    """int32 position inside the document."""
    sequence_B: jax.Array
    """int32 index of the sequence in the global batch: noise keys fold it, so no cut of the batch changes them."""
    step: jax.Array
    """int32 optimizer step."""
    key: jax.Array
    """Random key of this layer and step."""
    train: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def mask_BS(self) -> jax.Array:
        """True where the token is real."""
        return self.segment_BS > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """R assignments per sequence (static), and what the balance rules need. All floats are float32."""

    token_BR: jax.Array
    """int32 position in its sequence of the token that is assigned."""
    expert_BR: jax.Array
    """int32 expert in [0, E); E marks a void assignment (a padding token): it reaches no expert and no count."""
    weight_BR: jax.Array
    """Combine weight, 0 where void. Carries gradient."""
    probs_BSE: jax.Array
    """Scores normalised to sum to 1 over experts, 0 for padding. Carries gradient."""
    log_z_BS: jax.Array
    """logsumexp of the router logits, 0 for padding. Carries gradient."""
    margin_BS: jax.Array
    """Selection score of the last expert taken minus the first one left out; +inf for padding. No gradient."""
    num_selected: int | None = dataclasses.field(default=None, metadata={"static": True})
    """K if every token has exactly K assignments and token_BR is [0]*K + [1]*K + ..., else None."""

    @property
    def num_experts(self) -> int:
        return self.probs_BSE.shape[-1]


class Router(nnx.Module):
    """Scores tokens and picks experts. Pure: state goes in, a `Routing` comes out, nothing is written."""

    causal: bool = True
    """Whether a token's routing depends on no later token; a causal decoder refuses a router that says False."""

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's config; its type selects the router."""

    num_selected: int = 2
    """K, experts per token."""

    def build(self, key: jax.Array, width: int, num_experts: int) -> Router:
        raise NotImplementedError(f"{type(self).__name__} must define build")


def void_padding(mask_BS: jax.Array, num_experts: int, expert_BSK: jax.Array, weight_BSK: jax.Array) -> dict[str, Any]:
    """Token-major assignments of a token-choice router as `Routing` fields, with padding made void."""
    B, S, K = expert_BSK.shape
    token_SK = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], (S, K))
    real = mask_BS[..., None]
    return {
        "token_BR": jnp.broadcast_to(token_SK.reshape(-1), (B, S * K)),
        "expert_BR": jnp.where(real, expert_BSK, num_experts).reshape(B, S * K).astype(jnp.int32),
        "weight_BR": jnp.where(real, weight_BSK, 0.0).reshape(B, S * K),
        "num_selected": K,
    }
