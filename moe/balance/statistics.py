"""Per-sequence sums over real tokens: everything a balance rule may know about a layer's routing.

A layer only adds up; which sequences belong together (the scope) is decided afterwards by whoever reads the sums, so
the same forward pass serves every scope, and no cut of the batch can change a statistic.

Layers may differ in their number of experts: stacked statistics are as wide as the widest layer, and experts that a
layer does not have count nothing (`num_experts_L`, `exists_LE`).
"""

import dataclasses
from collections.abc import Sequence

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
    chosen_prob_B: jax.Array
    """float32 sum over tokens of the probability mass on the experts they took. No gradient."""
    margin_B: jax.Array
    """float32 sum of the selection margins that are finite. No gradient."""
    widths: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    """E of every stacked layer; () as long as nothing is stacked, or if all are as wide as the arrays."""

    @property
    def num_experts_L(self) -> jax.Array:
        """float32 [L] experts of every layer, for statistics stacked [L, B, ...] or [A, L, B, ...]."""
        L, E = self.count_BE.shape[-3], self.count_BE.shape[-1]
        return jnp.asarray(self.widths or (E,) * L, jnp.float32)

    @property
    def exists_LE(self) -> jax.Array:
        """bool [L, E]: False for experts that a layer narrower than the widest does not have."""
        return jnp.arange(self.count_BE.shape[-1]) < self.num_experts_L[:, None]


def statistics(routing: Routing, mask_BS: jax.Array, dropped_B: jax.Array) -> Statistics:
    """Reduces one layer's routing over positions. Collectives: none (sums stay inside a sequence)."""
    # Comparing with every expert fuses into one reduction; a scatter of S*K indices does not partition over devices.
    hit_BRE = routing.expert_BR[..., None] == jnp.arange(routing.num_experts)
    probs_BSE = jax.lax.stop_gradient(routing.probs_BSE)
    return Statistics(
        count_BE=hit_BRE.sum(axis=1, dtype=jnp.int32),
        prob_BE=routing.probs_BSE.sum(axis=1),
        z_B=jnp.square(routing.log_z_BS).sum(axis=1),
        tokens_B=mask_BS.sum(axis=1, dtype=jnp.int32),
        dropped_B=dropped_B,
        chosen_prob_B=_chosen_prob(routing, probs_BSE, hit_BRE),
        margin_B=jnp.where(jnp.isfinite(routing.margin_BS), routing.margin_BS, 0.0).sum(axis=1),
    )


def _chosen_prob(routing: Routing, probs_BSE: jax.Array, hit_BRE: jax.Array) -> jax.Array:
    """[B] probability mass of the assignments; a token that takes an expert through a slot has no mass of its own."""
    if routing.slots is not None:
        return jnp.zeros(probs_BSE.shape[:1], jnp.float32)
    if routing.num_selected is not None:
        B, S, E = probs_BSE.shape
        return (hit_BRE.reshape(B, S, -1, E) * probs_BSE[:, :, None]).sum(axis=(1, 2, 3))
    prob_BRE = jnp.take_along_axis(probs_BSE, routing.token_BR[..., None], axis=1)
    return (hit_BRE * prob_BRE).sum(axis=(1, 2))


def stack_layers(parts: Sequence[tuple[Statistics, int]]) -> Statistics:
    """Statistics [L_i, B, E_i] of consecutive layers, each with its E_i, as one [L, B, max E]."""
    widest = max(E for _, E in parts)

    def widen(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, widest - leaf.shape[-1])))

    padded = [
        dataclasses.replace(one, count_BE=widen(one.count_BE), prob_BE=widen(one.prob_BE), widths=())
        for one, _ in parts
    ]
    widths = tuple(E for one, E in parts for _ in range(one.count_BE.shape[0]))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *padded)
    return dataclasses.replace(joined, widths=widths if min(widths) < widest else ())


def load(count_E: jax.Array) -> jax.Array:
    """f = c / sum(c) over the last dimension, float32: fraction of assignments per expert; 0 where none is counted."""
    total = count_E.sum(axis=-1, keepdims=True)
    return count_E.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)


def summary(whole: Statistics) -> dict[str, jax.Array]:
    """Per-layer numbers [L] for the log, from the statistics [A, L, B, ...] of a whole batch.

    `load/max_violation` = E max(f) - 1 (0 when balanced); `load/entropy` = -sum f log f / log E (1 when balanced);
    `load/dead` = experts with f < 1 / (100 E); `load/dropped` = dropped share of the assignments.
    """
    count_LE = whole.count_BE.sum(axis=(0, 2))
    f_LE, E_L = load(count_LE), whole.num_experts_L
    log_f = jnp.log(jnp.where(f_LE > 0, f_LE, 1.0))
    return {
        "load/max_violation": E_L * f_LE.max(axis=-1) - 1.0,
        "load/entropy": -(f_LE * log_f).sum(axis=-1) / jnp.log(jnp.maximum(E_L, 2.0)),
        "load/dead": ((f_LE < 0.01 / E_L[:, None]) & whole.exists_LE).sum(axis=-1),
        "load/dropped": whole.dropped_B.sum(axis=(0, 2)) / jnp.maximum(count_LE.sum(axis=-1), 1),
    }
