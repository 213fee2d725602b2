"""Per-sequence sums over real tokens: everything a balance rule may know about a layer's routing.

A layer only adds up; which sequences belong together (the scope) is decided afterwards by whoever reads the sums, so
the same forward pass serves every scope, and no cut of the batch can change a statistic.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routing.base import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the real tokens of each sequence; leading dimensions (layers, accumulation) may be stacked on."""

    count_BE: jax.Array
    """int32 assignments per expert in the dispatched map: after the bias, before capacity drops. No gradient."""
    prob_BE: jax.Array
    """float32 sum of the probabilities. Carries gradient."""
    z_B: jax.Array
    """float32 sum of logsumexp(logits)^2. Carries gradient."""
    tokens_B: jax.Array
    """int32 real tokens."""
    dropped_B: jax.Array
    """int32 assignments that a capacity limit dropped."""


def statistics(routing: Routing, mask_BS: jax.Array, dropped_B: jax.Array) -> Statistics:
    """Reduces one layer's routing over positions. Collectives: none (sums stay inside a sequence)."""
    # Comparing with every expert fuses into one reduction; a scatter of S*K indices does not partition over devices.
    hit_BRE = routing.expert_BR[..., None] == jnp.arange(routing.num_experts)
    return Statistics(
        count_BE=hit_BRE.sum(axis=1, dtype=jnp.int32),
        prob_BE=routing.probs_BSE.sum(axis=1),
        z_B=jnp.square(routing.log_z_BS).sum(axis=1),
        tokens_B=mask_BS.sum(axis=1, dtype=jnp.int32),
        dropped_B=dropped_B,
    )


def load(count_E: jax.Array) -> jax.Array:
    """f = c / sum(c) over the last dimension, float32: fraction of assignments per expert; 0 where none is counted."""
    total = count_E.sum(axis=-1, keepdims=True)
    return count_E.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)


def summary(count_LE: jax.Array, dropped_L: jax.Array) -> dict[str, jax.Array]:
    """Per-layer numbers for the log.

    `load/max_violation` = E max(f) - 1 (0 when balanced); `load/entropy` = -sum f log f / log E (1 when balanced);
    `load/dead` = experts with f < 1 / (100 E); `load/dropped` = dropped share of the assignments.
    """
    f = load(count_LE)
    E = f.shape[-1]
    log_f = jnp.log(jnp.where(f > 0, f, 1.0))
    return {
        "load/max_violation": E * f.max(axis=-1) - 1.0,
        "load/entropy": -(f * log_f).sum(axis=-1) / jnp.log(float(max(E, 2))),
        "load/dead": (f < 0.01 / E).sum(axis=-1),
        "load/dropped": dropped_L / jnp.maximum(count_LE.sum(axis=-1), 1),
    }
