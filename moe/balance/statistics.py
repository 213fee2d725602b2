"""Per-sequence sums over real tokens: everything a balance rule may know about a layer's routing.

A layer only adds up; which sequences belong together (the scope) is decided afterwards by whoever reads the sums, so
the same forward pass serves every scope, and no cut of the batch can change a statistic.

Layers may differ in their number of experts: stacked statistics are as wide as the widest layer, and experts that a
layer does not have count nothing (`num_experts_L`, `exists_LE`).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe.balance.shortfall import count_below
from moe.routing.base import Routing

LOAD_EDGES = (0.0, 0.01, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Lower ends of the bins of the load histogram, in units of the even share 1 / E; the first bin holds dead experts."""


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
    unserved_B: jax.Array
    """int32 real tokens that the router gave to no expert."""
    chosen_prob_B: jax.Array
    """float32 sum over tokens of the probability mass on the experts they took. No gradient."""
    margin_B: jax.Array
    """float32 sum of the selection margins that are finite. No gradient."""
    expert_BR: jax.Array | None = None
    """int32 [B, R] expert of every assignment, where asked for; what is not below the layer's E is void."""
    token_BR: jax.Array | None = None
    """int32 [B, R] position of the token that each of them serves; None where experts serve mixtures of tokens."""
    need_B: jax.Array | None = None
    """float32 capacity with which none of the sequence's assignments would have been dropped; None: nothing drops."""
    below_EH: jax.Array | None = None
    """int32 [E, H], where asked for: tokens of all sequences that lack less score than each edge; see `shortfall`."""
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


def statistics(
    routing: Routing, mask_BS: jax.Array, dropped_B: jax.Array, *, keep_choices: bool = False,
    shortfall: tuple[float, int] | None = None, need_B: jax.Array | None = None,
) -> Statistics:  # fmt: skip
    """Reduces one layer's routing over positions; `keep_choices` keeps every assignment too.

    `shortfall` (reach, bins) asks for the histogram of missing scores, which is a sum over the sequences as well.
    Collectives: none but for that one (all other sums stay inside a sequence).
    """
    # Comparing with every expert fuses into one reduction; a scatter of S*K indices does not partition over devices.
    hit_BRE = routing.expert_BR[..., None] == jnp.arange(routing.num_experts)
    probs_BSE = jax.lax.stop_gradient(routing.probs_BSE)
    return Statistics(
        count_BE=hit_BRE.sum(axis=1, dtype=jnp.int32),
        prob_BE=routing.probs_BSE.sum(axis=1),
        z_B=jnp.square(routing.log_z_BS).sum(axis=1),
        tokens_B=mask_BS.sum(axis=1, dtype=jnp.int32),
        dropped_B=dropped_B,
        unserved_B=(mask_BS & ~_served(routing)).sum(axis=1, dtype=jnp.int32),
        chosen_prob_B=_chosen_prob(routing, probs_BSE, hit_BRE),
        margin_B=jnp.where(jnp.isfinite(routing.margin_BS), routing.margin_BS, 0.0).sum(axis=1),
        expert_BR=routing.expert_BR if keep_choices else None,
        token_BR=routing.token_BR if keep_choices and routing.slots is None else None,
        need_B=need_B,
        below_EH=count_below(routing, mask_BS, *shortfall) if shortfall is not None else None,
    )


def _served(routing: Routing) -> jax.Array:
    """bool [B, S]: some expert takes the token; every token has a part in slots that mix them all."""
    B, S, E = routing.probs_BSE.shape
    taken_BR = routing.expert_BR < E
    if routing.slots is not None:
        return jnp.ones((B, S), bool)
    if routing.num_selected is not None:
        return taken_BR.reshape(B, S, -1).any(axis=-1)
    return jax.vmap(lambda token_R, taken_R: jnp.zeros(S, bool).at[token_R].max(taken_R))(routing.token_BR, taken_BR)


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
    """Statistics [L_i, B, E_i] of consecutive layers, each with its E_i, as one [L, B, max E].

    Single assignments are kept only if every layer has as many of them.
    """
    widest = max(E for _, E in parts)
    R_of = {None if one.expert_BR is None else one.expert_BR.shape[-1] for one, _ in parts}
    with_tokens = {one.token_BR is not None for one, _ in parts}
    with_below = all(one.below_EH is not None for one, _ in parts)
    with_need = any(one.need_B is not None for one, _ in parts)

    def widen(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, widest - leaf.shape[-1])))

    def lengthen(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or not with_below:
            return None
        return jnp.pad(leaf, ((0, 0), (0, widest - leaf.shape[-2]), (0, 0)))

    padded = [
        dataclasses.replace(
            one,
            count_BE=widen(one.count_BE),
            prob_BE=widen(one.prob_BE),
            expert_BR=one.expert_BR if len(R_of) == 1 else None,
            token_BR=one.token_BR if len(R_of) == 1 and all(with_tokens) else None,
            need_B=(jnp.zeros_like(one.z_B) if one.need_B is None else one.need_B) if with_need else None,
            below_EH=lengthen(one.below_EH),
            widths=(),
        )
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

    Of the load f over the whole batch, with E the experts that the layer has:
    `load/max_violation` = E max(f) - 1 (0 when balanced);
    `load/max_violation_micro` = the same of every micro-batch, mean over those that hold a token; depends on A;
    `load/entropy` = -sum f log f / log E (1 when balanced);
    `load/histogram/from_a` = experts with a <= E f < the next of `LOAD_EDGES`; adds up to E over the edges;
    `load/dead` = experts with f < 1 / (100 E), the lowest of these bins; `load/dropped` = dropped share of assignments;
    `load/unserved` = share of the real tokens that the router gave to no expert.

    Means over real tokens: `router/chosen_prob` = probability mass of the experts that a token takes, K / E if its
    scores are all equal (the paper's top-k sum; 0 for routers with slots); `router/margin` = score of the last expert
    taken minus the first left out, in the router's own units, 0 where nothing is left out.
    Source: Qiu et al. 2025 (arXiv 2501.11873), section on specialisation, for the top-k sum; Wang et al. 2024
    (arXiv 2408.15664) for the maximal violation. Differs from the papers: no difference known.
    """
    count_ALE = whole.count_BE.sum(axis=2)
    count_LE = count_ALE.sum(axis=0)
    f_LE, E_L = load(count_LE), whole.num_experts_L
    log_f = jnp.log(jnp.where(f_LE > 0, f_LE, 1.0))
    histogram = _histogram(f_LE, whole)
    tokens_L = jnp.maximum(whole.tokens_B.sum(axis=(0, 2)), 1).astype(jnp.float32)
    return {
        "load/max_violation": E_L * f_LE.max(axis=-1) - 1.0,
        "load/max_violation_micro": _micro_violation(count_ALE, E_L),
        "load/entropy": -(f_LE * log_f).sum(axis=-1) / jnp.log(jnp.maximum(E_L, 2.0)),
        "load/dead": histogram[f"load/histogram/from_{LOAD_EDGES[0]:g}"],
        "load/dropped": whole.dropped_B.sum(axis=(0, 2)) / jnp.maximum(count_LE.sum(axis=-1), 1),
        "load/unserved": whole.unserved_B.sum(axis=(0, 2)) / tokens_L,
        "router/chosen_prob": whole.chosen_prob_B.sum(axis=(0, 2)) / tokens_L,
        "router/margin": whole.margin_B.sum(axis=(0, 2)) / tokens_L,
    } | histogram


def _histogram(f_LE: jax.Array, whole: Statistics) -> dict[str, jax.Array]:
    """int32 [L] for every bin of load over the even share."""
    relative_LE, exists_LE = f_LE * whole.num_experts_L[:, None], whole.exists_LE
    found = {}
    for low, high in zip(LOAD_EDGES, (*LOAD_EDGES[1:], math.inf), strict=True):
        inside_LE = (relative_LE >= low) & (relative_LE < high) & exists_LE
        found[f"load/histogram/from_{low:g}"] = inside_LE.sum(axis=-1, dtype=jnp.int32)
    return found


def _micro_violation(count_ALE: jax.Array, num_experts_L: jax.Array) -> jax.Array:
    """[L] mean over the micro-batches that hold an assignment of E max(f) - 1."""
    violation_AL = num_experts_L * load(count_ALE).max(axis=-1) - 1.0
    holds_AL = count_ALE.sum(axis=-1) > 0
    return jnp.where(holds_AL, violation_AL, 0.0).sum(axis=0) / jnp.maximum(holds_AL.sum(axis=0), 1)


def idle_steps(idle_LE: jax.Array, whole: Statistics) -> jax.Array:
    """int32 [L, E] updates since an expert last received a token: 0 if it did in this batch, else one more than before.

    0 for experts that a layer does not have. Counts assignments before capacity drops.
    """
    served_LE = (whole.count_BE.sum(axis=(0, 2)) > 0) | ~whole.exists_LE
    return jnp.where(served_LE, 0, idle_LE + 1)
