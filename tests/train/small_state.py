"""A small state with leaves of every kind that a run has, cut over two devices or more."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.train.state import TrainState


def make(step: int = 0) -> TrainState:
    key = jax.random.fold_in(jax.random.key(5), step)
    return TrainState(
        params={"w": jax.random.normal(key, (64, 33)), "scale": jax.random.normal(key, (8,)).astype(jnp.bfloat16)},
        balance={"bias": {"bias_LE": jax.random.normal(key, (2, 4))}},
        opt_state=({"w": jax.random.normal(key, (64, 33)) ** 2}, jnp.int32(step)),
        step=jnp.int32(step),
        key=jax.random.key(7),
        skipped=jnp.int32(0),
        skipped_in_row=jnp.int32(0),
        idle_LE=jnp.arange(8).reshape(2, 4) + step,
    )


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shardings(mesh: Mesh) -> TrainState:
    """The matrices are cut over the mesh, the rest is replicated."""

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("data") if leaf.shape == (64, 33) else PartitionSpec())

    found: TrainState = jax.tree.map(one, jax.eval_shape(make))
    return found


def placed(step: int, where: TrainState) -> TrainState:
    state: TrainState = jax.jit(lambda: make(step), out_shardings=where)()
    return state
