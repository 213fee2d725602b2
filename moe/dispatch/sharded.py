"""Any dispatcher over a mesh: tokens are gathered over the expert axis, outputs are summed and scattered back.

The batch is cut over (data, fsdp, expert) and experts over `expert`, so a device sees all tokens of its expert group
and computes those assigned to its own experts: an all-gather and a reduce-scatter of token vectors over `expert`.
Inside, expert weights are gathered over `fsdp` and their hidden width stays cut over `tensor` (partial sums, then one
all-reduce). Exact for every dispatcher, because each sequence keeps all its assignments to an expert in one place.

Collectives, forward: all-gather(x, routing; expert), all-gather(weights; fsdp), all-reduce(y; tensor),
reduce-scatter(y; expert); backward: their transposes, plus the all-reduce of weight gradients over `data` that
`shard_map` adds because it checks which values vary over which axes (`check_vma=True`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe import axes
from moe.axes import EXPERT, FSDP, TENSOR
from moe.dispatch.base import Dispatcher, ExpertWeights
from moe.routing.base import Routing

GATE_AXES = UP_AXES = ("experts", "embed", "expert_mlp")
DOWN_AXES = ("experts", "expert_mlp", "embed")
WEIGHT_AXES = (GATE_AXES, UP_AXES, DOWN_AXES)


def dispatch(
    dispatcher: Dispatcher, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """`dispatcher` over the mesh in use; the plain call without one. Shapes as in `Dispatcher`, all global."""
    routing = dataclasses.replace(routing, select_BSE=None)  # no dispatcher reads scores, so none need travel
    if not axes.mesh_in_use():
        return dispatcher(x_BSD, routing, weights)
    batch = axes.spec(("batch",))
    routing_spec = jax.tree.map(lambda _: batch, routing)
    weight_spec: Any = ExpertWeights(*(axes.spec(names) for names in WEIGHT_AXES))  # type: ignore[arg-type]

    def local(x: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        gathered = (
            jax.lax.all_gather(w, FSDP, axis=names.index("embed"), tiled=True)
            for w, names in zip(weights, WEIGHT_AXES, strict=True)
        )
        whole = ExpertWeights(*gathered)
        x, routing = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, EXPERT, axis=0, tiled=True), (x, routing))
        held = weights.gate_EDF.shape[0]
        expert_BR = routing.expert_BR - jax.lax.axis_index(EXPERT) * held
        here_BR = (expert_BR >= 0) & (expert_BR < held)
        mine = dataclasses.replace(routing, expert_BR=jnp.where(here_BR, expert_BR, held))
        y, dropped = dispatcher(x, mine, whole)
        y = jax.lax.psum(y, TENSOR)
        return _scatter(y), _scatter(dropped)

    run: Any = jax.shard_map(
        local,
        in_specs=(batch, routing_spec, weight_spec),
        out_specs=(batch, PartitionSpec(axes.BATCH_AXES)),
        check_vma=True,
    )
    return run(x_BSD, routing, weights)


def _scatter(partial: jax.Array) -> jax.Array:
    """Sums over the expert axis and leaves every device its own sequences."""
    return jax.lax.psum_scatter(partial, EXPERT, scatter_dimension=0, tiled=True)
