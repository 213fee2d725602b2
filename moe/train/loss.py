"""Forward pass of one micro-batch and its share of the batch's loss.

    loss = (1 / n) sum_t nll_t  +  sum_rules coefficient * sum_layers term

with n the real targets of the WHOLE batch, known before the first micro-batch runs: the shares of the micro-batches add
up to the loss of the batch, for every term alike, so accumulation cannot rescale one against another. Nats per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe import param
from moe.balance import BalanceRule, Batch, Statistics, asked, selection_bias
from moe.models import Decoder, Predictions
from moe.models.ahead import real_targets_ahead, targets_ahead
from moe.routing.base import Context

Arrays = dict[str, jax.Array]
"""A batch: tokens, segment_ids, positions, domains, each int32 [..., S + 1]; segment 0 is padding."""


def real_targets(segment_ids: jax.Array) -> jax.Array:
    """bool [..., S]: the next token is real and belongs to the same document."""
    return (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] > 0)


def nats(model: Decoder, params: Any, hidden_BSD: jax.Array, target_BS: jax.Array, real_BS: jax.Array) -> jax.Array:
    """float32 scalar: -log softmax(logits)[target] of hidden vectors from `forward`, summed where `real_BS`."""
    return param.bind(model, params).nats(hidden_BSD, target_BS, real_BS)


def forward(
    model: Decoder, params: Any, arrays: Arrays, bias_LE: jax.Array, *, step: jax.Array, key: jax.Array,
    first_sequence: jax.Array | int = 0, train: bool, keep_choices: bool = False,
    shortfall: tuple[float, int] | None = None,
) -> Predictions:  # fmt: skip
    """What the model says of a micro-batch [B, S+1]; `first_sequence` is its first global sequence index.

    `keep_choices`: the statistics hold every assignment too; `shortfall`: a histogram of missing scores. The key of
    random choices follows `step` in training alone, so that checkpoints are evaluated with the same draws.
    """
    B = arrays["tokens"].shape[0]
    context = Context(
        token_BS=arrays["tokens"][:, :-1],
        segment_BS=arrays["segment_ids"][:, :-1],
        position_BS=arrays["positions"][:, :-1],
        task_BS=arrays["domains"][:, :-1],
        sequence_B=first_sequence + jnp.arange(B, dtype=jnp.int32),
        step=step,
        key=jax.random.fold_in(key, step) if train else key,
        train=train,
        keep_choices=keep_choices,
        shortfall=shortfall,
    )
    return param.bind(model, params).predict(context, bias_LE)


class Share(NamedTuple):
    """What one micro-batch leaves behind, beside its gradient."""

    lm: jax.Array
    later: jax.Array | None
    """Of the tokens further ahead, before its coefficient; None if none are predicted."""
    terms: dict[str, jax.Array]
    """Per rule with a loss term: [L] before the coefficient."""
    records: dict[str, Any]
    statistics: Statistics | None


def share_of_loss(
    params: Any, model: Decoder, rules: tuple[BalanceRule, ...], states: dict[str, Any], carries: dict[str, Any],
    arrays: Arrays, batch: Batch, num_targets: jax.Array, *, step: jax.Array, key: jax.Array,
) -> tuple[jax.Array, tuple[dict[str, Any], Share]]:  # fmt: skip
    """(this micro-batch's share of the loss, (carries for the next one, what is left behind))."""
    bias_LE = bias_of(model, rules, states)
    first = batch.microbatch * arrays["tokens"].shape[0]
    found = forward(
        model, params, arrays, bias_LE, step=step, key=key, first_sequence=first, train=True, **asked(rules)
    )
    stats = found.statistics
    with jax.named_scope("loss"):
        real_BS = real_targets(arrays["segment_ids"])
        lm = nats(model, params, found.hidden_BSD, arrays["tokens"][:, 1:], real_BS) / num_targets
        total, later = lm, None
        if (ahead := model.config.ahead) is not None:
            later = loss_ahead(model, params, found.later, arrays) / num_targets
            total = lm + ahead.coefficient * later
    with jax.named_scope("balance"):
        terms, records, next_carries = {}, {}, {}
        for rule in rules:
            if stats is None:
                raise ValueError(f"balance rule {rule.name!r} is configured, but the model returned no statistics")
            value_L, next_carries[rule.name], records[rule.name] = rule.term(
                stats, batch, carries[rule.name], states[rule.name]
            )
            if value_L is not None:
                terms[rule.name] = value_L
                total = total + rule.coefficient * value_L.sum() if rule.weighs else total
            elif rule.weighs:
                raise ValueError(f"balance rule {rule.name!r} has coefficient {rule.coefficient} but no loss term")
    kept = jax.tree.map(jax.lax.stop_gradient, stats)
    return total, (next_carries, Share(lm, later, terms, records, kept))


def loss_ahead(model: Decoder, params: Any, later: Sequence[jax.Array], arrays: Arrays) -> jax.Array:
    """Nats of the tokens further ahead, summed over positions that have them, mean over the blocks; see `ahead`."""
    total = jnp.zeros(())
    for offset, hidden_BSD in enumerate(later, 1):
        real_BS = real_targets_ahead(arrays["segment_ids"], offset)
        total = total + nats(model, params, hidden_BSD, targets_ahead(arrays["tokens"], offset), real_BS)
    return total / len(later)


def bias_of(model: Decoder, rules: tuple[BalanceRule, ...], states: dict[str, Any]) -> jax.Array:
    """float32 [L, E] added to the selection scores of the model's MoE layers."""
    return selection_bias(rules, states, model.config.exists_LE)
