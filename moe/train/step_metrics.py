"""The numbers of one train step: a flat dict of scalars and of lists [L] with one value a MoE layer.

All of it is made of the per-sequence sums that the layers take for the balance rules: a few passes over A L B E counts,
S K times fewer than the comparisons that counted them. The `tokens` of a record, added later, counts positions, padding
included; `load/tokens` counts real tokens.
"""

import jax
import jax.numpy as jnp

from moe.balance import summary
from moe.train.loss import Share
from moe.train.run import RunConfig
from moe.train.state import TrainState

Metrics = dict[str, jax.Array]
NEED = "dispatch/need"
"""[L] multiple of the balanced load that every buffer of a layer would have to hold for nothing to be dropped."""


def step_metrics(config: RunConfig, state: TrainState, loss: jax.Array, grad_norm: jax.Array, share: Share) -> Metrics:
    """The metrics of the step that led to `state`; those of the routing are described in `moe.balance.summary`.

    `load/tokens` = real tokens in the batch. `load/idle_max` [L] = updates since the expert that has waited longest
    last received a token; `load/idle_mean` [L] = mean over the experts that got none in this batch, 0 if all got some.
    `dispatch/need` [L], where buffers have a size: the capacity that would have dropped nothing; `moe.dispatch.need`.
    Per rule: `balance/NAME` [L] before and `loss/NAME` after its coefficient `weight/NAME`; `balance/NAME/range` [L] =
    largest minus smallest bias of the layer's experts; and what the rule reports of itself.
    """
    metrics = {
        "loss": loss,
        "loss/lm": share.lm.sum(),
        "grad_norm": grad_norm,
        "learning_rate": config.optim.schedule.build(config.optim.learning_rate, config.steps)(
            jnp.maximum(state.step - 1 - state.skipped, 0)
        ),
        "skipped_total": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    if share.later is not None and config.model.ahead is not None:
        metrics["loss/ahead"] = config.model.ahead.coefficient * share.later.sum()
    if (stats := share.statistics) is None:
        return metrics
    metrics |= summary(stats) | _idle(state.idle_LE)
    metrics["load/tokens"] = stats.tokens_B[:, 0].sum()
    if stats.need_B is not None:
        metrics[NEED] = stats.need_B.max(axis=(0, 2))
    for rule in config.balance:
        if rule.name in share.terms:
            value_L = share.terms[rule.name].sum(axis=0)
            metrics[f"balance/{rule.name}"] = value_L
            metrics[f"loss/{rule.name}"] = rule.coefficient * value_L.sum()
            metrics[f"weight/{rule.name}"] = jnp.float32(rule.coefficient)
        metrics |= rule.report(share.records[rule.name], stats)
        if (bias_LE := state.balance[rule.name].get("bias")) is not None:
            metrics[f"balance/{rule.name}/range"] = _range(bias_LE, stats.exists_LE)
    return metrics


def _idle(idle_LE: jax.Array | None) -> Metrics:
    if idle_LE is None:
        return {}
    waiting_L = jnp.maximum((idle_LE > 0).sum(axis=-1), 1)
    return {"load/idle_max": idle_LE.max(axis=-1), "load/idle_mean": idle_LE.sum(axis=-1) / waiting_L}


def _range(bias_LE: jax.Array, exists_LE: jax.Array) -> jax.Array:
    """[L] largest minus smallest value among the experts that a layer has."""
    largest_L = jnp.where(exists_LE, bias_LE, -jnp.inf).max(axis=-1)
    return largest_L - jnp.where(exists_LE, bias_LE, jnp.inf).min(axis=-1)
