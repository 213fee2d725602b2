"""The step that is compiled ahead of time is the step that runs; what it holds is what the layout says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import debug
from launch.cli import override
from moe.axes import FSDP
from moe.plan.collectives import axes_name, collectives
from moe.plan.expected import gathered, largest, misplaced, replicated, unexpected
from moe.plan.hlo import Program
from moe.train.aot import Compiled, compile_step, shard_bytes
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer
from moe.train.step import BATCH_LOGICAL
from tests.grid import axes

DEPTH = 8
SHAPE = (
    "--model.dense-layers 0 --model.mlp-hidden 0 --model.attention.head-width 6 --accumulation 1 --batch-size 8"
    " --data.seq-len 16 --mesh.fsdp 2 --mesh.tensor 2 --mesh.expert 2"
)


def config(num_layers: int) -> RunConfig:
    words = f"{SHAPE} --model.num-layers {num_layers}".split()
    return override(debug.get_config(), words, "test")


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_step(config(DEPTH), jax.devices())


def test_the_step_runs_on_the_state_and_batch_of_a_run(compiled: Compiled) -> None:
    mesh = compiled.mesh
    tx = make_optimizer(config(DEPTH), config(DEPTH).model.abstract())
    state = create_state(config(DEPTH), tx, compiled.shardings)
    values = np.ones((1, 8, 17), np.int32)
    batch = {
        name: jax.device_put(values, axes.sharding(mesh, BATCH_LOGICAL))
        for name in ("tokens", "segment_ids", "positions", "domains")
    }
    state, metrics = compiled.executable(state, batch)
    assert int(state.step) == 1 and np.isfinite(metrics["loss"])


def test_memory_is_counted_by_kind(compiled: Compiled) -> None:
    memory = compiled.memory
    state = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(compiled.state) if leaf.dtype != compiled.state.key.dtype)
    assert abs(memory.state - state) < 256  # the random key, scalars rounded up, leaves that nothing reads
    assert memory.batch == 4 * (8 // 4) * 17 * 4  # four int32 arrays, cut over data 2 x fsdp 2
    assert 0 < memory.outputs < 4096  # metrics: the state takes its arguments' place
    assert memory.temporaries > 0 and not memory.host
    assert memory.total == memory.state + memory.batch + memory.outputs + memory.temporaries + memory.code


def test_parameters_and_moments_lie_as_the_table_says(compiled: Compiled) -> None:
    assert misplaced(compiled.executable, compiled.state, compiled.shardings) == []
    # Only norms and the state of balance rules are whole on every device.
    whole = replicated(compiled.state, compiled.shardings, small=0)
    assert all("scale" in name or "[]" in name or "balance" in name or "idle" in name for name in whole), whole
    assert replicated(compiled.state, compiled.shardings) == []


def test_a_parameter_in_another_place_is_seen(compiled: Compiled) -> None:
    whole = NamedSharding(compiled.mesh, PartitionSpec())
    wanted = dataclasses.replace(compiled.shardings, params=jax.tree.map(lambda _: whole, compiled.shardings.params))
    found = misplaced(compiled.executable, compiled.state, wanted)
    assert any(line.startswith("argument .params['embedding']") for line in found)
    assert any(line.startswith("result .params['embedding']") for line in found)
    assert any("['embedding']" in line for line in replicated(compiled.state, wanted, small=1024))


def test_no_layer_stack_is_gathered_whole(compiled: Compiled) -> None:
    assert gathered(compiled.program, compiled.state, compiled.shardings, small=1024) == []


def test_a_gathered_stack_is_seen(compiled: Compiled) -> None:
    mesh = compiled.mesh
    cut, whole = NamedSharding(mesh, PartitionSpec(None, FSDP)), NamedSharding(mesh, PartitionSpec())
    leaf = {"stacks": jax.ShapeDtypeStruct((3, 32, 48), jnp.float32, sharding=cut)}

    def program(x: Any) -> Program:
        def body(total: Any, w: Any) -> Any:
            return total + jnp.sin(w).sum(), None

        def run(w: Any) -> Any:
            return jax.lax.scan(body, jnp.float32(0), jax.lax.with_sharding_constraint(w, x))[0]

        return Program(jax.jit(run).lower(leaf["stacks"]).compile().as_text())

    assert gathered(program(cut), leaf, cut, small=0) == []
    (found, *_) = gathered(program(whole), leaf, cut, small=0)
    assert found.startswith("f32[3,32,48]")


def test_the_collectives_are_those_of_the_layout(compiled: Compiled) -> None:
    mesh = dict(compiled.mesh.shape)
    sent = collectives(compiled.program, mesh)
    assert not compiled.program.unknown_loops
    assert unexpected(sent, mesh) == []
    kinds = {(one.kind, axes_name(one.axes, mesh)) for one in sent if one.group > 1}
    assert ("all-gather", "fsdp") in kinds  # weights
    assert ("all-gather", "tensor=expert") in kinds or ("all-gather", "tensor") in kinds  # positions and rows
    # Once for every layer, forward and backward.
    assert sum(one.times for one in sent if one.kind == "all-gather" and "w_gate" not in one.origin) >= 2 * DEPTH


def test_a_collective_that_the_layout_does_not_explain_is_seen(compiled: Compiled) -> None:
    mesh = dict(compiled.mesh.shape)
    sent = collectives(compiled.program, mesh)
    odd = sent[0]._replace(kind="all-to-all", axes=frozenset({"fsdp"}), bytes=1 << 20, times=1)
    assert unexpected([*sent, odd], mesh) == [odd]
    assert unexpected([odd._replace(axes=frozenset({"tensor_expert"}))], mesh) == []
    assert unexpected([odd._replace(kind="all-gather", axes=frozenset({"data"}))], mesh) != []


def test_the_largest_arrays_are_named_with_their_origin(compiled: Compiled) -> None:
    found = largest(compiled.program, 3, small=0)
    sizes = [array.bytes for array, _, _ in found]
    assert len(found) == 3 and sizes == sorted(sizes, reverse=True) and "jit(step)" in found[0][2]


def test_program_and_compile_time_are_flat_in_depth(compiled: Compiled) -> None:
    few, many = compiled, compile_step(config(94), jax.devices())
    lengths = [sum(len(body) for body in one.program.computations.values()) for one in (few, many)]
    assert lengths[1] < 1.1 * lengths[0] and len(many.text) < 1.1 * len(few.text)
    assert many.cpu_s < 1.5 * few.cpu_s


def test_what_is_too_large_for_a_tpu_is_compiled_all_the_same() -> None:
    from launch.compile import quietly
    from moe.plan import topology
    from moe.train import aot

    quietly()
    mesh = jax.sharding.Mesh(topology.devices(topology.parse("v5e:1x1")), ("x",))
    cut = NamedSharding(mesh, PartitionSpec())
    for size, large in ((256, False), (60_000, True)):
        lowered = jax.jit(jnp.sin, out_shardings=cut).lower(
            jax.ShapeDtypeStruct((size, size), np.float32, sharding=cut)
        )
        executable, said = aot._compile(lowered, "tpu")
        assert (
            1 <= executable.memory_analysis().argument_size_in_bytes / (4 * size * size) < 1.01
        )  # tiles are filled up
        assert ("exceeds available HBM (15.75G)" in said) == large
