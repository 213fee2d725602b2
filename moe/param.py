"""The one place a parameter is declared: shape, logical axes, initialiser. Always float32, the master copy."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import axes as logical

AXES_KEY = "axes"
Module = TypeVar("Module", bound=nnx.Module)


def normal(key: jax.Array, shape: Sequence[int], axes: Sequence[str | None], std: float) -> nnx.Param:
    """A parameter drawn from a normal of standard deviation `std`, truncated at 3 of them."""
    value = std * jax.random.truncated_normal(key, -3.0, 3.0, tuple(shape), jnp.float32)
    return declare(value, axes)


def declare(value: jax.Array, axes: Sequence[str | None]) -> nnx.Param:
    """`value` as a parameter whose dimensions carry `axes`; raises on an axis the table does not know."""
    if value.ndim != len(axes):
        raise ValueError(f"a parameter of shape {value.shape} needs {value.ndim} logical axes, got {tuple(axes)}")
    logical.spec(axes)
    return nnx.Param(value, axes=tuple(axes))  # the keyword is AXES_KEY


def stack(make: Callable[[jax.Array], Module], keys: jax.Array) -> Module:
    """`len(keys)` modules as one whose parameters have a leading layer dimension, to be run by `jax.lax.scan`."""
    return jax.vmap(make)(keys)


def pure(module: nnx.Module) -> dict[str, Any]:
    """The parameters of `module` as a nested dict of arrays: what is trained, saved and loaded."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(module: Module, params: dict[str, Any]) -> Module:
    """A copy of `module` (its values may be abstract) that holds `params`."""
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def logical_axes(module: nnx.Module) -> dict[str, Any]:
    """The logical axes each parameter was declared with, in the tree of `pure`; a stacked layer dimension has none."""
    return _map_variables(module, lambda variable: variable.get_metadata()[AXES_KEY])


def specs(module: nnx.Module) -> dict[str, Any]:
    """PartitionSpec for each parameter, in the tree of `pure`; stacked layer dimensions are not cut."""

    def of(variable: nnx.Variable) -> PartitionSpec:
        axes = variable.get_metadata()[AXES_KEY]
        stacked = variable.get_value().ndim - len(axes)
        return PartitionSpec(*(None,) * stacked, *logical.spec(axes))

    return _map_variables(module, of)


def shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding for each parameter, in the tree of `pure`."""
    return jax.tree.map(
        lambda part: NamedSharding(mesh, part), specs(module), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def _map_variables(module: nnx.Module, of: Callable[[nnx.Variable], Any]) -> dict[str, Any]:
    state = nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
