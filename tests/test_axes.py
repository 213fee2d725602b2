"""The table of logical axes, meshes, and that what XLA compiles lies where the table says.

Guards against: an axis mapped twice (maxtext #4179), a parameter silently replicated (Marin #6304), optimizer states
not cut (DeepSpeed #7156), ranks that hold the same experts (DeepSpeed #6589).
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe import axes, param
from moe.axes import MeshConfig
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer, state_shardings
from tests import grid


def test_a_name_that_is_not_in_the_table_raises() -> None:
    with pytest.raises(KeyError, match=r"logical axis 'expert' is not in the table of moe/axes.py: .*batch, embed"):
        axes.spec(("expert", "embed"))


def test_a_mesh_axis_may_cut_one_dimension_only() -> None:
    with pytest.raises(ValueError, match=r"put mesh axis 'tensor' on two dimensions"):
        axes.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match=r"put mesh axis 'fsdp' on two dimensions"):
        axes.spec(("batch", "embed"))
    with pytest.raises(ValueError, match=r"put mesh axis 'context_expert' on two dimensions"):
        axes.spec(("experts", "embed"))


def grid_axis(name: str) -> tuple[str, ...]:
    return (name, f"{name}_expert", f"{name}_expert_tensor")


def test_specs_follow_the_table() -> None:
    data, fsdp, context, tensor = (grid_axis(name) for name in ("data", "fsdp", "context", "tensor"))
    experts = ("data_expert", "fsdp_expert", "context_expert", "tensor_expert")
    slices = tuple(f"{name}_tensor" for name in experts)
    golden = {
        "batch": data + fsdp, "position": context, "stream": context + tensor, "embed": fsdp + context,
        "vocab": tensor, "heads": tensor, "kv_heads": tensor, "head_width": None, "latent": None, "mlp": tensor,
        "layers": "stage",
        "experts": experts, "expert_embed": ("fsdp", "context", "tensor"), "expert_heads": slices,
        "expert_kv_heads": slices, "expert_mlp": slices, "router_experts": None, "norm": None, "accumulation": None,
        "memory_slots": None, "memory_width": fsdp + context + tensor, "memory_batch": data, "memory_position": None,
        "memory_slice": fsdp + context,
    }  # fmt: skip
    assert golden == axes.TABLE
    assert {name: axes.spec((name,)) for name in golden} == {name: PartitionSpec(to) for name, to in golden.items()}
    assert axes.spec(("batch", "position", None)) == PartitionSpec(data + fsdp, context, None)
    assert axes.spec(()) == PartitionSpec()


def test_an_unknown_axis_is_answered_with_every_name_of_the_table() -> None:
    with pytest.raises(KeyError) as caught:
        axes.spec((None, "embd"))
    assert all(name in str(caught.value) for name in axes.TABLE)


def test_a_mesh_has_every_axis_and_neighbours_in_tensor() -> None:
    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    assert mesh.axis_names == ("stage", *(grid_axis("data") + grid_axis("fsdp") + grid_axis("context")), *axes.TENSOR)
    assert axes.used(mesh) == {"fsdp": 2, "context": 2, "tensor": 2}
    assert [device.id for device in mesh.devices.reshape(4, 2)[0]] == [device.id for device in jax.devices()[:2]]
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


def test_without_a_mesh_constrain_is_the_identity_and_with_one_it_states_the_table() -> None:
    x = jnp.ones((2, 3))
    assert axes.constrain(x, "batch", None) is x and not axes.mesh_in_use()
    mesh = axes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, expert=4))
    with jax.set_mesh(mesh):
        assert axes.mesh_in_use()
        laid = jax.jit(lambda x: axes.constrain(x, "batch", "vocab"))(jnp.ones((8, 8)))
    assert laid.sharding.is_equivalent_to(axes.sharding(mesh, ("batch", "vocab")), 2)
    assert {shard.data.shape for shard in laid.addressable_shards} == {(2, 4)}


def cut(shape: tuple[int, ...], axes_of: tuple[str | None, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape of a shard, from the table and the sizes alone."""
    out = []
    for length, axis in zip(shape, axes_of, strict=True):
        names = axes.TABLE[axis] if axis else None
        names = (names,) if isinstance(names, str) else names or ()
        for name in names:
            length //= sizes[name]
        out.append(length)
    return tuple(out)


D, TENSOR = axes.FSDP + axes.CONTEXT, axes.TENSOR
E, E_D, E_F = axes.EXPERT, ("fsdp", "context", "tensor"), axes.EXPERT_TENSOR
EXPECTED = {  # of the grid's model; the leading layer dimension is not cut
    "embedding": PartitionSpec(TENSOR, D),
    "final_norm.scale": PartitionSpec(None),
    "stacks.0.0.attention.w_key": PartitionSpec(None, D, TENSOR, None),
    "stacks.0.0.attention.w_out": PartitionSpec(None, TENSOR, None, D),
    "stacks.0.0.attention.w_query": PartitionSpec(None, D, TENSOR, None),
    "stacks.0.0.attention.w_value": PartitionSpec(None, D, TENSOR, None),
    "stacks.0.0.norm.scale": PartitionSpec(None, None),
    "stacks.0.1.norm.scale": PartitionSpec(None, None),
    "stacks.0.1.moe.router.w_router": PartitionSpec(None, D, None),
    "stacks.0.1.moe.w_down": PartitionSpec(None, E, E_F, E_D),
    "stacks.0.1.moe.w_gate": PartitionSpec(None, E, E_D, E_F),
    "stacks.0.1.moe.w_up": PartitionSpec(None, E, E_D, E_F),
}


def test_every_parameter_of_the_model_is_cut_as_the_table_says() -> None:
    specs = param.specs(grid.model_config().abstract())
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = {".".join(str(key.key) for key in path): spec for path, spec in leaves}
    assert found == EXPECTED


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "context": 2, "tensor": 2, "expert": 2}, {"fsdp": 8, "expert": 8}, {"fsdp": 8}], ids=str
)
def test_parameters_and_moments_really_lie_in_shards(sizes: dict[str, int]) -> None:
    config = RunConfig(batch_size=32, steps=200, mesh=MeshConfig(**({"data": 1} | sizes)), model=grid.model_config())
    mesh, model = axes.make_mesh(config.mesh), config.model.abstract()
    tx = make_optimizer(config, model)
    with jax.set_mesh(mesh):
        state = create_state(config, tx, state_shardings(config, model, tx, mesh))
    whole = dict(mesh.shape)
    gate = state.params["stacks"][0][1]["moe"]["w_gate"]
    shard = cut((8, 32, 16), ("experts", "expert_embed", "expert_mlp"), whole)
    assert {s.data.shape for s in gate.addressable_shards} == {(2, *shard)}
    assert len({str(s.index) for s in gate.addressable_shards}) == 8, "two devices hold the same piece"
    # mu, nu of every parameter lie like the parameter; the rest of the state is whole everywhere.
    shapes = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.params)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    params_twice = jax.tree.leaves(state.params) * 2
    assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(moments, params_twice, strict=True))
    assert shapes[(264, 32)].shard_shape((264, 32)) == cut((264, 32), ("vocab", "embed"), whole)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.balance, state.step, state.key)))
