"""The real train step compiled ahead of time, for devices that need not be here: what it takes, without running it.

Nothing is allocated: state and batch are shapes with shardings, the same that a run would have.
"""

import dataclasses
import resource
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe import axes
from moe.axes import make_mesh
from moe.config import ConfigError
from moe.plan.device_order import in_mesh_order
from moe.plan.hlo import Program
from moe.train.run import RunConfig
from moe.train.state import TrainState, init_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step

ARRAYS = ("tokens", "segment_ids", "positions", "domains")
"""What a batch of the loader holds, each int32 [A, B, S+1]."""
_ANYWAY = {"xla_tpu_no_crash_on_oom": "true"}
"""Makes the TPU compiler finish a program that is too large, so that one can see what in it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    state: int
    """Parameters, optimizer and the rest of the train state; the step's results take their place."""
    batch: int
    outputs: int
    """Results that take no argument's place: metrics, and whatever state could not be donated."""
    temporaries: int
    """Activations, gradients, gathered weights: the most that exist at once."""
    code: int
    peak: int
    """State and temporaries at the worst moment: temporaries that never exist together share their place."""
    host: int
    """Host memory that the program uses for offloaded arrays."""

    @property
    def total(self) -> int:
        """On the device, at the worst moment."""
        return self.state + self.batch + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled train step and what it took to compile it."""

    executable: Any
    """`jax.stages.Compiled`."""
    program: Program
    text: str
    mesh: Mesh
    state: TrainState
    """Shapes."""
    shardings: TrainState
    memory: Memory
    refused: str
    """What the compiler said when it found the program too large for the device; empty if it did not."""
    lower_s: float
    compile_s: float
    cpu_s: float
    """Processor seconds of both."""
    host_bytes: int
    """The most memory this process ever had."""

    @property
    def flops(self) -> float | None:
        """Of one device, as the compiler counts them: the body of a loop once. None where it does not."""
        counted = self.executable.cost_analysis()
        return counted.get("flops") if counted else None


def abstract_step(
    config: RunConfig, devices: Sequence[jax.Device]
) -> tuple[Any, TrainState, dict[str, Any], TrainState]:
    """(jitted step, abstract state, abstract batch, shardings of the state) over these devices."""
    mesh = make_mesh(config.mesh, in_mesh_order(config.mesh, devices))
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    shardings = state_shardings(config, model, tx, mesh)
    state = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
    state = jax.tree.map(lambda leaf, cut: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut), state, shardings)
    shape = (config.accumulation, config.microbatch_size, config.data.seq_len + 1)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=axes.sharding(mesh, BATCH_LOGICAL)) for name in ARRAYS
    }
    return jit_step(config, model, tx, mesh, shardings), state, batch, shardings


def compile_step(config: RunConfig, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the train step of `config` for `devices`; twice, if it is too large for a TPU's memory."""
    begin, cpu = time.perf_counter(), _cpu_s()
    step, state, batch, shardings = abstract_step(config, devices)
    mesh = jax.tree.leaves(shardings)[0].mesh
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        lowered_at = time.perf_counter()
        executable, refused = _compile(lowered, devices[0].platform)
    text = executable.as_text()
    return Compiled(
        executable=executable,
        program=Program(text),
        text=text,
        mesh=mesh,
        state=state,
        shardings=shardings,
        memory=_memory(executable, batch),
        refused=refused,
        lower_s=lowered_at - begin,
        compile_s=time.perf_counter() - lowered_at,
        cpu_s=_cpu_s() - cpu,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """(executable, what the compiler said against it)."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if platform != "tpu" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        try:
            return lowered.compile(compiler_options=_ANYWAY), str(error)
        except jax.errors.JaxRuntimeError:  # so much too large that it cannot even be finished
            raise ConfigError(f"mesh: the step does not fit, by far: {str(error).splitlines()[0]}") from error


def _memory(executable: Any, batch: dict[str, Any]) -> Memory:
    found = executable.memory_analysis()
    of_batch = sum(shard_bytes(leaf) for leaf in batch.values())
    return Memory(
        state=found.argument_size_in_bytes - of_batch,
        batch=of_batch,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=getattr(found, "peak_memory_in_bytes", 0),
        host=found.host_argument_size_in_bytes + found.host_output_size_in_bytes
        - found.host_alias_size_in_bytes + found.host_temp_size_in_bytes,
    )  # fmt: skip


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract array."""
    size = leaf.dtype.itemsize
    for n in leaf.sharding.shard_shape(leaf.shape):
        size *= n
    return size


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
