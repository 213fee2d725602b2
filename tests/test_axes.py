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
from moe.config import ConfigError, check
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer, state_shardings
from tests import grid


def test_a_name_that_is_not_in_the_table_raises() -> None:
    with pytest.raises(KeyError, match=r"logical axis 'expert' is not in the table of moe/axes.py: .*batch, embed"):
        axes.spec(("expert", "embed"))


def test_a_mesh_axis_may_cut_one_dimension_only() -> None:
    with pytest.raises(ValueError, match=r"put mesh axis 'tensor' on two dimensions"):
        axes.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match=r"put mesh axis '(fsdp|expert|data)' on two dimensions"):
        axes.spec(("batch", "embed"))


def test_specs_follow_the_table() -> None:
    assert axes.spec(("batch", "position", None)) == PartitionSpec(("data", "fsdp", "expert"), None, None)
    assert axes.spec(("experts", "embed", "expert_mlp")) == PartitionSpec("expert", "fsdp", "tensor")
    assert axes.spec(()) == PartitionSpec()
    batch = ("data", "fsdp", "expert")
    golden = {
        "batch": batch, "position": None, "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor",
        "head_width": None, "mlp": "tensor", "experts": "expert", "expert_mlp": "tensor", "router_experts": None,
        "norm": None, "accumulation": None, "memory_slots": None, "memory_width": ("fsdp", "expert", "tensor"),
        "memory_batch": "data", "memory_slice": ("fsdp", "expert"),
    }  # fmt: skip
    assert golden == axes.TABLE
    assert {name: axes.spec((name,)) for name in golden} == {name: PartitionSpec(to) for name, to in golden.items()}


def test_an_unknown_axis_is_answered_with_every_name_of_the_table() -> None:
    with pytest.raises(KeyError) as caught:
        axes.spec((None, "embd"))
    assert all(name in str(caught.value) for name in axes.TABLE)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_sizes_fill_in_the_data_axis(devices: int) -> None:
    assert MeshConfig().sizes(devices) == (devices, 1, 1, 1)
    assert MeshConfig(fsdp=2, expert=2).sizes(8) == (2, 2, 2, 1)
    assert axes.make_mesh(MeshConfig(), jax.devices()[:devices]).size == devices


def test_sizes_that_do_not_factor_the_devices_are_answered_with_those_that_do() -> None:
    message = r"mesh = \(data=-1, fsdp=3, expert=1, tensor=1\): .* 8 devices here; each axis can be one of 1, 2, 4, 8"
    with pytest.raises(ConfigError, match=message):
        MeshConfig(fsdp=3).sizes(8)
    with pytest.raises(ConfigError, match="8 devices"):
        MeshConfig(data=2).sizes(8)


@pytest.mark.parametrize(
    ("config", "devices", "legal"),
    [
        (MeshConfig(data=4, tensor=4), 8, "1, 2, 4, 8"),
        (MeshConfig(data=1), 8, "1, 2, 4, 8"),  # devices would be left over
        (MeshConfig(fsdp=4), 6, "1, 2, 3, 6"),
        (MeshConfig(fsdp=2), 1, "1"),
    ],
)
def test_a_refused_mesh_names_what_was_asked_and_what_is_legal(config: MeshConfig, devices: int, legal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.sizes(devices)
    asked = f"(data={config.data}, fsdp={config.fsdp}, expert={config.expert}, tensor={config.tensor})"
    assert asked in str(caught.value) and str(caught.value).endswith(f"each axis can be one of {legal}")


@pytest.mark.parametrize("field", ["data", "fsdp", "expert", "tensor"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_size_below_one_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^mesh\.{field} = {value}: must be at least 1$"):
        check(MeshConfig(**{field: value}), "mesh")


def test_a_mesh_has_every_axis_and_neighbours_in_tensor() -> None:
    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor") and mesh.devices.shape == (1, 2, 2, 2)
    assert [device.id for device in mesh.devices[0, 0, 0]] == [device.id for device in jax.devices()[:2]]
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


def test_without_a_mesh_constrain_is_the_identity_and_with_one_it_states_the_table() -> None:
    x = jnp.ones((2, 3))
    assert axes.constrain(x, "batch", None) is x and not axes.mesh_in_use()
    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
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


EXPECTED = {  # of the grid's model; the leading layer dimension is not cut
    "embedding": PartitionSpec("tensor", "fsdp"),
    "final_norm.scale": PartitionSpec(None),
    "stacks.0.0.attention.w_key": PartitionSpec(None, "fsdp", "tensor", None),
    "stacks.0.0.attention.w_out": PartitionSpec(None, "tensor", None, "fsdp"),
    "stacks.0.0.attention.w_query": PartitionSpec(None, "fsdp", "tensor", None),
    "stacks.0.0.attention.w_value": PartitionSpec(None, "fsdp", "tensor", None),
    "stacks.0.0.norm.scale": PartitionSpec(None, None),
    "stacks.0.1.norm.scale": PartitionSpec(None, None),
    "stacks.0.1.moe.router.w_router": PartitionSpec(None, "fsdp", None),
    "stacks.0.1.moe.w_down": PartitionSpec(None, "expert", "tensor", "fsdp"),
    "stacks.0.1.moe.w_gate": PartitionSpec(None, "expert", "fsdp", "tensor"),
    "stacks.0.1.moe.w_up": PartitionSpec(None, "expert", "fsdp", "tensor"),
}


def test_every_parameter_of_the_model_is_cut_as_the_table_says() -> None:
    specs = param.specs(grid.model_config().abstract())
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = {".".join(str(key.key) for key in path): spec for path, spec in leaves}
    assert found == EXPECTED


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 8}, {"fsdp": 8}], ids=str)
def test_parameters_and_moments_really_lie_in_shards(sizes: dict[str, int]) -> None:
    config = RunConfig(batch_size=32, steps=200, mesh=MeshConfig(**({"data": 1} | sizes)), model=grid.model_config())
    mesh, model = axes.make_mesh(config.mesh), config.model.abstract()
    tx = make_optimizer(config, model)
    with jax.set_mesh(mesh):
        state = create_state(config, tx, state_shardings(config, model, tx, mesh))
    whole = dict(mesh.shape)
    gate = state.params["stacks"][0][1]["moe"]["w_gate"]
    shard = cut((8, 32, 16), ("experts", "embed", "expert_mlp"), whole)
    assert {s.data.shape for s in gate.addressable_shards} == {(2, *shard)}
    assert len({str(s.index) for s in gate.addressable_shards}) == 8, "two devices hold the same piece"
    # mu, nu of every parameter lie like the parameter; the rest of the state is whole everywhere.
    shapes = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.params)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    params_twice = jax.tree.leaves(state.params) * 2
    assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(moments, params_twice, strict=True))
    assert shapes[(264, 32)].shard_shape((264, 32)) == (264 // whole["tensor"], 32 // whole["fsdp"])
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.balance, state.step, state.key)))
