"""The train state: what is in it, and the refusal of meshes that cannot hold it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding

from moe import axes, param
from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig
from moe.config import ConfigError
from moe.train.run import RunConfig
from moe.train.state import create_state, init_state, make_optimizer, state_shardings
from tests import grid

RULES = (LoadBalanceConfig(), LoadBalanceConfig(name="lagged", accumulation="lagged"), ExpertBiasConfig())


def config(**changes: object) -> RunConfig:
    return dataclasses.replace(RunConfig(batch_size=16, balance=RULES, model=grid.model_config()), **changes)


def test_the_state_holds_every_rule_and_starts_at_zero() -> None:
    run = config()
    state = jax.eval_shape(lambda: init_state(run, make_optimizer(run, run.model.abstract()), jax.random.key(0)))
    assert set(state.balance) == {"load_balance", "lagged", "expert_bias"}
    assert state.balance["expert_bias"]["bias"].shape == state.balance["lagged"]["load"].shape == (2, 8)
    assert state.idle_LE is not None and state.idle_LE.shape == (2, 8) and state.idle_LE.dtype == jnp.int32
    assert state.step.dtype == state.skipped.dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_another_seed_gives_other_parameters_and_the_same_seed_the_same() -> None:
    run = config()
    tx = make_optimizer(run, run.model.abstract())
    first, again, other = (init_state(run, tx, jax.random.key(seed)).params["embedding"] for seed in (0, 0, 1))
    assert (first == again).all() and not (first == other).any()


def test_a_mesh_that_cannot_cut_a_parameter_is_refused_with_its_name() -> None:
    run = config(mesh=MeshConfig(data=1, tensor=8))
    mesh, model = axes.make_mesh(run.mesh), run.model.abstract()
    with pytest.raises(ConfigError, match=r"cannot cut parameter stacks.0.0.attention.w_key of shape \(2, 32, 2, 8\)"):
        state_shardings(run, model, make_optimizer(run, model), mesh)


def test_a_dense_model_has_a_state_too() -> None:
    run = config(balance=(), model=grid.model_config(moe=None, mlp_hidden=16))
    state = jax.eval_shape(lambda: init_state(run, make_optimizer(run, run.model.abstract()), jax.random.key(0)))
    assert state.balance == {} and state.idle_LE is None


CUT = MeshConfig(data=1, fsdp=4, tensor=2, expert=2, expert_tensor=2)


def placed(run: RunConfig, mesh: Mesh) -> tuple[Any, Any]:
    """(state made in place on the mesh, its shardings)."""
    model = run.model.abstract()
    tx = make_optimizer(run, model)
    shardings = state_shardings(run, model, tx, mesh)
    return create_state(run, tx, shardings), shardings


def test_every_leaf_of_the_state_has_a_sharding_and_moments_are_cut_like_their_parameters() -> None:
    run = config(mesh=CUT)
    state, shardings = placed(run, axes.make_mesh(run.mesh))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    expected = param.shardings(run.model.abstract(), axes.make_mesh(run.mesh))
    jax.tree.map(_lies, state.params, expected)
    moments = [part for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part)]
    assert len(moments) == 1
    jax.tree.map(_lies, moments[0].mu, expected)
    jax.tree.map(_lies, moments[0].nu, expected)
    cut = sum(leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(moments[0].mu))
    assert cut == sum("norm" not in jax.tree_util.keystr(path) for path, _ in _leaves(moments[0].mu))
    for part in (state.balance, state.idle_LE, state.step, state.key, state.skipped, moments[0].count):
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(part))


def test_the_first_state_is_the_same_bit_for_bit_on_one_device_and_on_eight() -> None:
    one, _ = placed(config(seed=3), axes.make_mesh(MeshConfig(), jax.devices()[:1]))
    eight, _ = placed(config(seed=3, mesh=CUT), axes.make_mesh(CUT))
    for (path, a), (_, b) in zip(_leaves(one), _leaves(eight), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_a_mesh_that_cannot_cut_a_parameter_is_named_in_the_refusal() -> None:
    run = config(mesh=MeshConfig(data=3, expert=3))
    mesh, model = axes.make_mesh(run.mesh, jax.devices()[:3]), run.model.abstract()
    with pytest.raises(ConfigError) as caught:
        state_shardings(run, model, make_optimizer(run, model), mesh)
    said = str(caught.value)
    assert said.startswith("mesh = {'data_expert': 3}: cannot cut parameter stacks.0.1.moe.")
    assert "of shape (2, 8, " in said and "into (1, 3, 1, 1) pieces" in said and "\n" not in said


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def _lies(leaf: jax.Array, sharding: NamedSharding) -> None:
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(tree)
