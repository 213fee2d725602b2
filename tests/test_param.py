"""Parameters: declared once, float32, with axes that exist; modules as trees of arrays and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from configs import debug
from moe import axes, param
from moe.axes import CONTEXT, FSDP, TENSOR, MeshConfig


class Pair(nnx.Module):
    def __init__(self, key: jax.Array):
        self.w = param.normal(key, (6, 4), ("embed", "mlp"), 0.5)
        self.scale = param.declare(jnp.ones(4), ("norm",))


def test_axes_must_fit_the_shape_and_exist() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 logical axes, got \('embed',\)"):
        param.declare(jnp.ones((2, 3)), ("embed",))
    with pytest.raises(KeyError, match=r"logical axis 'embde'"):
        param.declare(jnp.ones((2, 3)), ("embde", None))


def test_a_clash_of_mesh_axes_is_found_when_the_parameter_is_declared() -> None:
    with pytest.raises(ValueError, match="'tensor' on two dimensions"):
        param.declare(jnp.ones((2, 3)), ("heads", "mlp"))


def test_initial_values_are_float32_truncated_at_three_deviations() -> None:
    value = param.normal(jax.random.key(0), (400, 400), ("embed", "mlp"), 0.5).get_value()
    assert value.dtype == jnp.float32
    assert float(jnp.abs(value).max()) <= 1.5
    np.testing.assert_allclose(value.std(), 0.5 * 0.9866, rtol=5e-3)  # of a normal cut at 3
    np.testing.assert_allclose(value.mean(), 0.0, atol=5e-3)


def test_bind_and_pure_are_inverse_and_leave_the_module_alone() -> None:
    module = Pair(jax.random.key(0))
    before = jax.device_get(param.pure(module))
    doubled = jax.tree.map(lambda w: 2 * w, param.pure(module))
    bound = param.bind(module, doubled)
    np.testing.assert_array_equal(bound.w[...], 2 * before["w"])
    np.testing.assert_array_equal(module.w[...], before["w"])
    assert jax.tree.structure(param.pure(bound)) == jax.tree.structure(before)


def test_an_abstract_module_can_be_bound() -> None:
    abstract = jax.eval_shape(lambda: Pair(jax.random.key(0)))
    params = param.pure(Pair(jax.random.key(1)))
    np.testing.assert_array_equal(param.bind(abstract, params).w[...], params["w"])


def test_stacked_modules_have_a_layer_dimension_that_is_not_cut() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = param.stack(Pair, keys)
    assert stacked.w[...].shape == (3, 6, 4)
    for layer in range(3):
        np.testing.assert_array_equal(stacked.w[...][layer], Pair(keys[layer]).w[...])
    w = (FSDP + CONTEXT, TENSOR)
    assert param.specs(stacked) == {"w": PartitionSpec(None, *w), "scale": PartitionSpec(None, None)}
    assert param.specs(Pair(keys[0])) == {"w": PartitionSpec(*w), "scale": PartitionSpec(None)}


UNTIED = dataclasses.replace(debug.get_config().model, tie_embeddings=False)  # d | m m, with a shared expert
MESH = MeshConfig(data=1, fsdp=4, tensor=2, expert=2, expert_tensor=2)
# V = 264, D = 32, N = 4, M = 2, H = 8, E = 8, F = 32 (experts, shared) or 64 (dense). Shards by hand: D is cut by
# 4, of experts by 2.
ATTENTION = {"w_query": (8, 2, 8), "w_key": (8, 1, 8), "w_value": (8, 1, 8), "w_out": (2, 8, 8)}
EVERY_LAYER = {f"0.attention.{name}": shape for name, shape in ATTENTION.items()}
EVERY_LAYER |= {"0.norm.scale": (32,), "1.norm.scale": (32,)}
DENSE_LAYER = {"1.mlp.w_gate": (8, 32), "1.mlp.w_up": (8, 32), "1.mlp.w_down": (32, 8)}
MOE_LAYER = {"w_gate": (4, 16, 16), "w_up": (4, 16, 16), "w_down": (4, 16, 16), "router.w_router": (8, 8)}
MOE_LAYER |= {"shared.w_gate": (8, 16), "shared.w_up": (8, 16), "shared.w_down": (16, 8)}
SHARDS = {"embedding": (132, 8), "head": (8, 132), "final_norm.scale": (32,)}
SHARDS |= {f"stacks.0.{name}": (1, *shape) for name, shape in (EVERY_LAYER | DENSE_LAYER).items()}
SHARDS |= {f"stacks.1.{name}": (2, *shape) for name, shape in EVERY_LAYER.items()}
SHARDS |= {f"stacks.1.1.moe.{name}": (2, *shape) for name, shape in MOE_LAYER.items()}


def test_shards_on_eight_devices_have_the_shapes_of_the_table_and_hold_the_same_numbers() -> None:
    mesh, model = axes.make_mesh(MESH), UNTIED.abstract()

    def make(key: jax.Array) -> dict:
        return param.pure(UNTIED.build(key))

    params = jax.jit(make, out_shardings=param.shardings(model, mesh))(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    assert {name: {shard.data.shape for shard in leaf.addressable_shards} for name, leaf in found.items()} == {
        name: {shape} for name, shape in SHARDS.items()
    }
    assert len(found) == len(jax.tree.leaves(nnx.state(model)))  # there is no state that is not a parameter
    # Experts lie on the devices of their own part of the expert axis, in order.
    for shard in found["stacks.1.1.moe.w_gate"].addressable_shards:
        where = dict(zip(axes.MESH_AXES, (int(i[0]) for i in np.nonzero(mesh.devices == shard.device)), strict=True))
        fsdp, expert, tensor = (where[name] for name in ("fsdp", "fsdp_expert", "tensor_expert_tensor"))
        assert tuple(index.start or 0 for index in shard.index) == (0, 4 * expert, 16 * fsdp, 16 * tensor)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(params), jax.device_get(jax.jit(make)(jax.random.key(0)))
    )
