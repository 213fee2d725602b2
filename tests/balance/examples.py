"""Routed batches made by hand for the tests of balance rules: logits and a mask in, statistics out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.balance import BalanceRule, Batch, Statistics
from moe.balance.statistics import stack_layers, statistics
from moe.routing.base import Routing
from moe.routing.choice import token_choice, top_k
from tests.routing.contexts import context_for

SHORTFALL = (1.0, 101)
STEP, KEY = 3, 5


def logits_and_mask(G: int = 8, S: int = 6, E: int = 6, seed: int = 4) -> tuple[jax.Array, np.ndarray]:
    """Logits [G, S, E] skewed by sequence, and an uneven mask with a sequence of nothing but padding."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (G, S, E)) + 2 * rng.normal(0, 1, (G, 1, E))
    mask = np.arange(S) < rng.integers(1, S + 1, (G, 1))
    mask[0], mask[3] = True, False
    return jnp.asarray(logits, jnp.float32), mask


def route(logits_GSE: jax.Array, mask_GS: np.ndarray, K: int = 2, bias_E: Any = 0.0) -> Routing:
    """Softmax top-k."""
    context = dataclasses.replace(context_for(*mask_GS.shape), segment_BS=jnp.asarray(mask_GS, jnp.int32))
    probs = jax.nn.softmax(logits_GSE, axis=-1)
    expert_BSK, margin_BS = top_k(probs + bias_E, K)
    return token_choice(
        context, expert_BSK=expert_BSK, weight_BSK=jnp.take_along_axis(probs, expert_BSK, axis=-1), probs_BSE=probs,
        log_z_BS=jax.nn.logsumexp(logits_GSE, axis=-1), margin_BS=margin_BS, select_BSE=probs + bias_E,
    )  # fmt: skip


def sums(
    logits_GSE: jax.Array, mask_GS: np.ndarray, K: int = 2, bias_E: Any = 0.0, shortfall: Any = SHORTFALL
) -> Statistics:
    """Statistics of one layer [1, G, ...] with all that a rule may ask for; differentiable in the logits."""
    found = statistics(
        route(logits_GSE, mask_GS, K, bias_E), jnp.asarray(mask_GS), jnp.zeros(mask_GS.shape[0], jnp.int32),
        keep_choices=True, shortfall=shortfall,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[None], found)


def exists(stats: Statistics) -> np.ndarray:
    """[L, E] as `DecoderConfig.exists_LE` says it: known before anything runs."""
    L, E = stats.count_BE.shape[-3], stats.count_BE.shape[-1]
    return np.arange(E) < np.array(stats.widths or (E,) * L)[:, None]


def layers(*parts: Statistics) -> Statistics:
    """Layers [1, G, ...] on top of each other, as a decoder stacks them."""
    return stack_layers([(part, part.count_BE.shape[-1]) for part in parts])


def cut(stats: Statistics, A: int) -> Statistics:
    """[L, G, ...] -> [A, L, B, ...]; the histogram, a sum over all sequences, is left to the first micro-batch."""

    def one(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], A, -1, *leaf.shape[2:]), 1, 0)

    below = stats.below_EH
    rest = jax.tree.map(one, dataclasses.replace(stats, below_EH=None))
    if below is not None:
        below = jnp.concatenate([below[None], jnp.zeros((A - 1, *below.shape), below.dtype)])
    return dataclasses.replace(rest, below_EH=below)


def whole_term(
    rule: BalanceRule, stats: Statistics, A: int = 1, *, step: int = STEP, state: Any = None,
    order: Sequence[int] | None = None,
) -> tuple[jax.Array | None, dict[str, jax.Array]]:  # fmt: skip
    """(value_L of a batch cut into A micro-batches that run in the given order, what the rule reports)."""
    pieces, exists_LE = cut(stats, A), exists(stats)
    stopped = jax.lax.stop_gradient(pieces)
    before = stopped if rule.needs_prepass(A, pieces.count_BE.shape[2]) else None
    state = rule.init_state(exists_LE) if state is None else state
    total = jnp.maximum(stats.tokens_B[0].sum(), 1).astype(jnp.float32)
    carry, values, records = rule.init_carry(exists_LE), [], []
    for a in range(A) if order is None else order:
        batch = Batch(jnp.int32(a), A, total, before, jnp.int32(step), jax.random.key(KEY))
        value, carry, record = rule.term(jax.tree.map(lambda leaf, a=a: leaf[a], pieces), batch, carry, state)
        values.append(value)
        records.append(record)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
    return (None if values[0] is None else sum(values)), rule.report(stacked, stopped)
