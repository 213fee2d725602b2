"""Slow and obvious versions of what the package computes: Python loops over layers, groups and tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe import param
from moe.balance.statistics import Statistics
from moe.layers.base import Sublayer
from moe.layers.parallel import Parallel
from moe.models import Decoder
from moe.models.residual import Residual
from moe.routing.base import Context, Routing
from moe.train.loss import forward

NO_BIAS = 0.0


class Unrolled(NamedTuple):
    logits: jax.Array
    routings: list[Routing]
    """Of the MoE layers, in order."""
    statistics: list[Statistics]
    stream: list[jax.Array]
    """The embedding, and the residual stream after every sublayer."""


def unrolled(model: Decoder, params: Any, context: Context, bias_LE: Any) -> Unrolled:
    """The decoder as a Python loop over its sublayers: no scan, no remat, no jit."""
    bound = param.bind(model, params)
    x = bound.embed(context.token_BS)
    out = Unrolled(x, [], [], [x])
    for place, residual in enumerate(residuals(bound)):
        here = dataclasses.replace(context, key=jax.random.fold_in(context.key, place))
        moe = next((part for part in parts_of(residual.sublayer) if hasattr(part, "router")), None)
        bias = jnp.zeros(0)
        if moe is not None:
            bias = bias_LE[len(out.routings)][: model.config.num_experts_L[len(out.routings)]]
            out.routings.append(moe.router(residual.read(x), here, bias))
        x, found = residual(x, here, bias)
        out.statistics.extend([found] if found is not None else [])
        out.stream.append(x)
    return out._replace(logits=bound.unembed(x))


def residuals(bound: Decoder) -> list[Residual]:
    """Every sublayer with its norms and its own parameters, in order."""
    found = []
    for pattern in bound.stacks:
        graph, state = nnx.split(pattern)
        for repeat in range(jax.tree.leaves(state)[0].shape[0]):
            found += nnx.merge(graph, jax.tree.map(lambda leaf, i=repeat: leaf[i], state))
    return found


def parts_of(sublayer: Sublayer) -> tuple[Sublayer, ...]:
    return sublayer.parts if isinstance(sublayer, Parallel) else (sublayer,)


def context_of(arrays: dict[str, Any], key: jax.Array | None = None, step: int = 0, train: bool = True) -> Context:
    """The context `moe.train.loss.forward` builds for [B, S+1] arrays."""
    found = []

    class Catch:
        def predict(self, context: Context, bias: Any) -> Any:
            found.append(context)

    original = param.bind
    param.bind = lambda model, params: Catch()  # type: ignore[assignment]
    try:
        key = jax.random.key(1) if key is None else key
        arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
        forward(None, None, arrays, None, step=jnp.int32(step), key=key, train=train)  # type: ignore[arg-type]
    finally:
        param.bind = original
    return found[0]


def load_balance(
    prob_GSE: np.ndarray, expert_GSK: np.ndarray, mask_GS: np.ndarray, scope: str | int, f_E: np.ndarray | None = None
) -> float:
    """sum_g (n_g / n) E sum_i f_gi P_gi of one layer, token by token; `f_E` in place of the load of every group."""
    G, S, E = prob_GSE.shape
    n = {"sequence": 1, "global": G}.get(scope, scope) if isinstance(scope, str) else scope
    total, loss = int(mask_GS.sum()), 0.0
    for first in range(0, G, n):
        count, prob, tokens = np.zeros(E), np.zeros(E), 0
        for g in range(first, first + n):
            for s in range(S):
                if not mask_GS[g, s]:
                    continue
                tokens += 1
                prob += prob_GSE[g, s]
                for expert in expert_GSK[g, s]:
                    count[expert] += 1
        if tokens:
            f = count / count.sum() if f_E is None else f_E
            loss += tokens / total * E * float(f @ (prob / tokens))
    return loss


def expert_bias(
    expert_GSK: np.ndarray,
    mask_GS: np.ndarray,
    bias_E: np.ndarray,
    scope: str | int,
    rule: str,
    rate: float,
    recentre: bool,
) -> np.ndarray:
    """The bias of one layer after the step, group by group."""
    G, E = expert_GSK.shape[0], bias_E.shape[0]
    n = {"sequence": 1, "global": G}.get(scope, scope) if isinstance(scope, str) else scope
    move = np.zeros(E)
    for first in range(0, G, n):
        mask = mask_GS[first : first + n]
        chosen = expert_GSK[first : first + n][mask].reshape(-1)
        if not chosen.size:
            continue
        count = np.bincount(chosen, minlength=E)
        each = np.sign(chosen.size - E * count) if rule == "sign" else 1 - E * count / chosen.size
        move += mask.sum() / mask_GS.sum() * each
    new = bias_E + rate * move
    return new - new.mean() if recentre else new
