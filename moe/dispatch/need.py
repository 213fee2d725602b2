"""How large buffers would have to be: what the log says of a layer's head-room, and what a ladder of capacities reads.

Needs are multiples of the balanced load: a buffer of that capacity, or budget, just drops nothing. They are counted on
the assignments as the router made them, so they do not depend on the size that the buffers have.
"""

import jax
import jax.numpy as jnp

from moe import axes
from moe.axes import BATCH, EXPERT, STREAM
from moe.routing.base import Routing


def of_experts(routing: Routing) -> jax.Array:
    """float32 [B]: E / R times the largest number of a sequence's assignments to one expert."""
    count_BE = (routing.expert_BR[..., None] == jnp.arange(routing.num_experts)).sum(axis=1)
    return count_BE.max(axis=-1) * (routing.num_experts / routing.expert_BR.shape[1])


def of_devices(routing: Routing, chunks: int) -> jax.Array:
    """float32 [B]: n / R times the most rows that the device of a sequence's tokens sends to one of n devices.

    R is a device's assignments, in each of its `chunks` portions; the largest over portions, and over the devices that
    a sequence lies on. It depends on the mesh, as budgets do; 0 without one. Collectives: a maximum over what cuts S.
    """
    B, R = routing.expert_BR.shape
    if not axes.mesh_in_use():
        return jnp.zeros((B,))
    mesh = jax.sharding.get_abstract_mesh()
    rows, columns, ranks = (axes.size(mesh, names) for names in (BATCH, STREAM, EXPERT))
    expert_BR = jnp.pad(routing.expert_BR, ((0, 0), (0, (-R) % columns)), constant_values=routing.num_experts)
    cut = expert_BR.reshape(rows, B // rows, columns, -1).swapaxes(1, 2).reshape(rows, columns, -1)
    to = cut // (routing.num_experts // ranks)
    need = jnp.zeros((rows,))
    for begin, end in portions(cut.shape[-1], routing.num_selected, chunks):
        count = (to[:, :, begin:end, None] == jnp.arange(ranks)).sum(axis=2)
        need = jnp.maximum(need, count.max(axis=(1, 2)) * (ranks / (end - begin)))
    return jnp.repeat(need, B // rows)


def portions(num_assignments: int, num_selected: int | None, chunks: int) -> list[tuple[int, int]]:
    """(begin, end) of at most `chunks` portions of a device's assignments; one token's K stay together."""
    K = num_selected or 1
    units = num_assignments // K
    chunks = min(chunks, units)
    return [(units * i // chunks * K, units * (i + 1) // chunks * K) for i in range(chunks)]
