"""The one place a parameter is declared: shape, logical axes, initialiser. Always float32, the master copy."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import axes as logical

AXES_KEY = "axes"
PIECES_KEY = "pieces"
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


def stack(make: Callable[[jax.Array], Module], keys: jax.Array, pieces: int | None = None) -> Module:
    """`len(keys)` modules as one whose parameters have a leading layer dimension, to be run by `jax.lax.scan`.

    `pieces`: the dimension is cut over pipeline stages, if as many pieces for every stage come out even; None: never.
    """
    stacked = jax.vmap(make)(keys)
    if pieces is not None:
        for variable in jax.tree.leaves(nnx.state(stacked, nnx.Param), is_leaf=_is_variable):
            variable.set_metadata(PIECES_KEY, pieces)
    return stacked


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


def specs(module: nnx.Module, stages: int | None = None) -> dict[str, Any]:
    """PartitionSpec for each parameter, in the tree of `pure`, with so many pipeline stages (None: of the mesh in use).

    Stacked layer dimensions are cut over them where `stack` was told so and it comes out even.
    """
    here = logical.stages_in_use() if stages is None else stages

    def of(variable: nnx.Variable) -> PartitionSpec:
        metadata, shape = variable.get_metadata(), variable.get_value().shape
        axes, pieces = metadata[AXES_KEY], metadata.get(PIECES_KEY)
        layers: list[str | None] = [None] * (len(shape) - len(axes))
        if pieces is not None and here > 1 and shape[0] % (here * pieces) == 0:
            layers[0] = "layers"
        return logical.spec((*layers, *axes))

    return _map_variables(module, of)


def shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding for each parameter, in the tree of `pure`."""
    found = specs(module, logical.size(mesh, logical.STAGE))
    return jax.tree.map(lambda one: NamedSharding(mesh, one), found, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _map_variables(module: nnx.Module, of: Callable[[nnx.Variable], Any]) -> dict[str, Any]:
    state = nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=_is_variable))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
