"""What a program sends is read from its text: groups in every spelling, loops, pieces that count once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe.axes import MeshConfig, make_mesh
from moe.plan.collectives import axes_name, collectives
from moe.plan.hlo import Array, Program, arrays

MESH = {"a": 2, "b": 4, "c": 1}
"""Eight devices: places 0..3 have a = 0."""


def one(instruction: str, mesh: dict[str, int] | None = None) -> list:
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  {instruction}\n}}\n"
    return collectives(Program(text), MESH if mesh is None else mesh)


@pytest.mark.parametrize(
    ("groups", "axes", "n"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", {"b"}, 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", {"a"}, 2),
        ("{}", {"a", "b"}, 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", {"b"}, 2),
        ("[2,4]<=[8]", {"b"}, 4),
        ("[4,2]<=[2,4]T(1,0)", {"a"}, 2),
        ("[1,8]<=[8]", {"a", "b"}, 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", {"b"}, 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", {"a"}, 2),
        ("mesh['x'=8] {'x':(1)2}", {"a"}, 2),
        ("mesh['x'=8] {'x':(2)4}", {"b"}, 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", {"a"}, 2),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", {"b"}, 4),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", {"b"}, 2),
        ("mesh['x'=4,'y'=2] {'x','y'}", {"a", "b"}, 8),
    ],
)
def test_groups_of_devices_in_every_spelling(groups: str, axes: set[str], n: int) -> None:
    (found,) = one(f"ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert found.axes == axes and found.group == n
    assert found.bytes == 2 * 32 * (n - 1) // n


def test_an_unknown_spelling_is_an_error() -> None:
    with pytest.raises(ValueError, match="form that is not known"):
        one("ROOT %r = f32[8]{0} all-reduce(%x), replica_groups=round_robin, to_apply=%add")


@pytest.mark.parametrize(
    ("instruction", "kind", "array", "sent"),
    [
        ("f32[32]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", "f32[32]", 96),
        ("f32[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", "f32[2]", 24),
        ("bf16[8,2]{1,0:T(8,128)(2,1)} all-to-all(%x), replica_groups=[2,4]<=[8]", "all-to-all", "bf16[8,2]", 24),
        ("f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}", "collective-permute", "f32[8]", 32),
        (
            "(f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-gather", "f32[32]", 96,
        ),
        (
            "((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), replica_groups=[2,4]<=[8], to_apply=%add",
            "reduce-scatter", "f32[2]", 24,
        ),
        (
            "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,4}}",
            "collective-permute", "f32[8]", 32,
        ),
    ],
)  # fmt: skip
def test_bytes_are_those_a_device_sends_around_a_ring(instruction: str, kind: str, array: str, sent: int) -> None:
    (found,) = one(f"ROOT %r = {instruction}")
    assert (found.kind, str(found.array), found.bytes) == (kind, array, sent)


def test_a_combined_collective_counts_each_of_its_arrays_and_a_done_nothing() -> None:
    found = one(
        "%s = (f32[8]{0}, s32[2]{0}) all-reduce-start(%x, %x), replica_groups={}, to_apply=%add\n"
        "  ROOT %d = (f32[8]{0}, s32[2]{0}) all-reduce-done(%s)"
    )
    assert [str(each.array) for each in found] == ["f32[8]", "s32[2]"]


LOOP = """
%fused (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="7"}
}

%later (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %h = f32[32]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="7"}
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %y = f32[8]{0} get-tuple-element(%t), index=1
  %start = f32[32]{0} fusion(%y), kind=kCustom, calls=%fused
  %done = f32[32]{0} fusion(%y), kind=kCustom, calls=%later
  %s = f32[8]{0} all-reduce(%y), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %init = (s32[], f32[8]{0}) tuple(%x)
  ROOT %w = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
}
"""


def test_a_loop_multiplies_and_the_pieces_of_a_spread_collective_count_once() -> None:
    program = Program(LOOP)
    found = collectives(program, MESH)
    assert not program.unknown_loops
    assert sorted((each.kind, each.times, each.sent) for each in found) == [
        ("all-gather", 6, 6 * 96),
        ("all-reduce", 6, 6 * 32),
    ]


def test_a_loop_whose_length_is_not_written_is_named_and_counts_once() -> None:
    program = Program(LOOP.replace("constant(6)", "parameter(1)"))
    assert {each.times for each in collectives(program, MESH)} == {1}
    assert program.unknown_loops == ["w"]


def test_a_reduction_of_which_each_device_keeps_its_slice_is_a_reduce_scatter() -> None:
    text = LOOP.replace("%fused", "%all-reduce-scatter.1").replace("all-gather(%p)", "all-reduce(%p)")
    (found,) = (each for each in collectives(Program(text), MESH) if each.group == 4)
    assert (found.kind, found.bytes) == ("reduce-scatter", 128 * 3 // 4)


def test_axes_are_named_as_a_person_names_them() -> None:
    mesh = dict(make_mesh(MeshConfig(data=2, fsdp=4, expert=2)).shape)
    assert {name: size for name, size in mesh.items() if size > 1} == {"data": 2, "fsdp": 2, "fsdp_expert": 2}
    for axes, name in [
        ({"fsdp_expert"}, "expert"),
        ({"fsdp", "fsdp_expert"}, "fsdp"),
        ({"data", "fsdp", "fsdp_expert"}, "data+fsdp"),
        ({"data", "fsdp"}, "expert_data"),
        ({"data", "fsdp_expert"}, "data+fsdp_expert"),
        ({"data", "tensor"}, "data"),  # tensor is of size 1
        ({"tensor"}, "none"),
    ]:
        assert axes_name(axes, mesh) == name
    whole = dict(make_mesh(MeshConfig(fsdp=8, expert=8)).shape)
    assert axes_name({"fsdp_expert"}, whole) == "fsdp=expert"


def test_a_compiled_program_sends_what_was_written() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = PartitionSpec(("data", "fsdp"), "tensor")

    def local(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            return total + jax.lax.psum(x * total, "tensor"), None

        total, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.all_to_all(total, "fsdp", split_axis=0, concat_axis=0, tiled=True)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    program = Program(run.lower(jnp.ones((16, 8), np.float32)).compile().as_text())
    shape = dict(mesh.shape)
    found = {(each.kind, axes_name(each.axes, shape), each.group, each.times) for each in collectives(program, shape)}
    assert found == {("all-reduce", "tensor", 2, 5), ("all-to-all", "fsdp", 2, 1)}


def test_sizes_of_arrays() -> None:
    assert arrays("(f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/pred[], bf16[5]{0}, s4[3]{0}, f8e4m3fn[7]{0})") == [
        Array("f32", (2, 3)),
        Array("pred", ()),
        Array("bf16", (5,)),
        Array("s4", (3,)),
        Array("f8e4m3fn", (7,)),
    ]
    assert [each.bytes for each in arrays("(f32[2,3], pred[], bf16[5], s4[3], f8e4m3fn[7])")] == [24, 1, 10, 2, 7]
