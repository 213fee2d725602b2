"""Logical axes -> mesh axes: the one closed table, and the one place that knows the mesh.

The devices of a pipeline stage are factored twice ("parallel folding"), into a dense and an expert grid:

    data x fsdp x context x tensor   =   expert_data x expert x expert_tensor

`data` replicates parameters; `fsdp` cuts them (ZeRO-3), and both cut the batch; `context` cuts positions; `tensor` cuts
heads, hidden widths, the vocabulary and, between sublayers, positions. `expert` cuts the experts, `expert_tensor` their
hidden width; the rest of the grid, `expert_data`, holds other tokens for the same experts. `stages` cuts the layers.

Both grids are products of the same axes: the mesh has one axis for every pair of a dense and an expert axis (most of
size 1), named `fsdp`, `fsdp_expert`, `fsdp_expert_tensor`, ..., in device order. FSDP, EXPERT, ... are the tuples of
mesh axes that make up one axis of a grid; collectives and specs take them. Each choice of what is cut by what is a row
of TABLE. A name that is not in the table raises: no parameter is ever replicated because somebody misspelt an axis.

Axes are `Auto`: XLA's partitioner places the collectives, except inside `shard_map`.
Source: Liu et al. 2025, MoE parallel folding (arXiv 2504.14960). Differs from the paper: nothing but the names.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.custom_batching
import jax.extend
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.folding import DENSE, PARTS, MeshConfig

__all__ = ["MeshConfig", "constrain", "make_mesh", "mesh_in_use", "sharding", "spec"]

Axes = tuple[str, ...]


STAGE = "stage"
DATA, FSDP, CONTEXT, TENSOR = (tuple(dense + part for part in PARTS) for dense in DENSE)
EXPERT_DATA, EXPERT, EXPERT_TENSOR = (tuple(dense + part for dense in DENSE) for part in PARTS)
MESH_AXES: Axes = (STAGE, *DATA, *FSDP, *CONTEXT, *TENSOR)
BATCH: Axes = DATA + FSDP
"""What cuts sequences."""
STREAM: Axes = CONTEXT + TENSOR
"""What cuts the positions of the residual stream."""

TABLE: dict[str, Axes | str | None] = {
    "batch": BATCH,  # sequences
    "position": CONTEXT,  # S inside attention and of logits, where `tensor` cuts heads and vocabulary
    "stream": STREAM,  # S between sublayers: norms and routers see a token once
    "embed": FSDP + CONTEXT,  # D of a parameter
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_width": None,
    "latent": None,  # of latent attention: narrow, and its norm reads all of it
    "mlp": TENSOR,  # F of a dense MLP or a shared expert
    "layers": STAGE,  # the stacked layers of a pipeline
    "experts": EXPERT,
    "expert_embed": EXPERT_DATA[1:],  # D of a weight of experts; like all parameters, replicated over data
    "expert_heads": EXPERT_TENSOR,
    "expert_kv_heads": EXPERT_TENSOR,
    "expert_mlp": EXPERT_TENSOR,  # F of an expert
    "router_experts": None,  # E of a router: every device scores every expert
    "memory_slots": None,  # rows of a memory's table: every device holds a slice of each row
    "memory_width": FSDP + CONTEXT + TENSOR,  # D of such a table
    "memory_batch": DATA,  # sequences, while a memory is read: the axes that cut its width cannot cut them too
    "memory_position": None,
    "memory_slice": FSDP + CONTEXT,  # D on the way between the two: without it XLA replicates what it moves
    "norm": None,
    "accumulation": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them) in their order: neighbours in `tensor` closest, stages farthest.

    Raises ConfigError if the sizes do not factor the devices or the two grids do not fold.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.factors(len(devices))
    shape = [sizes[name] for name in MESH_AXES]
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def size(mesh: Mesh | jax.sharding.AbstractMesh, names: Axes | str) -> int:
    """Number of pieces that these mesh axes cut a dimension into."""
    names = (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def used(mesh: Mesh | jax.sharding.AbstractMesh) -> dict[str, int]:
    """The mesh axes that cut anything, with their sizes."""
    return {name: length for name, length in mesh.shape.items() if length > 1}


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of a tensor whose dimensions carry these logical axes (None: not cut)."""
    parts: list[Any] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in TABLE:
            raise KeyError(f"logical axis {axis!r} is not in the table of moe/axes.py: {', '.join(sorted(TABLE))}")
        target = None if axis is None else TABLE[axis]
        names = (target,) if isinstance(target, str) else target or ()
        if clash := used.intersection(names):
            raise ValueError(f"axes {tuple(axes)} put mesh axis {min(clash)!r} on two dimensions of one tensor")
        used.update(names)
        parts.append(target)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def mesh_in_use() -> bool:
    """Whether a mesh is set (`with jax.set_mesh(mesh)`); without one every layer runs on one device as plain JAX."""
    return not jax.sharding.get_abstract_mesh().empty


def stages_in_use() -> int:
    """Pipeline stages of the mesh in use; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(STAGE, 1) if mesh_in_use() else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States the sharding of an activation at a block boundary; the identity without a mesh."""
    return jax.lax.with_sharding_constraint(x, spec(axes)) if mesh_in_use() else x


def per_device(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` of `local` over the mesh in use, with `check_vma`.

    Under `side_by_side` the stages of a pipeline are a dimension of every array, of which a device holds 1: it is taken
    off before `local` and put back behind it, so kernels and collectives never meet a batched version of themselves.
    """
    if _side_by_side.get():
        local = _without_stages(local)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def side_by_side(stage: Callable[..., Any], *args: Any) -> Any:
    """`stage` for every slice of the first dimension of the args' leaves, which is cut over the stages of the mesh.

    That is `jax.vmap(stage, spmd_axis_name=STAGE)`, but `stage` is traced before it is batched: a `vmap` inside of a
    `shard_map` would else see the stages and type as varying over them what does not yet (jax 0.10.2 and 0.12.0).
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), args)
    token = _side_by_side.set(True)
    try:
        traced, shape = jax.make_jaxpr(stage, return_shape=True)(*one)
    finally:
        _side_by_side.reset(token)
    out = jax.vmap(jax.extend.core.jaxpr_as_fun(traced), spmd_axis_name=STAGE)(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), out)


_side_by_side: ContextVar[bool] = ContextVar("side_by_side", default=False)


def _without_stages(local: Callable[..., Any]) -> Callable[..., Any]:
    one = jax.custom_batching.custom_vmap(local)

    @one.def_vmap
    def held(size: int, has_stages: Any, *args: Any) -> tuple[Any, Any]:
        assert size == 1, f"a device holds one stage, not {size}"
        out = local(*jax.tree.map(lambda leaf, has: leaf[0] if has else leaf, args, tuple(has_stages)))
        return jax.tree.map(lambda leaf: leaf[None], out), jax.tree.map(lambda _: True, out)

    return one
