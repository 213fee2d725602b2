"""Any dispatcher with any exchange over a mesh.

Who is computed is decided outside, on whole sequences. Inside `shard_map` every device has tokens of its own: sequences
are cut over `data` and `fsdp`, positions over `context` and `tensor` like the residual stream, so no token is computed
or sent twice. Assignments are cut like tokens if every token has K of them. If not, the list is cut evenly, and tokens
are gathered over the axes that cut positions, sums scattered over them. Lengths that do not divide are padded.

Expert weights stay where the table puts them: experts over `expert`, hidden width over `expert_tensor`; their width is
gathered over the rest of the grid for the products (ZeRO-3), which makes the gradient a reduce-scatter over the
devices of expert_data alone, and an all-reduce over `data`, where weights are copies: `shard_map` adds it because it
checks which values vary over which axes (`check_vma=True`).

Collectives: those of the exchange; all-gather(weights; fsdp, context, tensor of expert_data) and its transpose.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe import axes
from moe.axes import BATCH, EXPERT, EXPERT_DATA, EXPERT_TENSOR, STREAM
from moe.dispatch.base import Assignments, Dispatcher, ExpertWeights
from moe.dispatch.exchange import COMBINED, DUPLICATES, ExchangeConfig, RingConfig, Shared, gather, scatter, takes_place
from moe.routing.base import Routing

GATE_AXES = UP_AXES = ("experts", "expert_embed", "expert_mlp")
DOWN_AXES = ("experts", "expert_mlp", "expert_embed")
WEIGHT_AXES = (GATE_AXES, UP_AXES, DOWN_AXES)
RING = RingConfig()


def dispatch(
    dispatcher: Dispatcher, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights, exchange: ExchangeConfig = RING
) -> tuple[jax.Array, jax.Array]:
    """`dispatcher` over the mesh in use; the plain call without one. Shapes as in `Dispatcher`, all global.

    Dropped counts what the dispatcher drops, the same on every mesh, and what the budget of the exchange does.
    """
    routing = dataclasses.replace(routing, select_BSE=None)  # no dispatcher reads scores, so none need travel
    if not axes.mesh_in_use():
        return dispatcher(x_BSD, routing, weights)
    if not takes_place(jax.sharding.get_abstract_mesh().shape):
        return _whole_sequences(dispatcher, x_BSD, routing, weights)
    routing, dropped_B = dispatcher.select(routing)
    positions = tuple(name for name in STREAM if not (exchange.sends_duplicates and name == DUPLICATES))
    x_BSD, length = _padded(x_BSD, axes.size(jax.sharding.get_abstract_mesh(), positions)), x_BSD.shape[1]
    y_BSD, over_budget_B = _cut_positions(dispatcher, x_BSD, routing, weights, exchange, positions)
    return y_BSD[:, :length], dropped_B + over_budget_B


def _whole_sequences(
    dispatcher: Dispatcher, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """Nothing but the batch is cut: every device runs the dispatcher on its own sequences."""

    def local(x: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        y, dropped = dispatcher(x, routing, _gathered(weights))
        return checkpoint_name(y, COMBINED), dropped + 0 * routing.expert_BR[:, 0]  # varies where zeros would not

    batch, cut = PartitionSpec(BATCH), PartitionSpec(BATCH, STREAM)
    return axes.per_device(local, (cut, batch, _weight_specs()), (cut, batch))(x_BSD, routing, weights)


def _cut_positions(
    dispatcher: Dispatcher,
    x_BSD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    exchange: ExchangeConfig,
    positions: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    K, E = routing.num_selected, weights.gate_EDF.shape[0]
    shards = axes.size(jax.sharding.get_abstract_mesh(), positions)
    missing = (-routing.expert_BR.shape[1]) % shards if K is None else x_BSD.shape[1] * K - routing.expert_BR.shape[1]
    pad = lambda value, fill: jnp.pad(value, ((0, 0), (0, missing)), constant_values=fill)  # noqa: E731
    listed = pad(routing.token_BR, 0), pad(routing.expert_BR, E), pad(routing.weight_BR, 0.0)
    mesh = jax.sharding.get_abstract_mesh()
    apart = tuple(name for name in EXPERT_TENSOR if not (exchange.sends_duplicates and name == DUPLICATES))
    same = tuple(name for name in EXPERT_TENSOR if name not in apart)
    shared = Shared(E // axes.size(mesh, EXPERT), apart, same)

    def local(x: jax.Array, listed: Any, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        whole = _gathered(weights)
        x = gather(x, positions, 1) if K is None else x
        (B, S, D), (token_BR, expert_BR, weight_BR) = x.shape, listed
        if K is not None:
            token_BR = token_BR - jax.lax.axis_index(positions) * S
        token_BR = token_BR + S * jnp.arange(B, dtype=jnp.int32)[:, None]
        a = Assignments(token_BR.reshape(-1), expert_BR.reshape(-1), weight_BR.reshape(-1), K)
        compute = lambda x, a, bound: dispatcher.compute(x, a, whole, bound)  # noqa: E731
        y, dropped_R = exchange.run(x.reshape(B * S, D), a, compute, shared)
        y = y.reshape(B, S, D)
        y = checkpoint_name(scatter(y, positions, 1) if K is None else y, COMBINED)
        return y, jax.lax.psum(dropped_R.reshape(B, -1).sum(axis=1), positions)

    cut = PartitionSpec(BATCH, positions)
    return axes.per_device(local, (cut, cut, _weight_specs()), (cut, PartitionSpec(BATCH)))(x_BSD, listed, weights)


def _weight_specs() -> Any:
    return ExpertWeights(*(axes.spec(names) for names in WEIGHT_AXES))  # type: ignore[arg-type]


def _gathered(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        *(
            gather(w, EXPERT_DATA[1:], names.index("expert_embed"))
            for w, names in zip(weights, WEIGHT_AXES, strict=True)
        )
    )


def _padded(x_BSD: jax.Array, pieces: int) -> jax.Array:
    """With positions of zeros added until they divide into `pieces`."""
    return jnp.pad(x_BSD, ((0, 0), (0, (-x_BSD.shape[1]) % pieces), (0, 0)))
