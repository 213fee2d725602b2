"""One train step: a whole global batch [A, B, S+1] in, the next state and a flat dict of metrics out.

    1. if a balance rule asks for it, the statistics of the whole batch, in a pass without gradient;
    2. gradients of the A micro-batches, summed (their losses are shares of one loss, see `moe.train.loss`);
    3. clip, optimizer, then the balance rules' own updates from the statistics of the whole batch;
    4. if loss or gradient norm is not finite: everything but the counters stays as it was.

Does not depend on how the batch is cut over devices, nor (but for `buffer`) on A. Collectives: those XLA places for the
table in `moe.axes`, and those of `moe.dispatch.sharded`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moe import axes, param
from moe.balance import Batch, Statistics, asked, idle_steps
from moe.models import Decoder
from moe.train.loss import Arrays, Share, bias_of, forward, real_targets, share_of_loss
from moe.train.run import RunConfig
from moe.train.state import TrainState, decays
from moe.train.step_metrics import Metrics, step_metrics

BATCH_LOGICAL = ("accumulation", "batch", None)


def make_step(
    config: RunConfig, model: Decoder, tx: optax.GradientTransformation
) -> Callable[[TrainState, Arrays], tuple[TrainState, Metrics]]:
    """The pure step function; `model` may be abstract. Jit it, or call `jit_step`."""

    def step(state: TrainState, arrays: Arrays) -> tuple[TrainState, Metrics]:
        loss, grads, share = batch_gradient(config, model, state, arrays)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            params, opt_state = optimized(config, model, tx, state, grads, finite)
        balance = {rule.name: rule.update(state.balance[rule.name], _need(share.statistics)) for rule in config.balance}
        idle_LE = None if state.idle_LE is None else idle_steps(state.idle_LE, _need(share.statistics))
        balance, idle_LE = _if(finite, (balance, idle_LE), (state.balance, state.idle_LE))
        state = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            balance=balance,
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            idle_LE=idle_LE,
        )
        return state, step_metrics(config, state, loss, grad_norm, share)

    return step


def optimized(
    config: RunConfig, model: Decoder, tx: optax.GradientTransformation, state: TrainState, grads: Any,
    finite: jax.Array,
) -> tuple[Any, Any]:  # fmt: skip
    """(parameters, optimizer state) after the update; as they were where `finite` is False."""
    if config.optim.in_tiles:
        return config.optim.update_tiles(
            grads, state.opt_state, state.params, finite,
            decay=decays(model), steps=config.steps, specs=param.specs(model),
        )  # fmt: skip
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates), opt_state
    return _if(finite, moved, (state.params, state.opt_state))


def _if(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def jit_step(
    config: RunConfig, model: Decoder, tx: optax.GradientTransformation, mesh: Mesh, shardings: TrainState
) -> Any:
    """The compiled step for arrays on `mesh`; the old state's buffers are donated."""
    batch = axes.sharding(mesh, BATCH_LOGICAL)
    replicated = axes.sharding(mesh, ())
    return jax.jit(
        make_step(config, model, tx),
        donate_argnums=0,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, replicated),
    )


def batch_gradient(
    config: RunConfig, model: Decoder, state: TrainState, arrays: Arrays
) -> tuple[jax.Array, Any, Share]:
    """Loss and gradient of the whole batch, and what its micro-batches left behind, stacked [A, ...]."""
    A, B = arrays["tokens"].shape[:2]
    num_targets = jnp.maximum(real_targets(arrays["segment_ids"]).sum(), 1).astype(jnp.float32)
    num_tokens = jnp.maximum((arrays["segment_ids"][..., :-1] > 0).sum(), 1).astype(jnp.float32)
    before: Statistics | None = None
    if any(rule.needs_prepass(A, B) for rule in config.balance):
        with jax.named_scope("prepass"):
            before = _prepass(config, model, state, arrays)

    def micro(carries: dict[str, Any], index: jax.Array, one: Arrays) -> Any:
        batch = Batch(index, A, num_tokens, before, state.step, state.key)
        return jax.value_and_grad(share_of_loss, has_aux=True)(
            state.params, model, config.balance, state.balance, carries, one, batch, num_targets,
            step=state.step, key=state.key,
        )  # fmt: skip

    carries = {rule.name: rule.init_carry(config.model.exists_LE) for rule in config.balance}
    if A == 1:
        (loss, (_, share)), grads = micro(carries, jnp.int32(0), {k: v[0] for k, v in arrays.items()})
        return loss, grads, jax.tree.map(lambda leaf: leaf[None], share)

    def body(carry: Any, scanned: Any) -> Any:
        loss, grads, carries = carry
        (share_loss, (carries, share)), share_grads = micro(carries, *scanned)
        return (loss + share_loss, jax.tree.map(jnp.add, grads, share_grads), carries), share

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params), carries)
    (loss, grads, _), share = jax.lax.scan(body, start, (jnp.arange(A, dtype=jnp.int32), arrays))
    return loss, grads, share


def _prepass(config: RunConfig, model: Decoder, state: TrainState, arrays: Arrays) -> Statistics:
    """Statistics [A, L, B, ...] of the whole batch without gradient: same keys, bias and masks as the main pass."""
    bias_LE = bias_of(model, config.balance, state.balance)
    B = arrays["tokens"].shape[1]
    params = jax.lax.stop_gradient(state.params)

    def body(_: None, scanned: Any) -> tuple[None, Statistics]:
        index, one = scanned
        first = index * B
        found = forward(
            model, params, one, bias_LE, step=state.step, key=state.key, first_sequence=first, train=True,
            **asked(config.balance),
        )  # fmt: skip
        return None, _need(found.statistics)

    return jax.lax.scan(body, None, (jnp.arange(arrays["tokens"].shape[0], dtype=jnp.int32), arrays))[1]


def _need(stats: Statistics | None) -> Statistics:
    if stats is None:
        raise ValueError("a balance rule is configured, but the model has no MoE layer to take statistics from")
    return stats
